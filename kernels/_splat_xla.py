"""The splat operator in plain ``jax.numpy``: the path of CPUs and TPUs, and the reference of the GPU kernel.

Both directions walk *tiles* of the image. Each tile lists the Gaussians whose box touches it, so the work follows the
area that the Gaussians cover and not ``m * h * w``; tiles with equally long lists share a block, and a block walks
its lists ``LANES`` at a time. Images are handled in chunks of bounded size, so temporary memory depends on the size
of one image but not on their number.

The backward direction is a gather: each (tile, Gaussian) pair writes its own slot, and a Gaussian sums its slots in a
fixed order. There are no atomics, hence the same bits on every run. The moments of a pair come from matrix products
with the monomials of the sample positions, because ``exp`` and memory traffic, not multiplications, bound this path
on a CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kernels.spec import SplatSpec

# Measured on a CPU, forward plus backward. Small tiles cull better, but their lists cost more: tiles of 8 instead of 16
# take 0.8 times as long at (300 images, 22 Gaussians, 32 px), 1.0 at (16, 170, 128 px), 1.5 at (4, 364, 256 px).
TILE = 16
SMALL_TILE = 8
SMALL_IMAGE = 64
# 4 lanes make the forward slower, 16 the backward.
LANES = 8
# Pixels x lanes of a block; 2^16 float32 weights are 256 KiB.
BLOCK_SIZE = 1 << 16
# Without it accelerators multiply matrices in TF32 or bfloat16.
PRECISION = lax.Precision.HIGHEST
# Upper bound for (tiles x Gaussians) of a chunk of images: about 2^19 * 8 floats = 16 MiB of pair slots.
CHUNK_PAIRS = 1 << 19


class _Tiles(NamedTuple):
    """The pair lists of a chunk of images; ``t`` counts the tiles of all its images, padded to whole blocks."""

    image: jax.Array  # [t] image that the tile belongs to
    origin: jax.Array  # [t, 2] pixel coordinates (x, y) of the tile's center
    members: jax.Array  # [t, m'] indices of the Gaussians that touch the tile, in ascending order, then filler
    length: jax.Array  # [t] length of each list
    place: jax.Array  # [tiles of the chunk] row of each tile (image-major) in the arrays above
    rank: jax.Array  # [b, tiles per image, m] slot of a Gaussian in its tile's list, or -1


def _tile(spec: SplatSpec) -> int:
    """Returns the edge of a tile in pixels."""
    return TILE if max(spec.height, spec.width) > SMALL_IMAGE else SMALL_TILE


def _monomials(size: int, supersample: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns monomials of the sample positions about a tile's center.

    These are 1, x, y of all samples, ``[s * s * size * size, 3]``, and 1, y, yy of one column phase,
    ``[s * size * size, 3]``. The samples are in the order (row phase, column phase, row, column).
    """
    phase = (np.arange(supersample) + 0.5) / supersample
    offsets = np.arange(size)[None, :] + phase[:, None] - size / 2
    y, x = np.broadcast_arrays(offsets[:, None, :, None], offsets[None, :, None, :])
    slanted = np.stack([np.ones_like(x), x, y], axis=-1)
    upright = np.stack([np.ones_like(y), y, y * y], axis=-1)[:, 0]
    return slanted.reshape(-1, 3), upright.reshape(-1, 3)


def _tile_lists(
    centers: jax.Array, conics: jax.Array, valid: jax.Array, spec: SplatSpec, tile: int, block: int
) -> _Tiles:
    b, m, _ = centers.shape
    rows, columns = -(-spec.height // tile), -(-spec.width // tile)
    p, r, s = conics[..., 0], conics[..., 1], conics[..., 2]
    # q = (p dx + r dy)^2 + (s dy)^2 <= reach^2 bounds |dy| by reach/s and |dx| by reach * sqrt(1 + (r/s)^2) / p.
    reach = float(np.sqrt(-2 * np.log(spec.cutoff))) if spec.cutoff > 0 else np.inf
    half = jnp.stack([reach * jnp.sqrt(1 + (r / s) ** 2) / p, reach / s], axis=-1)
    corner_x, corner_y = np.meshgrid(np.arange(columns) * tile, np.arange(rows) * tile)
    origin = np.stack([corner_x.ravel(), corner_y.ravel()], axis=-1) + tile / 2  # [rows * columns, 2]
    distance = jnp.abs(centers[:, None] - jnp.asarray(origin[None, :, None], centers.dtype))
    touches = jnp.all(~(distance > half[:, None] + tile / 2), axis=-1) & valid[:, None, None]  # [b, rows * columns, m]

    lanes = -(-m // LANES) * LANES
    flat = touches.reshape(b * rows * columns, m)
    rank = jnp.where(flat, jnp.cumsum(flat, axis=1, dtype=jnp.int32) - 1, -1)
    # One sort of plain integers compacts each list: strangers get a high bit and move to the end.
    keys = jnp.sort(jnp.where(flat, 0, 1 << 24) + jnp.arange(m, dtype=jnp.int32), axis=1)
    count = jnp.sum(flat, axis=1, dtype=jnp.int32)
    order = jnp.argsort(count)
    t = -(-flat.shape[0] // block) * block
    fill = (0, t - flat.shape[0])
    image = jnp.repeat(jnp.arange(b, dtype=jnp.int32), rows * columns)
    return _Tiles(
        image=jnp.pad(image[order], fill),
        origin=jnp.pad(jnp.tile(jnp.asarray(origin, centers.dtype), (b, 1))[order], (fill, (0, 0))),
        members=jnp.pad((keys & ((1 << 24) - 1))[order], (fill, (0, lanes - m))),
        length=jnp.pad(count[order], fill),
        place=jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=order.dtype)),
        rank=rank.reshape(b, rows * columns, m),
    )


def _weights(
    geometry: jax.Array, origin: jax.Array, slanted: jax.Array, upright: jax.Array, spec: SplatSpec
) -> tuple[jax.Array, jax.Array]:
    """Evaluates ``exp(-q/2)``, zero below the cutoff, of ``[t, l]`` pairs at all samples.

    Both it and ``u = p dx + r dy``, which is returned as well, are ``[t, l, s * s, tile * tile]``. Products with the
    monomials give ``u`` and ``v = s dy``, because sums over broadcast rows and columns take a CPU longer.
    """
    pairs, k = geometry.shape[:2], spec.supersample
    cx, cy = geometry[..., 0] - origin[:, None, 0], geometry[..., 1] - origin[:, None, 1]
    p, r, s = (geometry[..., i] for i in (2, 3, 4))
    u = _product(jnp.stack([-(p * cx + r * cy), p, r], axis=-1), slanted.T).reshape(*pairs, k * k, -1)
    v = _product(jnp.stack([-s * cy, s], axis=-1), upright[:, :2].T).reshape(*pairs, k, -1)
    w = jnp.exp(-0.5 * (u * u + jnp.repeat(v * v, k, axis=2)))
    return jnp.where(w >= spec.cutoff, w, 0.0), u


def _product(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """Multiplies ``[t, l, i]`` by ``[i, j]``; as one flat product, which is the fast one on CPUs."""
    flat = jnp.dot(x.reshape(-1, x.shape[-1]), matrix, precision=PRECISION)
    return flat.reshape(*x.shape[:-1], matrix.shape[1])


def _block(tiles: _Tiles, geometry: jax.Array, colors: jax.Array, first: jax.Array, step: jax.Array, block: int):
    """Gathers the parameters of the pairs (tiles ``first ...``, list entries ``step * LANES ...``)."""
    m = geometry.shape[1]
    members = lax.dynamic_slice(tiles.members, (first, step * LANES), (block, LANES))
    image = lax.dynamic_slice(tiles.image, (first,), (block,))
    count = lax.dynamic_slice(tiles.length, (first,), (block,))
    index = image[:, None] * m + members
    used = (step * LANES + jnp.arange(LANES)) < count[:, None]
    color = jnp.where(used[..., None], colors.reshape(-1, colors.shape[-1])[index], 0.0)
    return geometry.reshape(-1, 5)[index], color, used


def _steps(tiles: _Tiles, first: jax.Array, block: int) -> jax.Array:
    count = lax.dynamic_slice(tiles.length, (first,), (block,))
    # Of the default integer type, which slices demand of all their indices.
    return ((jnp.max(count) + LANES - 1) // LANES).astype(int)


def _forward_chunk(
    spec: SplatSpec, centers: jax.Array, conics: jax.Array, colors: jax.Array, valid: jax.Array
) -> jax.Array:
    b, m, c = colors.shape
    tile, s = _tile(spec), spec.supersample
    rows, columns = -(-spec.height // tile), -(-spec.width // tile)
    block = min(BLOCK_SIZE // (tile * tile * LANES), b * rows * columns)
    monomials = [jnp.asarray(x, colors.dtype) for x in _monomials(tile, s)]
    tiles = _tile_lists(centers, conics, valid, spec, tile, block)
    geometry = jnp.concatenate([centers, conics], axis=-1)

    def draw(first):
        origin = lax.dynamic_slice(tiles.origin, (first, 0), (block, 2))

        def body(step, image):
            g, color, _ = _block(tiles, geometry, colors, first, step, block)
            w, _ = _weights(g, origin, *monomials, spec)
            return image + jnp.einsum("tlp,tlc->tcp", jnp.sum(w, axis=2), color, precision=PRECISION)

        return lax.fori_loop(0, _steps(tiles, first, block), body, jnp.zeros((block, c, tile * tile), colors.dtype))

    drawn = lax.map(draw, jnp.arange(0, tiles.length.size, block))
    drawn = drawn.reshape(-1, c, tile, tile)[tiles.place] / (s * s)
    image = drawn.reshape(b, rows, columns, c, tile, tile).transpose(0, 1, 4, 2, 5, 3)
    image = image.reshape(b, rows * tile, columns * tile, c)[:, : spec.height, : spec.width]
    poison = jnp.isnan(geometry).any((1, 2)) | jnp.isnan(colors).any((1, 2))
    return jnp.where(poison[:, None, None, None], jnp.nan, image)


def _backward_chunk(
    spec: SplatSpec,
    centers: jax.Array,
    conics: jax.Array,
    colors: jax.Array,
    v_image: jax.Array,
    valid: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    b, m, c = colors.shape
    tile, s = _tile(spec), spec.supersample
    rows, columns = -(-spec.height // tile), -(-spec.width // tile)
    block = min(BLOCK_SIZE // (tile * tile * LANES), b * rows * columns)
    slanted, upright = (jnp.asarray(x, colors.dtype) for x in _monomials(tile, s))
    tiles = _tile_lists(centers, conics, valid, spec, tile, block)
    geometry = jnp.concatenate([centers, conics], axis=-1)

    v = jnp.pad(v_image / (s * s), ((0, 0), (0, rows * tile - spec.height), (0, columns * tile - spec.width), (0, 0)))
    v = v.reshape(b, rows, tile, columns, tile, c).transpose(0, 1, 3, 5, 2, 4).reshape(-1, c, tile * tile)
    v = jnp.pad(v[jnp.argsort(tiles.place)], ((0, tiles.length.size - v.shape[0]), (0, 0), (0, 0)))

    def gather(first):
        origin = lax.dynamic_slice(tiles.origin, (first, 0), (block, 2))
        v_tile = lax.dynamic_slice(v, (first, 0, 0), (block, c, tile * tile))

        def body(step, slots):
            g, color, used = _block(tiles, geometry, colors, first, step, block)
            w, u = _weights(g, origin, slanted, upright, spec)
            # The y-moments need no column phase, the colors none at all: sum early, multiply less.
            of_row = jnp.sum(w.reshape(block, LANES, s, s, tile * tile), axis=3)
            v_color = jnp.einsum("tlp,tcp->tlc", jnp.sum(of_row, axis=2), v_tile, precision=PRECISION)
            v_weight = sum(v_tile[:, None, i] * color[:, :, None, i] for i in range(c))[:, :, None]
            moments = (
                _product((x * v_weight).reshape(block, LANES, -1), basis)
                for x, basis in ((w * u, slanted), (of_row, upright))
            )
            v_geometry = _chain(*moments, g, origin)
            rows = jnp.where(used[..., None], jnp.concatenate([v_geometry, v_color], axis=-1), 0.0)
            return lax.dynamic_update_slice(slots, rows, (0, step * LANES, 0))

        slots = jnp.zeros((block, tiles.members.shape[1], 5 + c), colors.dtype)
        return lax.fori_loop(0, _steps(tiles, first, block), body, slots)

    slots = lax.map(gather, jnp.arange(0, tiles.length.size, block)).reshape(tiles.length.size, -1, 5 + c)
    rank = tiles.rank.reshape(b * rows * columns, m)
    pairs = slots[tiles.place[:, None], jnp.maximum(rank, 0)]
    grad = jnp.where((rank >= 0)[..., None], pairs, 0.0).reshape(b, rows * columns, m, 5 + c).sum(1)
    poison = (jnp.isnan(geometry).any((1, 2)) | jnp.isnan(colors).any((1, 2)))[:, None, None]
    grad = jnp.where(poison, jnp.nan, grad)
    return grad[..., :2], grad[..., 2:5], grad[..., 5:]


def _chain(slanted: jax.Array, upright: jax.Array, geometry: jax.Array, origin: jax.Array) -> jax.Array:
    """Turns moments of ``dL/dw * w`` into the gradient of (cx, cy, p, r, s).

    The ``slanted`` ones, of 1, x, y about the tile's center, are weighted with ``u`` as well. Second moments in x and y
    would give them too, but cancel for needles: in float32 the error is 4e-4 at 500 by 0.01 pixels, instead of 1e-5.
    """
    u1, ux, uy = (slanted[..., i] for i in range(3))
    s1, sy, syy = (upright[..., i] for i in range(3))
    cx, cy = geometry[..., 0] - origin[:, None, 0], geometry[..., 1] - origin[:, None, 1]
    p, r, s = (geometry[..., i] for i in (2, 3, 4))
    v_cy = r * u1 + s * s * (sy - cy * s1)
    v_s = -s * (syy - cy * (2 * sy - cy * s1))
    return jnp.stack([p * u1, v_cy, cx * u1 - ux, cy * u1 - uy, v_s], axis=-1)


def _in_chunks(function: Callable[..., Any], arrays: tuple[jax.Array, ...], spec: SplatSpec) -> Any:
    """Applies ``function`` to chunks of images, so that temporaries stay bounded.

    The last chunk is padded with images marked invalid, whose tiles are empty.
    """
    n, m = arrays[0].shape[:2]
    tile = _tile(spec)
    tiles = -(-spec.height // tile) * -(-spec.width // tile)
    chunks = max(1, -(-n * tiles * m // CHUNK_PAIRS))
    size = -(-n // min(chunks, n))
    chunks = -(-n // size)
    valid = jnp.ones(n, bool)
    if chunks == 1:
        return function(*arrays, valid)

    def split(x):
        x = jnp.pad(x, [(0, chunks * size - n)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(chunks, size, *x.shape[1:])

    out = lax.map(lambda chunk: function(*chunk), tuple(split(x) for x in (*arrays, valid)))
    return jax.tree.map(lambda x: x.reshape(chunks * size, *x.shape[2:])[:n], out)


def forward(spec: SplatSpec, centers: jax.Array, conics: jax.Array, colors: jax.Array) -> jax.Array:
    """Draws ``[n, m]`` Gaussians as images ``[n, h, w, c]``; see `kernels.splat`."""
    n, m, c = colors.shape
    if n == 0 or m == 0:
        return jnp.zeros((n, spec.height, spec.width, c), colors.dtype)
    return _in_chunks(functools.partial(_forward_chunk, spec), (centers, conics, colors), spec)


def backward(
    spec: SplatSpec, centers: jax.Array, conics: jax.Array, colors: jax.Array, v_image: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the cotangents of centers, conics and colors for the cotangent ``v_image [n, h, w, c]`` of the images."""
    n, m, _ = colors.shape
    if n == 0 or m == 0:
        return jnp.zeros_like(centers), jnp.zeros_like(conics), jnp.zeros_like(colors)
    return _in_chunks(functools.partial(_backward_chunk, spec), (centers, conics, colors, v_image), spec)
