"""Class-balanced sampling that runs inside jit: a table of image indices per class and a draw from it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gsdd_jax.errors import InputError
from gsdd_jax.parallel import Shard, unsharded


class ClassTable(NamedTuple):
    """Which images belong to which class.

    Attributes:
        index: int32 [k, longest], image indices per class; rows of smaller classes repeat their entries to the end.
        count: int32 [k], how many entries of each row are real.
    """

    index: jax.Array  # type: ignore[assignment]  # a tuple method of that name; the field hides it on purpose
    count: jax.Array  # type: ignore[assignment]


def class_table(labels: np.ndarray, num_classes: int) -> ClassTable:
    """Builds the table from the labels of a data set; on the host, once.

    Args:
        labels: Integers [n] in [0, num_classes).
        num_classes: k, at least 1.

    Raises:
        TypeError: Labels are not integers.
        ValueError: A label is out of range, labels are not one-dimensional, or a class has no image.
    """
    index, count = class_index(labels, num_classes)
    return ClassTable(index=jnp.asarray(index), count=jnp.asarray(count))


def class_index(labels: np.ndarray, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Same as `class_table`, as NumPy arrays `(index, count)`."""
    labels = np.asarray(labels)
    if labels.ndim != 1 or labels.size == 0:
        raise InputError(f"labels must have shape [n] with n >= 1, found {list(labels.shape)}")
    if not np.issubdtype(labels.dtype, np.integer):
        raise InputError(f"labels must be integers, found {labels.dtype}")
    if labels.min() < 0 or labels.max() >= num_classes:
        bad = labels.min() if labels.min() < 0 else labels.max()
        raise InputError(f"label {bad} is out of range; allowed: 0 to {num_classes - 1}")
    count = np.bincount(labels, minlength=num_classes)
    if count.min() == 0:
        raise InputError(f"class {int(count.argmin())} has no images")
    members = np.split(np.argsort(labels, kind="stable"), np.cumsum(count)[:-1])
    index = np.stack([np.resize(row, count.max()) for row in members])
    return index.astype(np.int32), count.astype(np.int32)


def sample_classes(key: jax.Array, table: ClassTable, batch: int, shard: Shard | None = None) -> jax.Array:
    """Draws `batch` images of every class, without replacement as far as a class has images.

    A class with `count >= batch` images gives `batch` distinct ones, every subset equally likely, in random order. A
    smaller class gives each of its images `batch // count` times and a random `batch % count` of them once more (one
    random order, repeated). The padding of the table never makes an image likelier. Works under jit and vmap; a partial
    sort of [k, longest].

    The reference codes (DC, DM, MTT) draw `permutation(count)[:batch]`, which silently returns fewer images for small
    classes.

    Args:
        key: PRNG key, consumed.
        table: From `class_table`.
        batch: Images per class, at least 1; static.
        shard: Which classes the rows of the table are, where other devices have the others. The draw of a class is the
            one that it has in the table of all, if the rows there are as long.

    Returns:
        int32 [k, batch], indices into the data set.

    Raises:
        ValueError: `batch` is less than 1.
    """
    if batch < 1:
        raise InputError(f"batch must be at least 1, found {batch}")
    rows, longest = table.index.shape
    shard = shard or unsharded(rows)
    # 31 random bits, so that -1 can mark padding; some two of 5,000 images tie with probability 0.6 %: harmless.
    bits = shard.take(jax.random.bits(key, (shard.total, longest), jnp.uint32))
    priority = (bits >> 1).astype(jnp.int32)
    priority = jnp.where(jnp.arange(longest) < table.count[:, None], priority, -1)
    _, order = jax.lax.top_k(priority, min(batch, longest))
    turn = jnp.arange(batch) % jnp.minimum(table.count, batch)[:, None]
    return jnp.take_along_axis(table.index, jnp.take_along_axis(order, turn, axis=1), axis=1)
