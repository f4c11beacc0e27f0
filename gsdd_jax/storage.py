"""Bits on disk: reduced precision with a straight-through gradient, and budgets counted in bytes exactly as written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

T = TypeVar("T")

# Stored precisions of a float; every budget is a whole number of these.
ITEMSIZE = {"float32": 4, "bfloat16": 2}
# Numbers of one Gaussian besides its colour: mean 2, cholesky 3, opacity 1 (GSDD, section 3.1: 9 with three channels).
GEOMETRY_NUMBERS = 6


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


def quantise(x: jax.Array, dtype: str) -> jax.Array:
    """Rounds to a stored precision, ``"float32"`` or ``"bfloat16"``, with a straight-through gradient."""
    return as_bfloat16(x) if dtype == "bfloat16" else x


def budget_bytes(ipc: float, image_shape: Sequence[int]) -> int:
    """Returns the bytes per class of ``ipc`` float32 pixel images of shape (h, w, c): the field's unit of budgets."""
    return int(ipc * int(np.prod(image_shape)) * ITEMSIZE["float32"])


def gaussian_numbers(channels: int) -> int:
    """Returns the stored numbers per Gaussian: 9 for three channels."""
    return GEOMETRY_NUMBERS + channels


def largest_num_points(bytes_per_class: int, gpc: int, channels: int, dtype: str = "bfloat16") -> int:
    """Returns the most Gaussians per image such that ``gpc`` images fit ``bytes_per_class``.

    With bfloat16 this equals the paper's ``floor(3 res^2 ipc 2 / (gpc 9))`` (section 4.1), whose factor 2 is the
    ratio of float32 pixels to bfloat16 parameters.

    Raises:
        ValueError: Not even one Gaussian per image fits.
    """
    points = bytes_per_class // (gpc * gaussian_numbers(channels) * ITEMSIZE[dtype])
    if points < 1:
        most = bytes_per_class // (gaussian_numbers(channels) * ITEMSIZE[dtype])
        raise ValueError(
            f"codec.gpc: {gpc} images do not fit {bytes_per_class} bytes per class even with one {dtype} Gaussian each "
            f"({gaussian_numbers(channels) * ITEMSIZE[dtype]} bytes); expected at most {most}"
        )
    return points


class BudgetRow(NamedTuple):
    """One way to spend a budget; counts are per class."""

    what: str
    images: int
    points_per_image: int
    floats: int
    bytes: int
    bytes_available: int


def budget_table(ipc: float, image_shape: Sequence[int], gpc: int, num_points: int, dtype: str) -> list[BudgetRow]:
    """Sets the paper's accounting and ours side by side.

    The paper counts floats and grants its own floats half a count each, because they are bfloat16; we count bytes for
    all.
    """
    channels = image_shape[-1]
    available = budget_bytes(ipc, image_shape)
    numbers = gaussian_numbers(channels)

    def row(what: str, images: int, points: int, itemsize: int) -> BudgetRow:
        floats = images * points * numbers
        return BudgetRow(what, images, points, floats, floats * itemsize, available)

    pixels = int(ipc * int(np.prod(image_shape)))
    rows = [BudgetRow("pixels, float32", int(ipc), 0, pixels, pixels * 4, available)]
    for name, size in ITEMSIZE.items():
        points = available // (gpc * numbers * size)
        if points:
            note = " (the paper's count)" if name == "bfloat16" else " (the rivals' count)"
            rows.append(row(f"{gpc} Gaussian images, {name}{note}", gpc, points, size))
    rows.append(row(f"this run: {gpc} Gaussian images, {dtype}", gpc, num_points, ITEMSIZE[dtype]))
    return rows


def nbytes(stored: object) -> int:
    """Returns the bytes of all arrays of a pytree, exactly as they are written."""
    return sum(leaf.size * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(stored))


def cast(tree: T, dtype: str) -> T:
    """Casts every array of a pytree to its stored dtype; bit-equal to what :func:`quantise` shows the forward pass."""
    return jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)), tree)
