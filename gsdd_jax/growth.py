"""Gaussians added one after another where they explain most of what is left of the image: matching pursuit.

The greedy choice of Mallat & Zhang 1993, from round Gaussians of a few sizes centered at pixels. Fitting draws with few
Gaussians at first and adds the others over the first half of its steps, so that each meets an image that those before
it have already learned to draw (density control: GSDD, section 5, leaves it open; adaptive density control of 3D
Gaussian splatting, Kerbl et al. 2023, clones by the gradient instead, and leaves the number open).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from gsdd_jax.gaussians import CHOLESKY_SHIFT, PREFILTER

# Standard deviations of what is added, in units of the radius of an equal share of the image.
SCALES = (0.2, 0.4, 0.8, 1.6, 3.2)
# The smallest of them in pixels.
SMALLEST = 0.5
# Share of the steps of a fit over which Gaussians are added, and in how many lots.
UNTIL = 0.5
LOTS = 24
# Images at a time: each has a map of every scale.
BATCH = 64

P = TypeVar("P")


def number(done: jax.Array, num_points: int, until: float = UNTIL) -> jax.Array:
    """Returns how many Gaussians are drawn after the share ``done`` of a fit's steps, all from `until` on: int32."""
    if not until:
        return jnp.full((), num_points, jnp.int32)
    lots = jnp.minimum(jnp.floor(done * (LOTS / until)).astype(jnp.int32) + 1, LOTS)
    return (lots * num_points + LOTS - 1) // LOTS


def pursue(
    params: P,
    residual: jax.Array,
    first: jax.Array | int,
    last: jax.Array | int,
    encode: Callable[[jax.Array], jax.Array] = lambda color: color,
) -> P:
    """Places the Gaussians ``first`` to ``last - 1`` of each image, one after another.

    Each is the one that takes most from the squared error of what those before it leave.

    Args:
        params: A dataclass with leaves ``mean [n, m, 2]``, ``cholesky [n, m, 3]`` and ``color [n, m, c]``, as in
            `Gaussians`, of opacity 1.
        residual: ``[n, h, w, c]``, the images less what is drawn of them.
        first: Of the Gaussians that are placed.
        last: The first that is not.
        encode: Maps colors ``[c]`` to what ``color`` holds.

    Returns:
        The parameters with these Gaussians in place of what was there.
    """
    leaves: Any = params
    m = leaves.mean.shape[1]
    _, h, w, c = residual.shape
    radius = np.sqrt(h * w / (np.pi * m))
    scales = np.maximum(np.array(SCALES) * radius, SMALLEST)
    # Row i of scale s: a Gaussian of this standard deviation around the center of pixel i.
    rows, columns = (_atoms(length, scales) for length in (h, w))
    energies = [(atoms**2).sum(-1) for atoms in (rows, columns)]

    def one(args: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        residual, mean, cholesky, color = args
        products = jnp.einsum("siy,yxc,sjx->sijc", rows, residual, columns)
        energy = jnp.einsum("si,sj->sij", *energies)

        def place(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            products, mean, cholesky, color = carry
            best = jnp.argmax(jnp.sum(products**2, axis=-1) / energy)
            scale, y, x = jnp.unravel_index(best, energy.shape)
            found = products[scale, y, x] / energy[scale, y, x]
            # What is drawn by it is gone from the products of the residual with all others.
            row, column = (jnp.asarray(atoms)[scale, at] for atoms, at in ((rows, y), (columns, x)))
            taken = jnp.einsum("si,sj,c->sijc", rows @ row, columns @ column, found)
            # The prefilter is added when it is drawn.
            spread = jnp.sqrt(jnp.asarray(scales**2 - PREFILTER, jnp.float32)[scale])
            position = jnp.stack([(2 * x + 1) / w - 1, (2 * y + 1) / h - 1]).astype(jnp.float32)
            shape = jnp.stack([spread, jnp.zeros_like(spread), spread]) - jnp.array(CHOLESKY_SHIFT, jnp.float32)
            return (
                products - taken,
                mean.at[i].set(position),
                cholesky.at[i].set(shape),
                color.at[i].set(encode(found)),
            )

        return jax.lax.fori_loop(first, last, place, (products, mean, cholesky, color))[1:]

    names = ("mean", "cholesky", "color")
    placed = jax.lax.map(one, (residual, *(getattr(leaves, name) for name in names)), batch_size=BATCH)
    return dataclasses.replace(leaves, **dict(zip(names, placed, strict=True)))


def grow(
    params: P,
    targets: jax.Array,
    done: jax.Array,
    before: jax.Array,
    *,
    draw: Callable[[P, jax.Array], jax.Array],
    until: float = UNTIL,
    encode: Callable[[jax.Array], jax.Array] = lambda color: color,
) -> P:
    """Places those Gaussians that are drawn from now on where they serve the images of now.

    Args:
        params: As for `pursue`.
        targets: Images ``[n, h, w, c]``.
        done: Share of the fit's steps that were taken.
        before: That of the step before.
        draw: ``(params, count) -> images`` of the first ``count`` Gaussians.
        until: As for `number`.
        encode: As for `pursue`.
    """
    m = params.mean.shape[1]  # type: ignore[attr-defined]
    first, last = (number(share, m, until) for share in (jnp.maximum(before, 0), done))
    return jax.lax.cond(
        last > first,
        lambda params: pursue(params, targets - draw(params, first), first, last, encode),
        lambda params: params,
        params,
    )


def _atoms(length: int, scales: np.ndarray) -> np.ndarray:
    at = np.arange(length)
    return np.exp(-0.5 * ((at[:, None] - at) / scales[:, None, None]) ** 2).astype(np.float32)
