"""Images as combinations of bases that the whole set shares: the addressable memories of RTP (Remember the Past)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from annotated_types import Ge, Gt, Le
from typing_extensions import Doc

from gsdd_jax import storage
from gsdd_jax.codecs.base import CENTER, MOST, SPREAD, Codec, Layout, Shape, Spec, arrays, cast_storage
from gsdd_jax.codecs.downscale import cell_size, enlargement
from gsdd_jax.errors import InputError
from gsdd_jax.later import optax

# Adam's rate from the random start. On 50 CIFAR-10 images, 12 bases, 300 steps, any from 0.02 to 0.2 comes as near to
# them as the SVD.
FIT_RATE = 0.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemorySpec(Spec):
    """Settings of the memory codec."""

    name: Annotated[Literal["memory"], Doc("the parameterization")] = "memory"
    bases: Annotated[int, Ge(1), Doc("images that all classes share (RTP: 16 on CIFAR-10 at 1 image/class)")] = 16
    factor: Annotated[int, Ge(1), Le(16), Doc("bases are smaller by it along each axis (RTP: 2)")] = 2
    images_per_class: Annotated[int, Ge(0), Doc("images per class; 0 = as many as the budget holds")] = 0
    dtype: Annotated[Literal["float32", "bfloat16"], Doc("precision on disk; the field counts float32")] = "float32"
    start: Annotated[
        Literal["svd", "xavier"],
        Doc("starting point: the best approximation of the images, or the reference's random draw"),
    ] = "svd"
    optimizer: Annotated[
        Literal["sgd", "adam"], Doc("sgd is the reference's: momentum 0.5, gradient norm at most 2")
    ] = "adam"
    lr: Annotated[
        float, Gt(0), Doc("learning rate of the coefficients in distillation (RTP, own objective: 0.1 with sgd)")
    ] = 0.03
    lr_bases: Annotated[float, Ge(0), Doc("factor of lr for the bases")] = 1.0
    NOISE = ("xavier",)

    def sizes(self, image_shape: Shape) -> dict[str, Sequence[int]]:
        h, w, c = image_shape
        height, width = cell_size(self.factor, (h, w))
        # More bases than their numbers cannot differ.
        return {"images_per_class": range(1, MOST), "bases": range(1, height * width * c + 1)}

    def layout(self, image_shape: Shape, num_classes: int) -> Layout:
        h, w, c = image_shape
        small = (*cell_size(self.factor, (h, w)), c)
        coefficients = (num_classes * self.images_per_class, self.bases)
        return arrays(self.dtype, {"coefficients": coefficients, "bases": (self.bases, *small)})


def make(spec: MemorySpec, image_shape: tuple[int, int, int], num_classes: int) -> Codec:
    """Builds the codec; see `gsdd_jax.codecs.make`.

    An image is ``CENTER + SPREAD`` times the bilinear enlargement of ``coefficients @ bases``. Parameters:
    ``coefficients [n, bases]``, each row an image's own, and ``bases [bases, h / factor, w / factor, c]``, rounded up,
    which every image of the set shares.

    Deviations: the reference's penalty on the coefficients is left out. There it is a part of the inner loss on which
    the network's gradient does not depend, so that nothing of it reaches the memory. Images are normalized by one mean
    and spread, not by those of a dataset. By default the start is the best approximation of real images and Adam
    trains; the reference starts at random and takes SGD, both of which can be asked for.
    """
    h, w, c = image_shape
    small = cell_size(spec.factor, (h, w))
    n = num_classes * spec.images_per_class
    if spec.bases > n:
        raise InputError(f"codec.bases: {n} images need at most as many bases, found {spec.bases}")

    def init(key, images):
        if spec.start == "svd":
            return best(jnp.asarray(images, jnp.float32), small, spec.bases)
        key_coefficients, key_bases = jax.random.split(key)
        # Fans as PyTorch counts them: a basis is a filter of c channels, so that h w are its receptive field.
        return {
            "coefficients": _xavier(key_coefficients, (n, spec.bases), spec.bases, n),
            "bases": _xavier(
                key_bases, (spec.bases, *small, c), c * small[0] * small[1], spec.bases * small[0] * small[1]
            ),
        }

    def decode(params, index=None, *, size=None, key=None):
        del key
        params = jax.tree.map(lambda x: storage.quantize(x, spec.dtype), params)
        coefficients = params["coefficients"] if index is None else params["coefficients"][index]
        combined = jnp.einsum("nb,bhwc->nhwc", coefficients, params["bases"], precision=jax.lax.Precision.HIGHEST)
        return CENTER + SPREAD * jax.image.resize(combined, (len(combined), *(size or (h, w)), c), "bilinear")

    def optimizer():
        rates = {"coefficients": spec.lr, "bases": spec.lr * spec.lr_bases}
        scale = optax.stateless(lambda updates, params: {name: -rates[name] * leaf for name, leaf in updates.items()})
        if spec.optimizer == "sgd":
            return optax.chain(optax.clip_by_global_norm(2.0), optax.trace(0.5), scale)
        return optax.chain(optax.scale_by_adam(), scale)

    def fitter(steps):
        if spec.start == "svd":
            return optax.set_to_zero()
        return optax.adam(optax.cosine_decay_schedule(FIT_RATE, steps, alpha=0.02))

    return Codec(
        name="memory",
        spec=spec,
        image_shape=image_shape,
        num_classes=num_classes,
        images_per_class=spec.images_per_class,
        init=init,
        decode=decode,
        optimizer=optimizer,
        fitter=fitter,
        # No other factors are nearer to the images than those of the SVD.
        fitted_by_init=spec.start == "svd",
        **cast_storage(spec, image_shape, num_classes),
    )


def best(images: jax.Array, small: tuple[int, int], count: int) -> dict[str, jax.Array]:
    """Returns the parameters that minimize the squared error over all images, by an SVD of what bases can show.

    Enlargement of rows is ``Q R`` with orthonormal ``Q``, that of columns likewise, so distances between images are
    distances between their projections on both ``Q``. Coefficients have unit mean square, the bases carry the rest.

    Args:
        images: ``[n, h, w, c]`` in [0,1].
        small: (height, width) of bases.
        count: Bases; at most ``n`` and the numbers of a basis.
    """
    n, h, w, c = images.shape
    (q_rows, r_rows), (q_columns, r_columns) = (
        jnp.linalg.qr(enlargement(large, less)) for large, less in zip((h, w), small, strict=True)
    )
    highest = jax.lax.Precision.HIGHEST
    shown = jnp.einsum("hi,nhwc,wj->nijc", q_rows, (images - CENTER) / SPREAD, q_columns, precision=highest)
    left, values, right = jnp.linalg.svd(shown.reshape(n, -1), full_matrices=False)
    scale = jnp.sqrt(jnp.float32(n))
    directions = (right[:count] * values[:count, None] / scale).reshape(count, *small, c)
    bases = jnp.einsum(
        "ih,bhwc,jw->bijc", jnp.linalg.inv(r_rows), directions, jnp.linalg.inv(r_columns), precision=highest
    )
    return {"coefficients": left[:, :count] * scale, "bases": bases}


def _xavier(key: jax.Array, shape: tuple[int, ...], fan_in: int, fan_out: int) -> jax.Array:
    limit = (6 / (fan_in + fan_out)) ** 0.5
    return jax.random.uniform(key, shape, jnp.float32, minval=-limit, maxval=limit)
