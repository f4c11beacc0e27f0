"""The public renderer: Gaussians in, images out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from gsdd_jax.errors import InputError
from gsdd_jax.gaussians import Gaussians, to_pixels
from kernels import DEFAULT_CUTOFF, splat
from kernels.spec import integer

G = TypeVar("G")


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
    g = checked(g, coordinates=2)
    height, width = checked_size(g, size, ("height", "width"))
    splats = to_pixels(g, (height, width))
    return splat(*splats, height=height, width=width, supersample=supersample, cutoff=cutoff, backend=backend)


def checked(g: G, *, coordinates: int) -> G:
    """Returns Gaussians of so many coordinates with float64 leaves narrowed to float32.

    Raises:
        ValueError: A leaf has the wrong shape.
    """
    found = {name: jnp.shape(getattr(g, name)) for name in ("mean", "cholesky", "color", "opacity")}
    lead, shapes = found["mean"][:2], coordinates * (coordinates + 1) // 2
    last = {"mean": (coordinates,), "cholesky": (shapes,), "color": found["color"][-1:], "opacity": ()}
    for name, own in found.items():
        if len(lead) != 2 or own != (*lead, *last[name]):
            raise InputError(
                f"{name}: expected shape {[*lead, *last[name]]} for [n, m] = {list(lead)}, found {list(own)}"
            )
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32) if x.dtype == np.float64 else x, g)


def checked_size(g: Any, size: Sequence[int] | None, names: tuple[str, ...]) -> tuple[int, ...]:
    """Returns the size to draw, that of the Gaussians where there is none.

    Raises:
        ValueError: Either is not so many integers.
    """
    native = _integers(g.size, "size of the Gaussians", names)
    return native if size is None else _integers(size, "size", names)


def _integers(size: Sequence[int], what: str, names: tuple[str, ...]) -> tuple[int, ...]:
    try:
        found = tuple(integer(side, what) for side in size)
        if len(found) == len(names):
            return found
    except (TypeError, ValueError):
        pass
    count = {2: "two", 3: "three"}[len(names)]
    raise InputError(f"{what}: expected ({', '.join(names)}), {count} integers >= 1; found {size!r}")
