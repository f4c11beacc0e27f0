"""Parameterizations of a distilled set behind one interface.

A new one is a file here, with a `gsdd_jax.codecs.base.Spec` whose ``name`` is a ``Literal`` and a function
``make``, and its spec in ``CodecSpec``; docs/add_codec.md has an example.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Sequence
from typing import Any, get_args, get_type_hints

import jax
import numpy as np

from gsdd_jax import pixels
from gsdd_jax.codecs import budget, frames
from gsdd_jax.codecs.base import Codec, Spec
from gsdd_jax.codecs.downscale import DownscaleSpec
from gsdd_jax.codecs.factor import FactorSpec
from gsdd_jax.codecs.frequency import FrequencySpec
from gsdd_jax.codecs.gaussian import GaussianSpec
from gsdd_jax.codecs.gaussian3d import Gaussian3DSpec
from gsdd_jax.codecs.latent import LatentSpec
from gsdd_jax.codecs.memory import MemorySpec
from gsdd_jax.codecs.neural_field import NeuralFieldSpec
from gsdd_jax.codecs.packed import PackedGaussianSpec
from gsdd_jax.codecs.packed3d import PackedGaussian3DSpec
from gsdd_jax.codecs.packed_frequency import PackedFrequencySpec
from gsdd_jax.codecs.palette import PaletteSpec
from gsdd_jax.codecs.pixel import PixelSpec
from gsdd_jax.codecs.sparse_epitome import SparseEpitomeSpec
from gsdd_jax.codecs.spectral import SpectralSpec
from gsdd_jax.codecs.static_dynamic import StaticDynamicSpec
from gsdd_jax.errors import InputError
from kernels.spec import integer

__all__ = [
    "SPECS",
    "Codec",
    "CodecSpec",
    "DownscaleSpec",
    "FactorSpec",
    "FrequencySpec",
    "Gaussian3DSpec",
    "GaussianSpec",
    "LatentSpec",
    "MemorySpec",
    "NeuralFieldSpec",
    "PackedFrequencySpec",
    "PackedGaussian3DSpec",
    "PackedGaussianSpec",
    "PaletteSpec",
    "PixelSpec",
    "SparseEpitomeSpec",
    "SpectralSpec",
    "StaticDynamicSpec",
    "make",
    "register",
]

CodecSpec = (
    GaussianSpec
    | PackedGaussianSpec
    | Gaussian3DSpec
    | PackedGaussian3DSpec
    | PixelSpec
    | PaletteSpec
    | DownscaleSpec
    | FrequencySpec
    | PackedFrequencySpec
    | NeuralFieldSpec
    | FactorSpec
    | MemorySpec
    | SparseEpitomeSpec
    | SpectralSpec
    | StaticDynamicSpec
    | LatentSpec
)
"""The registry: the specs of all codecs of the package."""
SPECS: dict[str, type] = {get_args(get_type_hints(spec)["name"])[0]: spec for spec in get_args(CodecSpec)}
"""The same and those of `register`, by name."""


def register(spec: type) -> type:
    """Adds a codec from outside the package, by the ``name`` of its spec; a class decorator.

    The function ``make(spec, image_shape, num_classes) -> Codec`` is looked up in the module of the spec.
    """
    SPECS[get_args(get_type_hints(spec)["name"])[0]] = spec
    return spec


def make(
    spec: CodecSpec,
    *,
    image_shape: Sequence[int],
    num_classes: int,
    bytes_per_class: int | None = None,
    label_bytes: int = 0,
) -> Codec:
    """Builds the codec of a spec for a dataset and a budget.

    What a spec leaves open, the number of images or of Gaussians, is the most that fits the budget together with the
    labels of the images. Arguments that come to the same settings give the same object, so that what ``jax.jit`` has
    compiled for its functions is found again.

    Args:
        spec: Which parameterization and its settings.
        image_shape: (h, w, c) of the images, or (t, h, w, c) of videos, which codecs of images store frame by frame.
        num_classes: ``k``.
        bytes_per_class: The budget: the codec's ``nbytes`` of a whole set, and its labels, are at most ``k`` times it.
            None = what the spec takes, which then has to leave nothing open.
        label_bytes: Of the label of an image; 0 = hard labels, see `gsdd_jax.labels.nbytes`.

    Raises:
        ValueError: The spec or the budget is impossible; the message names the setting and what would fit.
    """
    if not isinstance(spec, Spec):
        raise InputError(f"codec: expected a spec such as PackedGaussianSpec(num_points=22), found {spec!r}")
    if spec.name not in SPECS:
        raise InputError(f"codec.name: expected one of {', '.join(sorted(SPECS))}; found {spec.name!r}")
    # Plain numbers, as a manifest holds them, also of those who count with NumPy.
    plain = {name: value.item() for name, value in vars(spec).items() if isinstance(value, np.generic)}
    shape = tuple(integer(side, "image_shape") for side in image_shape)
    if len(shape) not in (3, 4):
        raise InputError(f"image_shape: expected (h, w, c), or (t, h, w, c) of videos; found {shape}")
    classes, spec = integer(num_classes, "num_classes"), dataclasses.replace(spec, **plain)
    spec = budget.resolve(
        spec,
        image_shape=shape,
        num_classes=classes,
        bytes_per_class=None if bytes_per_class is None else int(bytes_per_class),
        label_bytes=label_bytes,
    )
    return _built(spec, repr(spec), shape, classes)


@functools.lru_cache(maxsize=128)
def _built(spec: CodecSpec, shown: str, image_shape: tuple[int, ...], num_classes: int) -> Codec:
    """Builds the codec of a resolved spec, once.

    Settings that are equal but do not look the same, such as 1 and 1.0, are written differently and stay apart.
    """
    del shown
    codec = frames.make(sys.modules[SPECS[spec.name].__module__].make, spec, image_shape, num_classes)

    def init(key: jax.Array, images: Any) -> Any:
        return codec.init(key, pixels.as_float(pixels.check(images, real=False)))

    return codec._replace(init=init)
