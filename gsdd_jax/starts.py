"""Starting points of Gaussian image fitting, from the image itself or at random.

The authors start from uniform noise and fit 50,000 steps. A start that already knows where the image is busy and what
colors it has reaches the same error in far fewer steps (benchmarks/results/fit_psnr.json).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from gsdd_jax import growth
from gsdd_jax.gaussians import CHOLESKY_SHIFT, Gaussians
from gsdd_jax.render import render

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


def uniform(key: jax.Array, images: jax.Array, num_points: int) -> Gaussians:
    """The authors' start: positions U(-1,1), raw Cholesky entries and colors U(0,1), opacity 1.

    Only the shape of ``images`` matters.
    """
    n, h, w, c = images.shape
    key_mean, key_cholesky, key_color = jax.random.split(key, 3)
    return Gaussians(
        jax.random.uniform(key_mean, (n, num_points, 2), jnp.float32, minval=-1.0),
        jax.random.uniform(key_cholesky, (n, num_points, 3), jnp.float32),
        jax.random.uniform(key_color, (n, num_points, c), jnp.float32),
        jnp.ones((n, num_points), jnp.float32),
        size=(h, w),
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


def by_clusters(key: jax.Array, images: jax.Array, num_points: int) -> Gaussians:
    """One Gaussian per cluster of pixels in (position, color), with the cluster's covariance.

    k-means over pixels as in superpixels, seeded as in :func:`on_edges`; colors then solve the ridge regression of
    the image on the rendered Gaussians, in which the image is linear.
    """
    n, h, w, c = images.shape
    y, x = np.meshgrid(np.arange(h) + 0.5, np.arange(w) + 0.5, indexing="ij")
    positions = np.stack([x, y], axis=-1).reshape(-1, 2).astype(np.float32)
    spacing = float(np.sqrt(h * w / num_points))
    seeds = _edge_pixels(key, images, num_points)

    def nearest(features: jax.Array, centers: jax.Array) -> jax.Array:
        distance = jnp.sum(centers**2, axis=1) - 2 * features @ centers.T
        return jax.nn.one_hot(jnp.argmin(distance, axis=1), num_points, dtype=jnp.float32)

    def one(args: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        image, seed = args
        features = jnp.concatenate([positions / spacing, CLUSTER_COLOR * image.reshape(-1, c)], axis=-1)

        def lloyd(_, centers: jax.Array) -> jax.Array:
            member = nearest(features, centers)
            count = member.sum(0)[:, None]
            return jnp.where(count > 0, member.T @ features / jnp.maximum(count, 1), centers)

        centers = jax.lax.fori_loop(0, CLUSTER_STEPS, lloyd, features[seed])
        member = nearest(features, centers)
        count = jnp.maximum(member.sum(0)[:, None], 1)
        # An empty cluster keeps its center and gets the smallest allowed shape.
        mu = jnp.where(member.sum(0)[:, None] > 0, member.T @ positions / count, centers[:, :2] * spacing)
        offset = positions[:, None] - mu
        second = jnp.stack([offset[..., 0] ** 2, offset[..., 0] * offset[..., 1], offset[..., 1] ** 2], axis=-1)
        covariance = CLUSTER_SPREAD**2 * jnp.einsum("pm,pmi->mi", member, second) / count
        xx, xy, yy = jnp.maximum(covariance[:, 0], 0.25), covariance[:, 1], jnp.maximum(covariance[:, 2], 0.25)
        l11 = jnp.sqrt(xx)
        l21 = xy / l11
        l22 = jnp.sqrt(jnp.maximum(yy - l21**2, 0.1))
        cholesky = jnp.stack([l11, l21, l22], axis=-1) - jnp.array(CHOLESKY_SHIFT, jnp.float32)
        mean = mu / jnp.array([w, h], jnp.float32) * 2 - 1
        return mean, cholesky, least_squares_colors(mean, cholesky, image)

    mean, cholesky, color = jax.lax.map(one, (images, seeds))
    return Gaussians(mean, cholesky, color, jnp.ones((n, num_points), jnp.float32), size=(h, w))


def least_squares_colors(mean: jax.Array, cholesky: jax.Array, image: jax.Array) -> jax.Array:
    """Solves for the colors that draw an image best, given the geometry.

    Args:
        mean: ``[m, 2]``.
        cholesky: ``[m, 3]`` raw entries.
        image: ``[h, w, c]``.

    Returns:
        ``[m, c]`` colors at opacity 1: ridge regression of the image on the ``m`` rendered Gaussians.
    """
    h, w, c = image.shape
    m = mean.shape[0]
    # Each Gaussian paints a channel of its own, so the image with m channels is the design matrix.
    each = Gaussians(
        mean[None], cholesky[None], jnp.eye(m, dtype=jnp.float32)[None], jnp.ones((1, m), jnp.float32), size=(h, w)
    )
    design = render(each)[0].reshape(-1, m)
    gram = design.T @ design
    return jnp.linalg.solve(
        gram + RIDGE * jnp.trace(gram) / m * jnp.eye(m, dtype=gram.dtype), design.T @ image.reshape(-1, c)
    )


def by_pursuit(key: jax.Array, images: jax.Array, num_points: int) -> Gaussians:
    """Round Gaussians, each where it explains most of what those before it leave: see `gsdd_jax.growth`; no key."""
    del key
    n, h, w, c = images.shape
    mean, cholesky, color = (jnp.zeros((n, num_points, length), jnp.float32) for length in (2, 3, c))
    nothing = Gaussians(mean, cholesky, color, jnp.ones((n, num_points), jnp.float32), size=(h, w))
    return growth.pursue(nothing, images, 0, num_points)


def _edge_pixels(key: jax.Array, images: jax.Array, num_points: int) -> jax.Array:
    """Draws distinct pixels ``[n, m]``, a share of them in proportion to the gradient magnitude."""
    n, h, w, _ = images.shape
    dy = jnp.diff(images, axis=1, append=images[:, -1:])
    dx = jnp.diff(images, axis=2, append=images[:, :, -1:])
    edge = jnp.sqrt(jnp.sum(dx**2 + dy**2, axis=-1)).reshape(n, -1)
    chance = EDGE_SHARE * edge / jnp.maximum(edge.sum(1, keepdims=True), 1e-6) + (1 - EDGE_SHARE) / (h * w)
    replace = num_points > h * w
    keys = jax.random.split(key, n)
    return jax.vmap(lambda key, p: jax.random.choice(key, h * w, (num_points,), replace=replace, p=p))(keys, chance)


def _positions(index: jax.Array, h: int, w: int) -> jax.Array:
    """Maps flat pixel indices to positions of the pixels' centers in [-1, 1]."""
    half = jnp.float32(0.5)
    return jnp.stack([(index % w + half) / w, (index // w + half) / h], axis=-1) * 2 - 1


START: dict[str, Callable[[jax.Array, jax.Array, int], Gaussians]] = {
    "growth": by_pursuit,
    "clusters": by_clusters,
    "gradient": on_edges,
    "uniform": uniform,
}
