"""Videos as one image each, and what moves at a lower resolution: the static-dynamic split of VDSD (Wang et al. 2024).

Deviation: the two are added, where VDSD has a network that is trained with them and shared by all videos.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from annotated_types import Ge, Gt, Le
from typing_extensions import Doc

from gsdd_jax import storage
from gsdd_jax.codecs.base import MOST, Codec, Layout, Shape, Spec, arrays, cast_storage, only_videos
from gsdd_jax.codecs.downscale import enlargement
from gsdd_jax.later import optax


@dataclasses.dataclass(frozen=True, kw_only=True)
class StaticDynamicSpec(Spec):
    """Settings of the codec of static and moving parts."""

    name: Annotated[Literal["static_dynamic"], Doc("the parameterization")] = "static_dynamic"
    factor: Annotated[
        int, Ge(0), Le(64), Doc("by how much the frames of the moving part are smaller; 0 = there is none")
    ] = 2
    images_per_class: Annotated[int, Ge(0), Doc("videos per class; 0 = as many as the budget holds")] = 0
    dtype: Annotated[
        Literal["float32", "bfloat16", "uint8"],
        Doc("precision on disk; the field counts float32; uint8: multiples of 1/85 from -1 to 2"),
    ] = "float32"
    optimizer: Annotated[Literal["sgd", "adam"], Doc("sgd has momentum 0.5, as for pixels")] = "sgd"
    lr: Annotated[float, Gt(0), Doc("learning rate in distillation, for pixels in [0, 1]")] = 0.1
    VIDEO = True

    def resolved(self, image_shape: Shape) -> Any:
        return only_videos(self, image_shape)

    def sizes(self, image_shape: Shape) -> dict[str, Sequence[int]]:
        return {"images_per_class": range(1, MOST)}

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

    def project(params):
        if spec.dtype != "uint8":
            return params
        return jax.tree.map(lambda x: jnp.clip(x, storage.BYTE_LOW, storage.BYTE_HIGH), params)

    return Codec(
        name="static_dynamic",
        spec=spec,
        image_shape=image_shape,
        num_classes=num_classes,
        images_per_class=spec.images_per_class,
        init=init,
        decode=decode,
        project=project,
        optimizer=lambda: optax.sgd(spec.lr, momentum=0.5) if spec.optimizer == "sgd" else optax.adam(spec.lr),
        fitter=lambda steps: optax.set_to_zero(),
        fitted_by_init=True,
        **cast_storage(spec, image_shape, num_classes),
    )
