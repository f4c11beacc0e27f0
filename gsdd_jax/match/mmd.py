"""The kernel distance of two sets of features, class by class: the second term of D3 (Qin et al. 2024)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

# Widths of D3's Gaussian kernels, which are added up.
WIDTHS = (1.0, 2.0, 4.0, 8.0, 16.0)
# An unbiased mean over pairs needs a pair.
LEAST_SAMPLES = 2


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
    # Distances are those between centred features, whose squares lose fewer digits when they are taken apart.
    centre = jax.lax.stop_gradient(y.mean(0))
    x, y = x - centre, y - centre
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


def _mean_of_pairs(x: jax.Array) -> jax.Array:
    count = len(x)
    # Where, not minus the diagonal: the distance of a sample from itself is zero up to rounding only.
    return jnp.where(jnp.eye(count, dtype=bool), 0, _kernel(x, x)).sum() / (count * (count - 1))


def _kernel(x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns the kernel of all pairs, ``[a, b]``."""
    products = jnp.matmul(x, y.T, precision=jax.lax.Precision.HIGHEST)
    squared = jnp.sum(x**2, -1)[:, None] + jnp.sum(y**2, -1) - 2 * products
    return sum((jnp.exp(-squared / (2 * width**2)) for width in WIDTHS), jnp.zeros(squared.shape))


def _check(x: jax.Array, y: jax.Array, axes: tuple[str, ...]) -> None:
    want = f"expected two arrays [{', '.join(axes)}] that differ in samples at most"
    if x.ndim != len(axes) or y.ndim != len(axes) or (*x.shape[:-2], x.shape[-1]) != (*y.shape[:-2], y.shape[-1]):
        raise ValueError(f"mmd: {want}; found {x.shape} and {y.shape}")
    if min(x.shape[-2], y.shape[-2]) < LEAST_SAMPLES:
        raise ValueError(
            f"mmd: expected at least {LEAST_SAMPLES} samples on each side, found {x.shape[-2]} and {y.shape[-2]}"
        )
