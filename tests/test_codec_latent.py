"""The latent codec: its decoder against PyTorch's definitions in float64, D3's counts, and what a key draws."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gsdd_jax import codecs
from gsdd_jax.codecs import LatentSpec, latent

SHAPE, CLASSES, BUDGET = (8, 8, 3), 2, 4000
SMALL = LatentSpec(decoder="small", width=8, latent_dim=3, images_per_class=2)
SPECS = {
    "small batch": dataclasses.replace(SMALL, norm="batch"),
    "medium": LatentSpec(decoder="medium", width=4, latent_dim=3, images_per_class=2, dtype="bfloat16"),
    "large": LatentSpec(decoder="large", width=4, latent_dim=16, images_per_class=2, sample=False),
}


def make(spec, **changes) -> codecs.Codec:
    settings = {"image_shape": SHAPE, "num_classes": CLASSES, "bytes_per_class": BUDGET} | changes
    return codecs.make(spec, **settings)


def started(codec, seed=0):
    """Params off the start, so that no leaf is a constant that rounds to itself."""
    params = jax.jit(codec.init)(jax.random.key(seed), jnp.zeros((codec.num_images, *codec.image_shape)))
    rng = np.random.default_rng(seed)
    return {
        name: (np.asarray(x) * rng.normal(1, 0.2, x.shape) + rng.normal(0, 0.05, x.shape)).astype(np.float32)
        for name, x in params.items()
    }


def rounded(params, dtype) -> dict[str, np.ndarray]:
    """Stored precision by NumPy's own rounding, as float64."""
    stored = jnp.bfloat16 if dtype == "bfloat16" else np.float32
    return {name: np.asarray(leaf).astype(stored).astype(np.float64) for name, leaf in params.items()}


def transposed(x, kernel):
    """PyTorch's transposed convolution to twice the side: every pixel adds its kernel, from one before twice itself."""
    n, side, _, _ = x.shape
    canvas = np.zeros((n, 2 * side + 4, 2 * side + 4, kernel.shape[-1]))
    torch_kernel = kernel[::-1, ::-1]
    reach = len(kernel)
    for i in range(side):
        for j in range(side):
            canvas[:, 2 * i : 2 * i + reach, 2 * j : 2 * j + reach] += np.einsum(
                "na,yzab->nyzb", x[:, i, j], torch_kernel
            )
    return canvas[:, 1 : 2 * side + 1, 1 : 2 * side + 1]


def normalized(x, norm):
    result = np.empty_like(x)
    if norm == "batch":
        for channel in range(x.shape[-1]):
            own = x[..., channel]
            result[..., channel] = (own - own.mean()) / np.sqrt(own.var() + 1e-5)
        return result
    group = math.gcd(x.shape[-1], 8)
    for i in range(len(x)):
        for first in range(0, x.shape[-1], group):
            own = x[i, ..., first : first + group]
            result[i, ..., first : first + group] = (own - own.mean()) / np.sqrt(own.var() + 1e-5)
    return result


def oracle(p, codes, spec) -> np.ndarray:
    x = codes if spec.decoder == "large" else codes @ p["linear"] + p["linear_bias"]
    x = x.reshape(len(codes), 2, 2, spec.width)
    layer = 0
    while f"up{layer}" in p:
        x = transposed(x, p[f"up{layer}"]) + p[f"up{layer}_bias"]
        x = normalized(x, spec.norm) * p[f"scale{layer}"] + p[f"shift{layer}"]
        x = np.where(x > 0, x, 0.01 * x)
        layer += 1
    side = x.shape[1]
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    output = sum(padded[:, y : y + side, z : z + side] @ p["out"][y, z] for y in range(3) for z in range(3))
    return 0.5 + 0.5 * np.tanh(output + p["out_bias"])


@pytest.fixture(scope="module", params=SPECS)
def case(request):
    """``(codec, params, jitted decode)``."""
    codec = make(SPECS[request.param])
    return codec, started(codec), jax.jit(codec.decode)


def test_decode_is_the_decoder_of_the_means_in_float64(case):
    codec, params, decode = case
    p = rounded(params, codec.spec.dtype)
    np.testing.assert_allclose(decode(params), oracle(p, p["mean"], codec.spec), rtol=0, atol=1e-5)


def test_key_decodes_one_sample_of_each_latent(case):
    codec, params, decode = case
    p, key = rounded(params, codec.spec.dtype), jax.random.key(5)
    found = decode(params, key=key)
    if not codec.spec.sample:
        np.testing.assert_array_equal(found, decode(params))
        return
    noise = np.asarray(jax.random.normal(key, p["mean"].shape), np.float64)
    expected = oracle(p, p["mean"] + np.sqrt(np.exp(p["log_variance"])) * noise, codec.spec)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert np.abs(found - decode(params)).max() > 0.01
    assert np.abs(found - decode(params, key=jax.random.key(6))).max() > 0.01


def test_images_depend_on_others_under_batch_normalization_only(case):
    codec, params, decode = case
    moved = params | {"mean": params["mean"] + 0.5 * (np.arange(4) == 1)[:, None].astype(np.float32)}
    change = np.abs(np.asarray(decode(moved)) - decode(params)).max((1, 2, 3))
    assert change[1] > 1e-3
    assert (change[[0, 2, 3]] > 0).all() if codec.spec.norm == "batch" else not change[[0, 2, 3]].any()


def test_start_draws_normal_latents_and_pytorchs_decoder_whatever_the_images():
    spec = LatentSpec(decoder="small", width=32, latent_dim=64, images_per_class=50)
    codec = make(spec, bytes_per_class=10**6)
    shape = (codec.num_images, *SHAPE)
    params = jax.jit(codec.init)(jax.random.key(0), jnp.zeros(shape))
    again = jax.jit(codec.init)(jax.random.key(0), jnp.ones(shape))
    assert all((np.asarray(params[name]) == again[name]).all() for name in params)
    for name in ("mean", "log_variance"):
        drawn = np.asarray(params[name], np.float64)
        assert abs(drawn.mean()) < 0.05 and abs(drawn.std() - 1) < 0.05
    assert np.abs(np.corrcoef(np.ravel(params["mean"]), np.ravel(params["log_variance"]))[0, 1]) < 0.05
    # One over the root of: latents; outputs times 16 places; inputs times 9 places.
    bounds = {"linear": 64, "up0": 16 * 16, "up1": 8 * 16, "out": 8 * 9}
    for name, fan_in in bounds.items():
        kernel, bias = np.abs(params[name]), np.abs(params[f"{name}_bias"])
        assert 0.98 < kernel.max() * np.sqrt(fan_in) <= 1 and 0.2 < bias.max() * np.sqrt(fan_in) <= 1, name
    for layer in (0, 1):
        assert (np.asarray(params[f"scale{layer}"]) == 1).all() and (np.asarray(params[f"shift{layer}"]) == 0).all()


def numbers(spec, side) -> int:
    return sum(math.prod(shape) for shape in latent.shapes(spec, side, 3).values())


@pytest.mark.parametrize(
    ("decoder", "width", "latent_dim", "floats", "maps"),
    [
        ("small", 256, 64, 789_187, [256, 128, 64, 32, 32, 32]),
        ("medium", 512, 2048, 5_774_691, [512, 256, 128, 64, 32, 32]),
        ("large", 1024, 4096, 6_308_547, [1024, 512, 256, 128, 64, 64]),
    ],
)
def test_published_decoders_have_the_published_numbers_at_64_px(decoder, width, latent_dim, floats, maps):
    spec = LatentSpec(decoder=decoder, width=width, latent_dim=latent_dim, norm="batch", images_per_class=1)
    assert (numbers(spec, 64), latent.channels(spec, 64)) == (floats, maps)
    # And the arrays are those that are counted.
    codec = make(spec, image_shape=(64, 64, 3), num_classes=1, bytes_per_class=2**26)
    sizes = {name: math.prod(x.shape) for name, x in codec.layout().items()}
    assert sizes.pop("mean") == sizes.pop("log_variance") == latent_dim
    assert sum(sizes.values()) == floats


# Where all of D3's files is counted but soft labels, of which a set here has none: those of a block of classes.
@pytest.mark.parametrize(
    ("width", "latent_dim", "side", "classes", "ipc", "floats", "lpc"),
    [
        (64, 32, 128, 10, 1, 54_987, 682),
        (64, 32, 32, 100, 1, 52_891, 39),
    ],
)
def test_budgets_of_the_benchmarks_hold_as_many_latents_as_computed_by_hand(
    width, latent_dim, side, classes, ipc, floats, lpc
):
    spec = LatentSpec(decoder="small", width=width, latent_dim=latent_dim)
    codec = make(spec, image_shape=(side, side, 3), num_classes=classes, bytes_per_class=ipc * side * side * 3 * 4)
    assert numbers(spec, side) == floats
    assert lpc == codec.images_per_class == codec.spec.images_per_class
    available = classes * ipc * side * side * 3
    assert (available - floats) // (classes * 2 * latent_dim) == lpc
    params = jax.eval_shape(codec.init, jax.random.key(0), jnp.zeros((codec.num_images, side, side, 3)))
    assert codec.nbytes(params) == 4 * (floats + classes * lpc * 2 * latent_dim) <= 4 * available


def test_distillation_is_sgd_of_the_latents_and_adam_with_decay_of_the_decoder():
    codec = make(dataclasses.replace(SMALL, lr=0.3, lr_decoder=0.02))
    params, rng = started(codec), np.random.default_rng(2)
    grads = [jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), params) for _ in range(2)]
    optimizer = codec.optimizer()
    # Large weights, so that their decay is seen.
    weights = jax.tree.map(lambda x: np.float32(1e5) * x, params)

    @jax.jit
    def two_steps(grads):
        first, state = optimizer.update(grads[0], optimizer.init(params), weights)
        second, _ = optimizer.update(grads[1], state, weights)
        return jax.tree.map(jnp.add, first, second)

    total = two_steps(grads)
    for name in params:
        a, b = (np.asarray(grad[name], np.float64) for grad in grads)
        if name in ("mean", "log_variance"):
            expected = -0.3 * (a + 0.5 * a + b)
        else:
            a, b = (g + 1e-5 * np.asarray(weights[name], np.float64) for g in (a, b))
            m, v = 0.1 * (0.9 * a + b) / (1 - 0.9**2), 0.001 * (0.999 * a**2 + b**2) / (1 - 0.999**2)
            expected = -0.02 * (a / (np.abs(a) + 1e-8) + m / (np.sqrt(v) + 1e-8))
        np.testing.assert_allclose(total[name], expected, rtol=1e-4, atol=1e-5, err_msg=name)


def test_latents_take_adam_where_asked():
    codec = make(dataclasses.replace(SMALL, optimizer="adam", lr=0.3))
    params = started(codec)
    optimizer = codec.optimizer()
    ones = jax.tree.map(np.ones_like, params)
    updates, _ = jax.jit(lambda: optimizer.update(ones, optimizer.init(params), params))()
    np.testing.assert_allclose(updates["mean"], -0.3, rtol=1e-4)


def test_fitting_is_adam_with_a_rate_for_each_part_on_a_cosine():
    codec = make(SMALL)
    params = started(codec)
    fitter = codec.fitter(4)
    state, ones = jax.jit(fitter.init)(params), jax.tree.map(np.ones_like, params)
    update = jax.jit(fitter.update)
    for step in range(4):
        updates, state = update(ones, state, params)
        cosine = 0.98 * 0.5 * (1 + np.cos(np.pi * step / 4)) + 0.02
        np.testing.assert_allclose(updates["mean"], -latent.FIT_LATENTS * cosine, rtol=1e-4)
        np.testing.assert_allclose(updates["out"], -latent.FIT_DECODER / 8 * cosine, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        ({}, {"image_shape": (6, 8, 3)}, "codec.name: latent.*square images .* power of two from 8, found 6 x 8"),
        ({}, {"image_shape": (4, 4, 3)}, "codec.name: latent.*power of two from 8, found 4 x 4"),
        ({"width": 6}, {}, "codec.width: expected a multiple of 4, found 6"),
        (
            {"decoder": "large"},
            {},
            re.escape("codec.latent_dim: the large decoder has no linear map; expected 4 * codec.width = 32, found 3"),
        ),
    ],
)
def test_impossible_settings_say_what_would_do(changes, settings, message):
    with pytest.raises(ValueError, match=message):
        make(dataclasses.replace(SMALL, **changes), **settings)
