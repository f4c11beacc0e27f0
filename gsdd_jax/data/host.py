"""Class-balanced batches for data sets that do not fit on the device: images stay on the host."""

import queue
import threading
from collections.abc import Generator, Sequence
from typing import Any, Protocol

import numpy as np

from gsdd_jax import pixels
from gsdd_jax.data.sampling import class_index
from gsdd_jax.errors import InputError


class Sampler(Protocol):
    """Anything that maps a step to a batch."""

    def batch(self, step: int) -> np.ndarray:
        """Returns the batch of that step."""


class HostSampler:
    """Draws class-balanced batches as a pure function of `(seed, step)`.

    A resumed run therefore sees the same batches as an uninterrupted one. The rule of the draw is that of
    `sample_classes`; the random numbers are not the same (NumPy's Philox in counter mode, whose raw stream NumPy keeps
    fixed across versions), because a draw on the device would have to wait for the training step in flight.
    """

    def __init__(
        self,
        source: Sequence[Any] | np.ndarray,
        labels: np.ndarray,
        *,
        num_classes: int,
        batch: int,
        seed: int,
        classes: np.ndarray | None = None,
    ) -> None:
        """Prepares the class table; reads no image.

        Args:
            source: [n, h, w, c], uint8 or floating point in [0,1], or any `__len__`/`__getitem__` sequence of records
                `{"image": [h, w, c] in the same form, ...}` (`__getitems__` is used where there is one). Must be safe
                to read from one other thread.
            labels: Integers [n] in [0, num_classes).
            num_classes: k.
            batch: Images per class and step, at least 1.
            seed: 0 to 2**64 - 1.
            classes: Integers [j], whose images a batch holds, where other processes read the others; all, in order, if
                None.

        Raises:
            TypeError: An array source is neither uint8 nor floating point; labels are not integers.
            ValueError: Images that are none, see `pixels.check`, lengths differ, batch or seed out of range, a class
                without images, a label out of range.
        """
        if isinstance(source, np.ndarray):
            source = pixels.check(source)
        if len(source) != len(labels):
            raise InputError(f"{len(source)} images but {len(labels)} labels")
        if batch < 1:
            raise InputError(f"batch must be at least 1, found {batch}")
        if not 0 <= seed < 2**64:
            raise InputError(f"seed must be in 0 to 2**64 - 1, found {seed}")
        self._source, self._batch, self._seed = source, batch, seed
        self._index, self._count = class_index(labels, num_classes)
        self._classes = np.arange(num_classes) if classes is None else np.asarray(classes)

    def indices(self, step: int) -> np.ndarray:
        """Returns int32 [k, batch], the images of a step.

        Raises:
            ValueError: `step` is negative.
        """
        if step < 0:
            raise InputError(f"step must be at least 0, found {step}")
        rows, longest = self._index.shape
        # A step owns the 2**64 counter values above step * 2**64, so steps never share numbers.
        stream = np.random.Philox(counter=int(step) << 64, key=self._seed)
        priority = stream.random_raw(rows * longest).reshape(rows, longest)
        priority[np.arange(longest) >= self._count[:, None]] = np.iinfo(np.uint64).max
        drawn = min(self._batch, longest)
        order = np.argpartition(priority, drawn - 1, axis=1)[:, :drawn]
        within = np.argsort(np.take_along_axis(priority, order, axis=1), axis=1, kind="stable")
        order = np.take_along_axis(order, within, axis=1)
        turn = np.arange(self._batch) % np.minimum(self._count, self._batch)[:, None]
        return np.take_along_axis(self._index, np.take_along_axis(order, turn, axis=1), axis=1)

    def batch(self, step: int) -> np.ndarray:
        """Returns [k, batch, h, w, c], the images of a step, or those of its `classes`; uint8, or float32 in [0,1].

        Raises:
            TypeError: A record's image is neither uint8 nor floating point.
            ValueError: A record's image is none, see `pixels.check`, the images of the batch differ in shape or form,
                or `step` is negative.
        """
        chosen = self.indices(step)[self._classes]
        flat = chosen.reshape(-1)
        images = self._source[flat] if isinstance(self._source, np.ndarray) else _stack(self._source, flat)
        return images.reshape(*chosen.shape, *images.shape[1:])


def _stack(source: Sequence[Any], flat: np.ndarray) -> np.ndarray:
    # Small classes repeat images within a batch; each is decoded once.
    distinct, back = np.unique(flat, return_inverse=True)
    wanted = distinct.tolist()
    records = source.__getitems__(wanted) if hasattr(source, "__getitems__") else [source[i] for i in wanted]
    images = [
        np.asarray(pixels.check(record["image"], f"image {place}", single=True))
        for place, record in zip(wanted, records, strict=True)
    ]
    for place, image in zip(wanted, images, strict=True):
        if (image.shape, image.dtype) != (images[0].shape, images[0].dtype):
            raise InputError(
                f"image {place} is {image.dtype} {list(image.shape)}, image {wanted[0]} is {images[0].dtype} "
                f"{list(images[0].shape)}"
            )
    return np.stack(images)[back]


def prefetch(sampler: Sampler, start_step: int, *, depth: int = 2) -> Generator[tuple[int, np.ndarray], None, None]:
    """Yields `(step, batch)` from `start_step` on, for ever, prepared by one background thread.

    Closing the generator (or leaving the program's scope of it) stops and joins the thread. An error in the sampler is
    raised at the step where it happened, after the good batches before it.

    Args:
        sampler: Anything with `batch(step)`.
        start_step: First step, at least 0.
        depth: Finished batches that may wait, at least 1.

    Raises:
        ValueError: `depth` or `start_step` out of range (at the first `next`).
    """
    if depth < 1:
        raise InputError(f"depth must be at least 1, found {depth}")
    if start_step < 0:
        raise InputError(f"start_step must be at least 0, found {start_step}")
    ready: queue.Queue[tuple[int, np.ndarray | BaseException]] = queue.Queue(depth)
    stop = threading.Event()

    def put(item: tuple[int, np.ndarray | BaseException]) -> bool:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        step = start_step
        try:
            while put((step, sampler.batch(step))):
                step += 1
        except BaseException as error:  # handed over to the consumer, never swallowed
            put((step, error))

    thread = threading.Thread(target=work, name="gsdd-prefetch", daemon=True)
    thread.start()
    try:
        while True:
            step, item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield step, item
    finally:
        stop.set()
        thread.join()
