"""What the networks share besides convolution: PyTorch's initialization, normalization, max-pooling.

Max-pooling is not `reduce_window` (`flax.linen.max_pool`), whose gradient XLA computes in a plain loop on CPU. Measured
on 64 maps of 32x32x128 (jax 0.10.2, two cores), gradient inside a loop 16 instead of 108 ms, second derivative 72
instead of 189 ms. Comparing also gives the gradient to the first of equal pixels, as PyTorch does; `jnp.maximum` would
share it.
"""

import math
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

CIFAR_SIDE = 32  # the reference has forms of its own ("*CIFAR") for images of this side; here up to it

_EPS = 1e-5  # PyTorch's GroupNorm and LayerNorm


def uniform(
    key: jax.Array, kernels: Mapping[str, tuple[int, ...]], *, unbiased: Collection[str] = ()
) -> dict[str, Any]:
    """Draws layers as PyTorch does by default: kernel and bias from U(-b, b), b = 1 / sqrt(fan_in).

    Args:
        key: consumed.
        kernels: name of each layer -> shape of its kernel, outputs last; all other axes count as inputs.
        unbiased: names of the layers without a bias.

    Returns:
        Name -> {"kernel", "bias"}, float32.
    """
    # One draw for all: XLA takes half a second to compile each, and distribution matching compiles this too.
    sizes = {name: (math.prod(shape), 0 if name in unbiased else shape[-1]) for name, shape in kernels.items()}
    ends = np.cumsum([size for pair in sizes.values() for size in pair])
    parts = iter(jnp.split(jax.random.uniform(key, (int(ends[-1]),), jnp.float32, minval=-1, maxval=1), ends[:-1]))
    layers: dict[str, Any] = {}
    for name, shape in kernels.items():
        bound = 1 / math.sqrt(math.prod(shape[:-1]))
        layers[name] = {"kernel": bound * next(parts).reshape(shape)}
        bias = bound * next(parts)
        if name not in unbiased:
            layers[name]["bias"] = bias
    return layers


def unit_norm(channels: int) -> dict[str, jax.Array]:
    """Returns the initial scale and bias of a normalization."""
    return {"scale": jnp.ones(channels, jnp.float32), "bias": jnp.zeros(channels, jnp.float32)}


def instance_norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    """Normalizes each channel of each image of float [n, h, w, c], the literature's GroupNorm with a group a channel.

    Where an image is a single pixel, the result is the bias whatever the pixel.
    """
    return _normalize(x, (1, 2), scale, bias)


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    """Normalizes float [..., c] over its last axis."""
    return _normalize(x, (-1,), scale, bias)


def _normalize(x: jax.Array, axes: tuple[int, ...], scale: jax.Array, bias: jax.Array) -> jax.Array:
    # The two-pass variance is as fast here as E[x²] - E[x]², and does not cancel.
    centered = x - x.mean(axes, keepdims=True)
    variance = jnp.square(centered).mean(axes, keepdims=True)
    return centered * (jax.lax.rsqrt(variance + _EPS) * scale) + bias


def max_pool(x: jax.Array) -> jax.Array:
    """Takes the largest of each 2x2 pixels of float [n, h, w, c]; an odd last row or column is left out.

    Differentiable to any order; the gradient goes to the first of equal pixels. NaN wins.
    """
    n, h, w, c = x.shape
    x = x[:, : h // 2 * 2, : w // 2 * 2].reshape(n, h // 2, 2, w // 2, 2, c)
    top, bottom = (_larger(x[:, :, row, :, 0], x[:, :, row, :, 1]) for row in (0, 1))
    return _larger(top, bottom)


def adaptive_max_pool(x: jax.Array, side: int) -> jax.Array:
    """Takes the largest pixel in each cell of a grid over float [n, h, w, c]; returns [n, side, side, c].

    Cell i of an axis spans the pixels floor(i h / side) to ceil((i + 1) h / side) - 1, as in PyTorch: cells overlap
    where `side` does not divide `h`, and repeat pixels where it is larger. Differentiable as `max_pool`.
    """
    # Columns before rows, so that the first of equal pixels is the first in reading order.
    for axis in (2, 1):
        pixels = x.shape[axis]
        first = np.arange(side) * pixels // side
        last = -(-np.arange(1, side + 1) * pixels // side) - 1
        cells = jnp.take(x, first, axis=axis)
        for step in range(1, 1 + int((last - first).max())):
            cells = _larger(cells, jnp.take(x, np.minimum(first + step, last), axis=axis))
        x = cells
    return x


def _larger(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.where((b > a) | jnp.isnan(b), b, a)


def digit_margin(image_shape: tuple[int, ...]) -> int:
    """Returns by how much to pad images so that digits of 28 px become 32 px: 2 for (28, 28, 1), else 0.

    The reference widens the padding of the first convolution by 2 for every image of one channel.
    """
    return 2 if tuple(image_shape) == (28, 28, 1) else 0
