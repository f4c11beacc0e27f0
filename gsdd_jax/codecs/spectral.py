"""Small tensors, each combined with every one of a few sets of matrices: in the manner of NSD.

A re-derivation: of NSD (Neural Spectral Decomposition) no code was at hand. Its abstract says that spectrum tensors and
transformation matrices, combined with each other, give the images, of low rank along all dimensions. That is read here
as a Tucker decomposition, tensors of a class, matrices of the whole set.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from annotated_types import Ge, Gt
from typing_extensions import Doc

from gsdd_jax import storage
from gsdd_jax.codecs.base import (
    CENTER,
    MOST,
    SPREAD,
    Codec,
    Layout,
    Shape,
    Spec,
    arrays,
    cast_storage,
    resized,
)
from gsdd_jax.later import optax

# The leaves of the matrices, one per dimension of a tensor.
MATRICES = ("rows", "columns", "channels")
# Adam's rates when fitting images. Swept on 50 CIFAR-10 images, five sets of matrices, 300 steps: 24.2 dB, and within
# 0.3 of it with either rate halved or doubled.
FIT_TENSORS, FIT_MATRICES = 0.2, 0.04


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpectralSpec(Spec):
    """Settings of the spectral codec; no layout is known to be published, its sizes are ours for CIFAR-10."""

    name: Annotated[Literal["spectral"], Doc("the parameterization")] = "spectral"
    matrices: Annotated[int, Ge(1), Doc("sets of matrices; each gives an image with every tensor (not published)")] = 5
    rank_height: Annotated[int, Ge(1), Doc("rows of a tensor (not published)")] = 10
    rank_width: Annotated[int, Ge(1), Doc("columns of a tensor (not published)")] = 10
    rank_channels: Annotated[int, Ge(0), Doc("channels of a tensor; 0 = those of an image")] = 0
    images_per_class: Annotated[
        int, Ge(0), Doc("images per class, a multiple of matrices; 0 = as many as the budget holds")
    ] = 0
    dtype: Annotated[Literal["float32", "bfloat16"], Doc("precision on disk; the field counts float32")] = "float32"
    optimizer: Annotated[Literal["sgd", "adam"], Doc("sgd has momentum 0.5")] = "adam"
    lr: Annotated[float, Gt(0), Doc("learning rate of the tensors in distillation; no published setting is known")] = (
        0.1
    )
    lr_matrices: Annotated[float, Ge(0), Doc("factor of lr for the matrices")] = 0.1

    def resolved(self, image_shape: Shape) -> SpectralSpec:
        return dataclasses.replace(self, rank_channels=self.rank_channels or image_shape[-1])

    def sizes(self, image_shape: Shape) -> dict[str, Sequence[int]]:
        ranks = zip(("rank_height", "rank_width", "rank_channels"), image_shape, strict=True)
        return {
            "images_per_class": range(self.matrices, MOST, self.matrices),
            "matrices": range(1, MOST),
            **{name: range(1, length + 1) for name, length in ranks},
        }

    def layout(self, image_shape: Shape, num_classes: int) -> Layout:
        (h, w, c), sets = image_shape, self.matrices
        p, q, r = self.rank_height, self.rank_width, self.rank_channels
        tensors = num_classes * self.images_per_class // sets
        shapes = {
            "tensors": (tensors, p, q, r),
            "rows": (sets, h, p),
            "columns": (sets, w, q),
            "channels": (sets, c, r),
        }
        return arrays(self.dtype, shapes)


def make(spec: SpectralSpec, image_shape: tuple[int, int, int], num_classes: int) -> Codec:
    """Builds the codec; see `gsdd_jax.codecs.make`.

    Image ``i`` is ``CENTER + SPREAD`` times tensor ``i // matrices``, multiplied along each of its three dimensions by
    the matrices ``i % matrices``. Parameters: ``tensors [n / matrices, rank_height, rank_width, rank_channels]``,
    class-major, ``rows [matrices, h, rank_height]``, ``columns [matrices, w, rank_width]`` and ``channels [matrices, c,
    rank_channels]``, which all classes share.
    """
    h, w, c = image_shape
    sets, n = spec.matrices, num_classes * spec.images_per_class
    ranks = (spec.rank_height, spec.rank_width, spec.rank_channels)

    def init(key, images):
        targets = (jnp.asarray(images, jnp.float32) - CENTER) / SPREAD
        return higher_order_svd(targets.reshape(-1, sets, h, w, c), ranks)

    def decode(params, index=None, *, size=None, key=None):
        del key
        params = jax.tree.map(lambda x: storage.quantize(x, spec.dtype), params)
        index = jnp.arange(n) if index is None else jnp.asarray(index)
        tensors = params["tensors"][index // sets]
        images = CENTER + SPREAD * multiplied(tensors, [params[name][index % sets] for name in MATRICES])
        return resized(images, size)

    def leafwise(transformation, tensors, matrices):
        rates = {"tensors": tensors} | dict.fromkeys(MATRICES, matrices)
        scale = optax.stateless(lambda updates, params: {name: -rates[name] * leaf for name, leaf in updates.items()})
        return optax.chain(transformation, scale)

    def optimizer():
        how = optax.trace(0.5) if spec.optimizer == "sgd" else optax.scale_by_adam()
        return leafwise(how, spec.lr, spec.lr * spec.lr_matrices)

    def fitter(steps):
        adam = leafwise(optax.scale_by_adam(), FIT_TENSORS, FIT_MATRICES)
        return optax.chain(adam, optax.scale_by_schedule(optax.cosine_decay_schedule(1.0, steps, alpha=0.02)))

    return Codec(
        name="spectral",
        spec=spec,
        image_shape=image_shape,
        num_classes=num_classes,
        images_per_class=spec.images_per_class,
        init=init,
        decode=decode,
        optimizer=optimizer,
        fitter=fitter,
        **cast_storage(spec, image_shape, num_classes),
    )


def multiplied(tensors: jax.Array, matrices: list[jax.Array]) -> jax.Array:
    """Returns tensors ``[n, p, q, r]`` times matrices ``[n, h, p]``, ``[n, w, q]``, ``[n, c, r]``: ``[n, h, w, c]``."""
    return jnp.einsum("npqr,nhp,nwq,ncr->nhwc", tensors, *matrices, precision=jax.lax.Precision.HIGHEST)


def higher_order_svd(targets: jax.Array, ranks: tuple[int, int, int]) -> dict[str, jax.Array]:
    """Approximates images by their leading directions along each dimension, the same for every set of matrices.

    With one set of matrices this is the truncated higher-order SVD of all images. With more, a tensor is the projection
    of the mean of its images; what tells these apart is for the fit.

    Args:
        targets: ``[tensors, matrices, h, w, c]``.
        ranks: Sizes of a tensor.
    """
    sets = targets.shape[1]
    highest = jax.lax.Precision.HIGHEST
    directions = []
    for axis, rank in enumerate(ranks):
        unfolded = jnp.moveaxis(targets, 2 + axis, 0).reshape(targets.shape[2 + axis], -1)
        # Ascending: the last are those of the largest eigenvalues.
        vectors = jnp.linalg.eigh(jnp.matmul(unfolded, unfolded.T, precision=highest))[1]
        directions.append(vectors[:, ::-1][:, :rank])
    tensors = jnp.einsum("thwc,hp,wq,cr->tpqr", targets.mean(1), *directions, precision=highest)
    return {"tensors": tensors} | {
        name: jnp.tile(x, (sets, 1, 1)) for name, x in zip(MATRICES, directions, strict=True)
    }
