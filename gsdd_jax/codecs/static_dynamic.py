"""Videos as one image each, and what moves at a lower resolution: the static-dynamic split of VDSD (Wang et al. 2024).

Deviation: the two are added, where VDSD has a network that is trained with them and shared by all videos.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from annotated_types import Ge, Le
from typing_extensions import Doc

from gsdd_jax import storage
from gsdd_jax.codecs.base import Codec, Layout, Shape, arrays, cast_storage, only_videos
from gsdd_jax.codecs.downscale import enlargement
from gsdd_jax.codecs.pixel import PixelSpec, trained_as_pixels


@dataclasses.dataclass(frozen=True, kw_only=True)
class StaticDynamicSpec(PixelSpec):
    """Settings of the codec of static and moving parts; images are videos, and see `PixelSpec`."""

    name: Annotated[Literal["static_dynamic"], Doc("the parameterization")] = "static_dynamic"  # type: ignore[assignment]
    factor: Annotated[
        int, Ge(0), Le(64), Doc("by how much the frames of the moving part are smaller; 0 = there is none")
    ] = 2
    VIDEO = True

    def resolved(self, image_shape: Shape) -> Any:
        return only_videos(self, image_shape)

    def layout(self, image_shape: Shape, num_classes: int) -> Layout:
        (t, h, w, c), n = image_shape, num_classes * self.images_per_class
        shapes: dict[str, tuple[int, ...]] = {"static": (n, h, w, c)}
        if self.factor:
            shapes["dynamic"] = (n, t, *self.small(h, w), c)
        return arrays(self.dtype, shapes)

    def small(self, h: int, w: int) -> tuple[int, int]:
        """Returns (height, width) of the frames of the moving part."""
        return -(-h // self.factor), -(-w // self.factor)


def make(spec: StaticDynamicSpec, image_shape: Shape, num_classes: int) -> Codec:
    """Builds the codec; see `gsdd_jax.codecs.make`.

    It starts at the mean of the frames, and at what is nearest to their differences from it once it is enlarged.
    """
    t, h, w, c = image_shape
    both = "nthwc,ih,jw->ntijc"

    def init(key, videos):
        del key
        static = videos.mean(1)
        if not spec.factor:
            return {"static": static}
        rows, columns = (jnp.linalg.pinv(enlargement(x, y)) for x, y in zip((h, w), spec.small(h, w), strict=True))
        moved = videos - static[:, None]
        return {
            "static": static,
            "dynamic": jnp.einsum(both, moved, rows, columns, precision=jax.lax.Precision.HIGHEST),
        }

    def decode(params, index=None, *, size=None, key=None):
        del key
        params = jax.tree.map(lambda x: storage.quantize(x if index is None else x[index], spec.dtype), params)
        videos = jnp.broadcast_to(params["static"][:, None], (len(params["static"]), *image_shape))
        if spec.factor:
            moving = params["dynamic"]
            videos += jax.image.resize(moving, (len(moving), t, h, w, c), "linear")
        return videos if size is None else jax.image.resize(videos, (len(videos), *size, c), "linear")

    return Codec(
        name="static_dynamic",
        spec=spec,
        image_shape=image_shape,
        num_classes=num_classes,
        images_per_class=spec.images_per_class,
        init=init,
        decode=decode,
        **trained_as_pixels(spec),
        **cast_storage(spec, image_shape, num_classes),
    )
