"""A stride-1 convolution whose derivatives stay fast on every platform, under `scan` and under `vmap`.

This file exists for two measured defects of XLA on CPU (jax 0.10.2, ConvNetD3, 32 px, two busy cores):

- Inside a loop body XLA does not bring the gradient convolutions into the layout its fast kernel needs, and
  falls back to plain loops: training in `lax.scan` ran at 5 images/s instead of 180. Here the gradients are
  written in that layout to begin with. Second derivatives gain too, threefold, even outside loops.
- `vmap` over kernels makes a grouped convolution, which has no fast kernel either: 64 instead of 250 images/s.
  Here such a batch is a loop over ordinary convolutions.

Other platforms get what JAX does by itself, which is what XLA matches to cuDNN.

The convolution is bilinear, and its two gradients are bilinear again, so three operators are closed under
reverse-mode differentiation of any order: `<g, conv(x, k)> = <input_grad(g, k), x> = <filter_grad(x, g), k>`.
Forward mode (`jvp`) is not available.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
from jax import lax

_NHWC = ("NHWC", "HWIO", "NHWC")
_Operator = Callable[[jax.Array, jax.Array], jax.Array]


def conv_same(images: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolves with stride 1 and zero padding that keeps the height and width.

    Differentiable in both arguments in reverse mode, to any order.

    Args:
        images: float [n, h, w, c].
        kernel: float [s, s, c, o], s odd.

    Returns:
        float [n, h, w, o].

    Raises:
        ValueError: the kernel is not square with an odd side, or its input channels are not those of the images.
    """
    side = kernel.shape[0]
    if kernel.ndim != 4 or kernel.shape[1] != side or side % 2 == 0:
        raise ValueError(f"kernel: shape {kernel.shape}, must be [s, s, c, o] with s odd")
    if images.ndim != 4 or images.shape[-1] != kernel.shape[2]:
        raise ValueError(f"images: shape {images.shape}, kernel {kernel.shape} needs [n, h, w, {kernel.shape[2]}]")
    return _conv(images, kernel)


def _native_conv(x: jax.Array, k: jax.Array) -> jax.Array:
    pad = k.shape[0] // 2
    return lax.conv_general_dilated(x, k, (1, 1), ((pad, pad), (pad, pad)), dimension_numbers=_NHWC)


def _native_input_grad(y: jax.Array, k: jax.Array) -> jax.Array:
    x = jax.ShapeDtypeStruct((*y.shape[:3], k.shape[2]), y.dtype)
    return jax.linear_transpose(lambda x: _native_conv(x, k), x)(y)[0]


def _native_filter_grad(x: jax.Array, y: jax.Array, side: int) -> jax.Array:
    k = jax.ShapeDtypeStruct((side, side, x.shape[3], y.shape[3]), y.dtype)
    return jax.linear_transpose(lambda k: _native_conv(x, k), k)(y)[0]


def _cpu_input_grad(y: jax.Array, k: jax.Array) -> jax.Array:
    return _native_conv(y, k[::-1, ::-1].swapaxes(2, 3))


def _cpu_filter_grad(x: jax.Array, y: jax.Array, side: int) -> jax.Array:
    pad = side // 2
    # Channels take the place of the batch, the batch that of the channels, and the gradient that of the kernel.
    g = lax.conv_general_dilated(
        x.transpose(3, 1, 2, 0), y.transpose(1, 2, 0, 3), (1, 1), ((pad, pad), (pad, pad)), dimension_numbers=_NHWC
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


_conv_op = _batched(_native_conv, _native_conv, fold=True)
_input_grad_op = _batched(_native_input_grad, _cpu_input_grad, fold=True)


@cache
def _filter_grad_op(side: int) -> _Operator:
    return _batched(partial(_native_filter_grad, side=side), partial(_cpu_filter_grad, side=side), fold=False)


@jax.custom_vjp
def _conv(x: jax.Array, k: jax.Array) -> jax.Array:
    return _conv_op(x, k)


@jax.custom_vjp
def _input_grad(y: jax.Array, k: jax.Array) -> jax.Array:
    return _input_grad_op(y, k)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _filter_grad(x: jax.Array, y: jax.Array, side: int) -> jax.Array:
    return _filter_grad_op(side)(x, y)


def _conv_bwd(res: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, k = res
    return _input_grad(g, k), _filter_grad(x, g, k.shape[0])


def _input_grad_bwd(res: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    y, k = res
    return _conv(g, k), _filter_grad(g, y, k.shape[0])


def _filter_grad_bwd(side: int, res: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, y = res
    return _input_grad(y, g), _conv(x, g)


_conv.defvjp(lambda x, k: (_conv(x, k), (x, k)), _conv_bwd)
_input_grad.defvjp(lambda y, k: (_input_grad(y, k), (y, k)), _input_grad_bwd)
_filter_grad.defvjp(lambda x, y, side: (_filter_grad(x, y, side), (x, y)), _filter_grad_bwd)
