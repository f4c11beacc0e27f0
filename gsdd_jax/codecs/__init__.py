"""Parameterisations of a distilled set behind one interface.

A new one is a file here and a line in ``SPECS`` and in ``_MAKERS``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gsdd_jax.codecs import gaussian, packed, pixel
from gsdd_jax.codecs.base import Codec
from gsdd_jax.codecs.gaussian import GaussianSpec
from gsdd_jax.codecs.packed import PackedGaussianSpec
from gsdd_jax.codecs.pixel import PixelSpec

__all__ = ["SPECS", "Codec", "CodecSpec", "GaussianSpec", "PackedGaussianSpec", "PixelSpec", "make"]

CodecSpec = GaussianSpec | PackedGaussianSpec | PixelSpec
SPECS = {"gaussian": GaussianSpec, "packed_gaussian": PackedGaussianSpec, "pixel": PixelSpec}
_MAKERS: dict[str, Callable[..., Codec]] = {
    "gaussian": gaussian.make,
    "packed_gaussian": packed.make,
    "pixel": pixel.make,
}


def make(spec: CodecSpec, *, image_shape: Sequence[int], num_classes: int, bytes_per_class: int) -> Codec:
    """Builds the codec of a spec for a dataset and a budget.

    Args:
        spec: Which parameterisation and its settings.
        image_shape: (h, w, c) of the images.
        num_classes: ``k``.
        bytes_per_class: The budget; the codec's ``nbytes`` of a whole set is at most ``k`` times it.

    Raises:
        ValueError: The budget is impossible; the message names the setting and what would fit.
    """
    if spec.name not in _MAKERS:
        raise ValueError(f"codec.name: expected one of {', '.join(sorted(_MAKERS))}; found {spec.name!r}")
    return _MAKERS[spec.name](spec, tuple(image_shape), num_classes, bytes_per_class)
