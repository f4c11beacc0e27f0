"""DSA against float64 restatements in plain loops, and its contract: draws, Siamese sharing, transforms, gradients."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gsdd_jax import augment
from gsdd_jax.augment import FULL_STRATEGY, DsaSpec, cutmix, dsa

OPERATIONS = FULL_STRATEGY.split("_")
RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(3, 8, 8, 3)).astype(np.float32)
WIDE = RNG.normal(size=(2, 5, 9, 2)).astype(np.float32)


def only(name, **fields):
    return DsaSpec(strategy=name, **fields)


def run(spec, **settings):
    return jax.jit(lambda key, images: dsa(key, images, spec, **settings))


def coordinates(length, align_corners):
    """Where the pixels lie in [-1, 1] (PyTorch's affine_grid)."""
    if align_corners:
        return np.linspace(-1, 1, length)
    return (2 * np.arange(length) + 1) / length - 1


def to_pixel(value, length, align_corners):
    """PyTorch's grid_sample, back from [-1, 1] to pixel numbers."""
    return (value + 1) / 2 * (length - 1) if align_corners else ((value + 1) * length - 1) / 2


def grid_sample(image, matrix, align_corners):
    """Bilinear sampling with zero padding; the matrix acts on columns (x, y)."""
    h, w, c = image.shape
    out = np.zeros((h, w, c))
    for i, y in enumerate(coordinates(h, align_corners)):
        for j, x in enumerate(coordinates(w, align_corners)):
            px = to_pixel(matrix[0][0] * x + matrix[0][1] * y, w, align_corners)
            py = to_pixel(matrix[1][0] * x + matrix[1][1] * y, h, align_corners)
            for row, column in itertools.product(
                (math.floor(py), math.floor(py) + 1), (math.floor(px), math.floor(px) + 1)
            ):
                if 0 <= row < h and 0 <= column < w:
                    out[i, j] += image[row, column] * (1 - abs(py - row)) * (1 - abs(px - column))
    return out


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("images", [WIDE, WIDE.transpose(0, 2, 1, 3)], ids=["wide", "tall"])
def test_rotate_matches_grid_sampling(images, align_corners):
    theta = np.linspace(-0.26, 0.21, len(images)).astype(np.float32)
    out = jax.jit(augment.rotate, static_argnames="align_corners")(images, theta, align_corners=align_corners)
    for image, angle, result in zip(images, theta.astype(np.float64), out, strict=True):
        matrix = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
        np.testing.assert_allclose(result, grid_sample(image, matrix, align_corners), atol=5e-6)


@pytest.mark.parametrize("align_corners", [True, False])
def test_scale_matches_grid_sampling_for_either_align_corners(align_corners):
    factor = np.array([[1 / 1.2, 1.1], [1.2, 0.9]], np.float32)
    out = jax.jit(augment.scale)(WIDE, factor)
    for image, (sy, sx), result in zip(WIDE, factor.astype(np.float64), out, strict=True):
        np.testing.assert_allclose(result, grid_sample(image, [[sx, 0], [0, sy]], align_corners), atol=5e-6)


def test_color_matches_numpy():
    brightness, saturation, contrast = (np.array(v) for v in ([0.4, -0.5, 0.0], [0.0, 1.7, 1.0], [0.5, 1.4, 1.0]))
    out = jax.jit(augment.color)(IMAGES, brightness, saturation, contrast)
    for image, b, s, k, result in zip(IMAGES.astype(np.float64), brightness, saturation, contrast, out, strict=True):
        x = image + b
        gray = x.mean(2, keepdims=True)
        x = (x - gray) * s + gray
        np.testing.assert_allclose(result, (x - x.mean()) * k + x.mean(), atol=2e-6)
    np.testing.assert_allclose(out[2], IMAGES[2], atol=1e-6)


def test_crop_matches_numpy_for_every_shift():
    shifts = np.array(list(itertools.product((-2, -1, 0, 1, 2), (-1, 0, 1))), np.int32)
    images = np.broadcast_to(WIDE[:1], (len(shifts), *WIDE.shape[1:]))
    out = np.asarray(augment.crop(images, shifts, max_shift=(2, 1)))
    _, h, w, _ = images.shape
    for (ty, tx), result in zip(shifts, out, strict=True):
        for y, x in itertools.product(range(h), range(w)):
            inside = 0 <= y + ty < h and 0 <= x + tx < w
            np.testing.assert_array_equal(result[y, x], WIDE[0, y + ty, x + tx] if inside else 0)


def reference_cutout(image, center, size):
    """The authors' way: a grid of indices, clamped to the image."""
    out = image.copy()
    for i, j in itertools.product(range(size[0]), range(size[1])):
        row = min(max(i + center[0] - size[0] // 2, 0), image.shape[0] - 1)
        column = min(max(j + center[1] - size[1] // 2, 0), image.shape[1] - 1)
        out[row, column] = 0
    return out


@pytest.mark.parametrize("size", [(4, 4), (3, 5), (0, 0)])
def test_cutout_matches_the_clamped_indices_of_the_reference(size):
    h, w = WIDE.shape[1:3]
    centers = np.array(list(itertools.product(range(h + 1 - size[0] % 2), range(w + 1 - size[1] % 2))), np.int32)
    erase = jax.jit(augment.cutout, static_argnames="size")
    out = np.asarray(erase(np.broadcast_to(WIDE[:1], (len(centers), *WIDE.shape[1:])), centers, size=size))
    for center, result in zip(centers, out, strict=True):
        np.testing.assert_array_equal(result, reference_cutout(WIDE[0], center, size))


def test_cutout_erases_64_to_256_and_191_pixels_on_average_at_32():
    out = run(only("cutout"))(jax.random.key(0), np.ones((20_000, 32, 32, 1), np.float32))
    erased = 1024 - np.asarray(out.sum((1, 2, 3)))
    assert erased.min() == 64 and erased.max() == 256
    assert abs(erased.mean() - 190.95) < 1.5  # standard error 0.35


def test_flip_mirrors_the_width():
    out = augment.flip(IMAGES, np.array([True, False, True]))
    np.testing.assert_array_equal(out[0], IMAGES[0, :, ::-1])
    np.testing.assert_array_equal(out[1], IMAGES[1])
    np.testing.assert_array_equal(augment.flip(IMAGES, np.array(True)), IMAGES[:, :, ::-1])


def direct(name, n):
    """One operation with fixed parameters for each of `n` images, as a function of the images."""
    parameters = {
        "color": (np.array([0.3, -0.2, 0.1]), np.array([0.2, 1.5, 0.7]), np.array([0.6, 1.2, 1.4])),
        "crop": (np.array([[1, -1], [0, 1], [-1, 0]], np.int32),),
        "cutout": (np.array([[1, 7], [4, 4], [8, 0]], np.int32),),
        "flip": (np.array([True, False, True]),),
        "scale": (np.array([[0.85, 1.1], [1.2, 0.95], [1.0, 0.9]], np.float32),),
        "rotate": (np.array([0.26, -0.2, 0.05], np.float32),),
    }[name]
    parameters = [p[:n] for p in parameters]
    statics = {"crop": {"max_shift": (1, 1)}, "cutout": {"size": (4, 4)}}.get(name, {})
    return lambda x: getattr(augment, name)(x, *parameters, **statics)


@pytest.mark.parametrize("name", OPERATIONS)
def test_gradient_of_each_operation_matches_finite_differences(name):
    # Every operation is linear in the images up to a shift, so central differences are exact but for rounding.
    operation = direct(name, len(WIDE))
    weights, direction = np.asarray(RNG.normal(size=(2, *WIDE.shape)), np.float32)
    # One executable for the gradient and the values.
    both = jax.jit(jax.value_and_grad(lambda x: jnp.sum(operation(x) * weights)))
    full = np.asarray(both(WIDE)[1])
    slope = float(np.sum(full * direction))
    measured = float(both(WIDE + direction)[0] - both(WIDE - direction)[0]) / 2
    assert abs(measured) > 0.1
    np.testing.assert_allclose(slope, measured, atol=2e-4 * np.abs(weights).sum())
    for index in [(0, 0, 0, 0), (1, 3, 4, 1), (0, 4, 7, 0), (1, 2, 0, 1)]:
        unit = np.zeros_like(WIDE)
        unit[index] = 1
        measured = float(both(WIDE + unit)[0] - both(WIDE - unit)[0]) / 2
        np.testing.assert_allclose(full[index], measured, atol=2e-4)


@pytest.mark.parametrize("align_corners", [True, False])
def test_rotate_pullback_is_its_exact_transpose(align_corners):
    h, w = 4, 9
    basis = jnp.eye(h * w, dtype=jnp.float32).reshape(-1, h, w, 1)

    @jax.jit
    def matrices(theta):
        out, pull = jax.vjp(lambda x: augment.rotate(x, theta, align_corners=align_corners), basis)
        return out.reshape(h * w, h * w), pull(basis)[0].reshape(h * w, h * w)

    for theta in (0.0, 1e-7, 0.26, -0.26, 0.8, 3.0):
        matrix, pulled = matrices(jnp.float32(theta))
        assert np.abs(matrix).sum() > h * w / 2
        np.testing.assert_allclose(pulled, matrix.T, atol=1e-5)


@pytest.mark.parametrize("name", ["crop", "scale", "rotate"])
def test_no_gradient_scatters(name):
    grad = jax.grad(lambda x: jnp.sum(jnp.sin(direct(name, len(IMAGES))(x))))
    assert "scatter" not in jax.jit(grad).lower(IMAGES).as_text()


@pytest.mark.parametrize("name", OPERATIONS)
def test_dsa_draws_per_image_unless_siamese(name):
    same = np.broadcast_to(IMAGES[:1], (16, 8, 8, 3))
    separate = np.asarray(run(only(name))(jax.random.key(2), same))
    assert len(np.unique(separate.reshape(16, -1), axis=0)) >= 2
    together = run(only(name), siamese=True)
    few = together(jax.random.key(5), IMAGES)
    # Nor do they depend on the number of images.
    many = together(jax.random.key(5), np.concatenate([IMAGES[::-1], IMAGES]))
    np.testing.assert_allclose(few, many[3:], atol=1e-6)
    np.testing.assert_allclose(few, many[2::-1], atol=1e-6)


def draws(name, probe, count=4000):
    """Results of one operation on many copies of a probe image."""
    images = np.broadcast_to(np.asarray(probe, np.float32), (count, *probe.shape))
    return np.asarray(run(only(name))(jax.random.key(1), images), np.float64)


def test_color_draws_the_ranges_of_the_reference():
    # An image of 0 shows brightness alone: the mean of the image survives the other two steps.
    shift = draws("color", jnp.zeros((4, 4, 3))).mean((1, 2, 3))
    assert -0.5 <= shift.min() < -0.49 and 0.49 < shift.max() <= 0.5
    # Two gray pixels, 1 and -1, show contrast alone; one colored pixel shows the product of both factors.
    gray = draws("color", jnp.array([1.0, -1.0]).reshape(1, 2, 1) * jnp.ones(3))
    contrast = (gray[:, 0, 0] - gray[:, 0, 1])[:, 0] / 2
    assert 0.5 - 1e-6 <= contrast.min() < 0.51 and 1.49 < contrast.max() <= 1.5 + 1e-6
    colored = draws("color", jnp.array([1.0, 0.0, -1.0]).reshape(1, 1, 3))
    both = (colored[..., 0] - colored[..., 2])[:, 0, 0] / 2
    saturation = both / contrast
    assert -1e-6 <= saturation.min() < 0.02 and 1.98 < saturation.max() <= 2 + 1e-5


def test_crop_draws_every_shift_up_to_an_eighth():
    ramp = jnp.arange(1.0, 33.0)[:, None, None] * 100 + jnp.arange(1.0, 33.0)[None, :, None]
    center = draws("crop", ramp)[:, 15, 15, 0].astype(int)
    rows, columns = center // 100 - 16, center % 100 - 16
    assert set(rows) == set(columns) == set(range(-4, 5))


def test_flip_happens_half_of_the_time_it_is_drawn():
    left = draws("flip", jnp.array([1.0, 0.0]).reshape(1, 2, 1))[:, 0, 0, 0]
    assert abs(left.mean() - 0.5) < 0.04


def test_scale_and_rotate_draw_the_ranges_of_the_reference():
    # A ramp shows the slope of the sampling grid in the middle of the image.
    x = jnp.broadcast_to(jnp.arange(9.0)[None, :, None], (9, 9, 1))
    scaled, scaled_down = draws("scale", x), draws("scale", x.swapaxes(0, 1))
    sx = (scaled[:, 4, 5, 0] - scaled[:, 4, 3, 0]) / 2
    sy = (scaled_down[:, 5, 4, 0] - scaled_down[:, 3, 4, 0]) / 2
    for s in (sx, sy):
        assert 1 / 1.2 - 1e-5 <= s.min() < 0.84 and 1.19 < s.max() <= 1.2 + 1e-5
    assert abs(np.corrcoef(sx, sy)[0, 1]) < 0.06
    turned = draws("rotate", x)
    sine = (turned[:, 3, 4, 0] - turned[:, 5, 4, 0]) / 2
    degrees = np.degrees(np.arcsin(sine))
    assert -15.001 <= degrees.min() < -14.9 and 14.9 < degrees.max() <= 15.001


def test_every_operation_of_the_strategy_is_drawn_equally_often():
    image = jnp.asarray(IMAGES[:1])
    keys = jax.random.split(jax.random.key(0), 1200)
    # Flips always flip here, so that no operation can look like another.
    spec = DsaSpec(flip=1.0)
    out = jax.jit(lambda keys: jax.lax.map(lambda key: dsa(key, image, spec), keys))(keys)
    alone = [
        jax.jit(lambda keys, name=name: jax.lax.map(lambda key: dsa(key, image, only(name, flip=1.0)), keys))(keys)
        for name in OPERATIONS
    ]
    hits = np.stack([np.abs(np.asarray(out) - np.asarray(a)).max((1, 2, 3, 4)) < 1e-5 for a in alone])
    kinds = hits[:, hits.sum(0) == 1].sum(1)
    assert hits.any(0).all()
    assert np.all(np.abs(kinds / kinds.sum() - 1 / 6) < 0.05)  # standard error 0.011


def test_strategy_none_is_the_identity_and_strings_select_operations():
    assert dsa(jax.random.key(0), IMAGES, DsaSpec(strategy="none")) is IMAGES
    assert DsaSpec(strategy="color_crop_scale").operations == ("color", "crop", "scale")
    assert DsaSpec().operations == tuple(OPERATIONS)
    assert hash(DsaSpec()) == hash(dataclasses.replace(DsaSpec()))


@pytest.mark.parametrize("strategy", ["colour", "color_color", "none_flip"])
def test_strategy_that_names_no_operation_or_one_twice_is_refused(strategy):
    with pytest.raises(ValueError, match=f"strategy: '{strategy}', must be 'none' or some of .*'cutout'"):
        DsaSpec(strategy=strategy)


def test_images_of_wrong_rank_or_type_are_refused():
    with pytest.raises(ValueError, match=r"images: shape \(8, 8, 3\), must be \[n, h, w, c\]"):
        dsa(jax.random.key(0), IMAGES[0], DsaSpec())
    with pytest.raises(TypeError, match="images: uint8, must be floating point"):
        dsa(jax.random.key(0), np.zeros((1, 8, 8, 3), np.uint8), DsaSpec())


def test_cutmix_mixes_images_by_one_box_and_labels_by_its_area():
    n, height, width, keys = 5, 6, 9, 2000
    # Each pixel says whose it is, each label whose share.
    images = jnp.broadcast_to(jnp.arange(n, dtype=jnp.float32)[:, None, None, None], (n, height, width, 2))
    mix = jax.jit(jax.vmap(lambda key: cutmix(key, images, jnp.eye(n), 0.5)))
    mixed, labels = map(np.asarray, mix(jax.random.split(jax.random.key(0), keys)))
    np.testing.assert_allclose(labels.sum(2), 1, atol=1e-6)
    shares = np.stack([(mixed[..., 0] == i).mean((2, 3)) for i in range(n)], axis=2)
    np.testing.assert_allclose(labels, shares, atol=1e-6)
    foreign = mixed[..., 0] != np.arange(n)[:, None, None]
    boxes = foreign.any(1)
    rows, columns = boxes.any(2), boxes.any(1)
    np.testing.assert_array_equal(boxes, rows[:, :, None] & columns[:, None, :])
    # One box for all that another image falls on.
    np.testing.assert_array_equal(foreign, boxes[:, None] & foreign.any((2, 3))[:, :, None, None])
    # Mean share of foreign pixels, over the area, the center and the derangement of the batch.
    side, expected = np.sqrt((np.arange(4000) + 0.5) / 4000), 0.5 * (1 - 1 / n)
    inside = []
    for length in (height, width):
        half, center = (length * side).astype(int)[:, None] // 2, np.arange(length)
        inside.append((np.minimum(center + half, length) - np.maximum(center - half, 0)).mean(1) / length)
    assert foreign.mean() == pytest.approx(expected * np.mean(inside[0] * inside[1]), abs=0.012)  # three errors
