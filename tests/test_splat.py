import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scenes

from gsdd_jax.gaussians import to_pixels
from kernels import DEFAULT_CUTOFF, _splat_xla, splat
from kernels.spec import SplatSpec

OPERANDS = ("centers", "conics", "colors")
HEIGHT, WIDTH = 19, 26
# Two programs may sum in different orders; the same program gives the same bits.
REORDERED = 2e-6

draw = functools.partial(splat, height=HEIGHT, width=WIDTH)


def operands(n=3, m=5, channels=3, seed=0):
    return to_pixels(scenes.random(n=n, m=m, size=(HEIGHT, WIDTH), channels=channels, seed=seed))


def weights(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def loss(centers, conics, colors, v, **settings):
    """A loss that is not linear in the images, so that their cotangent depends on them."""
    return jnp.sum(jnp.tanh(draw(centers, conics, colors, **settings)) * v)


# Shared by the tests, so that its operands' usual shape compiles once.
value_and_gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))


def assert_close(found, wanted):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=REORDERED * max(1.0, float(jnp.max(jnp.abs(b)))))


@pytest.fixture
def chunk_pairs(monkeypatch):
    """Sets the size of a chunk; what was traced with another size is forgotten, before and after."""
    cache = importlib.import_module("kernels.splat")._operator

    def set_to(pairs):
        monkeypatch.setattr(_splat_xla, "CHUNK_PAIRS", pairs)
        cache.cache_clear()

    yield set_to
    cache.cache_clear()


def test_nested_vmap_over_other_axes_equals_a_loop():
    inner = [jax.tree.map(lambda *x: jnp.stack(x, 1), *[operands(seed=9 * i + j) for j in range(2)]) for i in range(3)]
    stacked = tuple(jax.tree.map(lambda *x: jnp.stack(x), *inner))
    v = weights(3, 2, 3, HEIGHT, WIDTH, 3)
    one = jax.grad(loss, argnums=(0, 1, 2))
    nested = jax.jit(jax.vmap(jax.vmap(one, in_axes=(1, 1, 1, 0))))(*stacked, v)
    for i in range(3):
        for j in range(2):
            _, alone = value_and_gradient(*(x[i, :, j] for x in stacked), v[i, j])
            assert_close(jax.tree.map(lambda x, i=i, j=j: x[i, j], nested), alone)


def test_a_shared_operand_gets_the_sum_of_the_gradients():
    shared = OPERANDS.index("conics")
    batch = [operands(seed=seed) for seed in range(3)]
    inputs = [batch[0][i] if i == shared else jnp.stack([one[i] for one in batch]) for i in range(3)]
    v = weights(3, 3, HEIGHT, WIDTH, 3)
    axes = tuple(None if i == shared else 0 for i in range(3))

    def total(*inputs):
        return jnp.sum(jax.vmap(loss, in_axes=(*axes, 0))(*inputs, v))

    value, gradient = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))(*inputs)
    alone = [value_and_gradient(*(x if i == shared else x[k] for i, x in enumerate(inputs)), v[k]) for k in range(3)]
    assert_close(value, sum(one[0] for one in alone))
    for i in range(3):
        parts = [one[1][i] for one in alone]
        assert_close(gradient[i], sum(parts) if i == shared else jnp.stack(parts))


def test_vmap_of_empty_images_and_empty_lists():
    for n, m in ((0, 3), (2, 0)):
        inputs = [jnp.zeros((4, n, m, last)) for last in (2, 3, 3)]
        images = jax.vmap(draw)(*inputs)
        assert images.shape == (4, n, HEIGHT, WIDTH, 3) and not np.any(images)
        gradient = jax.grad(lambda *x: jnp.sum(jax.vmap(draw)(*x)), argnums=(0, 1, 2))(*inputs)
        assert [x.shape for x in gradient] == [x.shape for x in inputs]


def test_checkpoint_inside_scan_equals_an_unrolled_loop():
    inputs, v = operands(), weights(3, HEIGHT, WIDTH, 3)

    def step(shift, _):
        return shift + 0.01 * loss(inputs.centers + shift, *inputs[1:], v), None

    def scanned(shift):
        return jax.lax.scan(jax.checkpoint(step), shift, None, length=2)[0]

    def unrolled(shift):
        for _ in range(2):
            shift, _ = step(shift, None)
        return shift

    start = jnp.float32(0.2)
    found = jax.jit(jax.value_and_grad(scanned))(start)
    wanted = jax.jit(jax.value_and_grad(unrolled))(start)
    assert abs(wanted[1] - 1) > 1e-3
    np.testing.assert_allclose(found, wanted, rtol=1e-4)


def test_two_runs_give_the_same_bits():
    inputs, v = operands(), weights(3, HEIGHT, WIDTH, 3)
    first, second = value_and_gradient(*inputs, v), value_and_gradient(*inputs, v)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True))


def test_eager_equals_jit_and_its_second_call_does_not_compile_again(caplog):
    inputs, other, v = operands(), operands(seed=1), weights(3, HEIGHT, WIDTH, 3)
    eager = jax.value_and_grad(loss, argnums=(0, 1, 2))
    assert_close(eager(*inputs, v), value_and_gradient(*inputs, v))
    with jax.log_compiles(), caplog.at_level("WARNING", logger="jax"):
        eager(*other, v)
        assert not [message for message in caplog.messages if message.startswith("Compiling")]
        # The log is the right one: a new shape does compile.
        jnp.sin(v[:1])
        assert [message for message in caplog.messages if message.startswith("Compiling")]


def test_dtypes_are_promoted_to_at_least_float32():
    inputs = operands()
    half = [x.astype(jnp.bfloat16) for x in inputs]
    assert jax.eval_shape(draw, *half).dtype == jnp.float32
    gradient = jax.eval_shape(jax.grad(lambda *x: jnp.sum(draw(*x)), argnums=(0, 1, 2)), *half)
    assert {x.dtype for x in gradient} == {jnp.dtype(jnp.bfloat16)}
    with jax.enable_x64(True):
        assert jax.eval_shape(draw, inputs[0].astype(jnp.float64), *inputs[1:]).dtype == jnp.float64


def test_matrix_products_ask_for_full_precision():
    # Accelerators otherwise multiply float32 in TF32 or bfloat16, a thousand times off the tolerance of the values.
    inputs, v = operands(), weights(3, HEIGHT, WIDTH, 3)
    program = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(*inputs, v))
    assert program.count("dot_general[") > 3
    assert program.count("dot_general[") == program.count("precision=(Precision.HIGHEST, Precision.HIGHEST)")


def test_chunks_of_images_change_nothing(chunk_pairs):
    # Three images to a chunk, with two chunks full and one not.
    n = 7
    inputs, v = operands(n=n, m=6), weights(n, HEIGHT, WIDTH, 3)

    def run(inputs, v):
        return jax.value_and_grad(functools.partial(loss, backend="xla"), argnums=(0, 1, 2))(*inputs, v)

    whole = jax.jit(run)(inputs, v)
    tile = _splat_xla._tile(SplatSpec(height=HEIGHT, width=WIDTH, supersample=2, cutoff=DEFAULT_CUTOFF))
    chunk_pairs(3 * 6 * -(-HEIGHT // tile) * -(-WIDTH // tile))
    assert_close(jax.jit(lambda *x: run(*x))(inputs, v), whole)


def test_nan_stays_in_its_image_across_chunks_and_blocks(chunk_pairs):
    inputs = operands()
    clean = jax.jit(draw)(*inputs)
    # Less than an image, of which a chunk holds one all the same.
    chunk_pairs(10)
    spoilt = jax.jit(lambda *x: draw(*x))(inputs.centers.at[1, 0, 1].set(jnp.nan), *inputs[1:])
    assert np.all(np.isnan(spoilt[1]))
    assert_close(spoilt[::2], clean[::2])


def temporary_bytes(n, m, with_gradient):
    size = 32
    shapes = [jax.ShapeDtypeStruct((n, m, last), jnp.float32) for last in (2, 3, 3)]
    image = jax.ShapeDtypeStruct((n, size, size, 3), jnp.float32)

    def forward(*inputs):
        return splat(*inputs, height=size, width=size, backend="xla")

    def backward(v, *inputs):
        return jax.vjp(forward, *inputs)[1](v)

    compiled = jax.jit(backward if with_gradient else forward).lower(*([image] if with_gradient else []), *shapes)
    memory = compiled.compile().memory_analysis()
    return memory.temp_size_in_bytes, memory.argument_size_in_bytes + memory.output_size_in_bytes


@pytest.mark.parametrize("with_gradient", [False, True], ids=["forward", "backward"])
def test_temporary_memory_does_not_grow_with_the_number_of_images(chunk_pairs, with_gradient):
    m = 40
    chunk_pairs(8 * 16 * m)
    few, few_io = temporary_bytes(64, m, with_gradient)
    many, many_io = temporary_bytes(512, m, with_gradient)
    # The loop over chunks may hold a copy of its inputs and outputs, and nothing else that grows.
    assert many - few <= 1.05 * (many_io - few_io), (few, many, few_io, many_io)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("centers", (3, 5, 3), r"centers: expected shape \[n, m, 2\], found \[3, 5, 3\]"),
        ("conics", (3, 4, 3), r"conics: expected leading axes \[3, 5\] as in centers, found \[3, 4\]"),
        ("colors", (3, 5), r"colors: expected shape \[n, m, c\], found \[3, 5\]"),
    ],
)
def test_an_operand_of_the_wrong_shape_is_named(name, shape, message):
    inputs = operands()._asdict() | {name: jnp.zeros(shape)}
    with pytest.raises(ValueError, match=message):
        draw(**inputs)


def test_an_operand_of_integers_is_named():
    with pytest.raises(TypeError, match="conics: expected a floating dtype, found int32"):
        draw(**operands()._asdict() | {"conics": jnp.zeros((3, 5, 3), jnp.int32)})


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("height", 0, "height: expected an integer >= 1, found 0"),
        ("width", 2.0, "width: expected an integer >= 1, found 2.0"),
        ("supersample", True, "supersample: expected an integer >= 1, found True"),
        ("cutoff", 1, r"cutoff: expected a number in \[0, 1\), found 1"),
        ("cutoff", float("nan"), r"cutoff: expected a number in \[0, 1\), found nan"),
        ("backend", "gpu", "backend: expected one of auto, .*xla.*; found 'gpu'"),
    ],
)
def test_a_bad_setting_is_named(setting, value, message):
    settings = {"height": HEIGHT, "width": WIDTH} | {setting: value}
    with pytest.raises(ValueError, match=message):
        splat(*operands(), **settings)


SECOND = {
    "jitted hessian": lambda f, x: jax.jit(jax.hessian(f))(x),
    "jvp of grad": lambda f, x: jax.jvp(jax.grad(f), (x,), (x,)),
    "grad of a batch of grads": lambda f, x: jax.grad(lambda x: jnp.sum(jax.vmap(jax.grad(f))(x[None]) ** 2))(x),
    "grad of grad with remat": lambda f, x: jax.grad(lambda x: jnp.sum(jax.grad(jax.checkpoint(f))(x) ** 2))(x),
}


@pytest.mark.parametrize("name", SECOND)
def test_a_second_derivative_is_refused_in_words(name):
    centers, conics, colors = jnp.ones((1, 2, 2)), jnp.ones((1, 2, 3)), jnp.ones((1, 2, 1))

    def f(centers):
        return jnp.sum(splat(centers, conics, colors, height=2, width=3) ** 2)

    with pytest.raises(TypeError, match="^splat: only first derivatives pass through the renderer, in reverse mode"):
        SECOND[name](f, centers)
