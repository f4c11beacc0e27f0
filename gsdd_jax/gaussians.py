"""Sparse Gaussian images: the pytree of their parameters and its map to pixel space (GSDD, section 3.1)."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

# The authors add it to the raw Cholesky entries, so that raw zeros are half-pixel Gaussians.
CHOLESKY_SHIFT = (0.5, 0.0, 0.5)
# Variance of a unit pixel box, in output pixels (GSDD, Eq. 9).
PREFILTER = 1.0 / 12.0
# A Gaussian this many pixels wide is constant on any image and one this far away is absent; limiting both keeps
# squares finite.
MAX_PIXELS = 1e6


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gaussians:
    """Parameters of ``n`` images with ``m`` Gaussians each; all leaves are unconstrained float arrays.

    Attributes:
        mean: ``[n, m, 2]`` centers (x, y); [-1, 1] spans the image.
        cholesky: ``[n, m, 3]`` entries (l11, l21, l22) of L minus ``CHOLESKY_SHIFT``, in pixels of the native size;
            the covariance is ``L @ L.T``.
        color: ``[n, m, c]`` colors; any sign and size.
        opacity: ``[n, m]`` factors of the colors; any sign and size.
        size: Native (height, width) in pixels; static.
    """

    mean: jax.Array
    cholesky: jax.Array
    color: jax.Array
    opacity: jax.Array
    size: tuple[int, int] = dataclasses.field(metadata={"static": True})

    @property
    def num_images(self) -> int:
        """``n``."""
        return self.mean.shape[0]

    @property
    def num_points(self) -> int:
        """``m``, Gaussians per image."""
        return self.mean.shape[1]

    def __getitem__(self, index) -> Gaussians:
        """Selects images, as ``array[index]`` does on the leading axis of every leaf."""
        return jax.tree.map(lambda leaf: leaf[index], self)


class Splats(NamedTuple):
    """Gaussians in pixel space, as `kernels.splat` takes them."""

    centers: jax.Array  # [n, m, 2] pixels
    conics: jax.Array  # [n, m, 3] (p, r, s) in 1/pixel
    colors: jax.Array  # [n, m, c] opacity * color


def to_pixels(g: Gaussians, size: tuple[int, int] | None = None) -> Splats:
    """Maps Gaussians to the pixel grid of an image of any size.

    L scales with the size per axis; the prefilter of Eq. 9 does not, it always is one output pixel's box. The inverse
    of the filtered covariance is returned in Cholesky form, built from sums of squares only, so that neither needles
    nor huge covariances cancel.

    Args:
        g: The Gaussians.
        size: (height, width) to map to; the native size by default.

    Returns:
        Centers, conics and premultiplied colors. Differentiable with respect to every leaf; L beyond ``MAX_PIXELS``
        is limited to it.
    """
    height, width = size or g.size
    x = 0.5 * width * (g.mean[..., 0] + 1)
    y = 0.5 * height * (g.mean[..., 1] + 1)
    centers = jnp.clip(jnp.stack([x, y], axis=-1), -MAX_PIXELS, MAX_PIXELS)

    grow_x, grow_y = width / g.size[1], height / g.size[0]
    l11, l21, l22 = (
        jnp.clip((g.cholesky[..., i] + CHOLESKY_SHIFT[i]) * grow, -MAX_PIXELS, MAX_PIXELS)
        for i, grow in enumerate((grow_x, grow_y, grow_y))
    )
    # Covariance [[l11^2 + e, l11 l21], [., l21^2 + l22^2 + e]]; 1/p^2 is the variance of x given y, 1/s^2 that of y.
    variance_y = l21**2 + l22**2 + PREFILTER
    p = jax.lax.rsqrt(PREFILTER + l11**2 * ((l22**2 + PREFILTER) / variance_y))
    r = -(l11 * l21 / variance_y) * p
    s = jax.lax.rsqrt(variance_y)
    return Splats(centers, jnp.stack([p, r, s], axis=-1), g.color * g.opacity[..., None])
