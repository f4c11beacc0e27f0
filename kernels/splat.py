"""The splat operator: additive 2-D Gaussians to images, with a hand-written derivative.

This file owns what all backends share: the public signature, the reverse-mode rule, the batching rule and the choice
of the backend. The backends know one leading batch axis and nothing of ``grad`` or ``vmap``: each direction is a
``custom_vmap`` function that folds any new axis into the images, and a ``custom_vjp`` joins the two. Only first-order
reverse mode is defined.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from kernels import _splat_xla
from kernels.spec import SplatSpec

# Moves no pixel of a fitted image by more than 0.2 of 1/512; 2e-4 moves some by 0.4 and 5e-4 by the whole ("cutoff" in
# benchmarks/results/fit_psnr.json). A larger value saves little: the area drawn grows with log(1 / cutoff) only.
DEFAULT_CUTOFF = 1e-4


def splat(
    centers: jax.Array,
    conics: jax.Array,
    colors: jax.Array,
    *,
    height: int,
    width: int,
    supersample: int = 2,
    cutoff: float = DEFAULT_CUTOFF,
    backend: str = "auto",
) -> jax.Array:
    """Draws sums of Gaussians (GSDD, Eq. 2 and 4).

    ``image[y, x]`` is the mean over its samples of ``sum_k exp(-q_k / 2) * color_k``. With ``dx, dy`` the offset of a
    sample from the centre, ``q = (p dx + r dy)^2 + (s dy)^2`` and ``(p, r, s)`` the conic. This is the Cholesky form of
    the inverse covariance: ``p^2, p r, r^2 + s^2`` are its entries. Unlike those entries it keeps ``q`` accurate in
    float32 for needle-like Gaussians, and needs fewer operations per sample.

    Blending is additive: no order, no clamp, no background. Differentiable once, in reverse mode, with respect to the
    three arrays; the cut at ``cutoff`` counts as constant. Works under ``jit``, nested ``vmap`` (also with unmapped
    operands), ``remat``.

    Args:
        centers: ``[n, m, 2]`` centres (x, y) in pixels; pixel (row y, column x) covers ``[x, x+1) x [y, y+1)``.
        conics: ``[n, m, 3]`` entries (p, r, s) in 1/pixel with p, s > 0.
        colors: ``[n, m, c]`` weights, of any sign.
        height: Rows of the images.
        width: Columns of the images.
        supersample: ``s``; each pixel is the mean of ``s * s`` samples at ``(i + 1/2) / s``.
        cutoff: Contributions with ``exp(-q / 2)`` below it are zero, in every backend alike.
        backend: ``"auto"`` or ``"xla"``.

    Returns:
        Images ``[n, height, width, c]`` in the dtype of the operands (at least float32). An image with a NaN operand
        is all NaN.

    Raises:
        ValueError: A shape or a setting is off; the message names it.
        TypeError: An operand is not floating point.
    """
    spec = SplatSpec(height=height, width=width, supersample=supersample, cutoff=cutoff, backend=backend)
    _check(centers, conics, colors)
    dtype = jnp.promote_types(jnp.result_type(centers, conics, colors), jnp.float32)
    return _operator(spec)(centers.astype(dtype), conics.astype(dtype), colors.astype(dtype))


def _check(centers: jax.Array, conics: jax.Array, colors: jax.Array) -> None:
    for name, array, last in (("centers", centers, 2), ("conics", conics, 3), ("colors", colors, None)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{name}: expected a floating dtype, found {array.dtype}")
        if array.ndim != 3 or (last is not None and array.shape[2] != last):
            raise ValueError(f"{name}: expected shape [n, m, {last or 'c'}], found {list(array.shape)}")
        if array.shape[:2] != centers.shape[:2]:
            raise ValueError(
                f"{name}: expected leading axes {list(centers.shape[:2])} as in centers, found {list(array.shape[:2])}"
            )


@functools.cache
def _operator(spec: SplatSpec) -> Callable[..., jax.Array]:
    """Builds the differentiable operator of one spec; cached so that equal calls share one trace."""
    # Compiled as a whole also in eager calls, whose loops would otherwise compile anew every time.
    forward = _fold_batches(jax.jit(functools.partial(_splat_xla.forward, spec)))
    backward = _fold_batches(jax.jit(functools.partial(_splat_xla.backward, spec)))

    @jax.custom_vjp
    def operator(centers, conics, colors):
        return forward(centers, conics, colors)

    operator.defvjp(lambda *inputs: (forward(*inputs), inputs), lambda inputs, v_image: backward(*inputs, v_image))
    return operator


def _fold_batches(function: Callable) -> Callable:
    """Gives a function over a leading image axis a batching rule that merges any mapped axis into the images.

    Operands that are not mapped are broadcast first; ``vjp`` of that broadcast then sums their cotangents.
    """
    folded = jax.custom_batching.custom_vmap(function)

    @folded.def_vmap
    def _rule(axis_size: int, mapped: Sequence[bool], *args: jax.Array):
        wide = [
            x if is_mapped else jnp.broadcast_to(x, (axis_size, *x.shape))
            for x, is_mapped in zip(args, mapped, strict=True)
        ]
        out = folded(*(x.reshape(axis_size * x.shape[1], *x.shape[2:]) for x in wide))
        out = jax.tree.map(
            lambda x: (
                x.reshape(axis_size, x.shape[0] // axis_size, *x.shape[1:])
                if x.size
                else jnp.zeros((axis_size, wide[0].shape[1], *x.shape[1:]), x.dtype)
            ),
            out,
        )
        return out, jax.tree.map(lambda _: True, out)

    return folded
