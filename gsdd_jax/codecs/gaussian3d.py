"""Sparse Gaussians in space and time: a video as one sum of them, bfloat16 on disk."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, ClassVar, Literal

from typing_extensions import Doc

from gsdd_jax.codecs import gaussian
from gsdd_jax.codecs.gaussian import GaussianSpec
from gsdd_jax.errors import InputError

make = gaussian.make


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gaussian3DSpec(GaussianSpec):
    """Settings of the codec of Gaussians in space and time; images are videos, and see `GaussianSpec`."""

    name: Annotated[Literal["gaussian3d"], Doc("the parameterization")] = "gaussian3d"  # type: ignore[assignment]
    start: Annotated[
        Literal["clusters", "uniform"],
        Doc("starting point of the fit: clusters of the video in space, time and color, or a uniform draw"),
    ] = "clusters"
    VIDEO: ClassVar[bool] = True

    def resolved(self, image_shape: tuple[int, ...]) -> Any:
        return require_videos(self, image_shape)


def require_videos(spec: Any, image_shape: tuple[int, ...]) -> Any:
    """Returns a spec as it is.

    Raises:
        ValueError: The shape is that of images.
    """
    if len(image_shape) != 4:
        shape = " x ".join(map(str, image_shape))
        raise InputError(f"codec.name: {spec.name} expects videos (frames, height, width, channels), found {shape}")
    return spec
