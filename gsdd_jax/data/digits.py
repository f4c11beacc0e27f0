"""The handwritten digits that scikit-learn ships: 1,797 images of 8x8 pixels. Needs no network."""

from collections.abc import Iterator

import numpy as np
from PIL import Image

from gsdd_jax.data.decode import Converter
from gsdd_jax.data.source import Source, Split, draw
from gsdd_jax.errors import needing

TEST_IMAGES = 500
_SPLIT_SEED = 0


def open_digits() -> Source:
    """Opens the digits as a source: 1,297 training and 500 test images, 8x8, one channel, ten classes.

    The original values 0 to 16 become uint8 by `round(v * 255 / 16)`. scikit-learn defines no split; ours is fixed:
    each class gives its share of the 500 test images (48 to 51, by largest remainder), drawn with a seeded generator.
    The writers of training and test images overlap, as they do in every random split of this set.
    """
    with needing("data.source 'digits' needs scikit-learn", extra="full"):
        from sklearn.datasets import load_digits

    values, target = load_digits(return_X_y=True)
    images = np.round(values.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    labels = target.astype(np.int32)
    test = _stratified_choice(labels, TEST_IMAGES)
    return Source(
        name="digits",
        class_names=tuple(str(digit) for digit in range(10)),
        channels=1,
        train=_array_split("digits train split", images[~test], labels[~test]),
        test=_array_split("digits test split", images[test], labels[test]),
    )


def _stratified_choice(labels: np.ndarray, total: int) -> np.ndarray:
    count = np.bincount(labels)
    share = total * count / count.sum()
    take = np.floor(share).astype(int)
    take[np.argsort(take - share, kind="stable")[: total - take.sum()]] += 1
    return draw(labels, take, _SPLIT_SEED)


def _array_split(where: str, images: np.ndarray, labels: np.ndarray) -> Split:
    def read(indices: np.ndarray, convert: Converter) -> Iterator[tuple[int, np.ndarray]]:
        for index in indices:
            yield int(labels[index]), convert(Image.fromarray(images[index]))

    name = f"image {{}} of the {where}".format
    return Split(where=where, size=len(labels), labels=lambda: [labels], read=read, name=name)
