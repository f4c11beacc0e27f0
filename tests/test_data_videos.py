"""Videos and volumes: those made of the digits, clips, arrays and voxels. Files are written by the tests."""

import dataclasses
import itertools
import re
import shutil
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gsdd_jax import data
from gsdd_jax.data import Dataset, DataSpec, HostSampler, digits, load
from gsdd_jax.data.decode import Converter
from gsdd_jax.errors import InputError

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
    assert (likeness[: len(some), len(some) :].argmax(1) == np.arange(len(some))).mean() > 0.3


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


# --- clips --------------------------------------------------------------------------------------------------


def _ramp(frames: int, *, first: int = 0, size: tuple[int, int] = (16, 16)) -> np.ndarray:
    """[frames, h, w, 3]: red says which frame it is, green rises to the right, blue downwards."""
    h, w = size
    video = np.zeros((frames, h, w, 3), np.uint8)
    video[..., 0] = (np.arange(frames) + first)[:, None, None] * 8
    video[..., 1] = np.linspace(0, 255, w)
    video[..., 2] = np.linspace(0, 255, h)[:, None]
    return video


def _write_frames(folder: Path, video: np.ndarray, name: str = "frame{:06d}.png") -> None:
    folder.mkdir(parents=True)
    for number, frame in enumerate(video, 1):
        Image.fromarray(frame.squeeze()).save(folder / name.format(number))


def _write_animation(file: Path, video: np.ndarray, **options: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    first, *others = [Image.fromarray(frame) for frame in video]
    first.save(file, save_all=True, append_images=others, **options)


def _write_video(file: Path, video: np.ndarray, codec: str = "ffv1", pixels: str = "bgr0", **options: str) -> None:
    av = pytest.importorskip("av", reason="PyAV is not installed, the extra video has it")
    file.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(file), "w") as container:
        stream = container.add_stream(codec, rate=10, options=options)
        stream.height, stream.width, stream.pix_fmt = *video.shape[1:3], pixels
        for frame in video:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def _clips(root: Path, **settings: Any) -> DataSpec:
    return DataSpec(source="clips", path=str(root), **settings)


def test_folders_of_frames_are_clips_and_every_third_frame_is_taken(tmp_path: Path) -> None:
    _write_frames(tmp_path / "train" / "b" / "late", _ramp(24, first=4))
    _write_frames(tmp_path / "train" / "b" / "deep" / "early", _ramp(22))
    # Names without leading zeros: frame2 comes before frame10.
    _write_frames(tmp_path / "train" / "a" / "v_Archery_g01", _ramp(30, first=1), "frame{}.png")
    _write_frames(tmp_path / "test" / "a" / "t", _ramp(22))
    found = load(_clips(tmp_path, frames=8, frame_step=3))
    assert found.class_names == ("a", "b") and found.train_labels.tolist() == [0, 1, 1]
    # Frames 1, 4, ..., 22 of a clip.
    for clip, first in zip(found.train_images, (1, 0, 4), strict=True):
        np.testing.assert_array_equal(clip, _ramp(30, first=first)[[0, 3, 6, 9, 12, 15, 18, 21]])
    # Frames are converted as images are, and records that are read on access are the same.
    spec = _clips(tmp_path, frames=2, resolution=8, channels=1, resize="squash")
    convert = Converter(resolution=8, resize="squash", channels=1)
    expected = [[convert(Image.fromarray(frame)) for frame in _ramp(2, first=first)] for first in (1, 0, 4)]
    np.testing.assert_array_equal(load(spec).train_images, expected)
    records, labels, _ = data.records(spec)
    np.testing.assert_array_equal(records[2]["image"], expected[2])
    sampler = HostSampler(records, labels, num_classes=2, batch=2, seed=0)
    np.testing.assert_array_equal(sampler.batch(3), np.array(expected)[sampler.indices(3)])
    # All frames, of as many in each clip.
    for folder in tmp_path.rglob("*/frame*.png"):
        if int(folder.stem.removeprefix("frame")) > 22:
            folder.unlink()
    np.testing.assert_array_equal(load(_clips(tmp_path)).test_images, [_ramp(22)])
    assert load(_clips(tmp_path, frame_step=11)).image_shape == (2, 16, 16, 3)


def test_animations_are_clips(tmp_path: Path) -> None:
    _write_animation(tmp_path / "train" / "a" / "1.webp", _ramp(5), lossless=True)
    # Few colors, which a palette holds.
    coarse = _ramp(5, size=(4, 4))
    _write_animation(tmp_path / "train" / "a" / "2.gif", np.kron(coarse, np.ones((1, 4, 4, 1), np.uint8)))
    _write_animation(tmp_path / "test" / "a" / "t.webp", _ramp(9), lossless=True)
    found = load(_clips(tmp_path, frames=3, frame_step=2))
    np.testing.assert_array_equal(found.train_images[0], _ramp(5)[::2])
    assert abs(found.train_images[1][:, ::4, ::4].astype(int) - coarse[::2]).max() <= 4
    np.testing.assert_array_equal(found.test_images[0], _ramp(9)[:5:2])


def test_gray_clips_have_one_channel(tmp_path: Path) -> None:
    video = _ramp(3)
    for split in ("train", "test"):
        _write_frames(tmp_path / split / "a" / "x", video[..., 1:2])
    found = load(_clips(tmp_path))
    np.testing.assert_array_equal(found.train_images[0], video[..., 1:2])
    Image.fromarray(video[2]).save(tmp_path / "test" / "a" / "x" / "frame000003.png")
    assert load(_clips(tmp_path)).image_shape == (3, 16, 16, 3)


def test_transparent_clips_are_counted_once_each(tmp_path: Path) -> None:
    alpha = np.concatenate([_ramp(3), np.zeros((3, 16, 16, 1), np.uint8)], -1)
    _write_frames(tmp_path / "train" / "a" / "x", alpha)
    _write_frames(tmp_path / "test" / "a" / "x", _ramp(3))
    with pytest.warns(data.DataNotice, match="1 of 2 clips have transparent pixels, composited on black .*1 of them"):
        assert (load(_clips(tmp_path, background="black")).train_images == 0).all()


@pytest.mark.parametrize(
    ("form", "codec", "pixels"), [("avi", "ffv1", "bgr0"), ("mkv", "ffv1", "bgr0"), ("mov", "png", "rgb24")]
)
def test_files_of_videos_are_clips_to_the_pixel(tmp_path: Path, form: str, codec: str, pixels: str) -> None:
    for split, first in (("train", 0), ("test", 5)):
        _write_video(tmp_path / split / "a" / f"x.{form.upper()}", _ramp(10, first=first), codec, pixels)
    _write_frames(tmp_path / "train" / "a" / "y", _ramp(10, first=3))
    found = load(_clips(tmp_path, frames=4, frame_step=3))
    for clip, first in zip([*found.train_images, *found.test_images], (0, 3, 5), strict=True):
        np.testing.assert_array_equal(clip, _ramp(10, first=first)[::3])
    assert load(_clips(tmp_path)).image_shape == (10, 16, 16, 3)


def test_lossy_videos_come_close(tmp_path: Path) -> None:
    for split in ("train", "test"):
        _write_video(tmp_path / split / "a" / "x.mp4", _ramp(6, size=(32, 32)), "mpeg4", "yuv420p", qmin="1", qmax="1")
    found = load(_clips(tmp_path)).train_images[0]
    assert found.shape == (6, 32, 32, 3) and abs(found.astype(int) - _ramp(6, size=(32, 32))).mean() < 5


def test_videos_are_turned_upright(tmp_path: Path) -> None:
    video = np.zeros((2, 16, 32, 3), np.uint8)
    video[:, :, :16] = 255
    file = tmp_path / "train" / "a" / "x.mp4"
    _write_video(file, video, "mpeg4", "yuv420p", qmin="1", qmax="1")
    # The matrix of the track header, by hand: to be shown turned by 90 degrees clockwise.
    content = file.read_bytes()
    at = content.index(b"tkhd") + 4 + 4 + 20 + 8 + 8
    assert content[at : at + 36] == struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    turned = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 16 << 16, 0, 1 << 30)
    (tmp_path / "test" / "a").mkdir(parents=True)
    for split in ("train", "test"):
        (tmp_path / split / "a" / "x.mp4").write_bytes(content[:at] + turned + content[at + 36 :])
    found = load(_clips(tmp_path)).train_images[0, 0]
    # What was left is up.
    assert found.shape == (32, 16, 3) and found[:12].min() > 200 and found[20:].max() < 50


def test_clips_that_cannot_be_read_are_named_or_left_out(tmp_path: Path) -> None:
    _write_frames(tmp_path / "train" / "a" / "good", _ramp(6))
    _write_frames(tmp_path / "test" / "a" / "good", _ramp(6))
    _write_frames(tmp_path / "train" / "a" / "short", _ramp(3))
    _write_frames(tmp_path / "train" / "a" / "broken", _ramp(6))
    (tmp_path / "train" / "a" / "broken" / "frame000003.png").write_bytes(b"no image")
    _write_frames(tmp_path / "train" / "a" / "grows", _ramp(6))
    Image.new("RGB", (8, 16)).save(tmp_path / "train" / "a" / "grows" / "frame000003.png")
    _write_animation(tmp_path / "train" / "a" / "short.gif", _ramp(2))
    (tmp_path / "train" / "a" / "text.webp").write_bytes(b"<html>")
    spec, reasons = (
        _clips(tmp_path, frames=3, frame_step=2),
        {
            "short": "3 frames, data.frames 3 at data.frame_step 2 needs 5",
            "broken": "frame000003.png: no image that Pillow knows",
            "grows": "frame000003.png is 16x8, frame000001.png is 16x16",
            "short.gif": "2 frames, data.frames 3 at data.frame_step 2 needs 5",
            "text.webp": "no image that Pillow knows",
        },
    )
    with pytest.raises(InputError, match="5 of 7 clips cannot be read") as caught:
        load(spec)
    for name, reason in reasons.items():
        assert f"{tmp_path / 'train' / 'a' / name} ({reason})" in str(caught.value)
    with pytest.warns(data.DataNotice, match="left out 5 of 7 clips"):
        assert len(load(dataclasses.replace(spec, unreadable="skip")).train_images) == 1


def test_videos_that_cannot_be_read_are_named_with_the_reason_of_the_decoder(tmp_path: Path) -> None:
    _write_video(tmp_path / "train" / "a" / "good.mkv", _ramp(6))
    _write_video(tmp_path / "test" / "a" / "good.mkv", _ramp(6))
    _write_video(tmp_path / "train" / "a" / "short.mkv", _ramp(4))
    whole = (tmp_path / "train" / "a" / "good.mkv").read_bytes()
    (tmp_path / "train" / "a" / "text.mp4").write_bytes(b"<html>not found</html>" * 50)
    (tmp_path / "train" / "a" / "empty.avi").write_bytes(b"")
    (tmp_path / "train" / "a" / "half.mkv").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "train" / "a" / "link.mp4").symlink_to(tmp_path / "absent.mp4")
    # A hole in the second half of the data.
    noise = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8).repeat(8, 1).repeat(8, 2)
    _write_video(tmp_path / "train" / "a" / "hole.avi", noise, "mpeg4", "yuv420p")
    whole = (tmp_path / "train" / "a" / "hole.avi").read_bytes()
    at = whole.index(b"movi") + (whole.index(b"idx1") - whole.index(b"movi")) // 2
    (tmp_path / "train" / "a" / "hole.avi").write_bytes(whole[:at] + bytes(200) + whole[at + 200 :])
    with pytest.raises(InputError, match="6 of 8 clips cannot be read") as caught:
        load(_clips(tmp_path, frames=5))
    for name, reason in (
        ("text.mp4", "Invalid data found when processing input"),
        ("empty.avi", "Invalid data found when processing input"),
        ("half.mkv", ""),
        ("hole.avi", "frame 2 is damaged"),
        ("short.mkv", "4 frames, data.frames 5 at data.frame_step 1 needs 5"),
        ("link.mp4", "a link to a file that is not there"),
    ):
        assert f"{name} ({reason}" in str(caught.value)
    with pytest.raises(InputError, match=r"good.mkv \(16x16 = 256 pixels, data.max_pixels allows 255\)"):
        load(_clips(tmp_path, max_pixels=255))


def test_a_video_without_pyav_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    _write_frames(tmp_path / "train" / "a" / "x", _ramp(2))
    (tmp_path / "train" / "a" / "y.mp4").write_bytes(b"")
    with pytest.raises(ImportError, match=r"needs PyAV for .*y\.mp4: pip install gsdd_jax\[video\]"):
        load(_clips(tmp_path))
    (tmp_path / "train" / "a" / "y.mp4").unlink()
    _write_frames(tmp_path / "test" / "a" / "x", _ramp(2))
    assert load(_clips(tmp_path)).image_shape == (2, 16, 16, 3)


def test_clips_of_several_lengths_or_sizes_say_which_setting_they_need(tmp_path: Path) -> None:
    _write_frames(tmp_path / "train" / "a" / "x", _ramp(4))
    _write_frames(tmp_path / "train" / "a" / "y", _ramp(5))
    _write_frames(tmp_path / "test" / "a" / "x", _ramp(4, size=(8, 16)))
    with pytest.raises(InputError, match=r"y is 5x16x16, .*x is 4x16x16; clips of several lengths need data\.frames"):
        load(_clips(tmp_path))
    with pytest.raises(
        InputError, match=r"training images are \[4, 16, 16, 3\], test images \[4, 8, 16, 3\]; set data"
    ):
        load(_clips(tmp_path, frames=4))
    assert load(_clips(tmp_path, frames=4, resolution=8)).image_shape == (4, 8, 8, 3)


def test_what_is_no_clip_is_counted_or_refused(tmp_path: Path) -> None:
    for split in ("train", "test"):
        _write_frames(tmp_path / split / "a" / "x", _ramp(2))
    (tmp_path / "train" / "a" / "x" / "times.txt").write_text("0 1")
    Image.fromarray(_ramp(1)[0]).save(tmp_path / "train" / "a" / "poster.png")
    with pytest.warns(data.DataNotice, match=r"passed over 2 files that belong to no clips .*\(1 \.png, 1 \.txt\)"):
        assert len(load(_clips(tmp_path)).train_images) == 1
    (tmp_path / "train" / "b").mkdir()
    Image.fromarray(_ramp(1)[0]).save(tmp_path / "train" / "b" / "still.png")
    with pytest.raises(InputError, match=r"b has no clips but 1 other files, such as still.png; expected clips: files"):
        load(_clips(tmp_path))


def test_clips_are_split_by_class_and_classes_may_hold_the_splits(tmp_path: Path) -> None:
    for name, number in (("a", 5), ("b", 10)):
        for i in range(number):
            _write_frames(tmp_path / name / f"{i}", _ramp(1, first=i))
    found = load(_clips(tmp_path, test_fraction=0.2))
    assert np.bincount(found.train_labels).tolist() == [4, 8] and np.bincount(found.test_labels).tolist() == [1, 2]
    for name in "ab":
        for split, clips in (("train", "0124"), ("val", "3")):
            (tmp_path / name / split).mkdir()
            for clip in clips:
                (tmp_path / name / clip).rename(tmp_path / name / split / clip)
    found = load(_clips(tmp_path))
    assert (found.train_images[:, 0, 0, 0, 0] // 8).tolist() == [0, 1, 2, 4] * 2
    assert (found.test_images[:, 0, 0, 0, 0] // 8).tolist() == [3] * 2
    shutil.rmtree(tmp_path / "b" / "train")
    with pytest.raises(InputError, match="has class 'b', which .* does not have"):
        load(_clips(tmp_path))


def test_lists_of_ucf101_are_read_as_they_come(tmp_path: Path) -> None:
    for name, first in (("Archery/v_Archery_g08_c01", 1), ("Archery/v_Archery_g01_c01", 2), ("Bowl/v_Bowl_g09_c02", 3)):
        _write_animation(tmp_path / "UCF-101" / f"{name}.webp", _ramp(2, first=first), lossless=True)
    (tmp_path / "lists").mkdir()
    train, test = (tmp_path / "lists" / name for name in ("trainlist01.txt", "testlist01.txt"))
    train.write_text("Bowl/v_Bowl_g09_c02.webp 2\r\nArchery/v_Archery_g08_c01.webp 1\r\n")
    test.write_text("Archery/v_Archery_g01_c01.webp\n\n")
    spec = _clips(tmp_path, train_split="lists/trainlist01.txt", test_split="lists/testlist01.txt")
    found = load(spec)
    assert found.class_names == ("Archery", "Bowl") and found.test_labels.tolist() == [0]
    np.testing.assert_array_equal(found.train_images, [_ramp(2, first=1), _ramp(2, first=3)])
    np.testing.assert_array_equal(found.test_images, [_ramp(2, first=2)])
    test.write_text("Archery/v_Archery_g01_c01.webp\nArchery/v_Archery_g02_c01.webp\n")
    with pytest.raises(InputError, match=r"testlist01\.txt, line 2: .*_g02_c01\.webp' names 0 clips in"):
        load(spec)
    test.write_text("")
    with pytest.raises(InputError, match=r"testlist01\.txt lists no clips of test or val or validation"):
        load(spec)


def test_a_table_of_folders_of_frames_is_read_as_it_comes(tmp_path: Path) -> None:
    rows = [("v_b_1", "b", "train"), ("v_a_1", "a", "train"), ("v_a_2", "a", "test"), ("v_b_2", "b", "validation")]
    for first, (name, _, _) in enumerate(rows):
        _write_frames(tmp_path / "jpegs_112" / name, _ramp(2, first=first))
    table = tmp_path / "splits.csv"
    table.write_text("folder_name,label,split\n" + "".join(f"{','.join(row)}\n" for row in rows))
    spec = _clips(tmp_path, train_split="splits.csv", test_split="splits.csv")
    found = load(spec)
    assert found.class_names == ("a", "b") and found.test_labels.tolist() == [0, 1]
    np.testing.assert_array_equal(found.train_images, [_ramp(2, first=1), _ramp(2, first=0)])
    np.testing.assert_array_equal(found.test_images, [_ramp(2, first=2), _ramp(2, first=3)])
    shutil.copytree(tmp_path / "jpegs_112", tmp_path / "jpegs_256")
    with pytest.raises(InputError, match=r"splits\.csv, line 2: expected one of a class, 'v_b_1' names 2 clips in"):
        load(spec)
    table.write_text("name,label\nv_b_1,b\n")
    with pytest.raises(InputError, match="expected columns folder_name, label and perhaps split, found name,label"):
        load(spec)


# --- volumes ------------------------------------------------------------------------------------------------


def _binvox(voxels: np.ndarray) -> bytes:
    """A file of bool [x, y, z], one run after the other as the format says, none longer than 255."""
    depth, width, height = voxels.shape
    stored = [bool(voxels[x, y, z]) for x in range(depth) for z in range(height) for y in range(width)]
    body = bytearray()
    for value, run in itertools.groupby(stored):
        left = len(list(run))
        while left:
            body += bytes([value, min(left, 255)])
            left -= body[-1]
    head = f"#binvox 1\ndim {depth} {height} {width}\ntranslate -0.5 0 1e-3\nscale 1.5\ndata\n"
    return head.encode() + bytes(body)


def test_voxels_are_read_in_the_layout_of_modelnet(tmp_path: Path) -> None:
    random, volumes = np.random.default_rng(0), {}
    for name, split in itertools.product(("desk", "chair"), ("train", "test")):
        volumes[name, split] = random.random((4, 5, 6)) < 0.3
        (tmp_path / name / split).mkdir(parents=True)
        (tmp_path / name / split / f"{name}_1.binvox").write_bytes(_binvox(volumes[name, split]))
    spec = DataSpec(source="volumes", path=str(tmp_path))
    found = load(spec)
    assert found.class_names == ("chair", "desk") and found.image_shape == (6, 5, 4, 1)
    for split, images in (("train", found.train_images), ("test", found.test_images)):
        expected = [volumes[name, split].transpose(2, 1, 0)[..., None] * np.uint8(255) for name in found.class_names]
        np.testing.assert_array_equal(images, expected)
    # An empty one and a full one have long runs; slices are resized, and stay as many.
    for name, value in (("desk", False), ("chair", True)):
        (tmp_path / name / "train" / f"{name}_1.binvox").write_bytes(_binvox(np.full((4, 5, 6), value)))
    small = load(dataclasses.replace(spec, resolution=3))
    assert small.image_shape == (6, 3, 3, 1) and (small.train_images[1] == 0).all()
    assert (small.train_images[0] == 255).all()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"no", 'no binvox file: expected "#binvox 1"'),
        (b"#binvox 2\ndim 1 1 1\ndata\n\1\1", "no binvox file"),
        (b"#binvox 1\ndim 1 1\ndata\n\1\1", 'expected a line "dim d h w" of whole numbers from 1, found 1 1'),
        (b"#binvox 1\ndim 0 1 1\ndata\n", 'expected a line "dim d h w" of whole numbers from 1, found 0 1 1'),
        (b"#binvox 1\ntranslate 0 0 0\ndata\n\1\1", 'expected a line "dim d h w" of whole numbers from 1, found none'),
        (b"#binvox 1\ndim 2 2 2\ndata\n\1\7", "runs of 7 voxels, expected 2x2x2 = 8"),
        (b"#binvox 1\ndim 2 2 2\ndata\n\1\10\1", "ends within a run"),
        (b"#binvox 1\ndim 2 2 2\ndata\n\3\10", "voxel 3, expected 0 or 1"),
        (b"#binvox 1\ndim 99999 99999 99999\ndata\n\1\1", "99999x99999x99999 = 999970000299999 pixels"),
    ],
)
def test_voxels_that_cannot_be_read_say_why(tmp_path: Path, content: bytes, reason: str) -> None:
    for split in ("train", "test"):
        (tmp_path / split / "a").mkdir(parents=True)
        (tmp_path / split / "a" / "x.binvox").write_bytes(_binvox(np.ones((2, 2, 2), bool)))
    (tmp_path / "train" / "a" / "y.binvox").write_bytes(content)
    with pytest.raises(InputError, match=rf"1 of 3 volumes cannot be read: .*y\.binvox \({re.escape(reason)}"):
        load(DataSpec(source="volumes", path=str(tmp_path)))


# --- arrays -------------------------------------------------------------------------------------------------


def _npz(folder: Path, shape: tuple[int, ...], **changes: Any) -> tuple[DataSpec, dict[str, np.ndarray]]:
    random = np.random.default_rng(0)
    arrays = {
        "train_images": random.integers(0, 256, (4, *shape), np.uint8),
        "train_labels": np.array([0, 1, 1, 0]),
        "test_images": random.integers(0, 256, (2, *shape), np.uint8),
        "test_labels": np.array([1, 0]),
    } | changes
    np.savez(folder / "some.npz", **{name: array for name, array in arrays.items() if array is not None})
    return DataSpec(source="arrays", path=str(folder / "some.npz")), arrays


@pytest.mark.parametrize("shape", [(6, 5, 3), (3, 6, 5, 1)])
def test_arrays_are_read_as_they_are_in_either_form(tmp_path: Path, shape: tuple[int, ...]) -> None:
    spec, arrays = _npz(tmp_path, shape, class_names=np.array(["x", "y"]))
    found = load(spec)
    assert found.name == "some" and found.class_names == ("x", "y") and found.image_shape == shape
    for name in arrays.keys() - {"class_names"}:
        np.testing.assert_array_equal(getattr(found, name), arrays[name])
    floats = {name: (arrays[name] / 255).astype(np.float16) for name in ("train_images", "test_images")}
    again = load(_npz(tmp_path, shape, **floats)[0])
    assert again.class_names == ("0", "1")
    assert abs(again.train_images.astype(int) - arrays["train_images"]).max() <= 1
    few = load(dataclasses.replace(spec, resolution=3, channels=3, classes=("1",), per_class=1))
    assert few.train_images.shape == (1, *shape[:-3], 3, 3, 3) and len(few.test_images) == 1
    spec, arrays = _npz(tmp_path, shape, test_images=None, test_labels=None)
    assert np.bincount(load(dataclasses.replace(spec, test_fraction=0.5)).test_labels).tolist() == [1, 1]


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        ({"test_labels": None}, {}, "has no array 'test_labels'; found train_images, "),
        ({"train_images": np.zeros((4, 2, 2, 3), int)}, {}, "train_images: found int64 of shape"),
        ({"train_images": np.full((4, 2, 2, 3), 2.0)}, {}, "train_images: found float64 from 2 to 2"),
        ({"train_images": np.zeros((4, 2, 2, 2))}, {}, "train_images must have 1 or 3 channels"),
        ({"train_labels": np.zeros(3, int)}, {}, r"train_labels must be integers of shape \[4\], found int64 \[3\]"),
        ({"train_labels": np.array([0, 1, 1, -1])}, {}, "train_labels must be at least 0, found -1 to 1"),
        ({"test_labels": np.array([0, 2])}, {}, r"test split of .*: label 2 is out of range; allowed: 0 to 1"),
        ({"class_names": np.array([1, 2])}, {}, r"class_names must be strings of shape \[k\], found int64 \[2\]"),
        ({"class_names": np.array(["a", None], object)}, {}, r"expected an .npz file of plain arrays, found .*pickle"),
        ({}, {"test_fraction": 0.5}, "data.test_fraction: .* has test_images; expected 0"),
    ],
)
def test_arrays_that_do_not_fit_are_explained(tmp_path: Path, changes: dict, settings: dict, message: str) -> None:
    spec = dataclasses.replace(_npz(tmp_path, (2, 2, 3), **changes)[0], **settings)
    with pytest.raises(InputError, match=message):
        load(spec)


def test_files_that_hold_no_arrays_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.npz"
    spec = DataSpec(source="arrays", path=str(file))
    with pytest.raises(FileNotFoundError, match=r"data\.path: no such file: .*x\.npz"):
        load(spec)
    for content in (b"", b"text", b"PK\3\4 cut off"):
        file.write_bytes(content)
        with pytest.raises(InputError, match="expected an .npz file of plain arrays, found"):
            load(spec)
    np.save(tmp_path / "one.npy", np.zeros(3))
    with pytest.raises(InputError, match="expected an .npz file, found a single array"):
        load(dataclasses.replace(spec, path=str(tmp_path / "one.npy")))


# --- settings -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "clips"}, "data.source 'clips' needs data.path, the folder"),
        ({"source": "volumes"}, "data.source 'volumes' needs data.path, the folder"),
        ({"source": "arrays"}, "data.source 'arrays' needs data.path, an .npz file"),
        ({"frames": 3}, "data.frames needs data.source 'clips', found 'digits'"),
        ({"source": "volumes", "path": "x", "frame_step": 3}, "data.frame_step needs .*'clips', found 'volumes'"),
        ({"source": "clips", "path": "x", "test_labels": "x"}, "data.test_labels needs data.source 'folder'"),
        ({"source": "arrays", "path": "x", "test_split": "x"}, "data.test_split must be empty with .*'arrays'"),
        ({"source": "moving_digits", "path": "x"}, "data.path must be empty with data.source 'moving_digits'"),
    ],
)
def test_settings_of_other_sources_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        DataSpec(**settings)
