"""Gaussians in space and time: videos whose every frame is an image of 2D Gaussians.

The cut of a Gaussian in (x, y, t) by the plane of a frame is a 2D Gaussian; its center moves along a line as t goes on,
its shape stays, and its weight falls off with the distance in time. What `kernels.splat` draws of images it so draws
of videos. Volumes are the same with slices for frames.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from gsdd_jax.gaussians import CHOLESKY_SHIFT, MAX_PIXELS, PREFILTER, Gaussians, Splats, to_pixels
from gsdd_jax.render import checked, checked_size
from kernels import DEFAULT_CUTOFF, splat

# Of (l11, l21, l22, u_x, u_y, l_t): raw zeros are Gaussians of half a pixel and half a frame that stand still.
SPACETIME_SHIFT = (*CHOLESKY_SHIFT, 0.0, 0.0, 0.5)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gaussians3D:
    """Parameters of ``n`` videos with ``m`` Gaussians each; all leaves are unconstrained float arrays.

    In the order (t, x, y) the covariance is ``L @ L.T`` with ``L = [[l_t, 0, 0], [u_x, l11, 0], [u_y, l21, l22]]``, so
    that (l11, l21, l22) is the shape that a frame shows and ``u / l_t`` the velocity.

    Attributes:
        mean: ``[n, m, 3]`` centers (x, y, t); [-1, 1] spans the video.
        cholesky: ``[n, m, 6]`` entries (l11, l21, l22, u_x, u_y, l_t) minus ``SPACETIME_SHIFT``: the first five in
            pixels of the native size, the last in native frames.
        color: ``[n, m, c]`` colors; any sign and size.
        opacity: ``[n, m]`` factors of the colors; any sign and size.
        size: Native (frames, height, width); static.
    """

    mean: jax.Array
    cholesky: jax.Array
    color: jax.Array
    opacity: jax.Array
    size: tuple[int, int, int] = dataclasses.field(metadata={"static": True})

    def __getitem__(self, index) -> Gaussians3D:
        """Selects videos, as ``array[index]`` does on the leading axis of every leaf."""
        return jax.tree.map(lambda leaf: leaf[index], self)


def kind(size: Sequence[int]) -> Any:
    """Returns the class of the Gaussians of images of size (height, width) or videos (frames, height, width)."""
    return {2: Gaussians, 3: Gaussians3D}[len(size)]


def to_frames(g: Gaussians3D, size: tuple[int, int, int] | None = None) -> Splats:
    """Maps Gaussians to the pixel grids of the frames of a video of any size.

    L scales with the size per axis. The prefilter is one output pixel's box, as in `to_pixels`, and one output frame's
    in time, which blurs what moves: with its variance e, ``var_t = l_t^2 + e``, and ``d`` the frames from the
    Gaussian's center in time, it is at ``mu + u l_t / var_t d`` with weight ``exp(-d^2 / (2 var_t))`` and covariance
    ``A + e / var_t u u^T``, where A is that of (l11, l21, l22). Only sums of squares are added, so nothing cancels.

    Args:
        g: The Gaussians.
        size: (frames, height, width) to map to; the native size by default.

    Returns:
        Splats of ``n * frames`` images, the frames of a video one after the other; weights are part of the colors.
        Differentiable with respect to every leaf; L beyond ``MAX_PIXELS`` pixels or frames is limited to it.
    """
    frames, height, width = size or g.size
    shape, motion = g.cholesky[..., :3], g.cholesky[..., 3:5]
    slices = to_pixels(Gaussians(g.mean[..., :2], shape, g.color, g.opacity, size=g.size[1:]), (height, width))
    # [n, 1, m] from here on, against the frames.
    centers, conics, colors = (leaf[:, None] for leaf in slices)
    time = jnp.clip(0.5 * frames * (g.mean[..., 2] + 1), -MAX_PIXELS, MAX_PIXELS)[:, None]
    grow = jnp.array([width / g.size[2], height / g.size[1]], motion.dtype)
    u = jnp.clip(motion * grow, -MAX_PIXELS, MAX_PIXELS)[:, None]
    raw_t = (g.cholesky[..., 5] + SPACETIME_SHIFT[5]) * (frames / g.size[0])
    l_t = jnp.clip(raw_t, -MAX_PIXELS, MAX_PIXELS)[:, None]

    distance = (jnp.arange(frames) + 0.5).astype(time.dtype)[:, None] - time
    variance_t = l_t**2 + PREFILTER
    moved = centers + u * (l_t / variance_t * distance)[..., None]
    weight = jnp.exp(-0.5 * (distance**2 / variance_t))

    # A^-1 = W^T W with W = [[p, r], [0, s]]; (A + k u u^T)^-1 = W^T (I + k q q^T)^-1 W with q = W u, whose middle is
    # R^T R with R upper triangular.
    p, r, s = (conics[..., i] for i in range(3))
    k, q1, q2 = PREFILTER / variance_t, p * u[..., 0] + r * u[..., 1], s * u[..., 1]
    one, all_ = 1 + k * q2**2, 1 + k * (q1**2 + q2**2)
    r11, r22 = jnp.sqrt(one / all_), jax.lax.rsqrt(one)
    r12 = -(k / all_) * q1 * q2 / r11
    blurred = jnp.stack([r11 * p, r11 * r + r12 * s, r22 * s], axis=-1)

    def images(leaf: jax.Array) -> jax.Array:
        n, _, m, last = leaf.shape
        return jnp.broadcast_to(leaf, (n, frames, m, last)).reshape(n * frames, m, last)

    return Splats(images(moved), images(blurred), images(colors * weight[..., None]))


def render_video(
    g: Gaussians3D,
    size: tuple[int, int, int] | None = None,
    *,
    supersample: int = 2,
    cutoff: float = DEFAULT_CUTOFF,
    backend: str = "auto",
) -> jax.Array:
    """Renders videos of Gaussians at any resolution and number of frames.

    Args:
        g: Gaussians ``[n, m, ...]``.
        size: (frames, height, width) of the videos; the native size by default.
        supersample: Samples per pixel and axis of a frame; 1 turns supersampling off.
        cutoff: Contributions below it, relative to the peak in a frame, are zero.
        backend: ``"auto"``, ``"xla"`` or ``"triton"``; see `kernels.splat`.

    Returns:
        Videos ``[n, t, h, w, c]``, float32 whatever the leaves are, unclamped. Differentiable with respect to every
        leaf of ``g``. No Gaussians give zeros; a NaN makes the video it belongs to NaN and no other.

    Raises:
        ValueError: A leaf has the wrong shape, or a setting is out of range.

    Examples:
        >>> import jax.numpy as jnp
        >>> zeros = jnp.zeros((1, 1, 6))
        >>> g = Gaussians3D(zeros[..., :3], zeros, zeros[..., :3], zeros[..., 0], size=(4, 8, 8))
        >>> render_video(g).shape, render_video(g, size=(9, 32, 48)).shape
        ((1, 4, 8, 8, 3), (1, 9, 32, 48, 3))
    """
    g = checked(g, coordinates=3)
    frames, height, width = checked_size(g, size, ("frames", "height", "width"))
    splats = to_frames(g, (frames, height, width))
    images = splat(*splats, height=height, width=width, supersample=supersample, cutoff=cutoff, backend=backend)
    return images.reshape(g.mean.shape[0], frames, height, width, images.shape[-1])
