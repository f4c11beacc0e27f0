"""The renderer once more, straight from its definition: NumPy, float64, one Gaussian at a time.

It shares nothing with the library. Derivatives are finite differences with an imaginary step,
``f'(x) = Im f(x + i e) / e``. Unlike real differences they neither cancel nor need a step that suits the curvature, so
one step serves Gaussians of a hundredth of a pixel and of five hundred. All that is differentiated here (squares,
quotients, ``exp``) is analytic. Which samples lie below the cutoff is decided by the real part and so counts as
constant, as it does in the library.
"""

from typing import NamedTuple

import numpy as np

STEP = 1e-20
# float32 knows exp(-q/2) of a hostile Gaussian to about this, relative; a sample this close to the cutoff may fall on
# either side, and what it could change is returned as the slack.
AMBIGUOUS = 1e-4


class Drawn(NamedTuple):
    """Images and gradients, each with the most that samples at the edge of the cutoff can move it."""

    images: np.ndarray  # [n, h, w, c]
    images_slack: np.ndarray
    v_geometry: np.ndarray  # [n, m, 5]
    v_geometry_slack: np.ndarray
    v_colors: np.ndarray  # [n, m, c]
    v_colors_slack: np.ndarray


class Rendered(NamedTuple):
    """What ``render`` should give: images, and the gradient of ``sum(images * v)`` for each leaf."""

    images: np.ndarray
    images_slack: np.ndarray
    gradient: dict[str, np.ndarray]
    gradient_slack: dict[str, np.ndarray]


def render(g, size=None, *, supersample=2, cutoff=0.0, v=None) -> Rendered:
    """Renders ``Gaussians`` from their raw leaves; ``v`` ``[n, h, w, c]`` weighs the pixels of the loss (default 1)."""
    mean, cholesky, color, opacity = (np.asarray(x, np.float64) for x in (g.mean, g.cholesky, g.color, g.opacity))
    (native_height, native_width), (height, width) = g.size, size or g.size

    def quadratic(parameters, x, y):
        mean_x, mean_y, raw11, raw21, raw22 = parameters
        dx = x - width * (mean_x + 1) / 2
        dy = y - height * (mean_y + 1) / 2
        lower = np.array([[raw11 + 0.5, 0], [raw21, raw22 + 0.5]])
        lower = np.diag([width / native_width, height / native_height]) @ lower
        covariance = lower @ lower.T + np.eye(2) / 12
        # The determinant of L L^T + e I as a sum of squares; the difference of products would cancel for needles.
        determinant = (lower[0, 0] * lower[1, 1]) ** 2 + np.sum(lower**2) / 12 + 1 / 144
        return (covariance[1, 1] * dx**2 - 2 * covariance[0, 1] * dx * dy + covariance[0, 0] * dy**2) / determinant

    geometry = np.concatenate([mean, cholesky], axis=-1)
    drawn = draw(geometry, opacity[..., None] * color, quadratic, height, width, supersample, cutoff, v)

    def leaves(v_geometry, v_colors, factor):
        return {
            "mean": v_geometry[..., :2],
            "cholesky": v_geometry[..., 2:],
            "color": v_colors * factor(opacity[..., None]),
            "opacity": np.sum(v_colors * factor(color), axis=-1),
        }

    return Rendered(
        drawn.images,
        drawn.images_slack,
        leaves(drawn.v_geometry, drawn.v_colors, lambda x: x),
        leaves(drawn.v_geometry_slack, drawn.v_colors_slack, np.abs),
    )


def splat(centers, conics, colors, *, height, width, supersample=2, cutoff=0.0, v=None) -> Drawn:
    """Draws what ``kernels.splat`` draws; ``v_geometry`` holds the gradient of (cx, cy, p, r, s)."""

    def quadratic(parameters, x, y):
        cx, cy, p, r, s = parameters
        return (p * (x - cx) + r * (y - cy)) ** 2 + (s * (y - cy)) ** 2

    geometry = np.concatenate([np.asarray(centers, np.float64), np.asarray(conics, np.float64)], axis=-1)
    return draw(geometry, np.asarray(colors, np.float64), quadratic, height, width, supersample, cutoff, v)


def draw(geometry, colors, quadratic, height, width, supersample, cutoff, v=None) -> Drawn:
    """Sums ``exp(-quadratic / 2) * colors`` over the Gaussians and averages the samples of each pixel."""
    n, m, c = colors.shape
    v = np.ones((n, height, width, c)) if v is None else np.asarray(v, np.float64)
    y, x = np.meshgrid(
        (np.arange(height * supersample) + 0.5) / supersample,
        (np.arange(width * supersample) + 0.5) / supersample,
        indexing="ij",
    )

    def pool(samples):
        return samples.reshape(height, supersample, width, supersample).mean((1, 3))

    out = Drawn(*(np.zeros(shape) for shape in 2 * [(n, height, width, c)] + 2 * [geometry.shape] + 2 * [colors.shape]))
    for i in range(n):
        for k in range(m):
            weight = np.exp(-quadratic(geometry[i, k], x, y) / 2)
            kept = weight >= cutoff
            ambiguous = abs(weight - cutoff) <= AMBIGUOUS * cutoff if cutoff > 0 else np.zeros_like(kept)
            out.images[i] += pool(weight * kept)[..., None] * colors[i, k]
            out.images_slack[i] += pool(weight * ambiguous)[..., None] * abs(colors[i, k])
            out.v_colors[i, k] = np.sum(v[i] * pool(weight * kept)[..., None], axis=(0, 1))
            out.v_colors_slack[i, k] = np.sum(abs(v[i]) * pool(weight * ambiguous)[..., None], axis=(0, 1))
            v_weight = v[i] @ colors[i, k]
            for j in range(geometry.shape[2]):
                moved = geometry[i, k].astype(complex)
                moved[j] += 1j * STEP
                slope = np.exp(-quadratic(moved, x, y) / 2).imag / STEP
                out.v_geometry[i, k, j] = np.sum(v_weight * pool(slope * kept))
                out.v_geometry_slack[i, k, j] = np.sum(abs(v_weight) * pool(abs(slope) * ambiguous))
    return out
