"""What every reader hands over, and the one path from there to a uint8 array.

A reader (digits, tfds, folder) only knows how to list labels and how to decode given records. Choosing records,
resizing, counting channels and stacking happen here, once for all sources. Nothing in this file knows a file format.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
from PIL import Image

Convert = Callable[[Image.Image], np.ndarray]
Resize = Literal["crop", "squash"]
_In = TypeVar("_In")
_Out = TypeVar("_Out")

# Modes that hold at most 8 bits per channel; "I;16", "I" and "F" would be clipped silently by a conversion.
_EIGHT_BIT = frozenset({"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"})
_GREY = frozenset({"1", "L", "LA", "La"})


class Split(NamedTuple):
    """One split of a source, not yet decoded.

    Attributes:
        where: Name for error messages: the split, and its file or folder.
        size: Number of records.
        labels: Yields the labels in stored order, in chunks, without decoding an image; may be abandoned early.
        read: `read(indices, convert)` yields `(label, pixels)` for those records in that order; `convert` runs in the
            decoding threads, so that full-size images never pile up.
    """

    where: str
    size: int
    labels: Callable[[], Iterable[np.ndarray]]
    read: Callable[[np.ndarray, Convert], Iterator[tuple[int, np.ndarray]]]


class Source(NamedTuple):
    """A training and a test split with their class names; `channels` (1 or 3) is what the images have by nature."""

    name: str
    class_names: tuple[str, ...]
    channels: int
    train: Split
    test: Split


class Records:
    """Chosen records of a split as a random-access sequence of `{"image", "label"}`, decoded when asked for."""

    def __init__(self, split: Split, indices: np.ndarray, labels: np.ndarray, convert: Convert) -> None:
        """Keeps what is needed to decode later.

        Args:
            split: The split to read from.
            indices: int64 [n], positions of the chosen records in the split.
            labels: int32 [n], the labels to report (after reordering of classes).
            convert: Turns a PIL image into uint8 [h, w, c].
        """
        self._split, self._indices, self._labels, self._convert = split, indices, labels, convert

    def __len__(self) -> int:
        """Number of chosen records."""
        return len(self._indices)

    def __getitem__(self, position: int) -> dict[str, Any]:
        """Decodes one record."""
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: Sequence[int]) -> list[dict[str, Any]]:
        """Decodes several records, on all cores."""
        at = np.asarray(positions, np.int64)
        images = (pixels for _, pixels in self._split.read(self._indices[at], self._convert))
        return [{"image": image, "label": int(label)} for image, label in zip(images, self._labels[at], strict=True)]


def converter(*, resolution: int, resize: Resize, channels: int) -> Convert:
    """Makes the function that turns a decoded PIL image into uint8 [h, w, c].

    Args:
        resolution: 0 = keep the size; otherwise the side of the square result in pixels.
        resize: "crop" = short side to `resolution`, then centre crop; "squash" = both sides to `resolution`. Both use
            PIL's antialiased Lanczos filter.
        channels: 1 (luma, ITU-R 601) or 3 (RGB; grey is replicated, alpha is dropped).
    """
    mode = {1: "L", 3: "RGB"}[channels]

    def convert(image: Image.Image) -> np.ndarray:
        if image.mode not in _EIGHT_BIT:
            raise ValueError(f"image mode {image.mode!r} is not 8 bits per channel (uint8); convert the files first")
        if image.mode != mode:
            image = image.convert(mode)
        if resolution and image.size != (resolution, resolution):
            image = _squash(image, resolution) if resize == "squash" else _short_side_and_crop(image, resolution)
        pixels = np.asarray(image)
        return pixels[..., None] if channels == 1 else pixels

    return convert


def _squash(image: Image.Image, side: int) -> Image.Image:
    return image.resize((side, side), Image.Resampling.LANCZOS)


def _short_side_and_crop(image: Image.Image, side: int) -> Image.Image:
    width, height = image.size
    scale = side / min(width, height)
    width, height = max(side, round(width * scale)), max(side, round(height * scale))
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    left, top = (width - side) // 2, (height - side) // 2
    return image.crop((left, top, left + side, top + side))


def is_grey(image: Image.Image) -> bool:
    """Whether the file stores one channel (with or without alpha)."""
    return image.mode in _GREY


def choose(split: Split, *, kept: Sequence[int], per_class: int = 0, limit: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Chooses records by their labels alone, without decoding an image.

    Args:
        split: The split to choose from.
        kept: Source labels to keep, in the order in which `limit` visits them.
        per_class: 0 = all; otherwise the first `per_class` records of each kept class.
        limit: 0 = all; otherwise at most this many records in total, spread over the classes as evenly as they allow
            (the first of each class, then the second of each class, ...).

    Returns:
        `(indices, labels)`, int64 [n] positions in stored order and int32 [n] *source* labels.
    """
    quota = per_class or (math.ceil(limit / len(kept)) if limit else 0)
    position = {label: place for place, label in enumerate(kept)}
    seen = np.zeros(len(kept), np.int64)
    chunks: list[np.ndarray] = []
    for chunk in split.labels():
        chunks.append(np.asarray(chunk, np.int32))
        if quota:
            # The label pass over an ImageNet-sized split costs minutes of reading; a smoke run stops as soon as it can.
            seen += [np.count_nonzero(chunks[-1] == label) for label in kept]
            if seen.min() >= quota:
                break
    labels = np.concatenate(chunks) if chunks else np.zeros(0, np.int32)
    indices = np.flatnonzero(np.isin(labels, np.asarray(kept)))
    rank = _rank_within_class(labels[indices])
    if per_class:
        indices, rank = indices[rank < per_class], rank[rank < per_class]
    if limit:
        place = np.array([position[label] for label in labels[indices].tolist()], np.int64)
        indices = np.sort(indices[np.lexsort((place, rank))[:limit]])
    return indices, labels[indices]


def _rank_within_class(labels: np.ndarray) -> np.ndarray:
    order = np.argsort(labels, kind="stable")
    _, first, count = np.unique(labels[order], return_index=True, return_counts=True)
    rank = np.empty(len(labels), np.int64)
    rank[order] = np.arange(len(labels)) - np.repeat(first, count)
    return rank


def assemble(split: Split, indices: np.ndarray, convert: Convert) -> tuple[np.ndarray, np.ndarray]:
    """Decodes records into one array.

    Returns:
        `(images, labels)`: uint8 [n, h, w, c] and int32 [n] *source* labels.

    Raises:
        ValueError: The images differ in size, or there are none.
    """
    if not len(indices):
        raise ValueError(f"{split.where} has no image of the chosen classes")
    labels = np.empty(len(indices), np.int32)
    images: np.ndarray | None = None
    for place, (label, pixels) in enumerate(split.read(indices, convert)):
        if images is None:
            images = np.empty((len(indices), *pixels.shape), np.uint8)
        if pixels.shape != images.shape[1:]:
            raise ValueError(
                f"{split.where}: image {indices[place]} is {_size(pixels)}, image {indices[0]} is {_size(images[0])}; "
                "images of several sizes need data.resolution > 0"
            )
        images[place], labels[place] = pixels, label
    assert images is not None
    return images, labels


def _size(pixels: np.ndarray) -> str:
    return f"{pixels.shape[0]}x{pixels.shape[1]}"


def parallel(function: Callable[[_In], _Out], items: Iterable[_In], *, block: int = 16) -> Iterator[_Out]:
    """Maps `function` over `items` in order, on all cores, holding only a few blocks at a time.

    PIL releases the interpreter lock while it decodes and resizes, so threads suffice. Blocks keep the hand-over cheap
    for 32-pixel images, where one decoding takes about 0.1 ms.
    """
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    def run(batch: list[_In]) -> list[_Out]:
        return [function(item) for item in batch]

    with ThreadPoolExecutor(workers, thread_name_prefix="gsdd-decode") as pool:
        for window in _windows(_windows(items, block), 4 * workers):
            for done in pool.map(run, window):
                yield from done


def _windows(items: Iterable[_In], size: int) -> Iterator[list[_In]]:
    window: list[_In] = []
    for item in items:
        window.append(item)
        if len(window) == size:
            yield window
            window = []
    if window:
        yield window
