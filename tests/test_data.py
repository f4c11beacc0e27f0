"""Readers, subsets, sampling and host batches. Sets are made by the tests; real data is used where it is present."""

import dataclasses
import io
import json
import re
import struct
import sys
import threading
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from gsdd_jax import data
from gsdd_jax.data import Dataset, DataSpec, HostSampler, class_table, load, prefetch, sample_classes
from gsdd_jax.data.decode import Converter
from gsdd_jax.data.subsets import SUBSETS, resolve

# --- sets made by the tests ---------------------------------------------------------------------------------


def _png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(stream, "PNG")
    return stream.getvalue()


def _varint(value: int) -> bytes:
    value &= 2**64 - 1
    out = bytearray()
    while value >= 128:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _field(number: int, payload: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(payload)) + payload


def _example(image: bytes, label: int) -> bytes:
    """Encodes a tf.train.Example, {"image": bytes, "label": int64}, in protobuf wire format by hand."""
    bytes_feature = _field(1, _field(1, image))
    int_feature = _field(3, _field(1, _varint(label)))
    entries = [(b"image", bytes_feature), (b"label", int_feature)]
    return _field(1, b"".join(_field(1, _field(1, key) + _field(2, value)) for key, value in entries))


def _write_tfds(
    folder: Path,
    splits: dict[str, list[tuple[bytes, int]]],
    names: list[str],
    *,
    shape: tuple[int | None, ...] = (4, 4, 3),
    name: str = "toy",
    version: str = "1.0.0",
    dtype: str = "uint8",
) -> str:
    """Writes a prepared TFDS directory without TFDS."""
    array_record = pytest.importorskip("array_record.python.array_record_module")
    folder.mkdir(parents=True)
    dims = {"dimensions": [str(-1 if side is None else side) for side in shape]}
    prefix = "tensorflow_datasets.core.features."
    features = {
        "image": {
            "pythonClassName": prefix + "image_feature.Image",
            "image": {"dtype": dtype, "encodingFormat": "png", "shape": dims},
        },
        "label": {
            "pythonClassName": prefix + "class_label_feature.ClassLabel",
            "classLabel": {"numClasses": str(len(names))},
        },
    }
    spec = {"pythonClassName": prefix + "features_dict.FeaturesDict", "featuresDict": {"features": features}}
    (folder / "features.json").write_text(json.dumps(spec))
    (folder / "label.labels.txt").write_text("\n".join(names) + "\n")
    described = []
    for split, records in splits.items():
        writer = array_record.ArrayRecordWriter(
            str(folder / f"{name}-{split}.array_record-00000-of-00001"), "group_size:1"
        )
        for image, label in records:
            writer.write(_example(image, label))
        writer.close()
        described.append(
            {
                "name": split,
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                "numBytes": "1",
                "shardLengths": [str(len(records))],
            }
        )
    info = {"name": name, "version": version, "fileFormat": "array_record", "moduleName": "toy", "splits": described}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return str(folder)


def _pixels(seed: int, shape: tuple[int, ...] = (4, 4, 3)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def _records(n: int, k: int, *, seed: int = 0, shape: tuple[int, ...] = (4, 4, 3)) -> list[tuple[bytes, int]]:
    return [(_png(_pixels(seed + i, shape)), i % k) for i in range(n)]


def _write_folder(root: Path, counts: dict[str, dict[str, int]], *, shape: tuple[int, ...] = (4, 4, 3)) -> str:
    seed = 0
    for split, classes in counts.items():
        for name, number in classes.items():
            (root / split / name).mkdir(parents=True)
            for i in range(number):
                (root / split / name / f"{i:03}.png").write_bytes(_png(_pixels(seed, shape)))
                seed += 1
    return str(root)


def _toy(train: list[int], *, names: tuple[str, ...] = ("a", "b"), test: list[int] | None = None) -> Dataset:
    test = [0] if test is None else test
    return Dataset(
        "toy",
        np.zeros((len(train), 4, 4, 3), np.uint8),
        np.array(train, np.int32),
        np.zeros((len(test), 4, 4, 3), np.uint8),
        np.array(test, np.int32),
        names,
    )


# --- digits -------------------------------------------------------------------------------------------------


def test_digits_split_is_a_stratified_partition_of_the_shipped_set() -> None:
    from sklearn.datasets import load_digits

    digits = load(DataSpec())
    assert digits.train_images.shape == (1297, 8, 8, 1)
    assert digits.test_images.shape == (500, 8, 8, 1)
    assert digits.class_names == tuple("0123456789")
    assert digits.image_shape == (8, 8, 1)
    assert digits.num_classes == 10
    raw, target = load_digits(return_X_y=True)
    expected = Counter(
        (bytes(np.floor(v * 255 / 16 + 0.5).astype(np.uint8)), int(t)) for v, t in zip(raw, target, strict=True)
    )
    both = [(digits.train_images, digits.train_labels), (digits.test_images, digits.test_labels)]
    found = Counter((i.tobytes(), int(t)) for images, labels in both for i, t in zip(images, labels, strict=True))
    assert found == expected
    share = np.bincount(target) * 500 / 1797
    assert np.abs(np.bincount(digits.test_labels) - share).max() < 1
    # Results on the demo are only comparable while split and pixels stay what they were in the first release.
    assert digits.fingerprint() == "2d084f933083b4cc02abca336a610f7606ccc1fe8a1097c4788125167cc7c68b"
    # The first images of each class, in stored order.
    few = load(DataSpec(per_class=3))
    chosen = np.sort(np.concatenate([np.flatnonzero(digits.train_labels == label)[:3] for label in range(10)]))
    np.testing.assert_array_equal(few.train_images, digits.train_images[chosen])
    np.testing.assert_array_equal(few.train_labels, digits.train_labels[chosen])
    np.testing.assert_array_equal(few.test_images, digits.test_images)


# --- choosing records ---------------------------------------------------------------------------------------


def test_test_limit_spreads_over_the_classes(tmp_path: Path) -> None:
    root = _write_folder(tmp_path, {"train": {"a": 1, "b": 1, "c": 1}, "test": {"a": 9, "b": 2, "c": 9}})
    for limit, expected in ((1, [1]), (4, [2, 1, 1]), (9, [4, 2, 3]), (99, [9, 2, 9])):
        found = load(DataSpec(source="folder", path=root, test_limit=limit)).test_labels
        assert np.bincount(found).tolist() == expected


def test_label_pass_stops_as_soon_as_every_class_is_full() -> None:
    served = []

    def labels():
        for start in range(0, 100, 4):
            served.append(start)
            yield np.arange(start, start + 4) % 4

    split = data.source.Split("toy", 100, labels, lambda indices, convert: iter(()), str)
    indices, found = data.source.choose(split, kept=(2, 0), per_class=2)
    assert indices.tolist() == [0, 2, 4, 6]
    assert found.tolist() == [0, 2, 0, 2]
    assert served == [0, 4]


# --- pixels -------------------------------------------------------------------------------------------------


def test_crop_keeps_the_aspect_ratio_and_squash_does_not() -> None:
    # 8 rows x 16 columns: left quarter red, middle half green, right quarter blue.
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, :4, 0], pixels[:, 4:12, 1], pixels[:, 12:, 2] = 255, 255, 255
    crop = Converter(resolution=8, resize="crop", channels=3)(Image.fromarray(pixels))
    np.testing.assert_array_equal(crop, pixels[:, 4:12])
    squash = Converter(resolution=8, resize="squash", channels=3)(Image.fromarray(pixels))
    assert squash.shape == (8, 8, 3)
    assert squash[4, 0].argmax() == 0
    assert squash[4, 4].argmax() == 1
    assert squash[4, 7].argmax() == 2
    tall = Converter(resolution=8, resize="crop", channels=3)(Image.fromarray(pixels.transpose(1, 0, 2)))
    np.testing.assert_array_equal(tall, pixels.transpose(1, 0, 2)[4:12])


def test_shrinking_is_antialiased() -> None:
    # A checkerboard of single pixels averages to gray; without a low-pass filter it stays black or white.
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    for resize in ("crop", "squash"):
        small = Converter(resolution=16, resize=resize, channels=1)(Image.fromarray(board))
        assert small.shape == (16, 16, 1)
        assert np.abs(small[2:-2, 2:-2].astype(int) - 127).max() < 12


# --- folder -------------------------------------------------------------------------------------------------


def test_folder_reads_sorted_classes_and_exact_pixels(tmp_path: Path) -> None:
    # Created from the last to the first.
    root = _write_folder(tmp_path / "set", {"train": {"dog": 2, "cat": 1}, "validation": {"cat": 1}})
    (tmp_path / "set" / "train" / "dog" / "._000.png").write_bytes(b"left by a file manager")
    (tmp_path / "set" / "train" / "dog" / "Z.PNG").write_bytes(_png(_pixels(7)))
    found = load(DataSpec(source="folder", path=root))
    assert found.name == "set"
    assert found.class_names == ("cat", "dog")
    assert found.train_labels.tolist() == [0, 1, 1, 1]
    assert found.test_labels.tolist() == [0]
    for image, seed in zip(found.train_images, (2, 0, 1, 7), strict=True):
        np.testing.assert_array_equal(image, _pixels(seed))
    assert load(DataSpec(source="folder", path=root, name="pets")).name == "pets"


# What an image file may be: a format that Pillow writes, with options.
_FORMATS = {"tif": {}, "ppm": {}, "gif": {}, "bmp": {}, "webp": {"lossless": True}, "TIFF": {}, "JPG": {"quality": 100}}


def _folder(root: Path, files: dict[str, Image.Image | bytes], **options: object) -> DataSpec:
    """Writes images by their paths below train/, and a test image of each class."""
    for name, content in files.items():
        file = root / "train" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        (root / "test" / name.split("/")[0]).mkdir(parents=True, exist_ok=True)
        file.write_bytes(content) if isinstance(content, bytes) else content.save(file)
    for folder in (root / "test").iterdir():
        (folder / "t.png").write_bytes(_png(_pixels(0)))
    return DataSpec(source="folder", path=str(root), **options)  # type: ignore[arg-type]


def test_folder_reads_what_lies_deeper_and_every_format(tmp_path: Path) -> None:
    image = Image.new("RGB", (4, 4), (200, 30, 90))
    spec = _folder(tmp_path, {"a/1.png": _png(_pixels(1)), "a/sub/x/2.png": _png(_pixels(2)), "a/zz.png": image})
    for suffix, options in _FORMATS.items():
        image.save(tmp_path / "train" / "a" / f"zz{suffix}.{suffix}", **options)
    images = load(spec).train_images
    np.testing.assert_array_equal(images[0], _pixels(1))
    np.testing.assert_array_equal(images[1], _pixels(2))
    assert len(images) == 3 + len(_FORMATS)
    np.testing.assert_allclose(images[2:].astype(int), np.broadcast_to([200, 30, 90], images[2:].shape), atol=3)


def test_files_that_are_no_images_are_counted_and_hidden_ones_are_not(tmp_path: Path) -> None:
    spec = _folder(tmp_path, {"a/1.png": _png(_pixels(1))})
    for hidden in (".DS_Store", "._1.png", "Thumbs.db", "desktop.ini", "__MACOSX/1.png", ".ipynb_checkpoints/1.png"):
        for folder in (tmp_path / "train", tmp_path / "train" / "a"):
            (folder / hidden).parent.mkdir(exist_ok=True)
            (folder / hidden).write_bytes(b"no image")
    assert len(load(spec).train_images) == 1
    for name in ("train/a/boxes.txt", "train/a/deep/more.txt", "train/beside.png", "test/a/x.npy"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"no image")
    with pytest.warns(
        data.DataNotice, match=r"passed over 4 files .*\(2 \.txt, 1 \.png, 1 \.npy\), such as train.a.boxes"
    ):
        assert len(load(spec).train_images) == 1


def _glyph(mode: str, *, opaque: bool = False) -> Image.Image:
    """Black on nothing: a square of ink in the middle, transparent around it."""
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[1:3, 1:3, 3] = 255
    if opaque:
        pixels[..., :3], pixels[..., 3] = _pixels(5), 255
    image = Image.fromarray(pixels)
    if mode != "P":
        return image.convert(mode)
    palette = Image.fromarray(np.uint8(pixels[..., 3] > 0)).convert("P")
    palette.putpalette([0, 0, 0] * 2)
    palette.info["transparency"] = 0
    return palette


@pytest.mark.parametrize(("mode", "background"), [("RGBA", "white"), ("LA", "#ff0000"), ("P", "#ff0000")])
def test_transparent_pixels_show_the_background(tmp_path: Path, mode: str, background: str) -> None:
    image = _glyph(mode)
    file = tmp_path / "train" / "a" / "0.png"
    spec = _folder(tmp_path, {"a/0.png": b""}, background=background, channels=3)
    image.save(file, transparency=0) if mode == "P" else image.save(file)
    with pytest.warns(data.DataNotice, match=f"1 of 2 images have transparent pixels, composited on {background} "):
        found = load(spec).train_images[0]
    expected = np.zeros((4, 4, 3), np.uint8)
    expected[...] = [255, 0, 0] if background == "#ff0000" else 255
    expected[1:3, 1:3] = 0
    np.testing.assert_array_equal(found, expected)
    # An opaque alpha is dropped without a word; ink that no longer stands out is told.
    _glyph("RGBA", opaque=True).save(file)
    np.testing.assert_array_equal(load(spec).train_images[0], _pixels(5))
    _glyph("RGBA").save(file)
    with pytest.warns(data.DataNotice, match="composited on black .*; 1 of them are of one color then"):
        load(dataclasses.replace(spec, background="black"))


@pytest.mark.parametrize("form", ["jpg", "png"])
def test_exif_orientation_is_applied(tmp_path: Path, form: str) -> None:
    pixels = np.zeros((4, 4, 3), np.uint8)
    pixels[:, 2:] = 255
    upright = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    spec = _folder(tmp_path, {"a/1.png": upright})
    options = {"quality": 100} if form == "jpg" else {}
    upright.rotate(90).save(tmp_path / "train" / "a" / f"0.{form}", exif=exif, **options)
    found = load(spec).train_images.astype(int)
    assert np.abs(found[0] - found[1]).max() < 30


def _chunk_png(depth: int, color: int, samples: int) -> bytes:
    """A PNG of 4x4 pixels of any depth, by hand."""
    rows = (b"\0" + bytes(range(4 * samples * depth // 8))) * 4
    head = struct.pack(">IIBBBBB", 4, 4, depth, color, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    body = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


def _frames(form: str) -> bytes:
    stream = io.BytesIO()
    first, second = (Image.fromarray(_pixels(seed)) for seed in (1, 2))
    first.save(stream, form, save_all=True, append_images=[second])
    return stream.getvalue()


def _tiff(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "TIFF")
    return stream.getvalue()


UNREADABLE = {
    "gray16.png": (_chunk_png(16, 0, 1), "mode 'I;16' of more than 8 bits"),
    "rgb16.png": (_chunk_png(16, 2, 3), "mode 'RGB' of more than 8 bits"),
    "rgb16.ppm": (b"P6 4 4 65535\n" + bytes(96), "mode 'RGB' of more than 8 bits"),
    "float.tif": (_tiff(np.ones((4, 4), np.float32)), "mode 'F' of more than 8 bits"),
    "int.tif": (_tiff(np.ones((4, 4), np.int32)), "mode 'I' of more than 8 bits"),
    "moving.gif": (_frames("GIF"), "2 frames or pages"),
    "moving.png": (_frames("PNG"), "2 frames or pages"),
    "moving.webp": (_frames("WEBP"), "2 frames or pages"),
    "pages.tif": (_frames("TIFF"), "2 frames or pages"),
    "text.jpg": (b"<html>not found</html>", "no image that Pillow knows"),
    "empty.png": (b"", "no image that Pillow knows"),
    "half.png": (_png(_pixels(0, (64, 64, 3)))[:200], "."),
}


def test_unreadable_images_are_all_named_or_left_out(tmp_path: Path) -> None:
    spec = _folder(
        tmp_path, {"a/0.png": _png(_pixels(0)), **{f"a/{name}": bad for name, (bad, _) in UNREADABLE.items()}}
    )
    (tmp_path / "train" / "a" / "link.png").symlink_to(tmp_path / "absent.png")
    with pytest.raises(
        ValueError, match=f"{len(UNREADABLE) + 1} of {len(UNREADABLE) + 3} images cannot be read"
    ) as caught:
        load(spec)
    for name, (_, reason) in UNREADABLE.items():
        assert re.search(rf"{re.escape(name)} \([^()]*{reason}", str(caught.value)), (name, str(caught.value))
    assert "link.png (a link to a file that is not there)" in str(caught.value)
    assert str(caught.value).endswith("; data.unreadable=skip goes on without")
    with pytest.warns(data.DataNotice, match=f"left out {len(UNREADABLE) + 1} of .*gray16"):
        left = load(dataclasses.replace(spec, unreadable="skip"))
    np.testing.assert_array_equal(left.train_images, [_pixels(0)])
    with pytest.raises(ValueError, match=r"cannot read .*empty\.png \(no image that Pillow knows\)"):
        data.records(spec)[0][1]
    with pytest.raises(ValueError, match=r"data\.unreadable: .*expected error, found 'skip'"):
        data.records(dataclasses.replace(spec, unreadable="skip"))


def test_large_images_are_named_before_they_are_decoded(tmp_path: Path) -> None:
    big = struct.pack(">IIBBBBB", 20000, 10000, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + big + struct.pack(">I", zlib.crc32(b"IHDR" + big))
    # Without its pixels: they are not looked at.
    png += struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    spec = _folder(tmp_path, {"a/big.png": png, "a/small.png": _png(_pixels(0))}, resolution=4)
    with pytest.raises(
        ValueError, match=r"big\.png \(20000x10000 = 200000000 pixels, data\.max_pixels allows 178956970\)"
    ):
        load(spec)
    with pytest.raises(ValueError, match=r"big\.png .*, .*small\.png \(4x4 = 16 pixels, data\.max_pixels allows 15\)"):
        load(dataclasses.replace(spec, max_pixels=15))
    assert Image.MAX_IMAGE_PIXELS == 89478485
    (tmp_path / "train" / "a" / "big.png").unlink()
    Image.MAX_IMAGE_PIXELS, before = 5, Image.MAX_IMAGE_PIXELS
    try:
        assert len(load(spec).train_images) == 1
        assert Image.MAX_IMAGE_PIXELS == 5
    finally:
        Image.MAX_IMAGE_PIXELS = before


# --- other splits and classes -------------------------------------------------------------------------------


def test_folder_without_test_is_split_by_class(tmp_path: Path) -> None:
    for name, number in (("a", 10), ("b", 4), ("c", 1)):
        (tmp_path / name).mkdir()
        for i in range(number):
            (tmp_path / name / f"{i}.png").write_bytes(_png(_pixels(100 * ord(name) + i)))
    spec = DataSpec(source="folder", path=str(tmp_path), test_fraction=0.2)
    found = load(spec)
    assert np.bincount(found.train_labels).tolist() == [8, 3, 1] and np.bincount(found.test_labels).tolist() == [2, 1]
    both = [image.tobytes() for image in (*found.train_images, *found.test_images)]
    assert len(set(both)) == 15
    assert load(spec).fingerprint() == found.fingerprint() != load(dataclasses.replace(spec, test_seed=1)).fingerprint()
    # Choosing classes afterwards moves no image between the splits; a folder train/ is the same thing.
    of_two = load(dataclasses.replace(spec, classes=("b", "a")))
    np.testing.assert_array_equal(
        of_two.test_images[of_two.test_labels == 1], found.test_images[found.test_labels == 0]
    )
    (tmp_path / "train").mkdir()
    for name in "abc":
        (tmp_path / name).rename(tmp_path / "train" / name)
    assert load(spec).fingerprint() == found.fingerprint()
    (tmp_path / "val").mkdir()
    with pytest.raises(ValueError, match=r"data\.test_fraction: .* has a test folder \(val\); expected 0"):
        load(spec)


def test_classes_are_taken_in_the_order_given(tmp_path: Path) -> None:
    digits, two = load(DataSpec()), load(DataSpec(classes=("8", "3")))
    assert two.class_names == ("8", "3") and two.name == "digits/2 classes"
    np.testing.assert_array_equal(
        two.train_images[two.train_labels == 0], digits.train_images[digits.train_labels == 8]
    )
    np.testing.assert_array_equal(two.test_images[two.test_labels == 1], digits.test_images[digits.test_labels == 3])
    back = load(DataSpec(classes=tuple("9876543210")))
    np.testing.assert_array_equal(back.train_labels, 9 - digits.train_labels)
    root = _write_folder(tmp_path, {"train": {"cat": 1, "dog": 1, "wolf": 1}, "test": {"dog": 1}})
    assert load(DataSpec(source="folder", path=root, classes=("wolf", "dog"))).test_labels.tolist() == [1]
    with pytest.raises(
        ValueError, match=r"data\.classes: .* has no class 'dogs'; expected .* 3 classes, such as 'dog'$"
    ):
        load(DataSpec(source="folder", path=root, classes=("cat", "dogs")))


_FLAT = {
    "tiny": "val_0.JPEG\tb\t0\t32\t44\t62\nval_1.JPEG\ta\t0\t0\t1\t2\nval_2.JPEG\tb\t0\t0\t1\t2\n",
    "numbers": "val/val_0.JPEG 1\nval_1.JPEG 0\nval_2.JPEG 1\n",
    "table": "ImageId,PredictionString\nval_0,b 85 1 499 272 \nval_1,a 1 2 3 4 a 5 6 7 8 \n\nval_2,b 1 2 3 4\n",
}


def _flat(root: Path) -> DataSpec:
    path = _write_folder(root, {"train": {"a": 1, "b": 1}})
    (root / "val" / "images").mkdir(parents=True)
    for i in range(3):
        (root / "val" / "images" / f"val_{i}.JPEG").write_bytes(_png(_pixels(50 + i)))
    return DataSpec(source="folder", path=path, test_labels="val/list.txt")


@pytest.mark.parametrize("form", _FLAT)
def test_flat_test_folder_is_read_by_its_list(tmp_path: Path, form: str) -> None:
    spec = _flat(tmp_path)
    (tmp_path / "val" / "list.txt").write_text(_FLAT[form])
    found = load(spec)
    assert found.test_labels.tolist() == [0, 1, 1]
    np.testing.assert_array_equal(found.test_images, [_pixels(51), _pixels(50), _pixels(52)])
    with pytest.raises(
        ValueError, match=r"none of the class folders of .*train but 3 images; data\.test_labels .*val.list"
    ):
        load(dataclasses.replace(spec, test_labels=""))


def test_mixed_sizes_need_a_resolution(tmp_path: Path) -> None:
    root = _write_folder(tmp_path, {"train": {"a": 2}, "test": {"a": 1}})
    (tmp_path / "train" / "a" / "wide.png").write_bytes(_png(_pixels(0, (4, 6, 3))))
    spec = DataSpec(source="folder", path=root)
    with pytest.raises(ValueError, match=r"a.wide\.png is 4x6, .*a.000\.png is 4x4; .*need data\.resolution"):
        load(spec)
    assert load(dataclasses.replace(spec, resolution=5)).image_shape == (5, 5, 3)
    (tmp_path / "train" / "a" / "wide.png").rename(tmp_path / "test" / "a" / "000.png")
    with pytest.raises(ValueError, match=r"images are \[4, 4, 3\], test images \[4, 6, 3\]; set data\.resolution"):
        load(spec)


# Folders of images, the text of a list of test labels where there is one, and what is said of them.
_BAD_FOLDERS = [
    ({"train": {"a": 1}, "test": {"a": 1, "b": 1}}, "has class 'b', which .*train does not have"),
    (
        {"train": {"a": 1, "b": 0}, "test": {"a": 1}},
        r"train.b has no images; expected files that Pillow reads, such as",
    ),
    ({"train": {"a": 1}, "test": {"a": 0}}, "test has no image of the chosen classes|test.a has no images"),
    ({"train": {}, "test": {"a": 1}}, "data.train_split: no such folder: .*train; found test"),
    ({"train": {"a": 1}}, r"no test folder \(test, val, validation\)"),
    ({"train": {"a": 1}, "test": {"a": 1}, "val": {"a": 1}}, "several test folders .test, val.; choose"),
    ({}, "data.path: no such folder: .*absent"),
    ("", r"data\.test_labels: no such file: .*val.list\.txt"),
    ("val_0.JPEG a\nval_1.JPEG b\n", r"list\.txt has no label for 1 images, such as .*val_2\.JPEG"),
    ("val_0.JPEG a\nval_9.JPEG b\n", r"line 2: 'val_9\.JPEG' names 0 images"),
    ("val_0.JPEG a\nval_1.JPEG 2\n", r"line 2: '2' is no label; expected a class .* or a number from 0 to 1"),
    ("val_0.JPEG a\nval_0.JPEG b\n", r"line 2: a second label for 'val_0\.JPEG'"),
]


@pytest.mark.parametrize(("content", "message"), _BAD_FOLDERS, ids=range(len(_BAD_FOLDERS)))
def test_bad_folders_are_explained(tmp_path: Path, content: dict | str, message: str) -> None:
    if isinstance(content, str):
        spec = _flat(tmp_path)
        if content:
            (tmp_path / "val" / "list.txt").write_text(content)
    else:
        spec = DataSpec(source="folder", path=_write_folder(tmp_path / ("" if content else "absent"), content))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load(spec)


# --- TFDS ---------------------------------------------------------------------------------------------------


def test_tfds_reads_exact_pixels_and_labels(tmp_path: Path) -> None:
    splits = {"train": _records(1100, 3), "test": _records(5, 3, seed=5000)}
    path = _write_tfds(tmp_path / "1.0.0", splits, ["x", "y", "z"])
    found = load(DataSpec(source="tfds", path=path))
    assert found.name == "toy"
    assert found.class_names == ("x", "y", "z")
    assert found.train_labels.dtype == np.int32
    np.testing.assert_array_equal(found.train_labels, np.arange(1100) % 3)
    np.testing.assert_array_equal(found.train_images, [_pixels(i) for i in range(1100)])
    np.testing.assert_array_equal(found.test_images, [_pixels(5000 + i) for i in range(5)])
    sliced = load(DataSpec(source="tfds", path=path, name="label", train_split="train[:10]", test_split="train[10:12]"))
    assert sliced.name == "label"
    np.testing.assert_array_equal(sliced.train_images, found.train_images[:10])
    np.testing.assert_array_equal(sliced.test_images, found.train_images[10:12])


def test_tfds_passes_over_a_test_split_without_labels(tmp_path: Path) -> None:
    unlabeled = [(image, -1) for image, _ in _records(3, 2)]
    splits = {"train": _records(4, 2), "test": unlabeled, "validation": _records(6, 2)}
    path = _write_tfds(tmp_path / "1.0.0", splits, ["x", "y"])
    assert len(load(DataSpec(source="tfds", path=path)).test_labels) == 6
    with pytest.raises(ValueError, match="label -1 is out of range; allowed: 0 to 1"):
        load(DataSpec(source="tfds", path=path, test_split="test"))
    path = _write_tfds(tmp_path / "2.0.0", {"train": _records(4, 2), "test": unlabeled}, ["x", "y"])
    with pytest.raises(ValueError, match="no labeled test split; found train, test; set data.test_split"):
        load(DataSpec(source="tfds", path=path))


def test_tfds_subset_decodes_only_its_own_images(tmp_path: Path) -> None:
    # The other classes hold no image at all: decoding one of them would fail.
    wnids = [entry.wnid for entry in SUBSETS["imagemeow"]]
    names = sorted([*wnids, "n00000001", "n99999999"])
    records = [(_png(_pixels(i)) if name in wnids else b"not an image", i) for i, name in enumerate(names)]
    path = _write_tfds(tmp_path / "1.0.0", {"train": records * 2, "validation": records}, names)
    found = load(DataSpec(source="tfds", path=path, subset="imagemeow"))
    assert found.name == "toy/imagemeow"
    assert found.class_names[:2] == ("tabby", "tiger_cat")
    assert found.class_names[9] == "lynx"
    assert sorted(found.train_labels.tolist()) == sorted(2 * list(range(10)))
    for image, label in zip(found.test_images, found.test_labels, strict=True):
        np.testing.assert_array_equal(image, _pixels(names.index(wnids[label])))
    with pytest.raises(ValueError, match=r"image 0 of split 'train' of .*1\.0\.0 \(no image that Pillow knows\)"):
        load(DataSpec(source="tfds", path=path))


def test_tfds_damaged_files_are_named(tmp_path: Path) -> None:
    records = _records(600, 2, shape=(16, 16, 3))
    path = _write_tfds(tmp_path / "1.0.0", {"train": records, "test": records[:2]}, ["x", "y"], shape=(16, 16, 3))
    file = tmp_path / "1.0.0" / "toy-train.array_record-00000-of-00001"
    whole = file.read_bytes()
    spec = DataSpec(source="tfds", path=path)
    assert len(load(spec).train_labels) == 600
    middle = len(whole) // 2
    for broken in (whole[:middle], b"", whole[:middle] + bytes(2000) + whole[middle + 2000 :]):
        file.write_bytes(broken)
        with pytest.raises(ValueError, match=r"cannot read split 'train' of .*1\.0\.0; damaged or truncated\?"):
            load(spec)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"split 'train': no such file: .*toy-train\.array_record"):
        load(spec)
    (tmp_path / "1.0.0" / "features.json").write_text("{")
    with pytest.raises(ValueError, match=r"cannot read the TFDS description in .*1\.0\.0; damaged"):
        load(spec)


def test_tfds_of_the_wrong_kind_is_explained(tmp_path: Path, monkeypatch) -> None:
    record = [(_png(_pixels(0)), 0)]
    path = _write_tfds(tmp_path / "1.0.0", {"train": record, "test": record}, ["x", "z"])
    found = DataSpec(source="tfds", path=path)
    for spec, message in (
        (found, r"class 'z' has no training images \(1 of 2 classes\)"),
        (dataclasses.replace(found, train_split="dev"), r"data\.train_split: no split 'dev' in .*; found train, test"),
    ):
        with pytest.raises(ValueError, match=message):
            load(spec)
    file = tmp_path / "1.0.0" / "features.json"
    for before, after, message in (
        ('"uint8"', '"uint16"', "feature 'image' must be a uint8 image"),
        ('"image": {"python', '"picture": {"python', "needs the features 'image' and 'label', found label, picture"),
    ):
        file.write_text(file.read_text().replace(before, after))
        with pytest.raises(ValueError, match=message):
            load(found)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ImportError, match=r"needs tensorflow_datasets: pip install gsdd_jax\[data\]"):
        load(found)


def test_tfds_missing_directory_names_what_is_there(tmp_path: Path) -> None:
    pytest.importorskip("tensorflow_datasets")
    with pytest.raises(FileNotFoundError, match="data.path: no such directory: .*absent"):
        load(DataSpec(source="tfds", path=str(tmp_path / "absent")))
    _write_tfds(tmp_path / "toy" / "1.0.0", {"train": _records(2, 1)}, ["x"])
    with pytest.raises(FileNotFoundError, match=r"dataset_info.json is missing; did you mean .*1\.0\.0\?"):
        load(DataSpec(source="tfds", path=str(tmp_path / "toy")))
    (tmp_path / "toy" / "incomplete.ABCDEF_2.0.0").mkdir()
    with pytest.raises(
        FileNotFoundError, match=r"2\.0\.0 \(an earlier preparation was interrupted and left .*ABCDEF_2"
    ):
        load(DataSpec(source="tfds", path=str(tmp_path / "toy" / "2.0.0")))


def test_tfds_by_name_reads_what_is_prepared_and_says_how_to_prepare(tmp_path: Path, monkeypatch) -> None:
    library = pytest.importorskip("tensorflow_datasets")
    monkeypatch.setattr(library.core.constants, "DATA_DIR", str(tmp_path))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(ValueError, match="data.name: TFDS has no data set 'no_such_set'"):
        load(DataSpec(source="tfds", name="no_such_set"))
    with pytest.raises(FileNotFoundError, match=r"'mnist' is not prepared in .*; prepare it once with: .*array_record"):
        load(DataSpec(source="tfds", name="mnist"))
    version = str(library.builder("mnist", try_gcs=False).version)
    (tmp_path / "mnist" / f"incomplete.QWERTY_{version}").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"interrupted and left .*QWERTY.*; prepare it once with"):
        load(DataSpec(source="tfds", name="mnist"))
    splits = {"train": _records(20, 10, shape=(28, 28, 1)), "test": _records(10, 10, shape=(28, 28, 1))}
    digits = [str(digit) for digit in range(10)]
    _write_tfds(tmp_path / "mnist" / version, splits, digits, shape=(28, 28, 1), name="mnist", version=version)
    found = load(DataSpec(source="tfds", name="mnist"))
    assert found.name == "mnist"
    np.testing.assert_array_equal(found.train_images[7], _pixels(7, (28, 28, 1)))
    info = tmp_path / "mnist" / version / "dataset_info.json"
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    with pytest.raises(ValueError, match="stored as tfrecord, which cannot be read by index; delete that directory"):
        load(DataSpec(source="tfds", name="mnist"))
    info.write_text("{")
    with pytest.raises(ValueError, match=r"TFDS cannot open data set 'mnist', expected in .*mnist \(.*JSON"):
        load(DataSpec(source="tfds", name="mnist"))


def test_real_cifar10_is_complete_and_balanced(data_root: Path) -> None:
    path = data_root / "cifar10_jpeg" / "1.0.0"
    if not path.is_dir():
        pytest.skip(f"no {path}")
    found = load(DataSpec(source="tfds", path=str(path), per_class=100, test_limit=1000))
    assert found.class_names[3] == "cat"
    assert np.bincount(found.train_labels).tolist() == [100] * 10
    assert np.bincount(found.test_labels).tolist() == [100] * 10
    assert found.image_shape == (32, 32, 3)
    # Channel means of CIFAR-10; a wrong channel order or scale would be far off.
    np.testing.assert_allclose(found.train_images.mean((0, 1, 2)) / 255, [0.4914, 0.4822, 0.4465], atol=0.03)


def test_real_imagenette_subset_is_in_the_order_of_the_field(data_root: Path) -> None:
    path = data_root / "imagenette128" / "1.0.0"
    if not path.is_dir():
        pytest.skip(f"no {path}")
    spec = DataSpec(source="tfds", path=str(path), subset="imagenette", per_class=4, test_limit=20, resolution=64)
    found = load(spec)
    assert found.class_names == tuple(entry.name for entry in SUBSETS["imagenette"])
    assert found.train_images.shape == (40, 64, 64, 3)
    assert found.test_images.shape == (20, 64, 64, 3)
    records, labels, names = data.records(spec)
    assert names == found.class_names
    np.testing.assert_array_equal(labels, found.train_labels)
    np.testing.assert_array_equal(records[7]["image"], found.train_images[7])


# --- subsets ------------------------------------------------------------------------------------------------


def test_subsets_hold_ten_distinct_imagenet_classes_each() -> None:
    by_place: dict[int, str] = {}
    for classes in SUBSETS.values():
        assert len({entry.wnid for entry in classes}) == len({entry.name for entry in classes}) == 10
        for entry in classes:
            assert by_place.setdefault(entry.place, entry.wnid) == entry.wnid
    # ILSVRC numbers are positions in the sorted list of WordNet ids, so both columns must sort alike.
    assert [by_place[place] for place in sorted(by_place)] == sorted(by_place.values())


def test_subset_by_wnid_by_name_by_number_and_by_position() -> None:
    wanted = tuple(entry.place for entry in SUBSETS["imagefruit"])
    names = tuple(entry.name for entry in SUBSETS["imagefruit"])
    thousand = [f"n{place:08}" for place in range(1000)]
    for entry in SUBSETS["imagefruit"]:
        thousand[entry.place] = entry.wnid
    assert resolve("imagefruit", thousand) == (wanted, names)
    assert resolve("imagefruit", [str(place) for place in range(1000)]) == (wanted, names)
    assert resolve("imagefruit", [f"name {1000 - place}" for place in range(1000)]) == (wanted, names)
    shuffled = [
        "Granny Smith",
        "orange",
        "fig",
        "bell-pepper",
        "lemon",
        "banana",
        "cucumber",
        "pomegranate",
        "strawberry",
    ]
    assert resolve("imagefruit", [*shuffled, "pineapple"])[0] == (9, 5, 8, 1, 4, 7, 2, 3, 6, 0)


# --- spec and checks ----------------------------------------------------------------------------------------


_OF_FOLDER = {"source": "folder", "path": "x"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source": "tfds"}, r"needs data\.name .* or data\.path"),
        ({"source": "folder"}, r"'folder' needs data\.path"),
        ({"name": "cifar10"}, r"data\.name must be empty with data\.source 'digits', found 'cifar10'"),
        ({"subset": "imagewoof"}, r"data\.subset must be empty"),
        ({"test_fraction": 0.1}, r"data\.test_fraction must be empty"),
        ({"test_labels": "val.txt"}, r"data\.test_labels needs data\.source 'folder', found 'digits'"),
        ({"classes": ("3", "8", "3")}, r"data\.classes: expected distinct names, found '3' twice"),
        (_OF_FOLDER | {"subset": "imagewoof", "classes": ("a",)}, r"data\.classes: expected none beside"),
        (_OF_FOLDER | {"test_fraction": 0.1, "test_split": "val"}, r"data\.test_split: expected none beside .*'val'"),
        ({"background": "#00000080"}, r"data\.background: expected a color .*found '#00000080'"),
        ({"source": "web"}, "unknown source 'web'; allowed: digits, moving_digits, "),
    ],
)
def test_spec_checks_fields_against_each_other(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(DataSpec(**fields))


def test_fingerprint_sees_pixels_labels_names_and_shape() -> None:
    base = _toy([0, 1])
    pixels = base.train_images.copy()
    pixels[1, 0, 0, 0] = 1
    variants = [
        base,
        base._replace(train_images=pixels),
        base._replace(train_labels=np.array([1, 0], np.int32)),
        base._replace(test_labels=np.array([1], np.int32)),
        base._replace(class_names=("a", "c")),
        base._replace(train_images=base.train_images.reshape(2, 2, 8, 3)),
    ]
    assert len({variant.fingerprint() for variant in variants}) == len(variants)
    assert base._replace(name="other").fingerprint() == base.fingerprint()
    strided = base._replace(train_images=np.zeros((2, 3, 4, 4), np.uint8).transpose(0, 2, 3, 1))
    assert strided.fingerprint() == base.fingerprint()


_TOY, _ZEROS = _toy([0, 1]), np.zeros((12, 2, 2, 3), np.uint8)
_CATS = _toy([0, 0, 0, 1, 1, 1, 1], names=("cat", "dog"))


def _check(**changes: object) -> None:
    data.check(_TOY._replace(**changes))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: _check(train_images=_TOY.train_images.astype(int)), "train_images: found int64"),
        (
            lambda: _check(train_images=_TOY.train_images + 255.0),
            r"train_images: found float64 from 255 to 255 of shape .* floating point \(0 to 1\)",
        ),
        (lambda: _check(test_images=_TOY.test_images[0]), r"test_images: .*expected \[n, h, w, c\]"),
        (lambda: _check(test_images=_TOY.test_images[..., :2]), "must have 1 or 3 channels"),
        (lambda: _check(train_labels=_TOY.train_labels * 1.0), "train_labels must be integers"),
        (lambda: _check(train_labels=_TOY.train_labels[:1]), r"train_labels must have shape \[2\]"),
        (lambda: _check(test_labels=_TOY.test_labels + 2), "test: label 2 is out of range; allowed: 0"),
        (lambda: _check(train_labels=_TOY.train_labels * 0), "class 'b' has no training images"),
        (lambda: _check(class_names=("a", "a")), "class_names must be distinct"),
        (lambda: data.require_per_class(_CATS, 4, "ipc"), "class 'cat' has 3 training images, ipc needs 4$"),
        (lambda: data.require_per_class(_CATS, 10, "ipc"), r"ipc needs 10 \(2 classes have too few\)"),
        (lambda: resolve("imagecats", ["a"]), "unknown subset 'imagecats'; allowed: imagenette, imagewoof"),
        (lambda: resolve("imagenette", ["a", "b"]), r"missing n01440764 \(tench\), .* and 7 more; it has 2"),
        # A folder of 1,000 readable names is sorted by name, so positions would pick the wrong classes.
        (
            lambda: resolve("imagewoof", sorted(f"class {i:03}" for i in range(1000))),
            "'imagewoof' is not in this source",
        ),
        (lambda: class_table(np.array([0, 2]), 3), "class 1 has no images"),
        (lambda: class_table(np.array([0, 3]), 3), "label 3 is out of range; allowed: 0 to 2"),
        (lambda: class_table(np.array([-1, 0]), 3), "label -1 is out of range"),
        (lambda: class_table(np.array([0.0, 1.0]), 3), "labels must be integers, found float64"),
        (lambda: sample_classes(jax.random.key(0), class_table(_LABELS, 3), 0), "batch must be at least 1, found 0"),
        (lambda: _host(source=_ZEROS.astype(np.int32)), "images: found int32"),
        (lambda: _host(source=_ZEROS - 1.0), "images: found float64 from -1 to -1 of shape"),
        (lambda: _host(source=_ZEROS[:3]), "3 images but 12 labels"),
        (lambda: _host(0), "batch must be at least 1"),
        (lambda: _host(seed=-1), "seed must be in 0 to"),
        (lambda: _host().batch(-1), "step must be at least 0, found -1"),
        (
            lambda: _host(7, source=[{"image": np.zeros((2, 2 + (i == 4), 3), np.uint8)} for i in range(12)]).batch(0),
            r"image 4 is uint8 \[2, 3, 3\], image 0 is uint8 \[2, 2, 3\]",
        ),
        (lambda: _host(7, source=[{"image": np.zeros((2, 2, 3), int)}] * 12).batch(0), "image 0: found int64 of shape"),
        (lambda: next(prefetch(_host(), 0, depth=0)), "depth must be at least 1, found 0"),
        (lambda: next(prefetch(_host(), -3)), "start_step must be at least 0, found -3"),
    ],
    ids=range(29),
)
def test_bad_input_is_explained(call: Callable, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        call()


# --- sampling on the device ---------------------------------------------------------------------------------

_LABELS = np.array([2, 0, 1, 0, 2, 2, 0, 2, 2, 2, 0, 2])  # 4, 1 and 7 images


def test_class_table_lists_every_image_once_and_pads_by_repeating() -> None:
    table = class_table(_LABELS, 3)
    assert table.count.tolist() == [4, 1, 7]
    assert table.index.tolist() == [[1, 3, 6, 10, 1, 3, 6], [2] * 7, [0, 4, 5, 7, 8, 9, 11]]
    assert table.index.dtype == table.count.dtype == jnp.int32


@pytest.mark.parametrize("batch", [1, 4, 18])
def test_sample_classes_draws_without_replacement_as_far_as_possible(batch: int) -> None:
    table = class_table(_LABELS, 3)
    draw = jax.jit(sample_classes, static_argnums=2)
    for seed in range(20):
        index = np.asarray(draw(jax.random.key(seed), table, batch))
        assert index.shape == (3, batch)
        for label, row in enumerate(index):
            assert (_LABELS[row] == label).all()
            times = np.bincount(row, minlength=12)[label == _LABELS]
            assert times.sum() == batch
            assert set(times) <= {batch // len(times), -(-batch // len(times))}


@pytest.mark.parametrize("batch", [2, 9])
def test_sample_classes_is_uniform_whatever_the_padding(batch: int) -> None:
    table = class_table(_LABELS, 3)
    keys = jax.random.split(jax.random.key(0), 4000)
    index = np.asarray(jax.vmap(lambda key: sample_classes(key, table, batch))(keys))
    for label, count in enumerate((4, 1, 7)):
        times = np.bincount(index[:, label].ravel(), minlength=12)[label == _LABELS] / 4000
        # Each count is batch // count plus a Bernoulli variable; 5 of its standard deviations over 4,000 draws.
        np.testing.assert_allclose(times, batch / count, atol=5 * 0.5 / np.sqrt(4000))


# --- sampling on the host -----------------------------------------------------------------------------------


def _host(batch: int = 3, seed: int = 0, source: object = None) -> HostSampler:
    images = np.arange(12, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
    return HostSampler(images if source is None else source, _LABELS, num_classes=3, batch=batch, seed=seed)


@pytest.mark.parametrize("batch", [3, 18])
def test_host_sampler_draws_without_replacement_and_uniformly(batch: int) -> None:
    sampler = _host(batch)
    index = np.stack([sampler.indices(step) for step in range(3000)])
    for label, count in enumerate((4, 1, 7)):
        members = np.flatnonzero(label == _LABELS)
        times = np.stack([(index[:, label] == member).sum(1) for member in members], 1)
        assert (times.sum(1) == batch).all()
        assert set(times.ravel()) <= {batch // count, -(-batch // count)}
        np.testing.assert_allclose(times.mean(0), batch / count, atol=5 * 0.5 / np.sqrt(3000))


def test_host_batch_is_a_pure_function_of_seed_and_step() -> None:
    first, again = _host(), _host()
    late = again.batch(41)
    batches = [first.batch(step) for step in range(45)]
    np.testing.assert_array_equal(batches[41], late)
    assert late.shape == (3, 3, 2, 2, 3)
    assert late.dtype == np.uint8
    np.testing.assert_array_equal(late[..., 0, 0, 0], first.indices(41))
    assert len({batch.tobytes() for batch in batches}) > 30
    assert not np.array_equal(_host(seed=1).indices(0), first.indices(0))


def test_host_draw_stays_the_same_across_numpy_versions() -> None:
    # A resumed run must see the batches of the interrupted one; these values were recorded once.
    assert _host(2, seed=7).indices(5).tolist() == [[3, 1], [2, 2], [4, 5]]


def test_host_sampler_reads_records_once_each_and_in_bulk() -> None:
    class Records:
        asked: list[list[int]] = []

        def __len__(self) -> int:
            return 12

        def __getitem__(self, i: int) -> dict:
            return {"image": np.full((2, 2, 3), i, np.uint8), "label": 0}

    class Bulk(Records):
        def __getitems__(self, positions: list[int]) -> list[dict]:
            self.asked.append(positions)
            return [self[i] for i in positions]

    expected = _host(6).batch(3)
    np.testing.assert_array_equal(_host(6, source=Records()).batch(3), expected)
    np.testing.assert_array_equal(_host(6, source=Bulk()).batch(3), expected)
    assert [len(positions) for positions in Bulk.asked] == [len(np.unique(expected))]


def test_host_sampler_reads_a_folder_lazily(tmp_path: Path) -> None:
    root = _write_folder(tmp_path, {"train": {"a": 3, "b": 4}, "test": {"a": 1}})
    spec = DataSpec(source="folder", path=root, per_class=3, resolution=6)
    whole = load(spec)
    records, labels, names = data.records(spec)
    assert names == ("a", "b")
    sampler = HostSampler(records, labels, num_classes=2, batch=2, seed=0)
    np.testing.assert_array_equal(sampler.batch(9), whole.train_images[sampler.indices(9)])
    assert [records[i]["label"] for i in range(6)] == whole.train_labels.tolist()
    assert len(records) == 6


def _prefetch_threads() -> int:
    return sum(thread.name == "gsdd-prefetch" for thread in threading.enumerate())


def test_prefetch_yields_the_batches_in_order_and_closes_its_thread() -> None:
    sampler = _host()
    stream = prefetch(sampler, 5, depth=2)
    for expected in range(5, 12):
        step, batch = next(stream)
        assert step == expected
        np.testing.assert_array_equal(batch, sampler.batch(expected))
    assert _prefetch_threads() == 1
    stream.close()
    assert _prefetch_threads() == 0


def test_prefetch_raises_the_samplers_error_at_its_step() -> None:
    class Broken:
        def batch(self, step: int) -> np.ndarray:
            if step == 2:
                raise OSError("disk gone")
            return np.zeros(1, np.uint8)

    stream = prefetch(Broken(), 0)
    assert [next(stream)[0], next(stream)[0]] == [0, 1]
    with pytest.raises(OSError, match="disk gone"):
        next(stream)
    assert _prefetch_threads() == 0
