"""Plain pixels: the parameterization of the vanilla methods, and the baseline of all others."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from annotated_types import Ge, Gt
from typing_extensions import Doc

from gsdd_jax import storage
from gsdd_jax.codecs.base import Codec, Layout, Shape, Spec, arrays, cast_storage, descent, resized
from gsdd_jax.later import optax


@dataclasses.dataclass(frozen=True, kw_only=True)
class PixelSpec(Spec):
    """Settings of the pixel codec."""

    name: Annotated[Literal["pixel"], Doc("the parameterization")] = "pixel"
    images_per_class: Annotated[int, Ge(0), Doc("images per class; 0 = as many as the budget holds")] = 0
    dtype: Annotated[
        Literal["float32", "bfloat16", "uint8"],
        Doc("precision on disk; the field counts float32; uint8: multiples of 1/85 from -1 to 2"),
    ] = "float32"
    optimizer: Annotated[Literal["sgd", "adam"], Doc("sgd with momentum 0.5 is the reference's choice for pixels")] = (
        "sgd"
    )
    lr: Annotated[float, Gt(0), Doc("learning rate in distillation, for pixels in [0, 1]")] = 0.1
    FORMER = Spec.FORMER | {"images_per_class": "ipc"}

    def layout(self, image_shape: Shape, num_classes: int) -> Layout:
        return arrays(self.dtype, {"images": (num_classes * self.images_per_class, *image_shape)})


def make(spec: PixelSpec, image_shape: tuple[int, int, int], num_classes: int) -> Codec:
    """Builds the codec; see `gsdd_jax.codecs.make`."""

    def init(key, images):
        return {"images": jnp.asarray(images, jnp.float32)}

    def decode(params, index=None, *, size=None, key=None):
        del key
        images = storage.quantize(params["images"], spec.dtype)
        images = images if index is None else images[index]
        return resized(images, size)

    return Codec(
        name="pixel",
        spec=spec,
        image_shape=image_shape,
        num_classes=num_classes,
        images_per_class=spec.images_per_class,
        init=init,
        decode=decode,
        **trained_as_pixels(spec),
        **cast_storage(spec, image_shape, num_classes),
    )


def trained_as_pixels(spec: PixelSpec) -> dict[str, Any]:
    """Returns ``project``, ``optimizer`` and what says that there is no fit, of a codec whose parameters are pixels."""

    def project(params):
        if spec.dtype != "uint8":
            return params
        # What a step carries beyond the ends would have no gradient to come back by.
        return jax.tree.map(lambda x: jnp.clip(x, storage.BYTE_LOW, storage.BYTE_HIGH), params)

    return {
        "project": project,
        "optimizer": lambda: descent(spec),
        "fitter": lambda steps: optax.set_to_zero(),
        "fitted_by_init": True,
    }
