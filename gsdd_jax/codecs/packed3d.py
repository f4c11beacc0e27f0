"""Gaussians in space and time in integer codes: `gsdd_jax.codecs.packed` of videos, three positions and six shapes."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Le
from typing_extensions import Doc

from gsdd_jax.codecs import packed
from gsdd_jax.codecs.base import Shape, only_videos
from gsdd_jax.codecs.packed import PackedGaussianSpec

make = packed.make


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedGaussian3DSpec(PackedGaussianSpec):
    """Settings of the packed codec of Gaussians in space and time; images are videos, and see `PackedGaussianSpec`."""

    name: Annotated[Literal["packed_gaussian3d"], Doc("the parameterization")] = "packed_gaussian3d"  # type: ignore[assignment]
    # Sorting wants the number of a cell in 32 bits.
    bits_mean: Annotated[int, Ge(2), Le(10), Doc("bits of each coordinate of a position, the time included")] = 8
    bits_cholesky: Annotated[int, Ge(2), Le(16), Doc("bits of each of the six numbers of a shape")] = 6
    start: Annotated[
        Literal["growth", "clusters", "uniform"],
        Doc(
            "starting point of the fit: one Gaussian after another where the error is largest, over the first half of "
            "its steps; clusters of the video in space, time and color; or a uniform draw"
        ),
    ] = "clusters"
    COORDINATES: ClassVar[int] = 3
    VIDEO: ClassVar[bool] = True

    def resolved(self, image_shape: Shape) -> Any:
        return only_videos(super().resolved(image_shape), image_shape)
