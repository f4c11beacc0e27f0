"""The linear codecs of other methods: downscale (IDC), frequency (FreD), memory (RTP) and spectral (after NSD)."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gsdd_jax import codecs, storage
from gsdd_jax.codecs import DownscaleSpec, FrequencySpec, MemorySpec, SpectralSpec
from gsdd_jax.codecs import downscale as downscale_codec
from gsdd_jax.codecs import frequency as frequency_codec
from gsdd_jax.codecs import memory as memory_codec
from gsdd_jax.codecs import spectral as spectral_codec

SHAPE, CLASSES, BUDGET = (6, 8, 3), 2, 1152  # bytes of two float32 images per class
CIFAR, IMAGENET = (32, 32, 3), (128, 128, 3)


def make(spec, shape=SHAPE, classes=CLASSES, budget=BUDGET) -> codecs.Codec:
    return codecs.make(spec, image_shape=shape, num_classes=classes, bytes_per_class=budget)


def started(codec, images, key=None):
    """The start, compiled as one, which is faster than its operations one by one; so are decodes below."""
    return jax.jit(codec.init)(key, images)


def published(spec, ipc, shape, classes=10) -> codecs.Codec:
    return make(spec, shape, classes, storage.budget_bytes(ipc, shape))


def noise(shape, seed=0, spread=1.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, spread, shape).astype(np.float32)


def pictures(count, shape=SHAPE, seed=0) -> np.ndarray:
    """Gray with some noise: far from 0 and 1."""
    return np.random.default_rng(seed).uniform(0.3, 0.7, (count, *shape)).astype(np.float32)


def as_bfloat16(x) -> np.ndarray:
    return np.asarray(x).astype(jnp.bfloat16).astype(np.float64)


def interpolation(large: int, small: int) -> np.ndarray:
    """Bilinear weights [large, small] of one axis, pixel centers at i + 1/2, nearest beyond the outermost centers."""
    weights = np.zeros((large, small))
    for i in range(large):
        place = min(max((i + 0.5) * small / large - 0.5, 0), small - 1)
        low = min(int(place), small - 2) if small > 1 else 0
        weights[i, low] += 1 - (place - low)
        if small > 1:
            weights[i, low + 1] += place - low
    return weights


def enlarged(image, size) -> np.ndarray:
    rows, columns = (interpolation(large, small) for large, small in zip(size, image.shape, strict=False))
    return np.einsum("yh,hwc,xw->yxc", rows, np.asarray(image, np.float64), columns)


def spread_out(output) -> np.ndarray:
    return 0.5 + 0.25 * np.asarray(output)


# Downscale


def cells_of(canvas, factor) -> list[np.ndarray]:
    height, width = (-(-x // factor) for x in canvas.shape[:2])
    padded = np.full((factor * height, factor * width, canvas.shape[2]), 0.5)
    padded[: canvas.shape[0], : canvas.shape[1]] = canvas
    return [
        padded[y * height : (y + 1) * height, x * width : (x + 1) * width]
        for y, x in itertools.product(range(factor), repeat=2)
    ]


@pytest.mark.parametrize(
    ("factor", "dtype", "size"), [(1, "float32", None), (2, "bfloat16", None), (3, "uint8", (9, 16))]
)
def test_downscale_enlarges_the_cells_of_padded_canvases_row_by_row(factor, dtype, size):
    codec = make(DownscaleSpec(factor=factor, dtype=dtype))
    canvases = np.random.default_rng(1).uniform(0, 1, (codec.num_images // factor**2, *SHAPE)).astype(np.float32)
    decoded = jax.jit(lambda p: codec.decode(p, size=size))({"canvases": canvases})
    shown = {"bfloat16": as_bfloat16(canvases), "uint8": np.round(85.0 * canvases) / 85}.get(dtype, canvases)
    expected = [enlarged(cell, size or SHAPE[:2]) for canvas in shown for cell in cells_of(canvas, factor)]
    np.testing.assert_allclose(decoded, expected, rtol=0, atol=1e-6)


def test_downscale_starts_at_the_least_squares_cells():
    factor = 3
    codec = make(DownscaleSpec(factor=factor))
    images = pictures(codec.num_images)
    canvases = np.asarray(started(codec, images)["canvases"])
    assert canvases.min() > 0 and canvases.max() < 1, "no pixel may be clipped, or this is another problem"
    height, width = -(-6 // factor), -(-8 // factor)
    for i, image in enumerate(images[: factor**2]):
        y, x = divmod(i, factor)
        free = min(height, 6 - y * height), min(width, 8 - x * width)
        design = []
        for place in np.ndindex(free):
            cell = np.zeros((height, width, 1))
            cell[place] = 1
            design.append(enlarged(cell, (6, 8)).reshape(-1))
        solved = np.linalg.lstsq(np.array(design).T, image.reshape(-1, 3) - 0.5, rcond=None)[0]
        found = canvases[0, y * height : y * height + free[0], x * width : x * width + free[1]]
        np.testing.assert_allclose(found, 0.5 + solved.reshape(*free, 3), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("factor", "ipc", "shape", "images"),
    [(2, 10, CIFAR, 40), (3, 1, IMAGENET, 9)],
)
def test_downscale_holds_the_published_number_of_images_in_exactly_the_budget(factor, ipc, shape, images):
    codec = published(DownscaleSpec(factor=factor), ipc, shape)
    assert codec.images_per_class == images
    assert codec.nbytes({"canvases": jax.ShapeDtypeStruct((10 * ipc, *shape), jnp.float32)}) == (
        10 * storage.budget_bytes(ipc, shape)
    )
    halved = published(DownscaleSpec(factor=factor, dtype="bfloat16"), ipc, shape)
    assert halved.images_per_class == 2 * images
    assert published(DownscaleSpec(factor=factor, dtype="uint8"), ipc, shape).images_per_class == 4 * images


# Frequency


def cosine(frequency, positions, length) -> np.ndarray:
    """A row of the orthonormal DCT-II of so many pixels, at any number of positions."""
    scale = np.sqrt((1 if frequency == 0 else 2) / length)
    return scale * np.cos(np.pi * frequency * (np.arange(positions) + 0.5) / positions)


def wave(place, size) -> np.ndarray:
    y, x = divmod(place, SHAPE[1])
    return np.outer(cosine(y, size[0], SHAPE[0]), cosine(x, size[1], SHAPE[1]))


def spectra_of(images) -> np.ndarray:
    """The DCT of (image - 0.5) / 0.25 as ``[n, h * w, c]``."""
    basis = np.array([wave(place, SHAPE[:2]) for place in range(48)])
    return np.einsum("khw,nhwc->nkc", basis, (np.asarray(images, np.float64) - 0.5) / 0.25)


@pytest.mark.parametrize(("size", "dtype"), [((12, 24), "float32"), (None, "bfloat16")])
def test_frequency_sums_the_cosines_of_its_class(size, dtype):
    codec = make(FrequencySpec(coefficients=4, images_per_class=3, dtype=dtype))
    coefficients, index = noise((6, 4, 3)), np.array([[0, 5, 8, 47], [1, 2, 30, 40]])
    decoded = jax.jit(lambda p: codec.decode(p, size=size))({"coefficients": coefficients, "index": index * 1.0})
    shown = as_bfloat16(coefficients) if dtype == "bfloat16" else coefficients
    for i in range(6):
        waves = np.array([wave(place, size or SHAPE[:2]) for place in index[i // 3]])
        np.testing.assert_allclose(decoded[i], spread_out(np.einsum("khw,kc->hwc", waves, shown[i])), atol=2e-6)


def test_frequency_leaves_out_what_a_smaller_size_cannot_show():
    codec = make(FrequencySpec(coefficients=3, images_per_class=1))
    places = [2 * 8 + 1, 3 * 8 + 1, 1 * 8 + 4]  # only the first is below 3 rows and 4 columns
    coefficients = noise((2, 3, 3))
    params = {"coefficients": coefficients, "index": np.array([places, places], np.float32)}
    decoded = jax.jit(lambda p: codec.decode(p, size=(3, 4)))(params)
    expected = wave(places[0], (3, 4))[..., None] * coefficients[:, 0, None, None, :]
    np.testing.assert_allclose(decoded, spread_out(expected), atol=1e-6)


@pytest.mark.parametrize("mask", ["variance", "energy"])
def test_frequency_starts_at_the_widest_coefficients_of_each_class(mask):
    images = np.random.default_rng(2).uniform(0, 1, (8, *SHAPE)).astype(np.float32)
    params = started(make(FrequencySpec(coefficients=7, images_per_class=4, mask=mask)), images)
    spectra = spectra_of(images).reshape(2, 4, 48, 3)
    score = spectra.mean(3).var(1) if mask == "variance" else (spectra**2).mean((1, 3))
    index = np.sort(np.argsort(-score, axis=1)[:, :7], axis=1)
    np.testing.assert_array_equal(params["index"], index)
    for i in range(8):
        expected = spectra.reshape(8, 48, 3)[i, index[i // 4]]
        np.testing.assert_allclose(params["coefficients"][i], expected, rtol=0, atol=1e-5)


def test_class_of_one_image_has_no_variance_and_gets_its_lowest_frequencies():
    params = started(make(FrequencySpec(coefficients=4, images_per_class=1, mask="variance")), pictures(2))
    # Cycles per axis: (0,0), (0,1), (1,0), (1,1) in 8 columns and 6 rows; next are (0,2), then (2,0).
    np.testing.assert_array_equal(params["index"], [[0, 1, 8, 9]] * 2)


@pytest.mark.parametrize(
    ("count", "name", "dtype", "size"),
    [(6, "index", "uint8", 2 * 6), (7, "mask", "uint8", 2 * 48 // 8)],
)
def test_frequency_writes_the_smaller_of_numbers_and_bits(count, name, dtype, size):
    codec = make(FrequencySpec(coefficients=count, images_per_class=2))
    params = started(codec, pictures(4))
    written = codec.pack(codec.quantize(params))
    assert written.keys() == {"coefficients", name}
    assert (str(written[name].dtype), written[name].size) == (dtype, size)
    assert codec.nbytes(params) == 4 * count * 3 * 4 + size


def test_bits_of_a_mask_are_the_places_of_each_class():
    index = np.array([[0, 9, 10], [1, 2, 11]], np.uint8)
    tree = {"coefficients": np.zeros((2, 3, 3), np.float32), "index": index}
    written = frequency_codec.pack(tree, 12)
    np.testing.assert_array_equal(written["mask"], [0b10000000, 0b01100110, 0b00000001])
    back = frequency_codec.unpack(written, 2, 3, 12)
    assert back["index"].dtype == np.uint8
    np.testing.assert_array_equal(back["index"], index)


def test_numbers_of_large_images_are_two_bytes_wide():
    codec = make(FrequencySpec(coefficients=20, images_per_class=1), CIFAR, budget=10**4)
    assert codec.layout()["index"].dtype == np.uint16


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mask": np.array([0b11100000, 0b11000000], np.uint8)}, "mask: expected 3 bits of each of 2 classes"),
        ({"mask": np.array([0b11100011, 0b10000001], np.uint8)}, "mask: .* zeros after them"),
        ({"index": np.array([[0, 1, 2], [3, 4, 6]], np.uint8)}, "index: expected 3 places below 6 .* rising order"),
    ],
)
def test_damaged_places_are_refused(arrays, message):
    with pytest.raises(ValueError, match=message):
        frequency_codec.unpack({"coefficients": np.zeros((2, 3, 3), np.float32)} | arrays, 2, 3, 6)


# Memory


@pytest.mark.parametrize(
    ("factor", "dtype", "size"), [(1, "float32", None), (2, "bfloat16", None), (4, "float32", (9, 16))]
)
def test_memory_enlarges_combinations_of_shared_bases(factor, dtype, size):
    codec = make(MemorySpec(bases=3, factor=factor, images_per_class=2, dtype=dtype))
    small = (-(-6 // factor), -(-8 // factor))
    params = {"coefficients": noise((4, 3)), "bases": noise((3, *small, 3), seed=1)}
    decoded = jax.jit(lambda p: codec.decode(p, size=size))(params)
    shown = {name: as_bfloat16(x) if dtype == "bfloat16" else x.astype(np.float64) for name, x in params.items()}
    for i in range(4):
        combined = sum(shown["coefficients"][i, j] * shown["bases"][j] for j in range(3))
        np.testing.assert_allclose(decoded[i], spread_out(enlarged(combined, size or SHAPE[:2])), rtol=0, atol=2e-6)


@pytest.mark.parametrize("factor", [1, 4])
def test_memory_starts_at_the_best_approximation_of_its_rank(factor):
    codec = make(MemorySpec(bases=2, factor=factor, images_per_class=3))
    images = pictures(6)
    params = started(codec, images)
    # Of images that bases can show, the singular values beyond the second are lost; of the rest, everything.
    flat = (images.astype(np.float64) - 0.5).transpose(0, 3, 1, 2).reshape(18, 48)
    rows, columns = (interpolation(length, -(-length // factor)) for length in SHAPE[:2])
    shown = np.linalg.qr(np.kron(rows, columns))[0]
    visible = flat @ shown
    lost = np.sum(np.linalg.svd(visible.reshape(6, -1))[1][2:] ** 2)
    expected = np.sum(flat**2) - np.sum(visible**2) + lost
    found = np.sum((np.asarray(jax.jit(codec.decode)(params), np.float64) - images) ** 2)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    np.testing.assert_allclose(np.mean(np.asarray(params["coefficients"]) ** 2, axis=0), 1, rtol=1e-4)


def test_memory_sgd_clips_the_norm_of_the_gradient():
    codec = make(MemorySpec(bases=2, images_per_class=2, optimizer="sgd", lr=0.1))
    params = {"coefficients": np.zeros((4, 2), np.float32), "bases": np.zeros((2, 3, 4, 3), np.float32)}
    grads = {"coefficients": np.full((4, 2), 3.0, np.float32), "bases": np.full((2, 3, 4, 3), 4.0, np.float32)}
    total = walked(codec.optimizer(), params, grads, steps=1)
    norm = np.sqrt(8 * 9 + 72 * 16)
    np.testing.assert_allclose(total["coefficients"], -0.1 * 3 * 2 / norm, rtol=1e-5)
    np.testing.assert_allclose(total["bases"], -0.1 * 4 * 2 / norm, rtol=1e-5)


# Spectral


def spectral_params(spec, classes=CLASSES) -> dict[str, np.ndarray]:
    ranks = (spec.rank_height, spec.rank_width, spec.rank_channels or 3)
    shapes = {"tensors": (classes * spec.images_per_class // spec.matrices, *ranks)}
    names = ("rows", "columns", "channels")
    shapes |= {name: (spec.matrices, length, rank) for name, length, rank in zip(names, SHAPE, ranks, strict=True)}
    return {name: noise(shape, seed) for seed, (name, shape) in enumerate(shapes.items())}


def test_spectral_combines_every_tensor_with_every_set_of_matrices():
    ranks = {"rank_height": 3, "rank_width": 4, "rank_channels": 2}
    spec = SpectralSpec(matrices=2, images_per_class=4, dtype="bfloat16", **ranks)
    params = spectral_params(spec)
    decoded = jax.jit(make(spec).decode)(params)
    shown = {name: as_bfloat16(x) for name, x in params.items()}
    for tensor, s in itertools.product(range(4), range(2)):
        image = np.tensordot(shown["rows"][s], shown["tensors"][tensor], (1, 0))  # h, q, r
        image = np.tensordot(image, shown["columns"][s], (1, 1))  # h, r, w
        image = np.tensordot(image, shown["channels"][s], (1, 1))  # h, w, c
        np.testing.assert_allclose(decoded[2 * tensor + s], spread_out(image), rtol=0, atol=2e-5)


def test_spectral_starts_at_the_higher_order_svd():
    spec = SpectralSpec(matrices=2, rank_height=3, rank_width=4, rank_channels=2, images_per_class=4)
    images = pictures(8)
    params = started(make(spec), images)
    targets = (images.astype(np.float64) - 0.5) / 0.25
    expected = targets.reshape(4, 2, *SHAPE).mean(1)
    for axis, (name, rank) in enumerate((("rows", 3), ("columns", 4), ("channels", 2)), start=1):
        directions = np.linalg.svd(np.moveaxis(targets, axis, 0).reshape(SHAPE[axis - 1], -1))[0][:, :rank]
        projection = directions @ directions.T
        for matrix in np.asarray(params[name]):
            # Directions are unique up to their signs.
            np.testing.assert_allclose(matrix @ matrix.T, projection, rtol=0, atol=1e-4)
        expected = np.moveaxis(np.tensordot(projection, expected, (1, axis)), 0, axis)
    decoded = np.asarray(jax.jit(make(spec).decode)(params)).reshape(4, 2, *SHAPE)
    for s in range(2):
        np.testing.assert_allclose(decoded[:, s], spread_out(expected), rtol=0, atol=1e-4)


# Learning rates of all


RANKS = {"matrices": 1, "rank_height": 2, "rank_width": 2, "images_per_class": 1}
MATRICES = ("rows", "columns", "channels")


def walked(transformation, params, grads, steps):
    """Returns where a constant gradient leads to in so many steps."""

    @jax.jit
    def walk(params):
        state = transformation.init(params)
        for _ in range(steps):
            updates, state = transformation.update(grads, state, params)
            params = jax.tree.map(jnp.add, params, updates)
        return params

    return walk(params)


@pytest.mark.parametrize(
    ("spec", "rates"),
    [
        (DownscaleSpec(lr=0.02, optimizer="sgd"), {"canvases": 0.02}),
        (FrequencySpec(lr=0.02, coefficients=3, optimizer="adam"), {"coefficients": 0.02, "index": 0.02}),
        (MemorySpec(lr=0.02, bases=2, lr_bases=3.0, optimizer="adam"), {"coefficients": 0.02, "bases": 0.06}),
        (
            SpectralSpec(lr=0.02, lr_matrices=0.5, optimizer="sgd", **RANKS),
            {"tensors": 0.02} | dict.fromkeys(MATRICES, 0.01),
        ),
    ],
)
def test_distillation_takes_the_configured_rate_of_each_leaf(spec, rates):
    codec = make(spec)
    shapes = jax.eval_shape(codec.init, jax.random.key(0), jnp.zeros((codec.num_images, *SHAPE)))
    params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)
    grads = {name: np.full(x.shape, 1e-3, np.float32) for name, x in params.items()}
    total = walked(codec.optimizer(), params, grads, steps=3)
    # Of a constant gradient, Adam takes its sign; momentum one half sums to 1 + 1.5 + 1.75.
    moved = 4.25e-3 if spec.optimizer == "sgd" else 3.0
    assert total.keys() == rates.keys()
    for name, rate in rates.items():
        np.testing.assert_allclose(total[name], -rate * moved, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize(
    ("spec", "rates"),
    [
        (DownscaleSpec(), {"canvases": downscale_codec.FIT_RATE}),
        (FrequencySpec(coefficients=3), {"coefficients": 0, "index": 0}),
        (MemorySpec(bases=2), {"coefficients": 0, "bases": 0}),
        (MemorySpec(bases=2, start="xavier"), dict.fromkeys(["coefficients", "bases"], memory_codec.FIT_RATE)),
        (
            SpectralSpec(**RANKS),
            {"tensors": spectral_codec.FIT_TENSORS} | dict.fromkeys(MATRICES, spectral_codec.FIT_MATRICES),
        ),
    ],
)
def test_fit_is_adam_on_a_cosine_where_the_start_is_not_the_solution(spec, rates):
    codec = make(spec)
    shapes = jax.eval_shape(codec.init, jax.random.key(0), jnp.zeros((codec.num_images, *SHAPE)))
    params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)
    total = walked(codec.fitter(4), params, jax.tree.map(np.ones_like, params), steps=4)
    cosine = sum(0.98 * 0.5 * (1 + np.cos(np.pi * t / 4)) + 0.02 for t in range(4))
    for name, rate in rates.items():
        np.testing.assert_allclose(total[name], -rate * cosine, rtol=1e-4, atol=1e-9, err_msg=name)
