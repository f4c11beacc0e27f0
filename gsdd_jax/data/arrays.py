"""Arrays of images, videos or volumes, in memory or in one .npz file."""

from collections.abc import Iterator

import numpy as np

from gsdd_jax.data.decode import Converter
from gsdd_jax.data.source import Split


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
