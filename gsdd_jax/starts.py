"""Starting points of Gaussian image and video fitting, from the image itself or at random.

The authors start from uniform noise and fit 50,000 steps. A start that already knows where the image is busy and what
colors it has reaches the same error in far fewer steps (benchmarks/results/fit_psnr.json).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gsdd_jax import growth, spacetime
from gsdd_jax.gaussians import CHOLESKY_SHIFT, Gaussians, to_pixels
from gsdd_jax.spacetime import SPACETIME_SHIFT, to_frames
from kernels import splat

# Share of the points of ``on_edges`` that follow the gradient magnitude; the rest cover the image evenly.
EDGE_SHARE = 0.5
# Standard deviation of the Gaussians of ``on_edges``, in units of sqrt(pixels / (pi m)), the radius of an equal share
# of the image.
EDGE_SPREAD = 0.6
# Lloyd iterations of ``by_clusters``; not tuned.
CLUSTER_STEPS = 10
# Weight of color (0..1) against position: a difference of 1/4 counts as much as one mean spacing of clusters.
CLUSTER_COLOR = 4.0
# A cluster's Gaussian is this much wider than the cluster, so that neighbors overlap and leave no dark seams; 1 and 2
# fit worse (6 images of 128 px, 107 Gaussians, 300 steps: 23.29 and 22.97 against 23.37 dB).
CLUSTER_SPREAD = 1.5
# Ridge of the least-squares colors, relative to the mean diagonal: keeps colors of overlapping Gaussians small.
RIDGE = 1e-3


def uniform(key: jax.Array, images: jax.Array, num_points: int) -> Any:
    """The authors' start: positions U(-1,1), raw Cholesky entries and colors U(0,1), opacity 1.

    Only the shape of ``images`` matters. Videos ``[n, t, h, w, c]`` get `Gaussians3D`.
    """
    n, *size, c = images.shape
    d = len(size)
    key_mean, key_cholesky, key_color = jax.random.split(key, 3)
    return spacetime.kind(size)(
        jax.random.uniform(key_mean, (n, num_points, d), jnp.float32, minval=-1.0),
        jax.random.uniform(key_cholesky, (n, num_points, d * (d + 1) // 2), jnp.float32),
        jax.random.uniform(key_color, (n, num_points, c), jnp.float32),
        jnp.ones((n, num_points), jnp.float32),
        size=tuple(size),
    )


def on_edges(key: jax.Array, images: jax.Array, num_points: int) -> Gaussians:
    """Round Gaussians at pixels drawn in proportion to the gradient magnitude, with half of their pixel's color."""
    n, h, w, c = images.shape
    index = _edge_pixels(key, images, num_points)
    color = jnp.take_along_axis(images.reshape(n, h * w, c), index[..., None], axis=1)
    spread = EDGE_SPREAD * np.sqrt(h * w / (np.pi * num_points))
    cholesky = jnp.array([spread, 0.0, spread], jnp.float32) - jnp.array(CHOLESKY_SHIFT, jnp.float32)
    return Gaussians(
        _positions(index, h, w),
        jnp.broadcast_to(cholesky, (n, num_points, 3)),
        0.5 * color,
        jnp.ones((n, num_points), jnp.float32),
        size=(h, w),
    )


def by_clusters(key: jax.Array, images: jax.Array, num_points: int) -> Any:
    """One Gaussian per cluster of pixels in (position, color), with the cluster's covariance.

    k-means over pixels as in superpixels, seeded as in `on_edges`; colors then solve the ridge regression of
    the image on the rendered Gaussians, in which the image is linear. Videos ``[n, t, h, w, c]`` get `Gaussians3D`,
    whose positions include the frame; a frame is as far from the next as a pixel is.
    """
    n, *size, c = images.shape
    d, frames = len(size), _frames(size)
    # In the order (x, y) or (x, y, t), frame by frame.
    axes = np.meshgrid(*(np.arange(side) + 0.5 for side in size), indexing="ij")
    positions = np.stack(axes[::-1], axis=-1).reshape(frames, -1, d).astype(np.float32)
    spacing = float((np.prod(size) / num_points) ** (1 / d))
    seeds = _edge_pixels(key, images, num_points)

    def one(args: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        image, seed = args
        colors = CLUSTER_COLOR * image.reshape(frames, -1, c)
        features = jnp.concatenate([positions / spacing, colors], axis=-1)

        def totals(centers: jax.Array, numbers: Callable[..., jax.Array], *more: Any) -> tuple[jax.Array, jax.Array]:
            """Returns the pixels of each cluster, and the sums of numbers ``(cluster, frame) -> [pixels, k]``."""

            def frame(args: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
                own = args[0]
                distance = jnp.sum(centers**2, axis=1) - 2 * own @ centers.T
                cluster = jnp.argmin(distance, axis=1)
                member = jax.nn.one_hot(cluster, num_points, dtype=jnp.float32)
                return member.sum(0), member.T @ numbers(cluster, *args)

            count, total = _summed(frame, (features, *more))
            return count[:, None], total

        def lloyd(_, centers: jax.Array) -> jax.Array:
            count, total = totals(centers, lambda _, own: own)
            return jnp.where(count > 0, total / jnp.maximum(count, 1), centers)

        def products(cluster: jax.Array, _: jax.Array, places: jax.Array) -> jax.Array:
            offset = places - mu[cluster]
            return jnp.stack([offset[:, i] * offset[:, j] for i, j in pairs], axis=-1)

        centers = jax.lax.fori_loop(0, CLUSTER_STEPS, lloyd, features.reshape(-1, d + c)[seed])
        count, total = totals(centers, lambda _, own, places: places, jnp.asarray(positions))
        # An empty cluster keeps its center and gets the smallest allowed shape.
        mu = jnp.where(count > 0, total / jnp.maximum(count, 1), centers[:, :d] * spacing)
        pairs = [(i, j) for i in range(d) for j in range(i + 1)]
        count, total = totals(centers, products, jnp.asarray(positions))
        cholesky = _factor(*(CLUSTER_SPREAD**2 * total / jnp.maximum(count, 1)).T)
        mean = mu / jnp.array(size[::-1], jnp.float32) * 2 - 1
        return mean, cholesky, least_squares_colors(mean, cholesky, image)

    mean, cholesky, color = jax.lax.map(one, (images, seeds))
    return spacetime.kind(size)(mean, cholesky, color, jnp.ones((n, num_points), jnp.float32), size=tuple(size))


def _factor(xx: jax.Array, xy: jax.Array, yy: jax.Array, *time: jax.Array) -> jax.Array:
    """Returns raw Cholesky entries of covariances, kept from being too thin; ``time`` is (tx, ty, tt)."""
    last = []
    if time:
        tx, ty, tt = time
        l_t = jnp.sqrt(jnp.maximum(tt, 0.25))
        u_x, u_y = tx / l_t, ty / l_t
        xx, xy, yy = xx - u_x**2, xy - u_x * u_y, yy - u_y**2
        last = [u_x, u_y, l_t]
    l11 = jnp.sqrt(jnp.maximum(xx, 0.25))
    l21 = xy / l11
    l22 = jnp.sqrt(jnp.maximum(jnp.maximum(yy, 0.25) - l21**2, 0.1))
    shift = SPACETIME_SHIFT if time else CHOLESKY_SHIFT
    return jnp.stack([l11, l21, l22, *last], axis=-1) - jnp.array(shift, jnp.float32)


def _frames(size: list[int]) -> int:
    return size[0] if len(size) == 3 else 1


def _summed(function: Callable[[Any], Any], frames: Any) -> Any:
    """Returns the sum of a function over the leading axis, one after the other."""
    first = jax.tree.map(lambda x: x[0], frames)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, first))
    return jax.lax.scan(lambda sums, one: (jax.tree.map(jnp.add, sums, function(one)), None), zeros, frames)[0]


def least_squares_colors(mean: jax.Array, cholesky: jax.Array, image: jax.Array) -> jax.Array:
    """Solves for the colors that draw an image or a video best, given the geometry.

    Args:
        mean: ``[m, 2]`` or, of a video, ``[m, 3]``.
        cholesky: ``[m, 3]`` or ``[m, 6]`` raw entries.
        image: ``[h, w, c]`` or ``[t, h, w, c]``.

    Returns:
        ``[m, c]`` colors at opacity 1: ridge regression of the image on the ``m`` rendered Gaussians.
    """
    *size, c = image.shape
    m, (h, w) = mean.shape[0], size[-2:]
    # Each Gaussian paints a channel of its own, so the image with m channels is the design matrix.
    leaves = mean[None], cholesky[None], jnp.eye(m, dtype=jnp.float32)[None], jnp.ones((1, m), jnp.float32)
    splats = (to_pixels if len(size) == 2 else to_frames)(spacetime.kind(size)(*leaves, size=tuple(size)))

    def frame(args: tuple[Any, jax.Array]) -> tuple[jax.Array, jax.Array]:
        splats, pixels = args
        design = splat(*(leaf[None] for leaf in splats), height=h, width=w)[0].reshape(-1, m)
        return design.T @ design, design.T @ pixels

    gram, products = _summed(frame, (splats, image.reshape(_frames(size), -1, c)))
    return jnp.linalg.solve(gram + RIDGE * jnp.trace(gram) / m * jnp.eye(m, dtype=gram.dtype), products)


def by_pursuit(key: jax.Array, images: jax.Array, num_points: int) -> Any:
    """Round Gaussians, each where it explains most of what those before it leave: see `gsdd_jax.growth`; no key.

    Videos ``[n, t, h, w, c]`` get `Gaussians3D`, some of which move.
    """
    del key
    n, *size, c = images.shape
    lengths = len(size), len(size) * (len(size) + 1) // 2, c
    zeros = (jnp.zeros((n, num_points, length), jnp.float32) for length in lengths)
    nothing = spacetime.kind(size)(*zeros, jnp.ones((n, num_points), jnp.float32), size=tuple(size))
    return growth.pursue(nothing, images, 0, num_points)


def _edge_pixels(key: jax.Array, images: jax.Array, num_points: int) -> jax.Array:
    """Draws distinct pixels ``[n, m]``, a share of them in proportion to the gradient magnitude."""
    n, *size, _ = images.shape
    count = int(np.prod(size))
    last = (jax.lax.slice_in_dim(images, -1, None, axis=axis) for axis in range(1, 1 + len(size)))
    slopes = (jnp.diff(images, axis=axis, append=edge) for axis, edge in enumerate(last, start=1))
    edge = jnp.sqrt(jnp.sum(sum(slope**2 for slope in slopes), axis=-1)).reshape(n, -1)
    chance = EDGE_SHARE * edge / jnp.maximum(edge.sum(1, keepdims=True), 1e-6) + (1 - EDGE_SHARE) / count
    replace = num_points > count
    keys = jax.random.split(key, n)
    return jax.vmap(lambda key, p: jax.random.choice(key, count, (num_points,), replace=replace, p=p))(keys, chance)


def _positions(index: jax.Array, h: int, w: int) -> jax.Array:
    """Maps flat pixel indices to positions of the pixels' centers in [-1, 1]."""
    half = jnp.float32(0.5)
    return jnp.stack([(index % w + half) / w, (index // w + half) / h], axis=-1) * 2 - 1


START: dict[str, Callable[[jax.Array, jax.Array, int], Any]] = {
    "growth": by_pursuit,
    "clusters": by_clusters,
    "gradient": on_edges,
    "uniform": uniform,
}
