"""What the networks share: Flax's layers as PyTorch initializes and pads them, normalization, max-pooling.

Max-pooling is not `reduce_window` (`flax.linen.max_pool`), whose gradient XLA computes in a plain loop on CPU. Measured
on 64 maps of 32x32x128 (jax 0.10.2, two cores), gradient inside a loop 16 instead of 108 ms, second derivative 72
instead of 189 ms. Comparing also gives the gradient to the first of equal pixels, as PyTorch does; `jnp.maximum` would
share it.
"""

import math
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from gsdd_jax.nets.conv import conv_general_dilated

CIFAR_SIDE = 32  # the reference has forms of its own ("*CIFAR") for images of this side; here up to it


def uniform(fan_in: int) -> nn.initializers.Initializer:
    """Returns PyTorch's default initializer of a kernel or bias: U(-b, b), b = 1 / sqrt(fan_in)."""
    bound = 1 / math.sqrt(fan_in)

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32, *_: Any) -> jax.Array:
        draw = _DRAW.get(None) or (lambda shape: jax.random.uniform(key, shape, dtype, -1, 1))
        return bound * draw(shape)

    return init


# From a shape to numbers in [-1, 1), where `at_once` draws them.
_DRAW: ContextVar[Callable[[tuple[int, ...]], jax.Array] | None] = ContextVar("_DRAW")


def at_once(init: Callable[[jax.Array], Any]) -> Callable[[jax.Array], Any]:
    """Lets a module's `init` draw all its `uniform` weights in one go, in the order in which it makes them.

    XLA takes a second on CPU to compile each array that is drawn (jax 0.10.2), and distribution matching compiles all
    of them into its step: 15 to 27 s for ResNet18, against 2 s. What other initializers draw stays as it is.
    """

    def drawn(key: jax.Array) -> Any:
        sizes: list[int] = []

        def count(shape: tuple[int, ...]) -> jax.Array:
            sizes.append(math.prod(shape))
            return jnp.zeros(shape, jnp.float32)

        _with(count, lambda: jax.eval_shape(init, key))
        if not sizes:
            return init(key)
        ends = np.cumsum(sizes)
        parts = iter(jnp.split(jax.random.uniform(key, (int(ends[-1]),), jnp.float32, -1, 1), ends[:-1]))
        return _with(lambda shape: next(parts).reshape(shape), lambda: init(key))

    return drawn


def _with(draw: Callable[[tuple[int, ...]], jax.Array], run: Callable[[], Any]) -> Any:
    token = _DRAW.set(draw)
    try:
        return run()
    finally:
        _DRAW.reset(token)


def conv(x: jax.Array, features: int, *, side: int = 3, stride: int = 1, use_bias: bool = True, name: str) -> jax.Array:
    """Applies an `nn.Conv` with an odd square kernel, padded by half of it, to float [n, h, w, c]."""
    init = uniform(side**2 * x.shape[-1])
    return nn.Conv(
        features,
        (side, side),
        stride,
        padding=side // 2,
        use_bias=use_bias,
        kernel_init=init,
        bias_init=init,
        conv_general_dilated=conv_general_dilated,
        name=name,
    )(x)


def dense(x: jax.Array, features: int, *, use_bias: bool = True, name: str) -> jax.Array:
    """Applies an `nn.Dense` to float [..., c]."""
    init = uniform(x.shape[-1])
    return nn.Dense(features, use_bias=use_bias, kernel_init=init, bias_init=init, name=name)(x)


def conv3d(x: jax.Array, features: int, *, name: str) -> jax.Array:
    """Convolves float [n, t, h, w, c] with 3x3x3 kernels: one of 3x3 over the channels of three frames, padded by 0."""
    n, t, h, w, c = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0), (0, 0)))
    around = jnp.concatenate([padded[:, at : at + t] for at in range(3)], axis=-1)
    return conv(around.reshape(n * t, h, w, 3 * c), features, name=name).reshape(n, t, h, w, features)


class InstanceNorm(nn.Module):
    """Normalizes each channel of each image of float [n, h, w, c], the literature's GroupNorm with a group a channel.

    Where an image is a single pixel, the result is the bias whatever the pixel. In place of Flax's, which with this
    variance subtracts the mean twice, and so does its gradient: a step of ViT took 1.2 instead of 0.95 s on CPU.

    Attributes:
        axes: what the mean and the variance are taken over.
    """

    axes: tuple[int, ...] = (1, 2)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalizes, then scales and shifts each channel."""
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:], jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:], jnp.float32)
        # The two-pass variance is as fast here as E[x²] - E[x]², and does not cancel.
        centered = x - x.mean(self.axes, keepdims=True)
        variance = jnp.square(centered).mean(self.axes, keepdims=True)
        return centered * (jax.lax.rsqrt(variance + 1e-5) * scale) + bias


class LayerNorm(InstanceNorm):
    """Normalizes float [..., c] over its last axis."""

    axes: tuple[int, ...] = (-1,)


def relu(x: jax.Array) -> jax.Array:
    """Takes the positive part; the gradient at 0 is 0, NaN stays.

    In place of `nn.relu`, whose zeros XLA writes out for a whole map on CPU before it reads them.
    """
    return jnp.where(x <= 0, 0, x)


def max_pool(x: jax.Array) -> jax.Array:
    """Takes the largest of each 2x2 pixels of float [n, h, w, c]; an odd last row or column is left out.

    Differentiable to any order; the gradient goes to the first of equal pixels. NaN wins.
    """
    n, h, w, c = x.shape
    x = x[:, : h // 2 * 2, : w // 2 * 2].reshape(n, h // 2, 2, w // 2, 2, c)
    top, bottom = (larger(x[:, :, row, :, 0], x[:, :, row, :, 1]) for row in (0, 1))
    return larger(top, bottom)


def avg_pool(x: jax.Array) -> jax.Array:
    """Takes the mean of each 2x2 pixels of float [n, h, w, c]; an odd last row or column is left out.

    Not `reduce_window` (`flax.linen.avg_pool`), for the same reason: 51 instead of 75 ms for the gradient of
    normalization, ReLU and this one on 256 maps of 32x32x128, four at a time.
    """
    n, h, w, c = x.shape
    x = x[:, : h // 2 * 2, : w // 2 * 2].reshape(n, h // 2, 2, w // 2, 2, c)
    return x.mean((2, 4))


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
            cells = larger(cells, jnp.take(x, np.minimum(first + step, last), axis=axis))
        x = cells
    return x


def larger(a: jax.Array, b: jax.Array) -> jax.Array:
    """Takes the larger of each two numbers; of equal ones the first, and NaN wins."""
    return jnp.where((b > a) | jnp.isnan(b), b, a)


def digit_margin(image_shape: tuple[int, ...]) -> int:
    """Returns by how much to pad images so that digits of 28 px become 32 px: 2 for (28, 28, 1), else 0.

    The reference widens the padding of the first convolution by 2 for every image of one channel.
    """
    return 2 if tuple(image_shape) == (28, 28, 1) else 0
