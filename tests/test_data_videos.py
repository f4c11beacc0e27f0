"""Videos and volumes: those made of the digits, clips, arrays and voxels. Files are written by the tests."""

import numpy as np
import pytest
from PIL import Image

from gsdd_jax.data import Dataset, DataSpec, digits, load

# --- made of the digits -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def moving() -> Dataset:
    pytest.importorskip("sklearn")
    return load(DataSpec(source="moving_digits"))


@pytest.fixture(scope="module")
def solid() -> Dataset:
    pytest.importorskip("sklearn")
    return load(DataSpec(source="solid_digits"))


def _frames(videos: np.ndarray) -> np.ndarray:
    # Noise is at most 16, and what is below is black but for edges.
    return np.maximum(videos[..., 0].astype(float) - 16, 0)


def test_moving_digits_have_the_split_and_the_classes_of_the_digits(moving: Dataset) -> None:
    still = load(DataSpec())
    assert moving.image_shape == (8, 16, 16, 1) and moving.train_images.dtype == np.uint8
    assert moving.class_names[:3] == ("0_left", "0_right", "1_left") and moving.num_classes == 20
    # The same bytes on every machine, and in the next version.
    assert moving.fingerprint() == "cc37b1adae13c8df90e8f736866e9d4bc02a04c043b1694303c6096b718fa222"
    known = np.concatenate([still.train_images, still.test_images])[..., 0].astype(float)
    known /= np.linalg.norm(known, axis=(1, 2), keepdims=True)
    spectra = np.fft.rfft2(known, (16, 16)).conj()
    for videos, labels, of, first in (
        (moving.train_images, moving.train_labels, still.train_labels, 0),
        (moving.test_images, moving.test_labels, still.test_labels, len(still.train_labels)),
    ):
        np.testing.assert_array_equal(labels, 2 * np.repeat(of, 2) + np.tile([0, 1], len(of)))
        # The sharpest frame looks like its own digit, at some place, more than like any other of the 1,797.
        some = np.arange(0, len(videos), 100)
        frames = _frames(videos[some])
        frames = frames[np.arange(len(some)), np.linalg.norm(frames, axis=(2, 3)).argmax(1)]
        likeness = np.fft.irfft2(np.fft.rfft2(frames)[:, None] * spectra, (16, 16)).max((2, 3))
        assert (likeness.argmax(1) == first + some // 2).mean() > 0.6


def test_moving_digits_move_at_one_speed_and_no_frame_tells_where_to(moving: Dataset) -> None:
    frames, left = _frames(moving.train_images), moving.train_labels % 2 == 0
    place = (frames.sum(2) * np.exp(2j * np.pi * np.arange(16) / 16)).sum(-1)
    place /= abs(place)
    speed = np.angle(place[:, 1:] / place[:, :-1]) * 16 / (2 * np.pi)
    assert (speed[left] < -0.5).all() and (speed[~left] > 0.5).all()
    assert np.ptp(speed, axis=1).mean() < 0.2
    assert 0.7 < abs(speed.mean(1)).min() < 0.85 and 1.4 < abs(speed.mean(1)).max() < 1.6
    height = (frames.sum(3) * np.arange(16)).sum(-1) / frames.sum((2, 3))
    assert np.ptp(height, axis=1).max() < 0.5
    # Positions of either direction are uniform over the ring in each frame: mean phases are those of chance.
    for direction in (left, ~left):
        chance = 1 / np.sqrt(direction.sum())
        assert abs(place[direction].mean(0)).max() < 3 * chance
        assert abs((place[direction] ** 2).mean(0)).max() < 3 * chance


def test_solid_digits_are_turned_extrusions(solid: Dataset) -> None:
    from scipy.ndimage import map_coordinates
    from scipy.spatial.transform import Rotation

    still = load(DataSpec())
    assert solid.image_shape == (16, 16, 16, 1) and solid.class_names == still.class_names
    assert solid.fingerprint() == "343bf9e4af151fc32636eb0955c8ffeee34f9e133e528fb3142f5c5066f0ebc0"
    np.testing.assert_array_equal(solid.test_labels, still.test_labels)
    turn, half, shift = np.array([0.1, -0.15, 0.05]), 2.3, np.array([0.5, -1.0, 0.25])
    image = still.train_images[3, ..., 0]
    found = digits._extruded(image, turn, half, shift)
    grid = np.stack(np.meshgrid(*[np.arange(16) - 7.5] * 3, indexing="ij"), -1) - shift
    rotation = Rotation.from_quat([*turn, 1])
    x, y, z = np.moveaxis(rotation.inv().apply(grid[..., ::-1].reshape(-1, 3)).reshape(grid.shape), -1, 0)
    plane = map_coordinates(np.pad(image.astype(float), 9), [y * 8 / 12 + 12.5, x * 8 / 12 + 12.5], order=1)
    np.testing.assert_allclose(found, plane * np.clip(half + 0.5 - abs(z), 0, 1), atol=0.02)
    # The shadow along the first axis shows the digit of that row, of 12 px.
    some = range(0, 500, 5)
    large = [Image.fromarray(still.test_images[i, ..., 0]).resize((12, 12), Image.Resampling.BILINEAR) for i in some]
    shadows = solid.test_images[some, ..., 0].mean(1).reshape(len(some), -1)
    likeness = np.corrcoef(shadows, np.pad(np.stack(large), ((0, 0), (2, 2), (2, 2))).reshape(len(some), -1))
    assert (likeness[: len(some), len(some) :].argmax(1) == np.arange(len(some))).mean() > 0.5


@pytest.mark.parametrize("source", ["moving_digits", "solid_digits"])
def test_fewer_of_what_is_made_of_the_digits_are_the_same_ones(source: str, request: pytest.FixtureRequest) -> None:
    every = request.getfixturevalue(source.split("_")[0])
    few = load(DataSpec(source=source, per_class=2, classes=every.class_names[3:0:-2], test_limit=5))  # type: ignore[arg-type]
    assert few.train_labels.tolist().count(0) == few.train_labels.tolist().count(1) == 2 and len(few.test_labels) == 5
    np.testing.assert_array_equal(
        few.train_images[few.train_labels == 0], every.train_images[every.train_labels == 3][:2]
    )
    half = load(DataSpec(source=source, per_class=1, resolution=8, channels=3, test_limit=1))
    assert half.image_shape == (every.image_shape[0], 8, 8, 3)
