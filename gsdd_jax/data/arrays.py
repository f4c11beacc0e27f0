"""Arrays of images, videos or volumes, in memory or in one .npz file."""

import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from gsdd_jax import pixels
from gsdd_jax.data.decode import Converter
from gsdd_jax.data.source import Source, Split, hold_out
from gsdd_jax.errors import InputError


def open_arrays(path: str | Path, *, test_fraction: float = 0.0, test_seed: int = 0) -> Source:
    """Opens an .npz file: `train_images`, `train_labels`, `test_images`, `test_labels`, and `class_names` or not.

    Images are [n, h, w, c], videos and volumes [n, t, h, w, c], of one or three channels, uint8 or floating point in
    [0,1], which is rounded to uint8. Labels are integers from 0; without names, classes are called by their numbers.

    Args:
        path: The file.
        test_fraction: Share of each class to split off as test images, of a file without them; 0 = none.
        test_seed: Seed of that split.

    Raises:
        FileNotFoundError: There is no such file.
        InputError: It is no .npz file, an array is missing, or not what it should be.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"data.path: no such file: {path}")
    parts = ("train",) if test_fraction else ("train", "test")
    try:
        # Opened here: NumPy leaves a damaged file open.
        with Path(path).open("rb") as stream:
            file = np.load(stream, allow_pickle=False)
            if isinstance(file, np.ndarray):
                raise InputError(f"data.path: expected an .npz file, found a single array in {path}")
            wanted = [f"{part}_{what}" for part in parts for what in ("images", "labels")]
            missing = [key for key in wanted if key not in file]
            if missing:
                raise InputError(f"data.path: {path} has no array {missing[0]!r}; found {', '.join(file) or 'none'}")
            if test_fraction and "test_images" in file:
                raise InputError(f"data.test_fraction: {path} has test_images; expected 0, or a file without them")
            arrays = {key: file[key] for key in [*wanted, *(["class_names"] if "class_names" in file else [])]}
    except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
        if isinstance(error, InputError) or (isinstance(error, OSError) and error.errno is not None):
            raise
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"data.path: expected an .npz file of plain arrays, found {path} ({reason})") from error
    splits = [_split(part, arrays, path) for part in parts]
    channels, names = arrays["train_images"].shape[-1], _class_names(arrays)
    train, test = hold_out(splits[0], test_fraction, test_seed) if test_fraction else splits
    return Source(name=Path(path).stem, class_names=names, channels=channels, train=train, test=test)


def _split(part: str, arrays: dict[str, np.ndarray], path: str | Path) -> Split:
    images, labels = arrays[f"{part}_images"], arrays[f"{part}_labels"]
    images = pixels.check(images, f"{path}: {part}_images")
    if images.shape[-1] not in (1, 3):
        raise InputError(f"{path}: {part}_images must have 1 or 3 channels, found shape {list(images.shape)}")
    if not np.issubdtype(labels.dtype, np.integer) or labels.shape != images.shape[:1]:
        raise InputError(
            f"{path}: {part}_labels must be integers of shape [{len(images)}], found {labels.dtype} "
            f"{list(labels.shape)}"
        )
    if labels.min() < 0 or labels.max() > np.iinfo(np.int32).max:
        raise InputError(f"{path}: {part}_labels must be at least 0, found {labels.min()} to {labels.max()}")
    if images.dtype != np.uint8:
        images = np.round(np.clip(images, 0, 1) * 255).astype(np.uint8)
    return array_split(f"{part} split of {path}", images, labels)


def _class_names(arrays: dict[str, np.ndarray]) -> tuple[str, ...]:
    if "class_names" not in arrays:
        return tuple(map(str, range(int(arrays["train_labels"].max()) + 1)))
    names = arrays["class_names"]
    if names.ndim != 1 or names.dtype.kind != "U":
        raise InputError(f"class_names must be strings of shape [k], found {names.dtype} {list(names.shape)}")
    return tuple(map(str, names))


def array_split(where: str, images: np.ndarray, labels: np.ndarray) -> Split:
    """Makes a split of an array.

    Args:
        where: Name of the split, for messages.
        images: uint8 [n, h, w, c], or [n, t, h, w, c].
        labels: Integers [n].
    """

    def read(indices: np.ndarray, convert: Converter) -> Iterator[tuple[int, np.ndarray]]:
        for index in indices:
            yield int(labels[index]), convert.array(images[index])

    name = f"image {{}} of the {where}".format
    return Split(where=where, size=len(labels), labels=lambda: [labels.astype(np.int32)], read=read, name=name)
