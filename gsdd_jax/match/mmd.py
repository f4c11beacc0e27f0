"""The kernel distance of two sets of features, class by class: the second term of D3 (Qin et al. 2024)."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from annotated_types import Ge
from typing_extensions import Doc

from gsdd_jax import pixels
from gsdd_jax.match.chunks import split_classes, sum_of_chunks
from gsdd_jax.match.distribution import Transform
from gsdd_jax.nets import Network
from gsdd_jax.parallel import Share, whole

# Widths of D3's Gaussian kernels, which are added up.
WIDTHS = (1.0, 2.0, 4.0, 8.0, 16.0)
# An unbiased mean over pairs needs a pair.
LEAST_SAMPLES = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class MmdSpec:
    """Settings of the term, which any objective can take on top of its own loss."""

    weight: Annotated[float, Ge(0), Doc("factor of the term (D3: 1); 0 = none")] = 0.0
    samples: Annotated[
        int,
        Ge(LEAST_SAMPLES),
        Doc(
            "images per class and iteration on either side (D3: 30 small, 12 medium, 20 large); fewer synthetic ones "
            "where a class has fewer and its codec draws none at random"
        ),
    ] = 30
    features: Annotated[
        Literal["random", "expert"],
        Doc(
            "whose last feature map is compared: a fresh random network's, or an expert's after its last epoch (D3), "
            "which trajectory matching has"
        ),
    ] = "random"
    steps: Annotated[
        Literal["joint", "separate"],
        Doc("one optimizer step on the sum, or one on the objective and then one on this term (D3)"),
    ] = "joint"


def mmd(x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns the unbiased estimate of the squared maximum mean discrepancy (Gretton et al. 2012, Eq. 3).

    The kernel is the sum over ``WIDTHS`` of ``exp(-||a - b||^2 / (2 width^2))``; no sample is paired with itself, so
    the estimate may be negative, and is zero in expectation where both sets come from one distribution.

    Args:
        x: ``[a, f]`` features, a >= 2.
        y: ``[b, f]`` features, b >= 2.

    Returns:
        A scalar. Differentiable with respect to both.

    Raises:
        ValueError: The shapes do not belong together, or a set has no pair.
    """
    _check(x, y, ("samples", "features"))
    # Distances are those between centered features, whose squares lose fewer digits when they are taken apart.
    center = jax.lax.stop_gradient(y.mean(0))
    x, y = x - center, y - center
    return _mean_of_pairs(x) + _mean_of_pairs(y) - 2 * _kernel(x, y).mean()


def mmd_loss(real: jax.Array, syn: jax.Array) -> jax.Array:
    """Returns the sum over classes of :func:`mmd`, D3's loss of latents and decoder.

    Args:
        real: ``[k, a, f]`` features of real images, by class; a >= 2. D3: the last feature map of a trained expert.
        syn: ``[k, b, f]`` features of synthetic images; b >= 2.

    Returns:
        A scalar. Differentiable with respect to both.

    Raises:
        ValueError: The shapes do not belong together, or a class has no pair.
    """
    _check(real, syn, ("classes", "samples", "features"))
    return jax.vmap(mmd)(real, syn).sum()


def feature_mmd(
    real: jax.Array,
    syn: jax.Array,
    params: Any,
    *,
    network: Network,
    transform: Transform,
    transform_params: Any,
    share: Share | None = None,
) -> jax.Array:
    """Returns :func:`mmd_loss` of the last feature maps of a network, one class at a time.

    Images are not augmented, as in D3.

    Args:
        real: ``[k, a, h, w, c]`` images, uint8 or in [0,1]; a >= 2.
        syn: ``[k, b, h, w, c]`` float images in [0,1]; b >= 2.
        params: Of the network; D3: of an expert after its last epoch.
        network: Its architecture.
        transform: ``(transform_params, images) -> images``: normalization of images in [0,1].
        transform_params: Its arrays.
        share: Which classes these are, where other devices have the others, and the sum is over these.

    Returns:
        A scalar. Differentiable once, with respect to ``syn`` and nothing else; the backward pass keeps no activations.

    Raises:
        ValueError: A class has no pair.
    """
    split, weight = split_classes(share or whole(len(real)), 1)
    shared = (params, transform_params)

    def embed(shared: Any, images: jax.Array) -> jax.Array:
        params, transform_params = shared
        _, features = network.outputs(params, transform(transform_params, images))
        return features.reshape(len(images), -1)

    def chunk_loss(shared: Any, syn: jax.Array, target: jax.Array, weight: jax.Array) -> jax.Array:
        return weight[0] * mmd(target, embed(shared, syn[0]))

    targets = jax.lax.map(lambda x: embed(shared, pixels.as_float(x, "real")), real)
    return sum_of_chunks(chunk_loss, split(syn), (jax.lax.stop_gradient(targets), weight), shared)


def _mean_of_pairs(x: jax.Array) -> jax.Array:
    count = len(x)
    # Where, not minus the diagonal: the distance of a sample from itself is zero up to rounding only.
    return jnp.where(jnp.eye(count, dtype=bool), 0, _kernel(x, x)).sum() / (count * (count - 1))


def _kernel(x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns the kernel of all pairs, ``[a, b]``."""
    products = jnp.matmul(x, y.T, precision=jax.lax.Precision.HIGHEST)
    squared = jnp.sum(x**2, -1)[:, None] + jnp.sum(y**2, -1) - 2 * products
    return sum((jnp.exp(-squared / (2 * width**2)) for width in WIDTHS), jnp.zeros(squared.shape, squared.dtype))


def _check(x: jax.Array, y: jax.Array, axes: tuple[str, ...]) -> None:
    want = f"expected two arrays [{', '.join(axes)}] that differ in samples at most"
    if x.ndim != len(axes) or y.ndim != len(axes) or (*x.shape[:-2], x.shape[-1]) != (*y.shape[:-2], y.shape[-1]):
        raise ValueError(f"mmd: {want}; found {x.shape} and {y.shape}")
    if min(x.shape[-2], y.shape[-2]) < LEAST_SAMPLES:
        raise ValueError(
            f"mmd: expected at least {LEAST_SAMPLES} samples on each side, found {x.shape[-2]} and {y.shape[-2]}"
        )
