"""The splat operator as Triton kernels for NVIDIA GPUs, called through jax-triton.

Forward: one program, one warp, draws one tile of one image. It tests 32 Gaussians at a time against the tile, one per
lane, packs the answers into the bits of one integer and walks the set bits. No lists are built beforehand and nothing
but the image is written.

Backward: a gather. One program owns a few Gaussians of one image; for each it walks the pixels that the Gaussian
reaches, reads the incoming gradient there and sums in registers. Each number is written once, by one program, in a
fixed order: no atomics, the same bits on every run, no residuals beyond the inputs. The pixels walked are those of the
parallelogram around the ellipse, ``|p dx + r dy| <= reach`` and ``|s dy| <= reach``, whose area is 4/pi of the ellipse
at any angle; an upright box would be mostly empty for slanted needles. Gaussians that reach many pixels are left to a
second launch with more warps per program, so that one as large as the image does not keep a single warp busy long
after the others are done.

Triton is imported here and nowhere else in the library; `kernels.splat` imports this file when it picks the backend.
"""

from __future__ import annotations

import functools
import inspect
import math
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from kernels.spec import SplatSpec

# exp(-q / 2) = 2^-(SCALE^2 q): the hardware computes powers of two.
SCALE = math.sqrt(0.5 * math.log2(math.e))
# Culling is exact but for rounding: this much wider, relative, it never drops what the test of each sample would keep.
MARGIN = 2.0**-10
# Below exp(-14.5^2 / 2) = 2e-46 float32 holds no number: with the cutoff off, nothing is lost there either.
LONGEST_REACH = 14.5
# Gaussians that a warp tests at once: one per lane, one bit each.
LIST = 32
# Channels that one launch draws; more are split over launches, whose geometry gradients add up.
CHANNELS = 4
# Up to here float32 divides indices of pixels exactly (see _backward_kernel); larger images pay for integer division.
FLOAT_PIXELS = 1 << 20


class Tuning(NamedTuple):
    """What may change speed but no value beyond the order of a sum; ``benchmarks.gpu`` sweeps it.

    The defaults rest on ``benchmarks.kernel_model``: instructions of the compiled loops times the work that fitted
    images make, not on timings.

    Attributes:
        tile_height: Rows of a forward tile.
        tile_width: Columns of a forward tile.
        tile_warps: Warps that draw a tile.
        tile_programs: A tile is halved while the forward launch has fewer programs than this, down to a pixel a lane.
        lanes: Pixels that a one-warp backward program takes per step.
        wide_lanes: Pixels that a program of the second backward launch takes per step.
        wide_warps: Its warps.
        wide_area: Pixels walked from which a Gaussian belongs to the second launch.
        programs: A backward launch gives each program more Gaussians only while this many warps remain.
    """

    # Instructions per pixel and Gaussian fall with the tile, the pixels drawn in vain rise with it. Bounds at 170
    # Gaussians and 128 px: 16 x 16 0.54 ms per 1,000 images, 8 x 16 0.58, 8 x 8 0.60, 16 x 32 with two warps 0.68. The
    # order is the same from 21 to 2,730 Gaussians.
    tile_height: int = 16
    tile_width: int = 16
    tile_warps: int = 1
    # Two rounds of the 2,112 warps that give each scheduler of 132 multiprocessors four of them.
    tile_programs: int = 1 << 12
    # The mean walk is 1,700 pixels of 170 Gaussians in an image, 100 of 2,730: more lanes waste more of the last step.
    lanes: int = 32
    wide_lanes: int = 256
    wide_warps: int = 8
    # 128 steps of one warp, some 10 microseconds: what a launch may take longer at its end because of one Gaussian.
    wide_area: int = 4096
    programs: int = 1 << 16


TUNING = Tuning()


class Launch(NamedTuple):
    """One kernel call: everything but the arrays."""

    kernel: Any
    grid: int
    warps: int
    constants: dict[str, Any]
    outputs: tuple[jax.ShapeDtypeStruct, ...]
    aliases: dict[int, int]


@triton.jit
def _first_set_bit(bits):
    """Returns the index of the lowest set bit, read off the exponent of that bit as a float: exact for all 32."""
    lowest = (bits & -bits).to(tl.float32)
    return ((lowest.to(tl.int32, bitcast=True) >> 23) & 255) - 127


@triton.jit
def _geometry(centers, conics, k, mask):
    """Loads (cx, cy, p, r, s) of the Gaussians ``k`` as float32; masked ones get p = s = 1."""
    cx = tl.load(centers + 2 * k, mask, 0.0).to(tl.float32)
    cy = tl.load(centers + 2 * k + 1, mask, 0.0).to(tl.float32)
    p = tl.load(conics + 3 * k, mask, 1.0).to(tl.float32)
    r = tl.load(conics + 3 * k + 1, mask, 0.0).to(tl.float32)
    s = tl.load(conics + 3 * k + 2, mask, 1.0).to(tl.float32)
    return cx, cy, p, r, s


@triton.jit
def _touches(
    centers,
    conics,
    k,
    left,
    top,
    M: tl.constexpr,
    S: tl.constexpr,
    REACH: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
):
    """Tells which of the Gaussians ``k`` reach a sample of the tile at (left, top)."""
    cx, cy, p, r, s = _geometry(centers, conics, k, k < M)
    # The samples of a tile, not its pixels, bound what can touch it.
    half_w: tl.constexpr = TILE_W / 2 - 0.5 / S
    half_h: tl.constexpr = TILE_H / 2 - 0.5 / S
    dx = left + TILE_W / 2 - cx
    dy = top + TILE_H / 2 - cy
    # The ellipse lies in its upright box and between the slanted lines |p dx + r dy| = REACH.
    touches = (k < M) & (tl.abs(dx) <= REACH * tl.sqrt(1 + (r / s) * (r / s)) / p + half_w)
    touches &= tl.abs(dy) <= REACH / s + half_h
    along = p * dx
    across = r * dy
    # Of a far center and a steep conic both terms are large, and their sum rounds.
    slack = 1e-6 * (tl.abs(along) + tl.abs(across))
    return touches & (tl.abs(along + across) <= REACH + p * half_w + tl.abs(r) * half_h + slack)


@triton.jit
def _add_row(weight, x, dy, p, r, s, S: tl.constexpr, CUTOFF: tl.constexpr):
    """Adds the weights of one row of samples; ``x`` is relative to the center, p, r and s carry SCALE."""
    across = r * dy
    up = s * dy
    for i in tl.static_range(S):
        u = p * (x + (i + 0.5) / S) + across
        w = tl.exp2(-(u * u + up * up))
        # Times 0 or 1, because the product joins the sum in one instruction and a selection does not: 16 fewer of the
        # 182 that a Gaussian costs four pixels.
        weight += w * (w >= CUTOFF).to(tl.float32)
    return weight


@triton.jit
def _forward_kernel(
    centers,
    conics,
    colors,
    poison,
    images,
    M: tl.constexpr,
    C: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    S: tl.constexpr,
    CUTOFF: tl.constexpr,
    REACH: tl.constexpr,
    SCALE: tl.constexpr,
    LIST: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
):
    """Draws tile ``program % tiles`` of image ``program // tiles``."""
    columns: tl.constexpr = (WIDTH + TILE_W - 1) // TILE_W
    tiles: tl.constexpr = columns * ((HEIGHT + TILE_H - 1) // TILE_H)
    image = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    left = (tile % columns) * TILE_W
    top = (tile // columns) * TILE_H
    centers += image * (M * 2)
    conics += image * (M * 3)
    colors += image * (M * C)
    spoilt = tl.load(poison + image)

    x = left + tl.arange(0, TILE_W)[None, :]
    y = top + tl.arange(0, TILE_H)[:, None]
    lane = tl.arange(0, LIST)

    red = tl.zeros((TILE_H, TILE_W), tl.float32) + spoilt
    green = red
    blue = red
    alpha = red
    for first in range(0, M, LIST):
        touches = _touches(centers, conics, first + lane, left, top, M, S, REACH, TILE_H, TILE_W)
        bits = tl.sum(tl.where(touches, 1 << lane, 0), 0)
        bits = tl.where(spoilt == 0, bits, 0)  # a spoilt image is NaN already
        while bits != 0:
            k = first + _first_set_bit(bits)
            bits &= bits - 1
            cx, cy, p, r, s = _geometry(centers, conics, k, True)
            p *= SCALE
            r *= SCALE
            s *= SCALE
            # To -0.0 the compiler adds nothing; 0.0 it must add, for the sake of the sign.
            weight = tl.full((TILE_H, TILE_W), -0.0, tl.float32)
            dx = x.to(tl.float32) - cx
            dy = y.to(tl.float32) - cy
            if S <= 4:
                for j in tl.static_range(S):
                    weight = _add_row(weight, dx, dy + (j + 0.5) / S, p, r, s, S, CUTOFF)
            else:
                for j in range(S):
                    weight = _add_row(weight, dx, dy + (j + 0.5) / S, p, r, s, S, CUTOFF)
            red += weight * tl.load(colors + k * C).to(tl.float32)
            if C > 1:
                green += weight * tl.load(colors + k * C + 1).to(tl.float32)
            if C > 2:
                blue += weight * tl.load(colors + k * C + 2).to(tl.float32)
            if C > 3:
                alpha += weight * tl.load(colors + k * C + 3).to(tl.float32)

    pixel = images + image * (HEIGHT * WIDTH * C) + (y * WIDTH + x) * C
    inside = (y < HEIGHT) & (x < WIDTH)
    tl.store(pixel, red * (1 / (S * S)), inside)
    if C > 1:
        tl.store(pixel + 1, green * (1 / (S * S)), inside)
    if C > 2:
        tl.store(pixel + 2, blue * (1 / (S * S)), inside)
    if C > 3:
        tl.store(pixel + 3, alpha * (1 / (S * S)), inside)


@triton.jit
def _walk(cx, cy, p, r, s, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, S: tl.constexpr, REACH: tl.constexpr):
    """Returns the pixels that Gaussians reach, as rows of equal length.

    Row ``top + j`` starts at column ``ceil(start + slope * j)``; there are ``rows`` rows of ``length`` pixels, some of
    them outside the image. They cover the parallelogram of the Gaussian, or its upright box within the image where
    that is narrower.
    """
    edge: tl.constexpr = 0.5 / S
    half_y = REACH / s
    top = tl.maximum(tl.ceil(cy - half_y + (edge - 1)), 0.0)
    bottom = tl.minimum(tl.floor(cy + half_y - edge), HEIGHT - 1.0)
    rows = tl.maximum(bottom - top + 1, 0.0)

    half_x = REACH * tl.sqrt(1 + (r / s) * (r / s)) / p
    left = tl.maximum(tl.ceil(cx - half_x + (edge - 1)), 0.0)
    right = tl.minimum(tl.floor(cx + half_x - edge), WIDTH - 1.0)
    box = tl.maximum(right - left + 1, 0.0)

    # The center line moves by -r/p per row; the samples of a pixel lie on several lines, half_w covers them all.
    slope = -r / p
    half_w = REACH / p + tl.abs(slope) * (0.5 - edge)
    strip = tl.floor(2 * half_w + (1 - 2 * edge)) + 1
    slanted = strip < box
    start = tl.where(slanted, cx + slope * (top + 0.5 - cy) - half_w + (edge - 1), left)
    return top, rows, start, tl.where(slanted, slope, 0.0), tl.where(slanted, strip, box)


@triton.jit
def _area(centers, conics, k, mask, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, S: tl.constexpr, REACH: tl.constexpr):
    """Returns how many pixels the walks of the Gaussians ``k`` visit."""
    cx, cy, p, r, s = _geometry(centers, conics, k, mask)
    _, rows, _, _, length = _walk(cx, cy, p, r, s, HEIGHT, WIDTH, S, REACH)
    return rows * length


@triton.jit
def _moments_of_row(w, wu, wux, wuy, wy, wyy, x, dy, p, r, s, S: tl.constexpr, CUTOFF: tl.constexpr):
    """Adds one row of samples to the moments of ``w`` and ``w u`` about the center, u = p dx + r dy with SCALE."""
    across = r * dy
    up = s * dy
    row_w = tl.full(w.shape, -0.0, tl.float32)
    row_u = tl.full(w.shape, -0.0, tl.float32)
    for i in tl.static_range(S):
        dx = x + (i + 0.5) / S
        u = p * dx + across
        sample = tl.exp2(-(u * u + up * up))
        sample = tl.where(sample >= CUTOFF, sample, 0.0)
        row_w += sample
        row_u += sample * u
        wux += sample * u * dx
    return w + row_w, wu + row_u, wux, wuy + row_u * dy, wy + row_w * dy, wyy + row_w * dy * dy


@triton.jit
def _backward_kernel(
    centers,
    conics,
    colors,
    poison,
    v_images,
    v_centers,
    v_conics,
    v_colors,
    M: tl.constexpr,
    C: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    S: tl.constexpr,
    CUTOFF: tl.constexpr,
    REACH: tl.constexpr,
    SCALE: tl.constexpr,
    LIST: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    MIN_AREA: tl.constexpr,
    MAX_AREA: tl.constexpr,
    FLOAT_INDEX: tl.constexpr,
):
    """Gathers for those of the Gaussians ``BLOCK * (program % blocks) ...`` that reach a number of pixels in range."""
    blocks: tl.constexpr = (M + BLOCK - 1) // BLOCK
    image = (tl.program_id(0) // blocks).to(tl.int64)
    first = (tl.program_id(0) % blocks) * BLOCK
    centers += image * (M * 2)
    conics += image * (M * 3)
    colors += image * (M * C)
    v_centers += image * (M * 2)
    v_conics += image * (M * 3)
    v_colors += image * (M * C)
    v_images += image * (HEIGHT * WIDTH * C)
    spoilt = tl.load(poison + image)

    lane = tl.arange(0, LIST)
    mine = (lane < BLOCK) & (first + lane < M)
    reached = _area(centers, conics, first + lane, mine, HEIGHT, WIDTH, S, REACH)
    # A spoilt image is walked by nobody: its gradients are what is added at the end.
    reached = tl.where(spoilt == 0, reached, 0.0)
    mine &= (reached >= MIN_AREA) & (reached < MAX_AREA)
    bits = tl.sum(tl.where(mine, 1 << lane, 0), 0)
    while bits != 0:
        k = first + _first_set_bit(bits)
        bits &= bits - 1
        cx, cy, p, r, s = _geometry(centers, conics, k, True)
        top, rows, start, slope, length = _walk(cx, cy, p, r, s, HEIGHT, WIDTH, S, REACH)
        # Of a spoilt image no number is to be trusted as a bound.
        rows = tl.where(spoilt == 0, rows, 0.0)
        length = tl.where(spoilt == 0, length, 0.0)
        area = rows.to(tl.int32) * length.to(tl.int32)
        color_0 = tl.load(colors + k * C).to(tl.float32)
        color_1 = tl.load(colors + k * C + 1, C > 1, 0.0).to(tl.float32)
        color_2 = tl.load(colors + k * C + 2, C > 2, 0.0).to(tl.float32)
        color_3 = tl.load(colors + k * C + 3, C > 3, 0.0).to(tl.float32)
        p_2 = p * SCALE
        r_2 = r * SCALE
        s_2 = s * SCALE
        per_length = 1 / tl.maximum(length, 1.0)

        sum_u = tl.zeros((LANES,), tl.float32)
        sum_ux = tl.zeros((LANES,), tl.float32)
        sum_uy = tl.zeros((LANES,), tl.float32)
        sum_y = tl.zeros((LANES,), tl.float32)
        sum_yy = tl.zeros((LANES,), tl.float32)
        sum_0 = tl.zeros((LANES,), tl.float32)
        sum_1 = tl.zeros((LANES,), tl.float32)
        sum_2 = tl.zeros((LANES,), tl.float32)
        sum_3 = tl.zeros((LANES,), tl.float32)
        for done in range(0, area, LANES):
            index = done + tl.arange(0, LANES)
            if FLOAT_INDEX:
                # At least 0.5 / length from the next integer, which rounding cannot cross below FLOAT_PIXELS.
                row = tl.floor((index.to(tl.float32) + 0.5) * per_length)
            else:
                row = (index // length.to(tl.int32)).to(tl.float32)
            column = tl.ceil(start + slope * row) + (index.to(tl.float32) - row * length)
            inside = (index < area) & (column >= 0) & (column < WIDTH)
            pixel = v_images + ((top + row).to(tl.int32) * WIDTH + column.to(tl.int32)) * C
            v_0 = tl.load(pixel, inside, 0.0)
            v_weight = v_0 * color_0
            if C > 1:
                v_1 = tl.load(pixel + 1, inside, 0.0)
                v_weight += v_1 * color_1
            if C > 2:
                v_2 = tl.load(pixel + 2, inside, 0.0)
                v_weight += v_2 * color_2
            if C > 3:
                v_3 = tl.load(pixel + 3, inside, 0.0)
                v_weight += v_3 * color_3

            dx = column - cx
            dy = top + row - cy
            # As in the forward: -0.0 costs no addition; 6 fewer of the 98 instructions of a step.
            w = tl.full((LANES,), -0.0, tl.float32)
            wu = tl.full((LANES,), -0.0, tl.float32)
            wux = tl.full((LANES,), -0.0, tl.float32)
            wuy = tl.full((LANES,), -0.0, tl.float32)
            wy = tl.full((LANES,), -0.0, tl.float32)
            wyy = tl.full((LANES,), -0.0, tl.float32)
            if S <= 4:
                for j in tl.static_range(S):
                    w, wu, wux, wuy, wy, wyy = _moments_of_row(
                        w, wu, wux, wuy, wy, wyy, dx, dy + (j + 0.5) / S, p_2, r_2, s_2, S, CUTOFF
                    )
            else:
                for j in range(S):
                    w, wu, wux, wuy, wy, wyy = _moments_of_row(
                        w, wu, wux, wuy, wy, wyy, dx, dy + (j + 0.5) / S, p_2, r_2, s_2, S, CUTOFF
                    )
            sum_u += v_weight * wu
            sum_ux += v_weight * wux
            sum_uy += v_weight * wuy
            sum_y += v_weight * wy
            sum_yy += v_weight * wyy
            sum_0 += v_0 * w
            if C > 1:
                sum_1 += v_1 * w
            if C > 2:
                sum_2 += v_2 * w
            if C > 3:
                sum_3 += v_3 * w

        # u was scaled; the mean over the samples was left out.
        mean: tl.constexpr = 1 / (S * S)
        u = tl.sum(sum_u, 0) * (mean / SCALE)
        y = tl.sum(sum_y, 0) * mean
        tl.store(v_centers + 2 * k, p * u + spoilt)
        tl.store(v_centers + 2 * k + 1, r * u + s * s * y + spoilt)
        tl.store(v_conics + 3 * k, spoilt - tl.sum(sum_ux, 0) * (mean / SCALE))
        tl.store(v_conics + 3 * k + 1, spoilt - tl.sum(sum_uy, 0) * (mean / SCALE))
        tl.store(v_conics + 3 * k + 2, spoilt - s * tl.sum(sum_yy, 0) * mean)
        tl.store(v_colors + C * k, tl.sum(sum_0, 0) * mean + spoilt)
        if C > 1:
            tl.store(v_colors + C * k + 1, tl.sum(sum_1, 0) * mean + spoilt)
        if C > 2:
            tl.store(v_colors + C * k + 2, tl.sum(sum_2, 0) * mean + spoilt)
        if C > 3:
            tl.store(v_colors + C * k + 3, tl.sum(sum_3, 0) * mean + spoilt)


@triton.jit
def _wide_kernel(
    centers,
    conics,
    colors,
    poison,
    v_images,
    given_centers,
    given_conics,
    given_colors,
    v_centers,
    v_conics,
    v_colors,
    M: tl.constexpr,
    C: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    S: tl.constexpr,
    CUTOFF: tl.constexpr,
    REACH: tl.constexpr,
    SCALE: tl.constexpr,
    LIST: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    MIN_AREA: tl.constexpr,
    MAX_AREA: tl.constexpr,
    FLOAT_INDEX: tl.constexpr,
):
    """The same for outputs that another launch has filled in part: the given arrays are the outputs themselves."""
    _backward_kernel(
        centers, conics, colors, poison, v_images, v_centers, v_conics, v_colors,
        M, C, HEIGHT, WIDTH, S, CUTOFF, REACH, SCALE, LIST, BLOCK, LANES, MIN_AREA, MAX_AREA, FLOAT_INDEX,
    )  # fmt: skip


def _reach(spec: SplatSpec) -> float:
    """Returns the root of the largest q that is not cut off, a little widened."""
    reach = math.sqrt(-2 * math.log(spec.cutoff)) if spec.cutoff > 0 else math.inf
    return min(reach, LONGEST_REACH) * (1 + MARGIN)


def _constants(spec: SplatSpec, m: int, c: int) -> dict[str, Any]:
    return {
        "M": m,
        "C": c,
        "HEIGHT": spec.height,
        "WIDTH": spec.width,
        "S": spec.supersample,
        "CUTOFF": float(spec.cutoff),
        "REACH": _reach(spec),
        "SCALE": SCALE,
        "LIST": LIST,
    }


def forward_launch(spec: SplatSpec, n: int, m: int, c: int, tuning: Tuning = TUNING) -> Launch:
    """Returns the call whose operands are (centers, conics, colors, poison ``[n]``) and whose output is the images."""
    height, width = tuning.tile_height, tuning.tile_width
    tiles = _tiles(spec, height, width)
    while n * tiles < tuning.tile_programs and height * width > LIST * tuning.tile_warps:
        height, width = (height // 2, width) if height >= width else (height, width // 2)
        tiles = _tiles(spec, height, width)
    return Launch(
        kernel=_forward_kernel,
        grid=n * tiles,
        warps=tuning.tile_warps,
        constants=_constants(spec, m, c) | {"TILE_H": height, "TILE_W": width},
        outputs=(jax.ShapeDtypeStruct((n, spec.height, spec.width, c), jnp.float32),),
        aliases={},
    )


def _tiles(spec: SplatSpec, height: int, width: int) -> int:
    return -(-spec.height // height) * -(-spec.width // width)


def backward_launches(
    spec: SplatSpec, n: int, m: int, c: int, dtypes: tuple[Any, Any, Any], tuning: Tuning = TUNING
) -> list[Launch]:
    """Returns the calls that together fill the cotangents of (centers, conics, colors), of the given dtypes.

    The operands of the first are those three, poison and the cotangent of the images. The second, if any, takes the
    outputs of the first in addition, and writes its Gaussians into them.
    """
    shapes = ((n, m, 2), (n, m, 3), (n, m, c))
    outputs = tuple(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True))

    def launch(lanes: int, warps: int, least: float, most: float, aliases: dict[int, int]) -> Launch:
        block = _block(n, m, tuning.programs // warps)
        constants = _constants(spec, m, c) | {
            "BLOCK": block,
            "LANES": lanes,
            "MIN_AREA": float(least),
            "MAX_AREA": float(most),
            "FLOAT_INDEX": spec.height * spec.width <= FLOAT_PIXELS,
        }
        return Launch(
            _wide_kernel if aliases else _backward_kernel, n * -(-m // block), warps, constants, outputs, aliases
        )

    if spec.height * spec.width < tuning.wide_area:
        return [launch(tuning.lanes, 1, 0, math.inf, {})]
    narrow = launch(tuning.lanes, 1, 0, tuning.wide_area, {})
    return [narrow, launch(tuning.wide_lanes, tuning.wide_warps, tuning.wide_area, math.inf, {5: 0, 6: 1, 7: 2})]


def _block(n: int, m: int, programs: int) -> int:
    """Returns how many Gaussians a program takes: as many as a warp tests at once, if enough programs remain."""
    block = LIST
    while block > 1 and n * -(-m // block) < programs:
        block //= 2
    return block


def _call(launch: Launch, *arrays: jax.Array, capability: int | None) -> list[jax.Array]:
    import jax_triton

    kernel = launch.kernel
    # jax-triton 0.4 renamed this argument, leaves multiply-adds to the default of Triton unless told, and hands an
    # output that aliases an input to the kernel once, not twice.
    if "out_type" in inspect.signature(jax_triton.triton_call).parameters:
        options: dict[str, Any] = {"out_type": launch.outputs, "backend_options": {"enable_fp_fusion": True}}
        kernel = _backward_kernel if kernel is _wide_kernel else kernel
    else:
        options = {"out_shape": launch.outputs, "enable_fp_fusion": True}
    with warnings.catch_warnings():
        # 0.4 prefers mutable references for outputs that a kernel shares; 0.3 has none.
        warnings.filterwarnings("ignore", "input_output_aliases", DeprecationWarning)
        return jax_triton.triton_call(
            *arrays,
            kernel=kernel,
            grid=(launch.grid,),
            num_warps=launch.warps,
            # There is no loop over loads to pipeline.
            num_stages=1,
            input_output_aliases=launch.aliases,
            compute_capability=capability,
            name="splat" + launch.kernel.__name__.removesuffix("_kernel"),
            **options,
            **launch.constants,
        )


def _poison(centers: jax.Array, conics: jax.Array, colors: jax.Array) -> jax.Array:
    """Returns NaN for images with a NaN operand and 0 for the others, ``[n]``."""
    spoilt = jnp.isnan(jnp.concatenate([centers, conics, colors], axis=-1)).any((1, 2))
    return jnp.where(spoilt, jnp.nan, jnp.float32(0))


def forward(
    spec: SplatSpec,
    centers: jax.Array,
    conics: jax.Array,
    colors: jax.Array,
    *,
    tuning: Tuning = TUNING,
) -> jax.Array:
    """Draws ``[n, m]`` Gaussians as images ``[n, h, w, c]`` float32; see `kernels.splat`.

    The operands may be float32, bfloat16 or float16, each its own; all arithmetic is in float32.
    """
    n, m, c = colors.shape
    if 0 in (n, m, c):
        return jnp.zeros((n, spec.height, spec.width, c), jnp.float32)
    poison = _poison(centers, conics, colors)
    images = [
        _call(
            forward_launch(spec, n, m, part.shape[2], tuning), centers, conics, part, poison, capability=spec.capability
        )[0]
        for part in _channel_groups(colors)
    ]
    return images[0] if len(images) == 1 else jnp.concatenate(images, axis=-1)


def backward(
    spec: SplatSpec,
    centers: jax.Array,
    conics: jax.Array,
    colors: jax.Array,
    v_images: jax.Array,
    *,
    tuning: Tuning = TUNING,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the cotangents of centers, conics and colors for the cotangent ``v_images [n, h, w, c]`` float32."""
    n, m, c = colors.shape
    if 0 in (n, m, c):
        return jnp.zeros_like(centers), jnp.zeros_like(conics), jnp.zeros_like(colors)
    poison = _poison(centers, conics, colors)
    several = c > CHANNELS
    v_geometry, v_colors = [], []
    for part, v_part in zip(_channel_groups(colors), _channel_groups(v_images), strict=True):
        # Sums over launches are taken in float32, whatever the operands are.
        dtypes = (jnp.float32, jnp.float32, colors.dtype) if several else (centers.dtype, conics.dtype, colors.dtype)
        out: list[jax.Array] = []
        for launch in backward_launches(spec, n, m, part.shape[2], dtypes, tuning):
            out = _call(launch, centers, conics, part, poison, v_part, *out, capability=spec.capability)
        v_geometry.append(out[:2])
        v_colors.append(out[2])
    if not several:
        return v_geometry[0][0], v_geometry[0][1], v_colors[0]
    v_centers, v_conics = (sum(parts[1:], parts[0]) for parts in zip(*v_geometry, strict=True))
    return v_centers.astype(centers.dtype), v_conics.astype(conics.dtype), jnp.concatenate(v_colors, axis=-1)


def try_to_lower(capability: int | None, dtypes: tuple[Any, ...]) -> None:
    """Compiles both directions for one small Gaussian of these dtypes; what jax-triton or Triton raise is passed on."""
    spec = SplatSpec(height=1, width=1, supersample=1, cutoff=0.0, capability=capability)
    operands = [jax.ShapeDtypeStruct((1, 1, last), dtype) for last, dtype in zip((2, 3, 1), dtypes, strict=True)]
    v_image = jax.ShapeDtypeStruct((1, 1, 1, 1), jnp.float32)
    for function, inputs in ((forward, operands), (backward, [*operands, v_image])):
        jax.jit(functools.partial(function, spec)).trace(*inputs).lower(lowering_platforms=("cuda",))


def _channel_groups(x: jax.Array) -> list[jax.Array]:
    return [x[..., i : i + CHANNELS] for i in range(0, x.shape[-1], CHANNELS)]
