"""The handwritten digits that scikit-learn ships, 8x8 pixels: as they are, as videos, as volumes. Needs no network."""

from collections.abc import Callable

import numpy as np

from gsdd_jax.data.arrays import array_split
from gsdd_jax.data.source import Source, draw
from gsdd_jax.errors import needing

TEST_IMAGES = 500
_SPLIT_SEED = 0
_SIDE = 8
# Of videos and volumes: pixels per side, and half the width of the noise, whose values are equally likely.
_CANVAS, _NOISE = 16, 16
FRAMES, SLICES = 8, 16
# Side of a digit within a volume.
_GLYPH = 12


def open_digits() -> Source:
    """Opens the digits as a source: 1,297 training and 500 test images, 8x8, one channel, ten classes.

    The original values 0 to 16 become uint8 by `round(v * 255 / 16)`. scikit-learn defines no split; ours is fixed:
    each class gives its share of the 500 test images (48 to 51, by largest remainder), drawn with a seeded generator.
    The writers of training and test images overlap, as they do in every random split of this set.
    """
    return _open("digits", lambda images, labels: (images[..., None], labels, tuple(map(str, range(10)))))


def open_moving_digits() -> Source:
    """Opens videos of the digits: 8 frames of 16x16, one channel; a class is a digit and a direction, 20 in all.

    Each digit moves once to the left and once to the right: 2,594 training videos, 1,000 test videos, and the digits of
    the test videos are those of `open_digits`. Speeds are uniform in [0.75, 1.5) px per frame; pixels between those of
    the digit are interpolated linearly. What leaves on one side comes back on the other, and starts are uniform over
    the 16 columns: in every frame, positions are distributed alike in both directions, so that no frame by itself tells
    the direction. Rows are uniform over what the canvas has room for. Noise is a whole number from -16 to 16.

    All arithmetic is exact, so the pixels are the same on every machine.
    """
    return _open("moving_digits", _moving)


def open_solid_digits() -> Source:
    """Opens volumes of the digits: 16 slices of 16x16, one channel; a class is a digit, ten in all.

    1,297 training and 500 test volumes, one of each digit of `open_digits`. A digit is enlarged to 12 px, extruded to a
    thickness uniform in [3, 7) slices, turned in space by quaternions ``(1, a, b, c)`` with a, b and c uniform in
    ±0.15 (about each axis by up to some 17 degrees), and shifted along each axis by up to a voxel. Values are
    interpolated linearly; noise is a whole number from -16 to 16.
    """
    return _open("solid_digits", _solid)


_Made = tuple[np.ndarray, np.ndarray, tuple[str, ...]]


def _open(name: str, make: Callable[[np.ndarray, np.ndarray], _Made]) -> Source:
    """Opens what is made of the digits, as many of each, one after the other."""
    with needing(f"data.source {name!r} needs scikit-learn", extra="full"):
        from sklearn.datasets import load_digits

    values, target = load_digits(return_X_y=True)
    images = np.round(values.reshape(-1, _SIDE, _SIDE) * (255 / 16)).astype(np.uint8)
    test = _stratified_choice(target, TEST_IMAGES)
    made, labels, class_names = make(images, target.astype(np.int32))
    test = np.repeat(test, len(made) // len(test))
    return Source(
        name=name,
        class_names=class_names,
        channels=1,
        train=array_split(f"{name} train split", made[~test], labels[~test]),
        test=array_split(f"{name} test split", made[test], labels[test]),
    )


def _stratified_choice(labels: np.ndarray, total: int) -> np.ndarray:
    count = np.bincount(labels)
    share = total * count / count.sum()
    take = np.floor(share).astype(int)
    take[np.argsort(take - share, kind="stable")[: total - take.sum()]] += 1
    return draw(labels, take, _SPLIT_SEED)


def _moving(images: np.ndarray, labels: np.ndarray) -> _Made:
    random = np.random.RandomState(_SPLIT_SEED)
    digit, sign = np.repeat(images, 2, 0), np.tile([-1, 1], len(images))
    # In 256ths of a pixel: sums and products of such numbers and of whole values are exact.
    start = random.randint(0, 256 * _CANVAS, len(sign))
    speed = random.randint(192, 384, len(sign))
    top = random.randint(0, 256 * (_CANVAS - _SIDE) + 1, len(sign)) / 256
    left = (start + (sign * speed) * np.arange(FRAMES)[:, None]).T % (256 * _CANVAS) / 256
    rows = _hats(np.arange(_CANVAS)[:, None] - top[:, None, None] - np.arange(_SIDE))
    # The nearest way from a column of the digit to one of the canvas, which closes to a ring.
    away = np.arange(_CANVAS)[:, None] - left[..., None, None] - np.arange(_SIDE)
    columns = _hats((away + _CANVAS / 2) % _CANVAS - _CANVAS / 2)
    # Of at most two terms each, whatever their order.
    frames = (rows @ digit)[:, None] @ columns.swapaxes(-1, -2)
    names = tuple(f"{d}_{way}" for d in range(10) for way in ("left", "right"))
    return _noisy(frames, random), (2 * np.repeat(labels, 2) + np.tile([0, 1], len(labels))).astype(np.int32), names


def _solid(images: np.ndarray, labels: np.ndarray) -> _Made:
    random = np.random.RandomState(_SPLIT_SEED)
    turns = random.randint(-300, 301, (len(images), 3)) / 2000
    half = random.randint(1500, 3500, len(images)) / 1000
    shifts = random.randint(-1000, 1001, (len(images), 3)) / 1000
    volumes = np.stack([_extruded(*each) for each in zip(images, turns, half, shifts, strict=True)])
    return _noisy(volumes, random), labels, tuple(map(str, range(10)))


def _extruded(image: np.ndarray, turn: np.ndarray, half: float, shift: np.ndarray) -> np.ndarray:
    """Returns [SLICES, _CANVAS, _CANVAS], a digit as a body of `2 * half` slices."""
    z, y, x = np.ogrid[:SLICES, :_CANVAS, :_CANVAS]
    z, y, x = (axis - (axis.size - 1) / 2 - by for axis, by in zip((z, y, x), shift, strict=True))
    # The inverse rotation, from the canvas to the digit; written out, so that sums have the same order everywhere.
    a, b, c = turn
    norm = 1 + a * a + b * b + c * c
    u = (1 + a * a - b * b - c * c) / norm * x + 2 * (a * b + c) / norm * y + 2 * (a * c - b) / norm * z
    v = 2 * (a * b - c) / norm * x + (1 - a * a + b * b - c * c) / norm * y + 2 * (b * c + a) / norm * z
    w = 2 * (a * c + b) / norm * x + 2 * (b * c - a) / norm * y + (1 - a * a - b * b + c * c) / norm * z
    # With a black margin, on which lies all that is outside.
    plane = np.pad(image, 1).astype(float)
    column, row = (np.clip(at * (_SIDE / _GLYPH) + (_SIDE + 1) / 2, 0, _SIDE + 1 - 1e-6) for at in (u, v))
    j, i = column.astype(int), row.astype(int)
    right, down = column - j, row - i
    above = plane[i, j] * (1 - right) + plane[i, j + 1] * right
    below = plane[i + 1, j] * (1 - right) + plane[i + 1, j + 1] * right
    return (above * (1 - down) + below * down) * np.clip(half + 0.5 - abs(w), 0, 1)


def _hats(distance: np.ndarray) -> np.ndarray:
    """Weights of linear interpolation over distances in pixels."""
    return np.maximum(0, 1 - abs(distance))


def _noisy(values: np.ndarray, random: np.random.RandomState) -> np.ndarray:
    noise = random.randint(-_NOISE, _NOISE + 1, values.shape)
    return np.clip(np.round(values) + noise, 0, 255).astype(np.uint8)[..., None]
