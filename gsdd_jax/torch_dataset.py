"""A distilled set as a dataset of PyTorch, decoded by NumPy: JAX is not needed, and leaves a GPU to PyTorch.

Only this module imports PyTorch: ``from gsdd_jax.torch_dataset import DistilledSet``.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, SupportsIndex

import numpy as np

from gsdd_jax import decode_numpy, exchange, synset
from gsdd_jax.errors import needing

with needing("gsdd_jax.torch_dataset needs PyTorch", extra="torch"):
    import torch
    from torch.utils.data import Dataset


class DistilledSet(Dataset):
    """The images of a distilled set, ``[c, h, w]``, or ``[c, t, h, w]`` of videos, float32 around [0,1], and labels.

    A label is an integer, or where the set has soft ones a tensor ``[k]`` of probabilities; ``CrossEntropyLoss`` takes
    both. Whatever is handed out is a copy: it may be changed in place.

    The set, whole or merged, is read and checked at once, decoded when the first image is asked for. Workers of a
    ``DataLoader`` decode for themselves unless an image was asked for before they were forked.

    Args:
        path: As for `gsdd_jax.load`.
        size: (height, width) of the images; those of the set by default.
        transform: Applied to each image, such as ``torchvision.transforms.v2.Normalize(found.mean, found.std)``.
        target_transform: Applied to each label.

    Attributes:
        class_names: One per class.
        mean: Of each channel of the training set, in units of the [0,1] image, or None where it was not recorded;
            networks of the run saw ``(image - mean) / std`` if it whitened by ``meanstd``.
        std: Likewise.
        transform: May be set later, too.
        target_transform: Likewise.

    Raises:
        FileNotFoundError: There is no set.
        ValueError: It is damaged, or its codec is not decoded without JAX.
        ImportError: From the import: there is no PyTorch.
    """

    def __init__(
        self,
        path: synset.Location,
        size: tuple[int, ...] | None = None,
        *,
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[Any], Any] | None = None,
    ):
        stored = decode_numpy.read(path)
        self.class_names = stored.class_names
        self.mean, self.std = (exchange.constants(stored.meta, f"channel_{name}") for name in ("mean", "std"))
        self.transform, self.target_transform = transform, target_transform
        self._labels, self._soft_labels = stored.labels, stored.soft_labels
        self._path, self._size = path, size
        self._images: np.ndarray | None = None

    @property
    def labels(self) -> np.ndarray:
        """Labels ``[n]`` int32, of NumPy."""
        return self._labels.copy()

    @property
    def soft_labels(self) -> np.ndarray | None:
        """Soft labels ``[n, k]`` float32, of NumPy, or None."""
        return None if self._soft_labels is None else self._soft_labels.copy()

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: SupportsIndex) -> tuple[Any, Any]:
        i = operator.index(index)
        if self._images is None:
            images = decode_numpy.load(self._path, self._size).images
            self._images = np.ascontiguousarray(np.moveaxis(images, -1, 1))
        image: Any = torch.from_numpy(self._images[i].copy())
        soft = self._soft_labels
        label: Any = int(self._labels[i]) if soft is None else torch.from_numpy(soft[i].copy())
        if self.transform is not None:
            image = self.transform(image)
        if self.target_transform is not None:
            label = self.target_transform(label)
        return image, label
