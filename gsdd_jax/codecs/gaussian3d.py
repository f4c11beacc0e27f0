"""Sparse Gaussians in space and time: a video as one sum of them, bfloat16 on disk."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, ClassVar, Literal

from typing_extensions import Doc

from gsdd_jax.codecs import gaussian
from gsdd_jax.codecs.base import Shape, only_videos
from gsdd_jax.codecs.gaussian import GaussianSpec

make = gaussian.make


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gaussian3DSpec(GaussianSpec):
    """Settings of the codec of Gaussians in space and time; images are videos, and see `GaussianSpec`."""

    name: Annotated[Literal["gaussian3d"], Doc("the parameterization")] = "gaussian3d"  # type: ignore[assignment]
    start: Annotated[
        Literal["growth", "clusters", "uniform"],
        Doc(
            "starting point of the fit: one Gaussian after another where the error is largest, over the first half of "
            "its steps; clusters of the video in space, time and color; or a uniform draw"
        ),
    ] = "growth"
    VIDEO: ClassVar[bool] = True

    def resolved(self, image_shape: Shape) -> Any:
        return only_videos(self, image_shape)
