"""A convolution whose derivatives stay fast on every platform, under `scan` and under `vmap`.

This file exists for three measured defects of XLA on CPU (jax 0.10.2, ConvNetD3 at 32 px where no other network is
named, two busy cores):

- Inside a loop body XLA does not bring the gradient convolutions into the layout its fast kernel needs, and
  falls back to plain loops: training in `lax.scan` ran at 5 images/s instead of 180. Here the gradients are
  written in that layout to begin with. Second derivatives gain too, threefold, even outside loops.
- `vmap` over kernels makes a grouped convolution, which has no fast kernel either: 64 instead of 250 images/s.
  Here such a batch is a loop over ordinary convolutions.
- Where a map has fewer pixels than the kernel, XLA lets the two swap places, and has no fast kernel for the result: the
  last layers of VGG11, 3x3 kernels on 2x2 pixels, took 550 instead of 25 ms each. Here the map is padded out of its
  sight.

Other platforms get what JAX does by itself, which is what XLA matches to cuDNN.

The convolution is bilinear, and its two gradients are bilinear again, so three operators are closed under
reverse-mode differentiation of any order: `<g, conv(x, k)> = <input_grad(g, k), x> = <filter_grad(x, g), k>`.
Forward mode (`jvp`) is not available.

A stride is part of all three operators. Measured on the three strided layers of ResNet18 (forward and backward in a
loop, 64 images of 32 px): 255 ms; 327 ms as a stride-1 convolution of 2x2 blocks of pixels taken as channels; 975 ms
as a stride-1 convolution of which every other pixel is kept.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

_NHWC = ("NHWC", "HWIO", "NHWC")
_Operator = Callable[[jax.Array, jax.Array], jax.Array]
_Pairs = tuple[tuple[int, int], ...]


class _Geometry(NamedTuple):
    """What the shapes of the operands of one operator alone do not say; a number for each of the two axes."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    padding: _Pairs
    size: tuple[int, ...]  # height and width of the convolution's input


def conv_general_dilated(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    **options: Any,
) -> jax.Array:
    """Convolves as `lax.conv_general_dilated`; made for `nn.Conv(conv_general_dilated=...)`, linen's and nnx's.

    A plain convolution of images [n, h, w, c] with a kernel [s, t, c, o] is the one of this file, differentiable in
    both in reverse mode, to any order. Dilations, groups, another layout and other options are left to `lax`.
    """
    dilations = {*(lhs_dilation or ()), *(rhs_dilation or ())}
    axes = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    plain = lhs.ndim == 4 and axes == lax.conv_dimension_numbers(lhs.shape, rhs.shape, _NHWC) and dilations <= {1}
    if not plain or feature_group_count != 1 or any(option not in (None, 1) for option in options.values()):
        return lax.conv_general_dilated(
            lhs, rhs, window_strides, padding, lhs_dilation, rhs_dilation, dimension_numbers, feature_group_count,
            **options,
        )  # fmt: skip
    (h, w), (s, t), strides = lhs.shape[1:3], rhs.shape[:2], tuple(window_strides)
    if isinstance(padding, str):
        padding = lax.padtype_to_pads((h, w), (s, t), strides, padding)
    (top, bottom), (left, right) = padding
    return _conv(lhs, rhs, _Geometry((s, t), strides, ((top, bottom), (left, right)), (h, w)))


def _native_conv(x: jax.Array, k: jax.Array, geometry: _Geometry) -> jax.Array:
    return lax.conv_general_dilated(x, k, geometry.strides, geometry.padding, dimension_numbers=_NHWC)


def _native_input_grad(y: jax.Array, k: jax.Array, geometry: _Geometry) -> jax.Array:
    x = jax.ShapeDtypeStruct((y.shape[0], *geometry.size, k.shape[2]), y.dtype)
    return jax.linear_transpose(lambda x: _native_conv(x, k, geometry), x)(y)[0]


def _native_filter_grad(x: jax.Array, y: jax.Array, geometry: _Geometry) -> jax.Array:
    k = jax.ShapeDtypeStruct((*geometry.kernel, x.shape[3], y.shape[3]), y.dtype)
    return jax.linear_transpose(lambda k: _native_conv(x, k, geometry), k)(y)[0]


def _cpu_conv(x: jax.Array, k: jax.Array, geometry: _Geometry) -> jax.Array:
    return _cpu_window(x, k, geometry.padding, strides=geometry.strides)


def _cpu_input_grad(y: jax.Array, k: jax.Array, geometry: _Geometry) -> jax.Array:
    # What follows the spread gradient fills the input up to its size.
    padding = tuple(
        (side - 1 - before, pixels + before - 1 - (out - 1) * stride)
        for side, stride, (before, _), pixels, out in zip(*geometry, y.shape[1:3], strict=True)
    )
    return _cpu_window(y, k[::-1, ::-1].swapaxes(2, 3), padding, spread=geometry.strides)


def _cpu_window(
    x: jax.Array,
    k: jax.Array,
    padding: _Pairs,
    *,
    strides: tuple[int, ...] = (1, 1),
    spread: tuple[int, ...] = (1, 1),
) -> jax.Array:
    """Slides the kernel over images whose pixels are first spread apart, then padded."""
    if math.prod(x.shape[1:3]) < math.prod(k.shape[:2]):
        spaces = [(*ends, between - 1) for ends, between in zip(padding, spread, strict=True)]
        x = lax.optimization_barrier(lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *spaces, (0, 0, 0)]))
        padding, spread = ((0, 0), (0, 0)), (1, 1)
    return lax.conv_general_dilated(x, k, strides, padding, lhs_dilation=spread, dimension_numbers=_NHWC)


def _cpu_filter_grad(x: jax.Array, y: jax.Array, geometry: _Geometry) -> jax.Array:
    # Pixels that no step of the stride reaches are cut off: that padding is negative.
    padding = tuple(
        (before, side + (out - 1) * stride - pixels - before)
        for side, stride, (before, _), pixels, out in zip(*geometry, y.shape[1:3], strict=True)
    )
    # Channels take the place of the batch, the batch that of the channels, and the gradient that of the kernel.
    g = lax.conv_general_dilated(
        x.transpose(3, 1, 2, 0),
        y.transpose(1, 2, 0, 3),
        (1, 1),
        padding,
        rhs_dilation=geometry.strides,
        dimension_numbers=_NHWC,
    )
    return g.transpose(1, 2, 0, 3)


def _batched(native: _Operator, cpu: _Operator, *, fold: bool) -> _Operator:
    """Makes an operator that picks its backend at lowering and, batched on CPU, loops instead of grouping.

    Args:
        native: the operator as JAX writes it, used off the CPU.
        cpu: the same values in the layout that XLA's CPU backend is fast at.
        fold: the leading axis of the first operand is that of the result, so that a batch of it alone can be folded in.

    Returns:
        A function of two arrays with a `vmap` rule.
    """

    @jax.custom_batching.custom_vmap
    def op(a: jax.Array, b: jax.Array) -> jax.Array:
        return lax.platform_dependent(a, b, cpu=cpu, default=native)

    @op.def_vmap
    def rule(axis_size: int, in_batched: Any, a: jax.Array, b: jax.Array) -> tuple[jax.Array, bool]:
        a_batched, b_batched = in_batched
        if fold and a_batched and not b_batched:
            out = op(a.reshape(-1, *a.shape[2:]), b)
            return out.reshape(axis_size, -1, *out.shape[1:]), True

        def loop(a: jax.Array, b: jax.Array) -> jax.Array:
            if a_batched and b_batched:
                return lax.map(lambda ab: op(*ab), (a, b))
            return lax.map(lambda a: op(a, b), a) if a_batched else lax.map(lambda b: op(a, b), b)

        axes = (0 if a_batched else None, 0 if b_batched else None)
        return lax.platform_dependent(a, b, cpu=loop, default=jax.vmap(native, in_axes=axes)), True

    return op


@cache
def _conv_op(geometry: _Geometry) -> _Operator:
    native, cpu = partial(_native_conv, geometry=geometry), partial(_cpu_conv, geometry=geometry)
    return _batched(native, cpu, fold=True)


@cache
def _input_grad_op(geometry: _Geometry) -> _Operator:
    native, cpu = partial(_native_input_grad, geometry=geometry), partial(_cpu_input_grad, geometry=geometry)
    return _batched(native, cpu, fold=True)


@cache
def _filter_grad_op(geometry: _Geometry) -> _Operator:
    native, cpu = partial(_native_filter_grad, geometry=geometry), partial(_cpu_filter_grad, geometry=geometry)
    return _batched(native, cpu, fold=False)


_Residuals = tuple[jax.Array, jax.Array]


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _conv(x: jax.Array, k: jax.Array, geometry: _Geometry) -> jax.Array:
    return _conv_op(geometry)(x, k)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _input_grad(y: jax.Array, k: jax.Array, geometry: _Geometry) -> jax.Array:
    return _input_grad_op(geometry)(y, k)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _filter_grad(x: jax.Array, y: jax.Array, geometry: _Geometry) -> jax.Array:
    return _filter_grad_op(geometry)(x, y)


def _conv_bwd(geometry: _Geometry, res: _Residuals, g: jax.Array) -> _Residuals:
    x, k = res
    return _input_grad(g, k, geometry), _filter_grad(x, g, geometry)


def _input_grad_bwd(geometry: _Geometry, res: _Residuals, g: jax.Array) -> _Residuals:
    y, k = res
    return _conv(g, k, geometry), _filter_grad(g, y, geometry)


def _filter_grad_bwd(geometry: _Geometry, res: _Residuals, g: jax.Array) -> _Residuals:
    x, y = res
    return _input_grad(y, g, geometry), _conv(x, g, geometry)


_conv.defvjp(lambda x, k, geometry: (_conv(x, k, geometry), (x, k)), _conv_bwd)
_input_grad.defvjp(lambda y, k, geometry: (_input_grad(y, k, geometry), (y, k)), _input_grad_bwd)
_filter_grad.defvjp(lambda x, y, geometry: (_filter_grad(x, y, geometry), (x, y)), _filter_grad_bwd)
