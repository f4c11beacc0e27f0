"""The GPU kernels on a machine without a GPU: their values in Triton's interpreter, their machine code, their lowering.

What only a GPU can show is in `benchmarks/gpu.py` and in the tests marked `gpu`.
"""

import functools
import importlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import scenes

import gsdd_jax as gsdd
from gsdd_jax.gaussians import to_pixels
from kernels import DEFAULT_CUTOFF, compute_capability, splat
from kernels.spec import SplatSpec

pytest.importorskip("triton", reason="needs Triton: make env installs it")
triton_interpreter = importlib.import_module("triton_interpreter")
machine_code = importlib.import_module("benchmarks.machine_code")

HEIGHT, WIDTH = 19, 26
SPEC = SplatSpec(height=HEIGHT, width=WIDTH, supersample=2, cutoff=DEFAULT_CUTOFF)
SMALL = SplatSpec(height=7, width=12, supersample=1, cutoff=DEFAULT_CUTOFF)
# The bounds of the XLA path, in tests/test_splat.py and tests/test_render.py; seen here: 5e-7 and 2e-6.
VALUES, GRADIENTS = 1e-5, 1e-4


without_gpu = pytest.mark.skipif(jax.default_backend() == "gpu", reason="is about machines without a GPU")


@pytest.fixture(scope="module")
def kernels():
    """The module of the kernels, interpreted: its `forward` and `backward` take and return NumPy arrays."""
    return triton_interpreter.load()


def operands(n=2, m=7, channels=3, seed=0, size=(HEIGHT, WIDTH)):
    return [np.asarray(x) for x in to_pixels(scenes.random(n=n, m=m, size=size, channels=channels, seed=seed))]


def cotangent(spec, n, channels=3, seed=0):
    shape = (n, spec.height, spec.width, channels)
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def assert_oracle(kernels, spec, inputs, **tuning):
    """Compares values and gradients with the float64 oracle, each column of the geometry by its own scale."""
    n, _, channels = inputs[2].shape
    v = cotangent(spec, n, channels)
    # The interpreter's time goes with the number of programs and steps, not with their width.
    tuning = kernels.TUNING._replace(**{"tile_programs": 0, "lanes": 128} | tuning)
    images = kernels.forward(spec, *inputs, tuning=tuning)
    gradient = kernels.backward(spec, *inputs, v, tuning=tuning)
    settings = {"height": spec.height, "width": spec.width, "supersample": spec.supersample, "cutoff": spec.cutoff}
    expected = oracle.splat(*inputs, v=v, **settings)
    scale = max(1.0, np.abs(expected.images).max())
    assert np.all(np.abs(images - expected.images) <= VALUES * scale + expected.images_slack)
    found = np.concatenate(gradient, axis=-1)
    wanted = np.concatenate([expected.v_geometry, expected.v_colors], axis=-1)
    slack = np.concatenate([expected.v_geometry_slack, expected.v_colors_slack], axis=-1)
    largest = np.abs(wanted).max(axis=(0, 1))
    largest[5:] = largest[5:].max()
    assert np.abs(wanted).max() > 0
    assert np.all(np.abs(found - wanted) <= GRADIENTS * np.maximum(largest, 1e-6) + slack)


# The others differ in what the kernels multiply by alone, or in how their operands come about.
@pytest.mark.parametrize("scene", ["all_widths", "needles", "short_needles", "outside"])
def test_hostile_scenes_match_the_oracle(kernels, scene):
    height, width = scenes.SIZE
    spec = SplatSpec(height=height, width=width, supersample=2, cutoff=DEFAULT_CUTOFF)
    # Both backward launches have Gaussians to gather for. One image: several are drawn below.
    assert_oracle(kernels, spec, [np.asarray(x[:1, ::2]) for x in to_pixels(scenes.HOSTILE[scene]())], wide_area=300)


@pytest.mark.parametrize(
    ("n", "m", "channels", "size", "supersample", "cutoff", "tuning"),
    [
        (2, 3, 1, (1, 1), 3, DEFAULT_CUTOFF, {}),
        (1, 4, 4, (3, 70), 1, DEFAULT_CUTOFF, {}),
        # Every sample counts.
        (1, 3, 3, (7, 12), 2, 0.0, {}),
        # Up to 4 the loop over rows of samples is unrolled, from 5 on it is not; a launch takes 4 channels.
        (1, 2, 6, (6, 9), 5, 1e-3, {}),
        # 32 to a list: the second is not full, and bit 31 is the sign of the integer that holds the bits.
        (1, 35, 3, (7, 20), 1, DEFAULT_CUTOFF, {"programs": 1}),
    ],
    ids=["one pixel", "strip", "no cutoff", "many samples and channels", "many Gaussians"],
)
def test_other_shapes_match_the_oracle(kernels, n, m, channels, size, supersample, cutoff, tuning):
    spec = SplatSpec(height=size[0], width=size[1], supersample=supersample, cutoff=cutoff)
    assert_oracle(kernels, spec, operands(n, m, channels, size=size), **tuning)


def test_far_and_huge_gaussians_are_drawn_or_not_and_nothing_hangs(kernels):
    centers, conics, colors = (x.copy() for x in operands(n=1, m=4))
    centers[0, :, 0] = [1e30, -1e9, 3.0, np.inf]
    conics[0, 2] = [1e-20, 0, 1e-20]
    images = kernels.forward(SPEC, centers, conics, colors)
    np.testing.assert_allclose(images, np.broadcast_to(colors[0, 2], images.shape), rtol=1e-6)
    gradient = kernels.backward(SPEC, centers, conics, colors, np.ones_like(images))
    assert all(np.all(np.isfinite(x)) for x in gradient)
    np.testing.assert_allclose(gradient[2][0], [[0] * 3, [0] * 3, [HEIGHT * WIDTH] * 3, [0] * 3], rtol=1e-6)


def test_bits_do_not_depend_on_tiles_blocks_or_the_number_of_images(kernels):
    inputs, v = operands(n=2, m=5, size=(7, 12)), cotangent(SMALL, 2)
    # As above, wide steps cost the interpreter least.
    common = kernels.TUNING._replace(tile_programs=0, lanes=128)
    tunings = [
        common,
        common._replace(tile_height=4, tile_width=32, programs=4),
        common._replace(tile_programs=1 << 30, programs=20),
    ]
    constants = [
        kernels.forward_launch(SMALL, 2, 5, 3, t).constants
        | kernels.backward_launches(SMALL, 2, 5, 3, ("f4",) * 3, t)[0].constants
        for t in tunings
    ]
    assert [(x["TILE_H"], x["TILE_W"], x["BLOCK"]) for x in constants] == [(16, 16, 1), (4, 32, 4), (4, 8, 1)]
    images, *others = (kernels.forward(SMALL, *inputs, tuning=t) for t in tunings)
    assert all(np.array_equal(found, images) for found in others)
    # Backward knows no tiles: the third is the first.
    gradient, blocks = (kernels.backward(SMALL, *inputs, v, tuning=t) for t in tunings[:2])
    alone = [x[1:] for x in inputs]
    assert np.array_equal(kernels.forward(SMALL, *alone, tuning=common), images[1:])
    singles = kernels.backward(SMALL, *alone, v[1:], tuning=common)
    for found, single, wanted in zip(blocks, singles, gradient, strict=True):
        assert np.array_equal(found, wanted) and np.array_equal(single, wanted[1:])


def test_integer_division_walks_the_same_pixels_as_the_float_one(kernels, monkeypatch):
    inputs, v = operands(n=1, m=2, size=(7, 12)), cotangent(SMALL, 1)
    quick = kernels.backward(SMALL, *inputs, v)
    monkeypatch.setattr(kernels, "FLOAT_PIXELS", 0)
    exact = kernels.backward(SMALL, *inputs, v)
    assert all(np.array_equal(a, b) for a, b in zip(quick, exact, strict=True))


def test_float_division_is_exact_up_to_its_limit(kernels):
    # What the kernel computes, for the last pixels of the rows that are hardest to tell apart.
    limit = kernels.FLOAT_PIXELS
    for length in (1, 2, 3, 7, 127, 128, 129, 511, 1000, 1023, 1024):
        ends = np.arange(length, limit + 1, length)
        index = np.concatenate([ends - 1, ends[:-1]]).astype(np.int32)
        for per_length in (np.nextafter(np.float32(1 / length), np.float32(x)) for x in (0, 1)):
            row = np.floor((index.astype(np.float32) + np.float32(0.5)) * per_length)
            assert np.array_equal(row, index // length), length


def test_nan_fills_its_own_image_and_its_gradient_and_no_other(kernels):
    inputs, v = [x.copy() for x in operands(n=4, m=2, size=(7, 12))], cotangent(SMALL, 4)
    clean = [x[1:2].copy() for x in inputs]
    for operand, image in enumerate((0, 2, 3)):
        inputs[operand][image, 1, 1] = np.nan
    found = [kernels.forward(SMALL, *inputs), *kernels.backward(SMALL, *inputs, v)]
    wanted = [kernels.forward(SMALL, *clean), *kernels.backward(SMALL, *clean, v[1:2])]
    for spoilt, whole in zip(found, wanted, strict=True):
        assert np.all(np.isnan(spoilt[[0, 2, 3]])) and np.array_equal(spoilt[1:2], whole)


def test_half_precision_is_read_as_it_is_and_summed_in_float32(kernels):
    dtype = jnp.bfloat16
    half = [x.astype(dtype) for x in operands(n=1, m=3, size=(7, 12))]
    full = [x.astype(np.float32) for x in half]
    v = cotangent(SMALL, 1)
    images = kernels.forward(SMALL, *half)
    assert images.dtype == np.float32 and np.array_equal(images, kernels.forward(SMALL, *full))
    mixed = kernels.backward(SMALL, full[0], full[1], half[2], v)
    assert [x.dtype for x in mixed] == [np.float32, np.float32, dtype]
    wanted = kernels.backward(SMALL, *full, v)
    assert np.array_equal(mixed[0], wanted[0]) and np.array_equal(mixed[1], wanted[1])
    # The interpreter cuts off the bits that the hardware rounds: the machine code below has cvt.rn.
    spacing = np.spacing(np.abs(wanted[2]).astype(dtype)).astype(np.float32)
    assert np.all(np.abs(mixed[2].astype(np.float32) - wanted[2]) <= spacing)


def test_no_images_or_gaussians_launch_nothing(kernels):
    for n, m in ((0, 3), (2, 0)):
        inputs = [np.zeros((n, m, last), np.float32) for last in (2, 3, 3)]
        assert kernels.forward(SPEC, *inputs).shape == (n, HEIGHT, WIDTH, 3)
        gradient = kernels.backward(SPEC, *inputs, np.zeros((n, HEIGHT, WIDTH, 3), np.float32))
        assert [x.shape for x in gradient] == [x.shape for x in inputs]


# Capabilities of A100, H100/H200 and B200. Up to 64 registers the first two hold as many one-warp programs as they can
# schedule; a fourth channel takes eight more. On the third, two samples share an instruction and more registers.
@pytest.mark.parametrize(
    ("capability", "registers", "n", "m", "channels", "size", "supersample", "dtype"),
    [
        (90, 64, 1000, 170, 3, 128, 2, "float32"),
        (80, 64, 300, 22, 3, 32, 2, "bfloat16"),
        (90, 64, 32, 107, 4, 512, 1, "float32"),
        (100, 128, 4, 12, 1, 28, 4, "float32"),
    ],
)
def test_machine_code_neither_spills_nor_needs_atomics(capability, registers, n, m, channels, size, supersample, dtype):
    module = importlib.import_module("kernels._splat_triton")
    spec = SplatSpec(height=size, width=size, supersample=supersample, cutoff=DEFAULT_CUTOFF)
    launches = [
        module.forward_launch(spec, n, m, channels),
        *module.backward_launches(spec, n, m, channels, (dtype,) * 3),
    ]
    for launch in launches:
        code = machine_code.compile(launch, [dtype] * 3 + ["float32"] * 2, capability)
        assert code.target == capability and len(code.cubin) > 1000
        assert code.spilled == 0 and code.stack == 0, launch.kernel
        # The second gather has eight warps and few programs; Triton 3.6 gives it 80 registers, 3.9 64.
        allowed = max(registers, 96) if launch.aliases else registers + 8 * (channels == 4)
        assert 16 <= code.registers <= allowed, (launch.kernel, code.registers)
        assert not re.search(r"\b(atom|red)\.", code.ptx)
        assert "ex2.approx" in code.ptx
        assert ("cvt.rn.bf16" in code.ptx) == (dtype == "bfloat16" and launch != launches[0])


def loss(g, **settings):
    return jnp.sum(jnp.tanh(gsdd.render(g, **settings)))


def lower(function, *args):
    """Lowers for CUDA on this machine, and gives the module's text."""
    # The second name is that of jax-triton 0.4.
    names = ("triton_kernel_call", "triton_kernel_call_ffi")
    checks = [jax.export.DisabledSafetyCheck.custom_call(name) for name in names]
    return jax.export.export(jax.jit(function), platforms=["cuda"], disabled_checks=checks)(*args).mlir_module()


@pytest.fixture
def lower_for_gpu():
    pytest.importorskip("jax_triton", reason="needs jax-triton and JAX's CUDA plugin", exc_type=ImportError)
    with compute_capability(90):
        yield lower


def calls(module_text):
    return len(re.findall(r"custom_call @triton_kernel_call", module_text))


def test_gradient_of_the_renderer_lowers_for_cuda(lower_for_gpu):
    g = scenes.random(n=2, m=9, size=(128, 128))
    assert calls(lower_for_gpu(gsdd.render, g)) == 1
    # The images and two launches of the gather; at 32 px no Gaussian reaches enough pixels for a second launch.
    assert calls(lower_for_gpu(jax.grad(loss), g)) == 3
    assert calls(lower_for_gpu(jax.grad(loss), scenes.random(n=2, m=9, size=(32, 32)))) == 2


def stack(g):
    return jax.tree.map(lambda x: jnp.stack([x] * 3), g)


def test_vmap_and_remat_lower_for_cuda_as_one_folded_call(lower_for_gpu):
    stacked = stack(scenes.random(n=2, m=9, size=(32, 32)))
    assert calls(lower_for_gpu(jax.vmap(jax.grad(loss)), stacked)) == 2
    text = lower_for_gpu(jax.value_and_grad(jax.remat(lambda g: jnp.sum(jax.vmap(loss)(g)))), stacked)
    assert calls(text) == 2
    assert "tensor<6x32x32x3xf32>" in text


def test_float64_takes_the_portable_path_for_cuda_too(lower_for_gpu):
    with jax.enable_x64(True):
        inputs = [jnp.asarray(x, jnp.float64) for x in operands()]
        assert calls(lower_for_gpu(functools.partial(splat, height=HEIGHT, width=WIDTH), *inputs)) == 0
        with pytest.raises(ValueError, match="backend: 'triton' computes in float32 and found float64 operands"):
            splat(*inputs, height=HEIGHT, width=WIDTH, backend="triton")


@without_gpu
def test_a_program_lowered_for_the_cpu_takes_the_portable_path(lower_for_gpu):
    inputs = operands()
    wanted = splat(*inputs, height=HEIGHT, width=WIDTH, backend="xla")
    assert np.array_equal(jax.jit(functools.partial(splat, height=HEIGHT, width=WIDTH))(*inputs), wanted)


@without_gpu
def test_forcing_the_kernels_without_a_gpu_is_refused():
    with pytest.raises(ValueError, match="backend: 'triton' needs an NVIDIA GPU, JAX runs on cpu; allowed here: auto"):
        splat(*operands(), height=HEIGHT, width=WIDTH, backend="triton")


@pytest.mark.parametrize("value", ["sm_90", "9"])
def test_a_bad_capability_is_named(monkeypatch, value):
    monkeypatch.setenv("GSDD_COMPUTE_CAPABILITY", value)
    draw = functools.partial(splat, *operands(), height=HEIGHT, width=WIDTH)
    with pytest.raises(ValueError, match=f"GSDD_COMPUTE_CAPABILITY: expected ten times .*found '{value}'"):
        draw()
    with compute_capability(value), pytest.raises(ValueError, match=f"^compute_capability: expected .* '{value}'"):
        draw()
    assert draw(backend="xla").shape == (2, HEIGHT, WIDTH, 3)


def test_another_capability_traces_and_compiles_anew(lower_for_gpu, monkeypatch):
    inputs = operands(n=1, m=3, size=(7, 12))
    draw = functools.partial(splat, height=7, width=12)
    jitted = jax.jit(draw)

    def code(function):
        return re.findall(r'custom_call @triton_kernel_call.*?backend_config = "[^"]*"', lower(function, *inputs))

    hopper = code(jitted)
    with compute_capability(80):
        ampere = code(jitted)
    assert len(hopper) == len(ampere) == 1 and hopper != ampere
    with compute_capability(None):
        assert code(jitted) == []
        # The variable has no such power over `jitted`, but what is traced after its change follows.
        for value, expected in (("90", hopper), ("80", ampere)):
            monkeypatch.setenv("GSDD_COMPUTE_CAPABILITY", value)
            assert code(functools.partial(draw)) == expected
    assert code(jitted) == hopper


BROKEN = """
import jax
from jax.extend.core import Primitive
from jax.interpreters import mlir
broken = Primitive("broken")
broken.multiple_results = True
broken.def_abstract_eval(lambda *args, out: [jax.core.ShapedArray(x.shape, x.dtype) for x in out])
mlir.register_lowering(broken, lambda *args, out: (lambda x: x)(1)(2), platform="cuda")
def triton_call(*args, out_type, **others):
    return broken.bind(*args, out=out_type)
"""


def test_where_jax_triton_dies_of_lowering_xla_takes_over_with_one_warning(monkeypatch, tmp_path):
    (tmp_path / "jax_triton.py").write_text(BROKEN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "jax_triton", raising=False)
    module = importlib.import_module("kernels.splat")
    inputs, draw = operands(n=1, m=2, size=(7, 12)), functools.partial(splat, height=7, width=12, supersample=1)
    wanted, reason = draw(*inputs, backend="xla"), "'int' object is not callable"
    caches = module._triton, module._warn_of_slow_path, module._operator
    for cache in caches:
        cache.cache_clear()
    with compute_capability(89):
        with pytest.warns(UserWarning, match=f"through XLA, .* that works with jax .*{reason}.*pip install") as caught:
            images = draw(*inputs)
            assert calls(lower(jax.value_and_grad(lambda *inputs: jnp.sum(draw(*inputs))), *inputs)) == 0
        assert len(caught) == 1 and np.array_equal(images, wanted)
        with pytest.raises(ImportError, match=f"backend: 'triton' needs a jax-triton .*{reason}"):
            draw(*inputs, backend="triton")
    for cache in caches:
        cache.cache_clear()


class Jitted:
    """The module of the kernels as the interpreted one is used: NumPy arrays in and out."""

    def __init__(self, module):
        self.TUNING = module.TUNING
        self.forward, self.backward = self.wrap(module.forward), self.wrap(module.backward)

    @staticmethod
    def wrap(function):
        def run(spec, *arrays, tuning):
            return jax.tree.map(np.asarray, jax.jit(functools.partial(function, spec, tuning=tuning))(*arrays))

        return run


@pytest.mark.gpu
@pytest.mark.parametrize("scene", scenes.HOSTILE)
def test_the_gpu_agrees_with_the_oracle_and_with_itself(scene):
    g = scenes.HOSTILE[scene]()
    height, width = g.size
    inputs = to_pixels(g)
    spec = SplatSpec(height=height, width=width, supersample=2, cutoff=DEFAULT_CUTOFF)
    module = importlib.import_module("kernels._splat_triton")
    assert_oracle(Jitted(module), spec, [np.asarray(x) for x in inputs], wide_area=300)
    draw = jax.jit(jax.grad(functools.partial(loss, backend="triton")))
    first, second = draw(g), draw(g)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True))
