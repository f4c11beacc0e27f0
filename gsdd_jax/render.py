"""The public renderer: Gaussians in, images out."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from gsdd_jax.errors import InputError
from gsdd_jax.gaussians import Gaussians, to_pixels
from kernels import DEFAULT_CUTOFF, splat
from kernels.spec import integer


def render(
    g: Gaussians,
    size: tuple[int, int] | None = None,
    *,
    supersample: int = 2,
    cutoff: float = DEFAULT_CUTOFF,
    backend: str = "auto",
) -> jax.Array:
    """Renders Gaussian images at any resolution (GSDD, Eq. 4, 5, 9 and 2x2 supersampling of section 3.2).

    Deviations from the authors' CUDA code, which are exactly the paper's equation: no clamp of ``opacity * g`` at 1,
    no threshold on it but the ``cutoff`` on ``g`` alone, no limit of 256 Gaussians per tile, negative weights allowed.

    Args:
        g: Gaussians ``[n, m, ...]``.
        size: (height, width) of the images; the native size by default.
        supersample: Samples per pixel and axis; 1 turns supersampling off.
        cutoff: Contributions with ``exp(-q/2)`` below it are zero.
        backend: ``"auto"``, ``"xla"`` or ``"triton"``; see `kernels.splat`.

    Returns:
        Images ``[n, h, w, c]``, float32 whatever the leaves are, unclamped. Differentiable with respect to every leaf
        of ``g``. No Gaussians give zeros; a NaN makes the image it belongs to NaN and no other.

    Raises:
        ValueError: A leaf has the wrong shape, or a setting is out of range.

    Examples:
        >>> import jax.numpy as jnp
        >>> one = jnp.ones((1, 1, 3))
        >>> g = Gaussians(jnp.zeros((1, 1, 2)), one, one, jnp.ones((1, 1)), size=(8, 8))
        >>> render(g).shape, render(g, size=(32, 48)).shape
        ((1, 8, 8, 3), (1, 32, 48, 3))
    """
    _check(g)
    height, width = size = _pixels(g.size, "size of the Gaussians") if size is None else _pixels(size, "size")
    narrow = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32) if x.dtype == np.float64 else x, g)
    splats = to_pixels(narrow, size)
    return splat(*splats, height=height, width=width, supersample=supersample, cutoff=cutoff, backend=backend)


def _check(g: Gaussians) -> None:
    lead = jnp.shape(g.mean)[:2]
    expected = {"mean": (*lead, 2), "cholesky": (*lead, 3), "color": (*lead, jnp.shape(g.color)[-1]), "opacity": lead}
    for name, shape in expected.items():
        found = jnp.shape(getattr(g, name))
        if len(lead) != 2 or found != shape:
            raise InputError(f"{name}: expected shape {list(shape)} for [n, m] = {list(lead)}, found {list(found)}")


def _pixels(size: tuple[int, int], name: str) -> tuple[int, int]:
    try:
        height, width = (integer(side, name) for side in size)
    except (TypeError, ValueError):
        raise InputError(f"{name}: expected (height, width), two integers >= 1; found {size!r}") from None
    return height, width
