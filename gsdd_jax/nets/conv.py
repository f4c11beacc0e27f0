"""A convolution whose derivatives are fast on every platform, under `scan` and under `vmap`.

On a CPU it differs from XLA's (jax 0.10.2, two AMD EPYC cores with AVX2, 256 images in parts that stay in cache):

- 3x3 kernels over many pixels and channels go by Winograd's minimal filtering along rows of pixels, which takes half of
  the products: 16x16 pixels and 128 channels in 103 instead of 229 ms, the filter's gradient in 202 instead of 336. Its
  rounding is three times as large, about 1e-6 of the largest value.
- The gradient of other filters is one matrix product with all windows of pixels. XLA's takes 7 to 13 times as long, and
  in loops, which training is, falls back to plain ones.
- So are kernels over few channels, the images', 22 instead of 36 ms to 128 channels at 32 px, and the gradient of these
  images, 41 instead of 107 ms.
- `vmap` over kernels is a loop over ordinary convolutions. XLA makes grouped ones of them, which have no fast kernel.
- Where an image has fewer pixels than the kernel, XLA lets the two swap places, and has no fast kernel for the result:
  57 instead of 5 ms for 3x3 kernels on 2x2 pixels.

Other platforms get what JAX does by itself, which is what XLA matches to cuDNN.

The convolution is bilinear, and its two gradients are bilinear again, so three operators are closed under
reverse-mode differentiation of any order: `<g, conv(x, k)> = <input_grad(g, k), x> = <filter_grad(x, g), k>`.
Forward mode (`jvp`) is not available.
"""

import functools
import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
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
    if _winograd(geometry, x, *k.shape[2:]):
        return _winograd_conv(x, k, geometry.padding)
    if _small(geometry, k):
        return _windows(x, geometry) @ k.reshape(-1, k.shape[3])
    return _native_conv(x, k, geometry)


def _cpu_input_grad(y: jax.Array, k: jax.Array, geometry: _Geometry) -> jax.Array:
    (s, t), strides, padding, size = geometry
    spans = [(out - 1) * stride + 1 for out, stride in zip(y.shape[1:3], strides, strict=True)]
    if _small(geometry, k):
        parts, c, total = y @ k.reshape(-1, k.shape[3]).T, k.shape[2], jnp.zeros((), y.dtype)
        for place in range(s * t):
            lows = [at - before for at, (before, _) in zip(divmod(place, t), padding, strict=True)]
            shifts = [(low, pixels - low - span) for low, pixels, span in zip(lows, size, spans, strict=True)]
            total += _padded(parts[..., place * c : (place + 1) * c], shifts, strides)
        return total
    # What surrounds the gradient fills the input up to its size.
    ends = tuple(
        (side - 1 - before, pixels + before - span)
        for side, (before, _), pixels, span in zip((s, t), padding, size, spans, strict=True)
    )
    k = k[::-1, ::-1].swapaxes(2, 3)
    if _winograd(geometry, y, *k.shape[2:]):
        return _winograd_conv(y, k, ends)
    return lax.conv_general_dilated(y, k, (1, 1), ends, lhs_dilation=strides, dimension_numbers=_NHWC)


def _cpu_filter_grad(x: jax.Array, y: jax.Array, geometry: _Geometry) -> jax.Array:
    if _winograd(geometry, y, x.shape[3], y.shape[3]):
        return _winograd_filter_grad(x, y, geometry)
    windows = _windows(x, geometry)
    g = windows.reshape(-1, windows.shape[3]).T @ y.reshape(-1, y.shape[3])
    return g.reshape(*geometry.kernel, x.shape[3], y.shape[3])


def _small(geometry: _Geometry, k: jax.Array) -> bool:
    """Tells whether images have few channels, or fewer pixels than the kernel, so that XLA would let the two swap."""
    return k.shape[2] < 8 or math.prod(geometry.size) < math.prod(geometry.kernel)


def _padded(x: jax.Array, ends: Sequence[tuple[int, int]], strides: Sequence[int] = (1, 1)) -> jax.Array:
    spread = [(*around, stride - 1) for around, stride in zip(ends, strides, strict=True)]
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *spread, (0, 0, 0)])


def _windows(x: jax.Array, geometry: _Geometry) -> jax.Array:
    """Returns what the kernel sees at each place where it stops: [n, h', w', s t c]."""
    (s, t), (down, right), padding, _ = geometry
    x = _padded(x, padding)
    h, w = ((pixels - side) // stride + 1 for pixels, side, stride in zip(x.shape[1:3], *geometry[:2], strict=True))
    return jnp.concatenate([x[:, i::down, j::right][:, :h, :w] for i in range(s) for j in range(t)], axis=-1)


# Winograd's minimal filtering F(4, 3), along rows of pixels: six products in place of twelve for four pixels and three
# places of a kernel (Lavin & Gray 2016, the matrices of F(4x4, 3x3) along one axis).
_TILE = 4
_PIXELS = np.array(
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ]
)
_KERNEL = np.array(
    [[1 / 4, 0, 0], [-1 / 6] * 3, [-1 / 6, 1 / 6, -1 / 6], [1 / 24, 1 / 12, 1 / 6], [1 / 24, -1 / 12, 1 / 6], [0, 0, 1]]
)
_OUTPUT = np.array([[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]])


def _winograd(geometry: _Geometry, images: jax.Array, *channels: int) -> bool:
    """Tells whether tiles are worth their sums, and the second that these take to compile."""
    n, h, w, _ = images.shape
    large = h * w * math.prod(channels) >= 1 << 18 and n * h * -(-w // _TILE) >= 64
    return large and geometry.kernel[1] == 3 and geometry.strides == (1, 1)


def _combined(matrix: np.ndarray, parts: Sequence[jax.Array], axis: int) -> jax.Array:
    """Stacks the sums of parts that the rows of a matrix say."""
    sums = [
        functools.reduce(
            jnp.add, [part if c == 1 else float(c) * part for c, part in zip(row, parts, strict=True) if c]
        )
        for row in matrix
    ]
    return jnp.stack(sums, axis)


def _tiles(x: jax.Array, rows: int, padding: _Pairs) -> jax.Array:
    """Transforms tiles of pixels, and lays side by side what a kernel of so many rows sees: [6, n h' w'', s c]."""
    (top, bottom), (left, right) = padding
    width = x.shape[2] + left + right - 2
    x = _padded(x, ((top, bottom), (left, right + -width % _TILE)))
    count, height = -(-width // _TILE), x.shape[1] - rows + 1
    tiles = _combined(_PIXELS, [x[:, :, j::_TILE][:, :, :count] for j in range(len(_PIXELS))], 0)
    tiles = jnp.concatenate([tiles[:, :, i : i + height] for i in range(rows)], axis=-1)
    return tiles.reshape(len(tiles), -1, tiles.shape[-1])


def _winograd_conv(x: jax.Array, k: jax.Array, padding: _Pairs) -> jax.Array:
    s, _, c, o = k.shape
    kernels = _combined(_KERNEL, [k[:, t] for t in range(3)], 0).reshape(-1, s * c, o)
    products = jnp.einsum("upc,uco->upo", _tiles(x, s, padding), kernels)
    height, width = (
        pixels + sum(ends) - side + 1 for pixels, ends, side in zip(x.shape[1:3], padding, (s, 3), strict=True)
    )
    y = _combined(_OUTPUT, list(products.reshape(len(kernels), len(x), height, -1, o)), 3)
    return y.reshape(len(x), height, -1, o)[:, :, :width]


def _winograd_filter_grad(x: jax.Array, y: jax.Array, geometry: _Geometry) -> jax.Array:
    (s, _), _, padding, _ = geometry
    y = _padded(y, ((0, 0), (0, -y.shape[2] % _TILE)))
    sums = _combined(_OUTPUT.T, [y[:, :, j::_TILE] for j in range(_TILE)], 0)
    grads = jnp.einsum("upc,upo->uco", _tiles(x, s, padding), sums.reshape(len(sums), -1, y.shape[3]))
    return _combined(_KERNEL.T, list(grads.reshape(-1, s, x.shape[3], y.shape[3])), 1)


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
