"""Scenes that a renderer of Gaussians must survive, each with the reason why it is here.

The hostile ones share one shape, so that a jitted function compiles once for all of them; the others differ in shape.
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from gsdd_jax.gaussians import Gaussians

# Neither edge is a multiple of a tile, the image is not square, and the lists can be longer than the lanes of a block.
IMAGES, POINTS, SIZE, CHANNELS = 2, 12, (24, 37), 3


def gaussians(mean, lower, color, opacity, size) -> Gaussians:
    """Builds Gaussians from entries (l11, l21, l22) of L itself, not from the raw ones that are stored."""
    raw = np.asarray(lower) - np.array([0.5, 0, 0.5])
    return Gaussians(*(jnp.asarray(x, jnp.float32) for x in (mean, raw, color, opacity)), size=size)


def ellipses(sigma, ratio, angle) -> np.ndarray:
    """Returns (l11, l21, l22) for standard deviations ``sigma`` and ``ratio * sigma``, turned by ``angle``."""
    sigma, ratio, angle = np.broadcast_arrays(sigma, ratio, angle)
    cos, sin = sigma * np.cos(angle), sigma * np.sin(angle)
    l11 = np.hypot(cos, ratio * sin)
    # L L^T = R diag(sigma^2, (ratio sigma)^2) R^T, whose determinant is (ratio sigma^2)^2.
    return np.stack([l11, cos * sin * (1 - ratio**2) / l11, ratio * sigma**2 / l11], axis=-1)


def random(n=IMAGES, m=POINTS, size=SIZE, channels=CHANNELS, seed=0) -> Gaussians:
    """Like a fitted image: Gaussians of a few pixels inside the image, turned and stretched, colors of both signs."""
    rng = np.random.default_rng(seed)
    spread = 0.6 * np.sqrt(np.prod(size) / (np.pi * max(m, 1)))
    lower = ellipses(spread * rng.uniform(0.5, 2, (n, m)), rng.uniform(0.3, 1, (n, m)), rng.uniform(0, np.pi, (n, m)))
    return gaussians(
        rng.uniform(-1, 1, (n, m, 2)),
        lower,
        rng.uniform(-0.5, 1, (n, m, channels)),
        rng.uniform(0.5, 1.5, (n, m)),
        size,
    )


def _variation(seed=0, **leaves) -> Gaussians:
    g = random(seed=seed)
    changed = {name: jnp.asarray(np.broadcast_to(x, getattr(g, name).shape), jnp.float32) for name, x in leaves.items()}
    return Gaussians(
        *(changed.get(name, getattr(g, name)) for name in ("mean", "cholesky", "color", "opacity")), size=g.size
    )


def _raw(lower) -> np.ndarray:
    return np.asarray(lower) - np.array([0.5, 0, 0.5])


def all_widths() -> Gaussians:
    """Round Gaussians from 0.01 to 500 pixels: the prefilter alone at one end, a constant image at the other."""
    return _variation(cholesky=_raw(ellipses(np.geomspace(0.01, 500, POINTS), 1, 0)))


def needles() -> Gaussians:
    """500 by 0.01 pixels at all angles: in float32 the inverse, and moments about any other point, cancel."""
    return _variation(cholesky=_raw(ellipses(500, 0.01 / 500, np.linspace(0, np.pi, POINTS, endpoint=False))))


def short_needles() -> Gaussians:
    """8 by 0.2 pixels near the diagonals: their boxes are large and almost empty, and they cross many tiles."""
    angle = np.pi / 4 + np.linspace(-0.05, 0.05, POINTS) + np.pi / 2 * (np.arange(POINTS) % 2)
    return _variation(cholesky=_raw(ellipses(8, 0.2 / 8, angle)))


def outside() -> Gaussians:
    """Centers up to two images away, on all sides, of Gaussians that reach in or not: culling must know which."""
    angle = np.linspace(0, 2 * np.pi, POINTS, endpoint=False)
    mean = np.linspace(1.05, 4, POINTS)[:, None] * np.stack([np.cos(angle), np.sin(angle)], -1)
    return _variation(mean=mean, cholesky=_raw(ellipses(np.linspace(2, 25, POINTS), 0.5, angle)))


def strong_weights() -> Gaussians:
    """Huge weights of both signs that nearly cancel: nothing may be clamped, neither opacity nor the sum."""
    rng = np.random.default_rng(1)
    sign = np.where(np.arange(POINTS) % 2, -1.0, 1.0)
    color = rng.uniform(500, 1000, (IMAGES, POINTS, CHANNELS))
    return _variation(color=color, opacity=sign * 3)


def zero_lower() -> Gaussians:
    """L = 0 but for one entry each: only the prefilter makes the covariance invertible, and L is stationary."""
    lower = np.zeros((POINTS, 3))
    lower[np.arange(POINTS), np.arange(POINTS) % 3] = np.linspace(0, 3, POINTS)
    return _variation(cholesky=_raw(lower))


def negative_lower() -> Gaussians:
    """Negative diagonals of L: the parameters are unconstrained, and only L L^T counts."""
    rng = np.random.default_rng(2)
    return _variation(cholesky=_raw(rng.uniform(-4, 4, (IMAGES, POINTS, 3))))


def stacked() -> Gaussians:
    """All centers on one corner of a pixel: one tile's list is full while most are empty."""
    return _variation(mean=(2 * 5 / SIZE[1] - 1, 2 * 3 / SIZE[0] - 1), cholesky=_raw((0.7, 0.1, 0.7)))


HOSTILE: dict[str, Callable[[], Gaussians]] = {
    "random": random,
    "all_widths": all_widths,
    "needles": needles,
    "short_needles": short_needles,
    "outside": outside,
    "strong_weights": strong_weights,
    "zero_lower": zero_lower,
    "negative_lower": negative_lower,
    "stacked": stacked,
}


def shaped() -> dict[str, tuple[Gaussians, dict]]:
    """Other shapes and settings: channels, one Gaussian, one pixel, strips, output sizes, supersampling 1 to 4."""
    return {
        "one_gaussian": (random(n=3, m=1, size=(9, 8), channels=1, seed=5), {"supersample": 3}),
        "one_pixel": (random(n=2, m=3, size=(1, 1), channels=4, seed=6), {}),
        "strip_of_many": (random(n=1, m=70, size=(3, 70), seed=7), {"supersample": 1}),
        "reduced": (random(m=5, size=(32, 40), seed=10), {"size": (7, 9), "supersample": 4}),
        "stretched": (random(m=5, size=(16, 16), seed=11), {"size": (10, 41), "supersample": 3}),
    }
