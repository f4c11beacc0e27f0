"""Neural fields, bases with hallucinators, sparse epitomes and the slot for a generator, each against its equations."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import ddif_decode
from gsdd_jax import SynSet, codecs, storage
from gsdd_jax.codecs import FactorSpec, NeuralFieldSpec, SparseEpitomeSpec, neural_field, sparse_epitome
from gsdd_jax.codecs.generator import GeneratorSpec, generator_prior

SHAPE, CLASSES = (6, 8, 3), 2
BUDGET = 2 * 6 * 8 * 3 * 4

FIELD = NeuralFieldSpec(layers=2, width=5, images_per_class=3)
FACTOR = FactorSpec(hallucinators=2, images_per_class=4, base_channels=1, dtype="bfloat16")
EPITOME = SparseEpitomeSpec(patch=2, width=6, blocks=2, heads=2, tokens=4, nonzeros=7, images_per_class=3)
SPECS = {"neural_field": FIELD, "factor": FACTOR, "sparse_epitome": EPITOME}


def half(spec):
    return dataclasses.replace(spec, dtype="bfloat16")


def make(spec, **changes) -> codecs.Codec:
    settings = {"image_shape": SHAPE, "num_classes": CLASSES, "bytes_per_class": BUDGET} | changes
    return codecs.make(spec, **settings)


def smooth_images(n):
    ramp = np.linspace(0, 1, SHAPE[1])[None, :, None] * np.ones(SHAPE)
    colors = np.random.default_rng(3).uniform(0, 1, (n, 1, 1, 3))
    return (0.3 * ramp + 0.7 * colors).astype(np.float32)


def moved(params):
    """Off the start, so that no leaf is a constant that rounds to itself."""
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda x: (
            np.asarray(x) * rng.normal(1, 0.2, x.shape).astype(np.float32)
            + rng.normal(0, 0.05, x.shape).astype(np.float32)
        ),
        params,
    )


def bits(tree) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def rounded(params) -> dict[str, np.ndarray]:
    """bfloat16 by NumPy's own rounding, as float64."""
    return {name: np.asarray(leaf).astype(jnp.bfloat16).astype(np.float64) for name, leaf in params.items()}


@pytest.mark.parametrize("name", SPECS)
def test_distillation_takes_the_rates_of_the_spec(name):
    def step(**changes):
        optimizer = make(dataclasses.replace(SPECS[name], **changes)).optimizer()
        params = {"coefficients": np.float32(1), "epitome": np.float32(1), "out": np.float32(1)}
        return [float(x) for x in optimizer.update(params, optimizer.init(params))[0].values()]

    factors = {"lr_epitome": 0.5, "lr_network": 0.25} if name == "sparse_epitome" else {}
    expected = np.array([1, 0.5, 0.25] if factors else [1, 1, 1])
    np.testing.assert_allclose(step(optimizer="sgd", lr=0.3, **factors), -0.3 * expected, rtol=1e-6)
    np.testing.assert_allclose(step(optimizer="adam", lr=0.3, **factors), -0.3 * expected, rtol=1e-5)


# Neural fields


def siren(params, size, spec, channels):
    """The equations, pixel by pixel, float64."""
    n = len(params["weight0"])
    images = np.zeros((n, *size, channels))
    for i in range(n):
        for place in np.ndindex(*size):
            hidden = 2 * np.array(place) / (np.array(size) - 1) - 1
            for layer in range(spec.layers):
                frequency = spec.omega if layer else spec.omega0
                hidden = np.sin(frequency * (hidden @ params[f"weight{layer}"][i] + params[f"bias{layer}"][i]))
            output = hidden @ params[f"weight{spec.layers}"][i] + params[f"bias{spec.layers}"][i]
            images[(i, *place)] = 0.5 + 0.25 * output
    return images


@pytest.mark.parametrize("size", [(5, 11), (4, 5, 3)])
def test_field_draws_the_equations_at_any_size(size):
    images = smooth_images(6)
    if len(size) == 3:
        images = np.stack([images, images[:, ::-1]], axis=1)
    codec = make(half(FIELD), image_shape=images.shape[1:])
    params = moved(jax.jit(codec.init)(jax.random.key(0), images[: codec.num_images]))
    expected = siren(rounded(params), size, FIELD, 3)
    assert expected.std(axis=tuple(range(1, expected.ndim - 1))).min() > 0.005
    # Phases reach tens, of which float32 knows 1e-6.
    np.testing.assert_allclose(jax.jit(lambda p: codec.decode(p, size=size))(params), expected, rtol=0, atol=2e-5)


def test_field_start_is_siren_with_the_output_solved_by_ridge_regression():
    images = np.random.default_rng(5).uniform(0, 1, (6, *SHAPE)).astype(np.float32)
    key = jax.random.key(3)
    spec = NeuralFieldSpec(layers=2, width=5, images_per_class=3)
    drawn = jax.jit(make(NeuralFieldSpec(layers=2, width=5, images_per_class=3, start="uniform")).init)(key, images)
    solved = jax.jit(make(spec).init)(key, images)
    assert all(bits(solved[name]) == bits(drawn[name]) for name in ("weight0", "bias0", "weight1", "bias1"))
    y, x = np.meshgrid(np.linspace(-1, 1, 6), np.linspace(-1, 1, 8), indexing="ij")
    for i in range(6):
        own = {name: np.asarray(leaf[i], np.float64) for name, leaf in drawn.items()}
        hidden = np.sin(30 * (np.stack([y, x], -1).reshape(-1, 2) @ own["weight0"] + own["bias0"]))
        hidden = np.sin(10 * (hidden @ own["weight1"] + own["bias1"]))
        inputs = np.concatenate([hidden, np.ones((48, 1))], 1)
        # Ridge as rows of a least-squares problem.
        rows = np.concatenate([inputs, np.sqrt(neural_field.RIDGE * 48) * np.eye(6)])
        target = np.concatenate([(images[i].reshape(48, 3) - 0.5) / 0.25, np.zeros((6, 3))])
        expected = np.linalg.lstsq(rows, target, rcond=None)[0]
        np.testing.assert_allclose(solved["weight2"][i], expected[:-1], atol=2e-3)
        np.testing.assert_allclose(solved["bias2"][i], expected[-1], atol=2e-3)


def test_field_is_drawn_within_the_bounds_of_siren_and_uses_them():
    spec = NeuralFieldSpec(layers=3, width=20, omega=40.0)
    params = jax.device_get(jax.jit(lambda key: neural_field.siren(key, 50, spec, 3))(jax.random.key(2)))
    for layer, bound in enumerate([0.5, *3 * [math.sqrt(6 / 20) / 40]]):
        for leaf in (params[f"weight{layer}"], params[f"bias{layer}"]):
            assert 0.95 * bound < np.abs(leaf).max() <= bound


def test_field_that_draws_again_has_the_same_images_and_gradients(monkeypatch):
    # Two chunks of two images and a rest of one.
    monkeypatch.setattr(neural_field, "CHUNK_PIXELS", 2 * 6 * 8)
    v = np.random.default_rng(4).standard_normal((5, *SHAPE)).astype(np.float32)
    found = []
    for remat in (False, True):
        codec = make(
            NeuralFieldSpec(layers=2, width=4, start="uniform", remat=remat, images_per_class=5), num_classes=1
        )
        params = jax.jit(codec.init)(jax.random.key(1), np.zeros((5, *SHAPE), np.float32))
        draw = jax.jit(
            jax.value_and_grad(lambda p, codec=codec: (jnp.sum(v * (x := codec.decode(p))), x), has_aux=True)
        )
        (_, images), grads = draw(params)
        found.append((images, grads))
    np.testing.assert_allclose(found[1][0], found[0][0], rtol=0, atol=1e-6)
    for name, grad in found[0][1].items():
        np.testing.assert_allclose(found[1][1][name], grad, rtol=1e-3, atol=1e-3 * np.abs(grad).max(), err_msg=name)


def test_field_that_draws_again_holds_fewer_bytes(monkeypatch):
    monkeypatch.setattr(neural_field, "CHUNK_PIXELS", 2 * 32 * 32)
    spec = {"layers": 3, "width": 20, "images_per_class": 32, "start": "uniform"}
    temporary = {}
    for remat in (False, True):
        codec = make(
            NeuralFieldSpec(remat=remat, **spec), image_shape=(32, 32, 3), num_classes=1, bytes_per_class=1 << 30
        )
        params = jax.eval_shape(codec.init, jax.random.key(0), jax.ShapeDtypeStruct((32, 32, 32, 3), jnp.float32))
        compiled = jax.jit(jax.grad(lambda p, codec=codec: jnp.sum(codec.decode(p) ** 2))).lower(params).compile()
        temporary[remat] = compiled.memory_analysis().temp_size_in_bytes
    assert temporary[True] < temporary[False] / 4


@pytest.mark.parametrize(
    ("shape", "ipc", "layers", "width", "images"),
    [
        ((32, 32, 3), 1, 2, 6, 37),
        ((128, 128, 3), 10, 3, 20, 510),
    ],
)
def test_fields_fill_the_budget_as_ddif_counts(shape, ipc, layers, width, images):
    spec = NeuralFieldSpec(layers=layers, width=width)
    codec = make(spec, image_shape=shape, bytes_per_class=storage.budget_bytes(ipc, shape))
    assert codec.images_per_class == codec.spec.images_per_class == images
    more = make(half(spec), image_shape=shape, bytes_per_class=storage.budget_bytes(ipc, shape))
    assert more.images_per_class in (2 * images, 2 * images + 1)


# Bases and hallucinators


def hallucinate(p, spec, bases):
    """The equations with plain loops, float64; transposed convolution by scattering."""
    h, w, c = SHAPE
    images = []
    for base in p["base"][:bases]:
        for j in range(spec.hallucinators):
            inner = np.zeros((h - 2, w - 2, c))
            for y in range(h - 2):
                for x in range(w - 2):
                    window = base[y : y + 3, x : x + 3]
                    inner[y, x] = np.einsum("yzc,yzcd->d", window, p["conv"][j]) + p["conv_bias"][j]
            inner = p["scale"][j] * inner + p["shift"][j]
            image = np.zeros(SHAPE) + p["deconv_bias"][j]
            for y in range(h - 2):
                for x in range(w - 2):
                    image[y : y + 3, x : x + 3] += np.einsum("c,yzcd->yzd", inner[y, x], p["deconv"][j])
            images.append(0.5 + 0.25 * image)
    return np.stack(images)


def test_every_base_is_drawn_through_every_hallucinator():
    codec = make(FACTOR)
    params = moved(jax.jit(codec.init)(jax.random.key(0), smooth_images(codec.num_images)))
    assert {name: leaf.shape for name, leaf in params.items()} == {
        "base": (4, 6, 8, 1),
        "conv": (2, 3, 3, 1, 3),
        "conv_bias": (2, 3),
        "scale": (2, 4, 6, 3),
        "shift": (2, 4, 6, 3),
        "deconv": (2, 3, 3, 3, 3),
        "deconv_bias": (2, 3),
    }
    expected = hallucinate(rounded(params), FACTOR, 4)
    np.testing.assert_allclose(jax.jit(codec.decode)(params), expected, rtol=0, atol=1e-5)


def test_factor_starts_from_the_first_real_image_of_each_base_and_pytorchs_convolutions():
    codec = make(FactorSpec(hallucinators=2), bytes_per_class=4 * BUDGET)
    images = np.random.default_rng(6).uniform(0, 1, (codec.num_images, *SHAPE)).astype(np.float32)
    params = jax.jit(codec.init)(jax.random.key(0), images)
    np.testing.assert_allclose(0.5 + 0.25 * params["base"], images[::2], atol=1e-6)
    assert (params["scale"] == 1).all() and (params["shift"] == 0).all()
    for name in ("conv", "deconv"):
        drawn = np.array(params[name])
        drawn[:, 1, 1] -= np.eye(3)
        bound = 1 / math.sqrt(27)
        assert 0.95 * bound < np.abs(drawn).max() <= bound * (1 + 1e-5)
        assert 0 < np.abs(params[f"{name}_bias"]).max() <= bound
    assert bits(params["conv"][0]) != bits(params["conv"][1])


# Sparse epitomes


def speed(p, spec, channels):
    """The equations patch by patch, float64; p has sparse coefficients."""
    h, w, _ = SHAPE
    s, part = spec.patch, spec.width // spec.heads

    def norm(x, scale, shift):
        return scale * (x - x.mean()) / np.sqrt(x.var() + 1e-5) + shift

    images = np.zeros((len(p["coefficients"]), h, w, channels))
    for i, image in enumerate(images):
        for j in range((h // s) * (w // s)):
            heads = [
                p["coefficients"][i, head, j] @ p["epitome"][:, head * part : (head + 1) * part]
                for head in range(spec.heads)
            ]
            token, x = np.concatenate(heads), np.zeros(spec.width)
            for r in range(spec.blocks):
                x = norm(x + token @ p["mix"][r] + p["mix_bias"][r], p["norm_scale"][r, 0], p["norm_shift"][r, 0])
                y = x @ p["mlp"][r, 0] + p["mlp_bias"][r, 0]
                y = np.array([0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in y])
                y = y @ p["mlp"][r, 1] + p["mlp_bias"][r, 1]
                x = norm(x + y, p["norm_scale"][r, 1], p["norm_shift"][r, 1])
            top, left = s * (j // (w // s)), s * (j % (w // s))
            patch = x @ p["out"] + p["out_bias"]
            image[top : top + s, left : left + s] = 0.5 + 0.25 * patch.reshape(s, s, channels)
    return images


def cut(coefficients, count):
    """All but the largest magnitudes of each image and head set to zero."""
    flat = np.array(coefficients, np.float64).reshape(*coefficients.shape[:2], -1)
    for row in flat.reshape(-1, flat.shape[-1]):
        row[np.argsort(-np.abs(row), kind="stable")[count:]] = 0
    return flat.reshape(coefficients.shape)


@pytest.fixture(scope="module")
def epitome():
    codec = make(half(EPITOME))
    started = jax.jit(codec.init)(jax.random.key(0), random_images(6))
    return codec, started, moved(started)


def random_images(n):
    return np.random.default_rng(7).uniform(0, 1, (n, *SHAPE)).astype(np.float32)


def test_epitome_draws_the_equations_from_its_largest_coefficients(epitome):
    codec, _, params = epitome
    sparse = rounded(params) | {"coefficients": rounded({"a": cut(params["coefficients"], 7)})["a"]}
    expected = speed(sparse, EPITOME, 3)
    assert expected.std(axis=(1, 2)).min() > 0.01
    np.testing.assert_allclose(jax.jit(codec.decode)(params), expected, rtol=0, atol=2e-4)


def test_epitome_stores_values_with_16_bit_places(epitome):
    codec, _, params = epitome
    stored = codec.quantize(params)
    assert stored["indices"].dtype == np.uint16 and stored["values"].dtype == jnp.bfloat16
    assert stored["indices"].shape == stored["values"].shape == (6, 2, 7)
    dense = np.zeros((6, 2, 12 * 4))
    np.put_along_axis(dense, np.asarray(stored["indices"], int), np.asarray(stored["values"], float), -1)
    expected = rounded({"a": cut(params["coefficients"], 7)})["a"]
    np.testing.assert_array_equal(dense.reshape(6, 2, 12, 4), expected)
    assert (np.count_nonzero(expected, axis=(2, 3)) == 7).all()


def test_coefficients_that_take_no_part_have_no_gradient(epitome):
    coefficients = epitome[2]["coefficients"]
    weights = np.random.default_rng(9).normal(size=coefficients.shape).astype(np.float32)
    grad = jax.jit(jax.grad(lambda a: jnp.sum(weights * sparse_epitome.largest(a, 7))))(coefficients)
    np.testing.assert_array_equal(grad, weights * (cut(coefficients, 7) != 0))


def test_epitome_is_drawn_as_published():
    spec = SparseEpitomeSpec(patch=4, width=32, blocks=3, heads=2, tokens=64, nonzeros=8)
    params = jax.device_get(jax.jit(lambda key: sparse_epitome.speed(key, 20, 16, spec, 3))(jax.random.key(0)))
    for name in ("epitome", "coefficients"):
        assert params[name].std() == pytest.approx(0.2, rel=0.05)
    for name, ends in (("mix", 64), ("mlp", 64), ("out", 80)):
        bound = math.sqrt(6 / ends)
        assert 0.97 * bound < np.abs(params[name]).max() <= bound
    assert (params["norm_scale"] == 1).all()
    assert not any(params[name].any() for name in ("mix_bias", "mlp_bias", "norm_shift", "out_bias"))


@pytest.mark.parametrize(
    ("size", "classes", "ipc", "settings", "images"),
    [
        (32, 10, 1, (4, 32, 1, 2, 16, 48), 17),
        (128, 10, 10, (8, 384, 2, 6, 256, 384), 111),
    ],
)
def test_epitomes_fill_the_budget_as_speed_counts(size, classes, ipc, settings, images):
    names = ("patch", "width", "blocks", "heads", "tokens", "nonzeros")
    spec = SparseEpitomeSpec(**dict(zip(names, settings, strict=True)))
    shape = (size, size, 3)
    codec = make(spec, image_shape=shape, num_classes=classes, bytes_per_class=storage.budget_bytes(ipc, shape))
    assert codec.images_per_class == images
    p, d, r, heads, k, nonzeros = settings
    numbers = d * k + r * (3 * d * d + 7 * d) + 3 * p * p * (d + 1) + 1.5 * images * classes * heads * nonzeros
    params = jax.eval_shape(
        codec.init, jax.random.key(0), jax.ShapeDtypeStruct((codec.num_images, *shape), jnp.float32)
    )
    assert codec.nbytes(params) == 4 * numbers


def test_settings_of_an_epitome_that_make_no_sense_are_named():
    good = {"patch": 2, "width": 6, "blocks": 1, "heads": 2, "tokens": 4, "nonzeros": 7}
    for changes, message in (
        ({"patch": 4}, "codec.patch: expected a divisor of 6 and 8, found 4"),
        ({"heads": 4}, "codec.width: expected a multiple of 4, found 6"),
        ({"nonzeros": 49}, "codec.nonzeros: expected at most 48, found 49"),
        ({"tokens": 5462}, "codec.tokens: 12 patches of 5462 coefficients .* 65536 places .*; expected at most 5461"),
    ):
        with pytest.raises(ValueError, match=message):
            make(SparseEpitomeSpec(**(good | changes)))


# The slot for a generator

GENERATOR = np.random.default_rng(8).normal(size=(5, math.prod(SHAPE))).astype(np.float32)


def linear(latents):
    return 0.5 + 0.1 * (latents["w"] @ GENERATOR).reshape(-1, *SHAPE)


def prior(decode=linear, shape=(5,), count=6, generator_bytes=0, budget=BUDGET, images_per_class=3):
    return generator_prior(
        decode,
        lambda key, images: {"w": jax.random.normal(key, (count, *shape))},
        spec=GeneratorSpec(images_per_class=images_per_class, generator_bytes=generator_bytes, dtype="bfloat16"),
        image_shape=SHAPE,
        num_classes=CLASSES,
        bytes_per_class=budget,
        optimizer=lambda: optax.sgd(0.1),
        fitter=lambda steps: optax.adam(0.1),
    )


def test_a_generator_of_ones_own_becomes_a_codec(tmp_path):
    codec = prior(generator_bytes=100)
    images = smooth_images(6)
    params, decode = codec.init(jax.random.key(0), images), jax.jit(codec.decode)
    expected = 0.5 + 0.1 * (rounded(params)["w"] @ GENERATOR.astype(np.float64)).reshape(-1, *SHAPE)
    np.testing.assert_allclose(decode(params), expected, atol=1e-5)
    np.testing.assert_allclose(decode(params, np.array([4, 0])), expected[[4, 0]], atol=1e-5)
    assert jax.eval_shape(lambda p: codec.decode(p, size=(12, 16)), params).shape == (6, 12, 16, 3)
    assert bits(decode(codec.dequantize(codec.quantize(params)))) == bits(decode(params))
    # The file has the latents, the count the generator, too.
    sizes = SynSet(codec, params, BUDGET, ("a", "b")).save(tmp_path)
    assert sizes["payload"] == 6 * 5 * 2 and codec.nbytes(params) == 6 * 5 * 2 + 100
    assert json.loads((tmp_path / "manifest.json").read_text())["codec"]["generator_bytes"] == 100
    updates, _ = codec.optimizer().update(params, codec.optimizer().init(params))
    np.testing.assert_allclose(updates["w"], -0.1 * params["w"], rtol=1e-6)


def test_a_generator_that_does_not_fit_says_what_would():
    message = (
        "images_per_class: latents of 3 images per class, 10 bytes each, and 60 bytes of the generator do not fit "
    )
    with pytest.raises(ValueError, match=message + "the 100 bytes of all classes; expected at most 2"):
        prior(generator_bytes=60, budget=50)
    with pytest.raises(ValueError, match="expected at least 60 per class"):
        prior(generator_bytes=100, budget=50)
    with pytest.raises(ValueError, match=r"init_fn: expected latents of 6 images .*, found \{'w': \(5, 5\)\}"):
        prior(count=5)
    with pytest.raises(ValueError, match=r"decode_fn: expected images \(6, 6, 8, 3\), found \(6, 8, 6, 3\)"):
        prior(decode=lambda latents: linear(latents).swapaxes(1, 2))


# The benchmark of the decode


def test_benchmark_times_loops_and_batches_that_draw_the_same(tmp_path):
    out = tmp_path / "ddif.json"
    ddif_decode.main(["--images", "2", "--size", "4", "--repeats", "1", "--out", str(out)])
    results = json.loads(out.read_text())["results"]
    assert list(results) == ["op_by_op", "jitted_loop", "batched", "remat"]
    for row in results.values():
        assert 0 < row["min_ms"] <= row["median_ms"] and row["difference"] < 1e-4
    assert results["batched"]["batched_is_faster_by"] == 1
