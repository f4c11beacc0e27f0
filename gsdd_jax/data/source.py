"""What every reader hands over, and the one path from there to a uint8 array.

A reader (digits, tfds, folder, ...) only knows how to list labels and how to decode given records. Choosing records,
splitting and stacking happen here, once for all sources; `gsdd_jax.data.decode` turns a file into pixels.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import numpy as np

from gsdd_jax.data.decode import Converter, Unreadable
from gsdd_jax.errors import InputError

_In = TypeVar("_In")
_Out = TypeVar("_Out")


class Split(NamedTuple):
    """One split of a source, not yet decoded.

    Attributes:
        where: Name for error messages: the split, and its file or folder.
        size: Number of records.
        labels: Yields the labels in stored order, in chunks, without decoding an image; may be abandoned early.
        read: `read(indices, convert)` yields `(label, pixels or Unreadable)` for those records in that order; `convert`
            runs in the decoding threads, so that full-size images never pile up.
        name: `name(index)` names a record for messages: its file, or its number in the split.
    """

    where: str
    size: int
    labels: Callable[[], Iterable[np.ndarray]]
    read: Callable[[np.ndarray, Converter], Iterator[tuple[int, np.ndarray | Unreadable]]]
    name: Callable[[int], str]


class Source(NamedTuple):
    """A training and a test split with their class names.

    `channels` (1 or 3) is what the images have by nature; `notice` says what a reader passed over; `things` is what
    messages call a record.
    """

    name: str
    class_names: tuple[str, ...]
    channels: int
    train: Split
    test: Split
    notice: str = ""
    things: str = "images"


class Records:
    """Chosen records of a split as a random-access sequence of `{"image", "label"}`, decoded when asked for."""

    def __init__(self, split: Split, indices: np.ndarray, labels: np.ndarray, convert: Converter) -> None:
        """Keeps what is needed to decode later.

        Args:
            split: The split to read from.
            indices: int64 [n], positions of the chosen records in the split.
            labels: int32 [n], the labels to report (after reordering of classes).
            convert: Turns an image into uint8 [h, w, c], or a video into [t, h, w, c].
        """
        self._split, self._indices, self._labels, self._convert = split, indices, labels, convert

    def __len__(self) -> int:
        """Number of chosen records."""
        return len(self._indices)

    def __getitem__(self, position: int) -> dict[str, Any]:
        """Decodes one record."""
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: Sequence[int]) -> list[dict[str, Any]]:
        """Decodes several records, on all cores.

        Raises:
            InputError: An image cannot be read.
        """
        at = np.asarray(positions, np.int64)
        decoded = self._split.read(self._indices[at], self._convert)
        records = []
        for index, label, (_, pixels) in zip(self._indices[at], self._labels[at], decoded, strict=True):
            if isinstance(pixels, Unreadable):
                raise InputError(f"cannot read {self._split.name(index)} ({pixels.reason})")
            records.append({"image": pixels, "label": int(label)})
        return records


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


def assemble(split: Split, indices: np.ndarray, convert: Converter) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Decodes records into one array.

    Returns:
        `(images, labels, unreadable)`: uint8 [n, h, w, c], or of videos [n, t, h, w, c], and int32 [n] *source* labels
        of those that can be read, and the names of the others, each with the reason. `images` has no side where none
        can be read.

    Raises:
        ValueError: The images differ in size, or there are none.
    """
    if not len(indices):
        raise InputError(f"{split.where} has no image of the chosen classes")
    labels = np.empty(len(indices), np.int32)
    images: np.ndarray | None = None
    first, read, unreadable = 0, 0, []
    for index, (label, pixels) in zip(indices, split.read(indices, convert), strict=True):
        if isinstance(pixels, Unreadable):
            unreadable.append(f"{split.name(index)} ({pixels.reason})")
            continue
        if images is None:
            images, first = np.empty((len(indices), *pixels.shape), np.uint8), index
        if pixels.shape != images.shape[1:]:
            length = pixels.ndim == 4 and len(pixels) != len(images[0])
            way_out = "clips of several lengths need data.frames" if length else "several sizes need data.resolution"
            raise InputError(
                f"{split.where}: {split.name(index)} is {_size(pixels)}, {split.name(first)} is {_size(images[0])}; "
                f"{way_out} > 0"
            )
        images[read], labels[read] = pixels, label
        read += 1
    images = np.empty((0, 0, 0, convert.channels), np.uint8) if images is None else images
    return images[:read], labels[:read], unreadable


def hold_out(split: Split, fraction: float, seed: int) -> tuple[Split, Split]:
    """Splits off test images: of each class its share, rounded, but at least one and never all.

    Which ones depends on the seed and on the labels in stored order, and on nothing else.

    Args:
        split: All images.
        fraction: Share of the test images, in (0, 1).
        seed: Of the draw.

    Returns:
        Training and test split.
    """
    labels = np.concatenate([np.asarray(chunk, np.int32) for chunk in split.labels()] or [np.zeros(0, np.int32)])
    count = np.bincount(labels[labels >= 0])
    test = draw(labels, [min(max(1, round(fraction * n)), n - 1) if n else 0 for n in count.tolist()], seed)

    def part(chosen: np.ndarray, what: str) -> Split:
        rows = np.flatnonzero(chosen)
        return Split(
            where=f"{what} images of {split.where}",
            size=len(rows),
            labels=lambda: [labels[rows]],
            read=lambda indices, convert: split.read(rows[indices], convert),
            name=lambda index: split.name(rows[index]),
        )

    return part(~test, "training"), part(test, "test")


def draw(labels: np.ndarray, numbers: Sequence[int], seed: int) -> np.ndarray:
    """Draws so many records of each class, by a seeded generator; bool [n], true for the drawn ones."""
    # The split must not move: NumPy's policy freezes the streams of RandomState, but not those of default_rng.
    random = np.random.RandomState(seed)
    chosen = np.zeros(len(labels), bool)
    for label, number in enumerate(numbers):
        chosen[random.permutation(np.flatnonzero(labels == label))[:number]] = True
    return chosen


def _size(pixels: np.ndarray) -> str:
    return "x".join(map(str, pixels.shape[:-1]))


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
