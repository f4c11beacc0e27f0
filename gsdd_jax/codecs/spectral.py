"""Small tensors, each combined with every one of a few sets of matrices: in the manner of NSD.

A re-derivation: of NSD (Neural Spectral Decomposition) no code was at hand. Its abstract says that spectrum tensors and
transformation matrices, combined with each other, give the images, of low rank along all dimensions. That is read here
as a Tucker decomposition, tensors of a class, matrices of the whole set.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import optax
from annotated_types import Ge, Gt
from typing_extensions import Doc

from gsdd_jax import storage
from gsdd_jax.codecs.base import CENTER, SPREAD, Codec, cast_storage, resized

# The leaves of the matrices, one per dimension of a tensor.
MATRICES = ("rows", "columns", "channels")
# Adam's rates when fitting images. Swept on 50 CIFAR-10 images, five sets of matrices, 300 steps: 24.2 dB, and within
# 0.3 of it with either rate halved or doubled.
FIT_TENSORS, FIT_MATRICES = 0.2, 0.04


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpectralSpec:
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


def make(spec: SpectralSpec, image_shape: tuple[int, int, int], num_classes: int, bytes_per_class: int) -> Codec:
    """Builds the codec; see :func:`gsdd_jax.codecs.make`.

    Image ``i`` is ``CENTER + SPREAD`` times tensor ``i // matrices``, multiplied along each of its three dimensions by
    the matrices ``i % matrices``. Parameters: ``tensors [n / matrices, rank_height, rank_width, rank_channels]``,
    class-major, ``rows [matrices, h, rank_height]``, ``columns [matrices, w, rank_width]`` and ``channels [matrices, c,
    rank_channels]``, which all classes share.
    """
    h, w, c = image_shape
    spec = dataclasses.replace(spec, rank_channels=spec.rank_channels or c)
    spec = dataclasses.replace(
        spec, images_per_class=_images_per_class(spec, image_shape, num_classes, bytes_per_class)
    )
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
        **cast_storage(init, spec.dtype, image_shape, n),
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


def _images_per_class(
    spec: SpectralSpec, image_shape: tuple[int, int, int], num_classes: int, bytes_per_class: int
) -> int:
    """Returns the images per class, the most that fit where the spec leaves them open.

    Raises:
        ValueError: They do not fit or leave combinations unused, or a rank is larger than what it stands for; the
            message says what would do.
    """
    ranks = {"rank_height": spec.rank_height, "rank_width": spec.rank_width, "rank_channels": spec.rank_channels}
    for (name, rank), length in zip(ranks.items(), image_shape, strict=True):
        if rank > length:
            raise ValueError(f"codec.{name}: expected at most {length} for images of {image_shape}, found {rank}")
    if spec.images_per_class % spec.matrices:
        raise ValueError(
            f"codec.images_per_class: expected a multiple of matrices = {spec.matrices}, found {spec.images_per_class}"
        )
    available, itemsize = num_classes * bytes_per_class, storage.ITEMSIZE[spec.dtype]
    tensors = num_classes * spec.rank_height * spec.rank_width * spec.rank_channels * itemsize
    one_set = itemsize * sum(rank * length for rank, length in zip(ranks.values(), image_shape, strict=True))

    def says(per_class: int) -> str:
        return (
            f"{per_class} images per class of {per_class // spec.matrices} {spec.dtype} tensors "
            f"{'x'.join(map(str, ranks.values()))} and {spec.matrices} sets of matrices need "
            f"{per_class // spec.matrices * tensors + spec.matrices * one_set} bytes, the budget of all classes has "
            f"{available}"
        )

    fits = spec.matrices * ((available - spec.matrices * one_set) // tensors)
    if fits < 1:
        most = (available - tensors) // one_set
        least = -(-(tensors + one_set) // num_classes)
        less = f"at most {most}" if most > 0 else f"smaller ranks, or at least {least} bytes per class"
        raise ValueError(f"codec.matrices: {says(spec.matrices)}; expected {less}")
    if spec.images_per_class > fits:
        raise ValueError(f"codec.images_per_class: {says(spec.images_per_class)}; expected at most {fits}")
    return spec.images_per_class or fits
