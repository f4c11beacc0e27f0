"""Bits on disk: reduced precision with a straight-through gradient, and budgets counted in bytes exactly as written."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

T = TypeVar("T")

# Stored precisions of a float; every budget is a whole number of these.
ITEMSIZE = {"float32": 4, "bfloat16": 2}
# Those of pixels, whose range is known well enough for one grid that no file has to store.
PIXEL_ITEMSIZE = ITEMSIZE | {"uint8": 1}
# The values of a byte: multiples of 1/85 from -1 to 2, since distilled pixels leave [0, 1].
BYTE_LOW, BYTE_HIGH, BYTE_PER_UNIT = -1.0, 2.0, 85.0
BYTE_STEP = np.float32(1 / BYTE_PER_UNIT)


@jax.custom_jvp
def as_bfloat16(x: jax.Array) -> jax.Array:
    """Rounds float32 to the nearest bfloat16 (ties to even) and stays in float32; the gradient passes straight through.

    GSDD, section 3.2: float32 masters, bfloat16 in the forward pass. ``reduce_precision`` and not two casts, because
    XLA may drop a pair of casts as excess precision.
    """
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


@as_bfloat16.defjvp
def _as_bfloat16_jvp(primals, tangents):
    return as_bfloat16(*primals), tangents[0]


def byte_codes(x: jax.Array) -> jax.Array:
    """Returns the numbers 0 to 255, as floats, of the nearest values of a byte, ties to even numbers; NaN stays."""
    return jnp.round((jnp.clip(x, BYTE_LOW, BYTE_HIGH) - BYTE_LOW) * BYTE_PER_UNIT)


def byte_values(codes: jax.Array) -> jax.Array:
    """Returns ``codes / 85 - 1`` within one unit of the last place.

    One product of two numbers of float32, which every compiler rounds alike. Of the quotient it may make a product, and
    fuse that with the sum.
    """
    return (codes + BYTE_LOW * BYTE_PER_UNIT) * BYTE_STEP


@jax.custom_jvp
def as_uint8(x: jax.Array) -> jax.Array:
    """Rounds float32 to the nearest value of a byte and stays in float32; what is beyond the ends is clipped.

    The gradient passes straight through, and is zero where a value was clipped: further beyond an end than half a
    step, as in `on_grid`.
    """
    return byte_values(byte_codes(x))


@as_uint8.defjvp
def _as_uint8_jvp(primals, tangents):
    (x,), (tangent,) = primals, tangents
    inside = (x >= BYTE_LOW - BYTE_STEP / 2) & (x <= BYTE_HIGH + BYTE_STEP / 2)
    return as_uint8(x), jnp.where(inside, tangent, 0)


# Of a grid, or of each channel's own.
Bits = int | tuple[int, ...]


def grid_codes(x: jax.Array, low: jax.Array, step: jax.Array, bits: Bits) -> jax.Array:
    """Returns the numbers 0 to 2^bits - 1, as floats, of the nearest grid values ``low + code * step``; NaN stays."""
    return jnp.clip(jnp.round((x - low) / step), 0, _top(bits))


def _top(bits: Bits) -> np.ndarray:
    return np.asarray(2.0 ** np.asarray(bits) - 1, np.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def on_grid(x: jax.Array, low: jax.Array, step: jax.Array, bits: Bits) -> jax.Array:
    """Rounds to the nearest of 2^bits evenly spaced values, with the gradient of a learned step size.

    LSQ (Esser et al. 2020, Eq. 3 and 5, gradient scale of section 2.2) with the offset of LSQ+ (Bhalgat et al. 2020,
    Eq. 4 to 7). Deviation: what is beyond an end by less than half a step rounds to it like all else, so it does not
    count as clipped. A clipped value has no gradient of its own, it pulls at the range.

    Where ``low`` and ``step`` are bfloat16 numbers and ``bits`` at most 16, ``code * step`` is exact in float32 and
    the sum rounds once: the same bits whether or not a compiler fuses the two.

    Args:
        x: ``[..., c]`` float32.
        low: ``[c]`` value of code 0.
        step: ``[c]`` distance of neighbors, > 0.
        bits: 1 to 16, or ``c`` such numbers.

    Returns:
        ``[..., c]``. Differentiable with respect to ``x``, ``low`` and ``step``.
    """
    return low + grid_codes(x, low, step, bits) * step


def _on_grid_fwd(x, low, step, bits):
    return on_grid(x, low, step, bits), (x, low, step)


def _on_grid_bwd(bits, residuals, v):
    x, low, step = residuals
    top = _top(bits)
    position, code = (x - low) / step, grid_codes(x, low, step, bits)
    inside = (position >= -0.5) & (position <= top + 0.5)
    others = tuple(range(x.ndim - 1))
    scale = np.float32(1 / np.sqrt(max(x.size // x.shape[-1], 1) * top.astype(np.float64)))
    v_low = scale * jnp.sum(jnp.where(inside, 0, v), others)
    v_step = scale * jnp.sum(v * jnp.where(inside, code - position, code), others)
    return jnp.where(inside, v, 0), v_low, v_step


on_grid.defvjp(_on_grid_fwd, _on_grid_bwd)


def quantize(x: jax.Array, dtype: str) -> jax.Array:
    """Rounds to a stored precision, a key of ``PIXEL_ITEMSIZE``, with a straight-through gradient."""
    if dtype == "uint8":
        return as_uint8(x)
    return as_bfloat16(x) if dtype == "bfloat16" else x


def budget_bytes(ipc: float, image_shape: Sequence[int]) -> int:
    """Returns the bytes per class of ``ipc`` float32 pixel images of shape (h, w, c): the field's unit of budgets."""
    return int(ipc * int(np.prod(image_shape)) * ITEMSIZE["float32"])


def nbytes(stored: object) -> int:
    """Returns the bytes of all arrays of a pytree, exactly as they are written."""
    return sum(leaf.size * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(stored))


def cast(tree: T, dtype: str) -> T:
    """Casts every array of a pytree to its stored dtype; bit-equal to what `quantize` shows the forward pass.

    Bytes are codes, that of a NaN is 0.
    """
    if dtype == "uint8":
        return jax.tree.map(lambda x: jnp.nan_to_num(byte_codes(x)).astype(jnp.uint8), tree)
    return jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)), tree)


def widen(tree: T) -> T:
    """Returns as float32 what `cast` has made of a pytree."""

    def one(x):
        wide = jnp.asarray(x, jnp.float32)
        return byte_values(wide) if x.dtype == jnp.uint8 else wide

    return jax.tree.map(one, tree)
