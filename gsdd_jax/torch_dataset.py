"""A distilled set as a dataset of PyTorch, decoded by NumPy: JAX is not needed, and leaves a GPU to PyTorch.

Only this module imports PyTorch: ``from gsdd_jax.torch_dataset import DistilledSet``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gsdd_jax import decode_numpy, exchange, synset

try:
    import torch
    from torch.utils.data import Dataset
except ImportError as error:
    raise ImportError("gsdd_jax.torch_dataset needs PyTorch: pip install gsdd_jax[torch]") from error


class DistilledSet(Dataset):
    """The images of a distilled set, ``[c, h, w]`` float32 around [0,1], each with its label.

    A label is an integer, or where the set has soft ones a tensor ``[k]`` of probabilities; ``CrossEntropyLoss`` takes
    both.

    The set is read and checked at once, decoded when the first image is asked for. Workers of a ``DataLoader`` decode
    for themselves unless an image was asked for before they were forked.

    Args:
        path: As for :func:`gsdd_jax.load`.
        size: (height, width) of the images; those of the set by default.

    Attributes:
        class_names: One per class.
        labels: ``[n]`` int32, of NumPy.
        soft_labels: ``[n, k]`` float32, of NumPy, or None.

    Raises:
        FileNotFoundError: There is no set.
        ValueError: It is damaged, or its codec is not decoded without JAX.
        ImportError: From the import: there is no PyTorch.
    """

    def __init__(self, path: synset.Location, size: tuple[int, int] | None = None):
        manifest, _, arrays = synset.read(path, decode_numpy.decoder_of)
        entry = manifest.labels
        self.soft_labels = None if entry is None else exchange.soft_labels(arrays, entry, manifest.num_classes)
        self.class_names = manifest.class_names
        self.labels = np.repeat(np.arange(manifest.num_classes, dtype=np.int32), manifest.images_per_class)
        self._path, self._size = path, size
        self._images: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        if self._images is None:
            images = decode_numpy.load(self._path, self._size).images
            self._images = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
        soft = self.soft_labels
        label = int(self.labels[index]) if soft is None else torch.from_numpy(soft[index])
        return torch.from_numpy(self._images[index]), label
