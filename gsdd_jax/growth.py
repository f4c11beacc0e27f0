"""Gaussians added one after another where they explain most of what is left of the image: matching pursuit.

The greedy choice of Mallat & Zhang 1993, from round Gaussians of a few sizes centered at pixels. In videos they last
for a few durations and move at a few speeds. Fitting draws with few Gaussians at first and adds the others over the
first half of its steps, so that each meets an image that those before it have already learned to draw (density control:
GSDD, section 5, leaves it open; adaptive density control of 3D Gaussian splatting, Kerbl et al. 2023, clones by the
gradient instead, and leaves the number open).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from gsdd_jax.gaussians import CHOLESKY_SHIFT, PREFILTER
from gsdd_jax.spacetime import SPACETIME_SHIFT

# Standard deviations of what is added, in units of the radius of an equal share of the image.
SCALES = (0.2, 0.4, 0.8, 1.6, 3.2)
# Of videos, whose larger ones gain nothing and stretch the grids of packed Gaussians: volumes of solid_digits (16 of 15
# Gaussians, 300 steps) have 28.8 dB with three and 26.4 with five.
VIDEO_SCALES = SCALES[:3]
# Those in time, as shares of the video.
DURATIONS = (1 / 16, 1 / 5, 1 / 2)
# The smallest of both, in pixels or frames.
SMALLEST = 0.5
# What moves does so along each axis by these many of its standard deviations per frame. Beyond 1.1 the blur of the
# smallest that move both ways would be wider than they are.
SPEEDS = (-1.0, -0.5, 0.0, 0.5, 1.0)
# Share of the steps of a fit over which Gaussians are added, and in how many lots.
UNTIL = 0.5
LOTS = 24
# Images or frames at a time: each has a map of every scale.
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
    """Places the Gaussians ``first`` to ``last - 1`` of each image or video, one after another.

    Each is the one that takes most from the squared error of what those before it leave. In videos the place is that of
    the best that stands still, and what moves is the best that passes there.

    Args:
        params: A dataclass with leaves ``mean [n, m, 2]``, ``cholesky [n, m, 3]`` and ``color [n, m, c]``, as in
            `Gaussians`, of opacity 1; of videos, as in `Gaussians3D`.
        residual: ``[n, h, w, c]``, the images less what is drawn of them, or ``[n, t, h, w, c]``.
        first: Of the Gaussians that are placed.
        last: The first that is not.
        encode: Maps colors ``[c]`` to what ``color`` holds.

    Returns:
        The parameters with these Gaussians in place of what was there.
    """
    leaves: Any = params
    _, *frames, h, w, _ = residual.shape
    begin, find = (_of_video if frames else _of_image)((*frames, h, w), leaves.mean.shape[1])

    def one(args: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        residual, *held = args

        def place(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            left, *held = carry
            left, position, shape, color = find(left)
            found = (position, shape, encode(color))
            return (left, *(leaf.at[i].set(value) for leaf, value in zip(held, found, strict=True)))

        return jax.lax.fori_loop(first, last, place, (begin(residual), *held))[1:]

    names = ("mean", "cholesky", "color")
    batch = max(BATCH // frames[0], 1) if frames else BATCH
    placed = jax.lax.map(one, (residual, *(getattr(leaves, name) for name in names)), batch_size=batch)
    return dataclasses.replace(leaves, **dict(zip(names, placed, strict=True)))


# What is kept of one residual, and (what is kept) -> (that of the next, position, raw Cholesky entries, color).
Search = tuple[Callable[[jax.Array], jax.Array], Callable[[jax.Array], tuple[jax.Array, ...]]]


def _of_image(size: tuple[int, ...], num_points: int) -> Search:
    h, w = size
    scales = np.maximum(np.array(SCALES) * np.sqrt(h * w / (np.pi * num_points)), SMALLEST)
    # Row i of scale s: a Gaussian of this standard deviation around the center of pixel i.
    rows, columns = (_atoms(length, scales) for length in (h, w))
    energies = [(atoms**2).sum(-1) for atoms in (rows, columns)]
    energy = jnp.einsum("si,sj->sij", *energies)

    def find(products: jax.Array) -> tuple[jax.Array, ...]:
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
        return products - taken, position, shape, found

    return lambda residual: jnp.einsum("siy,yxc,sjx->sijc", rows, residual, columns), find


def _of_video(size: tuple[int, ...], num_points: int) -> Search:
    t, h, w = size
    radius = np.cbrt(t * h * w / num_points) / np.sqrt(np.pi)
    scales = np.maximum(np.array(VIDEO_SCALES) * radius, SMALLEST)
    durations = np.maximum(np.array(DURATIONS) * t, SMALLEST)
    rows, columns, times = _atoms(h, scales), _atoms(w, scales), _atoms(t, durations)
    energy = jnp.einsum("pa,si,sj->psaij", *((atoms**2).sum(-1) for atoms in (times, rows, columns)))
    spreads, lasting = jnp.asarray(scales, jnp.float32), jnp.asarray(durations, jnp.float32)
    # Pixels per frame of scale s at speed v.
    speeds = spreads[:, None] * jnp.array(SPEEDS, jnp.float32)

    def find(residual: jax.Array) -> tuple[jax.Array, ...]:
        products = jnp.einsum("pat,siy,sjx,tyxc->psaijc", times, rows, columns, residual)
        at = jnp.unravel_index(jnp.argmax(jnp.sum(products**2, axis=-1) / energy), energy.shape)[2:]
        # Of what passes there: [durations, t] and, per frame, [scales, speeds, t, h] and [scales, speeds, t, w].
        away = jnp.arange(t, dtype=jnp.float32) - at[0]
        fading = jnp.exp(-0.5 * (away / lasting[:, None]) ** 2)

        def passing(length: int, at: jax.Array) -> jax.Array:
            center = at + speeds[..., None] * away
            return jnp.exp(-0.5 * ((jnp.arange(length) - center[..., None]) / spreads[:, None, None, None]) ** 2)

        down, across = passing(h, at[1]), passing(w, at[2])
        products = jnp.einsum("pt,sity,sjtx,tyxc->psijc", fading, down, across, residual)
        energies = jnp.einsum("pt,sit,sjt->psij", fading**2, (down**2).sum(-1), (across**2).sum(-1))
        best = jnp.argmax(jnp.sum(products**2, axis=-1) / energies)
        p, s, i, j = jnp.unravel_index(best, energies.shape)
        found = products[p, s, i, j] / energies[p, s, i, j]
        taken = jnp.einsum("t,ty,tx,c->tyxc", fading[p], down[s, i], across[s, j], found)
        # As `to_frames` draws: the center moves by u l_t / (l_t^2 + e) per frame, and u blurs, so the rest is thinner.
        l_t = jnp.sqrt(lasting[p] ** 2 - PREFILTER)
        u_x, u_y = (speeds[s, k] * (lasting[p] ** 2 / l_t) for k in (j, i))
        blur = PREFILTER / lasting[p] ** 2
        l11 = jnp.sqrt(spreads[s] ** 2 - PREFILTER - blur * u_x**2)
        l21 = -blur * u_x * u_y / l11
        l22 = jnp.sqrt(spreads[s] ** 2 - PREFILTER - blur * u_y**2 - l21**2)
        shape = jnp.stack([l11, l21, l22, u_x, u_y, l_t]) - jnp.array(SPACETIME_SHIFT, jnp.float32)
        position = (2 * jnp.stack(at[::-1]) + 1) / jnp.array(size[::-1], jnp.float32) - 1
        return residual - taken, position, shape, found

    return lambda residual: residual, find


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
        targets: Images ``[n, h, w, c]`` or videos ``[n, t, h, w, c]``.
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
