"""TensorFlow Datasets in `array_record` files, read without TensorFlow.

Only reading: downloading and preparing a data set is TFDS's own business, done once by the command that the error
names.
"""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gsdd_jax.data.decode import Converter, Unreadable
from gsdd_jax.data.source import Source, Split, hold_out, parallel
from gsdd_jax.errors import InputError, needing

TEST_SPLITS = ("test", "validation", "val")
# Records per call into the reader: about 60 MB of ImageNet JPEGs, 0.5 MB of CIFAR.
_CHUNK = 512


def open_tfds(
    *,
    name: str = "",
    path: str | Path = "",
    train_split: str = "",
    test_split: str = "",
    test_fraction: float = 0.0,
    test_seed: int = 0,
) -> Source:
    """Opens a prepared TFDS data set; decodes nothing yet.

    Args:
        name: TFDS name such as "cifar10" or "imagenet2012", looked up in TFDS's data directory (TFDS_DATA_DIR or
            `~/tensorflow_datasets`); only a label for reports if `path` is given.
        path: A prepared version directory (`.../1.0.0`, the one that holds dataset_info.json).
        train_split: TFDS split or slice ("train[:90%]"); "" = "train".
        test_split: Likewise; "" = the first of "test", "validation", "val" that carries labels (the test split of
            imagenet2012 does not).
        test_fraction: Share of each class of the training split to take as test images instead; 0 = none.
        test_seed: Seed of that split.

    Raises:
        ImportError: tensorflow_datasets is not installed.
        FileNotFoundError: The directory or one of its files is missing, or the data set was never prepared.
        InputError: A file is damaged or truncated.
        ValueError: Unknown data set or split; no uint8 image of 1 or 3 channels, or no class label in its features.
    """
    library = _library()
    builder = _builder_at(library, Path(path)) if path else _builder_named(library, name)
    features = builder.info.features
    channels = _check_features(library, features, builder.data_path)
    class_names = tuple(features["label"].names)
    train = _open_split(library, builder, train_split or "train", "data.train_split")
    if test_fraction:
        train, test = hold_out(train, test_fraction, test_seed)
    else:
        test = _open_split(library, builder, test_split or _find_test(library, builder), "data.test_split")
    return Source(name=name or builder.name, class_names=class_names, channels=channels, train=train, test=test)


def _library() -> Any:
    with needing("data.source 'tfds' needs tensorflow_datasets", extra="data"):
        import tensorflow_datasets
    return tensorflow_datasets


def _builder_at(library: Any, path: Path) -> Any:
    if not path.is_dir():
        raise FileNotFoundError(f"data.path: no such directory: {path}{_interrupted(path)}")
    missing = [file for file in ("dataset_info.json", "features.json") if not (path / file).is_file()]
    if missing:
        inside = sorted(str(found.parent.relative_to(path)) for found in path.glob("*/dataset_info.json"))
        hint = f"; did you mean {path / inside[-1]}?" if inside else ""
        raise FileNotFoundError(
            f"data.path: {path} is not a prepared TFDS version directory: "
            f"{missing[0]} is missing{hint}{_interrupted(path)}"
        )
    try:
        return library.builder_from_directory(str(path))
    except Exception as error:
        raise InputError(
            f"cannot read the TFDS description in {path}; damaged or truncated? ({_line(error)})"
        ) from error


def _builder_named(library: Any, name: str) -> Any:
    try:
        builder = library.builder(name, try_gcs=False)
    except library.core.registered.DatasetNotFoundError as error:
        raise InputError(f"data.name: TFDS has no data set {name!r}; `tfds.list_builders()` lists them") from error
    except Exception as error:
        # A damaged description, an unknown version or config, a package that this set needs: TFDS raises all sorts.
        where = Path(library.core.constants.DATA_DIR) / name
        raise InputError(f"TFDS cannot open data set {name!r}, expected in {where} ({_line(error)})") from error
    prepare = (
        f'prepare it once with: python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder({name!r}, file_format='array_record').download_and_prepare()\""
    )
    where = Path(builder.data_path)
    if not (where / "dataset_info.json").is_file():
        raise FileNotFoundError(f"TFDS data set {name!r} is not prepared in {where}{_interrupted(where)}; {prepare}")
    if not any(form.value in ("array_record", "parquet") for form in builder.info.available_file_formats()):
        raise InputError(
            f"TFDS data set {name!r} in {where} is stored as {builder.info.file_format.value}, "
            "which cannot be read by index; "
            f"delete that directory and {prepare}"
        )
    return builder


def _interrupted(path: Path) -> str:
    """Names what an interrupted preparation left: TFDS writes to `incomplete.XXXXXX_<version>` and renames it last."""
    versions = [path.name] if path.name[:1].isdigit() else ["*"]
    parents = [path.parent] if path.name[:1].isdigit() else [path]
    left = sorted(str(found) for p in parents for v in versions for found in p.glob(f"incomplete.*_{v}"))
    return f" (an earlier preparation was interrupted and left {left[0]}; it is safe to delete)" if left else ""


def _check_features(library: Any, features: Any, where: Any) -> int:
    keys = set(features) if isinstance(features, library.features.FeaturesDict) else set()
    if not {"image", "label"} <= keys:
        found = ", ".join(sorted(keys)) or features
        raise InputError(f"{where}: needs the features 'image' and 'label', found {found}")
    image, label = features["image"], features["label"]
    if not isinstance(image, library.features.Image) or np.dtype(image.np_dtype) != np.uint8:
        raise InputError(f"{where}: feature 'image' must be a uint8 image, found {image}")
    if not isinstance(label, library.features.ClassLabel) or not label.num_classes:
        raise InputError(f"{where}: feature 'label' must be a class label, found {label}")
    channels = image.shape[-1]
    return 1 if channels == 1 else 3


def _find_test(library: Any, builder: Any) -> str:
    splits = [name for name in TEST_SPLITS if name in builder.info.splits]
    for name in splits:
        first = next(iter(_open_split(library, builder, name, "data.test_split", chunk=1).labels()), np.zeros(0))
        if len(first) and first[0] >= 0:
            return name
    found = ", ".join(builder.info.splits)
    raise InputError(f"{builder.data_path} has no labeled test split; found {found}; set data.test_split")


def _open_split(library: Any, builder: Any, name: str, key: str, *, chunk: int = _CHUNK) -> Split:
    try:
        files = [Path(file) for file in builder.info.splits[name].filepaths]
    except (KeyError, ValueError) as error:
        found = ", ".join(builder.info.splits)
        raise InputError(f"{key}: no split {name!r} in {builder.data_path}; found {found}") from error
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"split {name!r}: no such file: {file}; prepare or copy the data set again")
    where = f"split {name!r} of {builder.data_path}"
    try:
        records = builder.as_data_source(split=name, decoders={"image": library.decode.SkipDecoding()})
        size = len(records)
    except Exception as error:
        raise InputError(f"cannot read {where}; damaged or truncated? ({_line(error)})") from error

    def fetch(indices: list[int]) -> list[dict[str, Any]]:
        try:
            return records.__getitems__(indices)
        except Exception as error:
            # The reader raises bare RuntimeErrors, the parser whatever the damage leads to; both mean the same here.
            raise InputError(f"cannot read {where}; damaged or truncated? ({_line(error)})") from error

    def labels() -> Iterator[np.ndarray]:
        for start in range(0, size, chunk):
            batch = fetch(list(range(start, min(size, start + chunk))))
            yield np.array([record["label"] for record in batch], np.int32)

    def read(indices: np.ndarray, convert: Converter) -> Iterator[tuple[int, np.ndarray | Unreadable]]:
        def decode(record: dict[str, Any]) -> tuple[int, np.ndarray | Unreadable]:
            return int(record["label"]), convert.read(io.BytesIO(record["image"]))

        def items() -> Iterator[dict[str, Any]]:
            for start in range(0, len(indices), chunk):
                yield from fetch(indices[start : start + chunk].tolist())

        return parallel(decode, items())

    return Split(where=where, size=size, labels=labels, read=read, name=lambda index: f"image {index} of {where}")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
