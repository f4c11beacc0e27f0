"""The codes of packed Gaussians as bytes, of images and videos: NumPy alone, for readers with and without JAX.

First the positions of all images, then shapes, colors or lumas, and color differences, each in so many bits; or, with
``bits_gaussian``, all but the positions as `gsdd_jax.rans` writes them. What the codes mean is the codec's affair, and
``spec`` whatever has its settings.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np

from gsdd_jax import packing, rans
from gsdd_jax.errors import InputError

# Entropy-coded numbers have codes of 0 to 2^so many - 1.
CODED_BITS = 10


def image_bits(spec: Any, channels: int, d: int) -> int:
    """Returns the bits of one image of ``d`` = 2 dimensions, or of a video of 3, in codes of fixed width."""
    return position_bits(spec, d) + spec.num_points * sum(count * width for count, width in _parts(spec, channels, d))


def position_bits(spec: Any, d: int) -> int:
    """Returns the bits of the positions of an image."""
    if spec.order == "sorted":
        return packing.multiset_bits(spec.num_points, 1 << d * spec.bits_mean)
    return spec.num_points * d * spec.bits_mean


def set_bytes(spec: Any, n: int, channels: int, d: int) -> int:
    """Returns the bytes of ``n`` images."""
    bits = n * (spec.num_points * spec.bits_gaussian if spec.bits_gaussian else image_bits(spec, channels, d))
    return math.ceil(bits / 8)


def check_rate(spec: Any, n: int, channels: int, d: int) -> None:
    """Refuses ``bits_gaussian`` that are too few for positions, tables, and a bit of each number.

    Raises:
        ValueError: They are.
    """
    count, numbers = n * spec.num_points, _shapes(d) + channels
    least = n * position_bits(spec, d) + 8 + count * numbers + rans.least_bits(numbers, count * numbers)
    if spec.bits_gaussian and count * spec.bits_gaussian < least:
        raise InputError(
            f"codec.bits_gaussian: expected 0 or at least {math.ceil(10 * least / count) / 10:g} for {n} images of "
            f"{spec.num_points} Gaussians, found {spec.bits_gaussian:g}"
        )


def cells(codes: Any, bits_mean: int) -> Any:
    """Numbers the cells of positions ``[..., d]``, uint32: by frames, if any, then rows and columns."""
    cell = codes[..., -1]
    for i in reversed(range(codes.shape[-1] - 1)):
        cell = cell << bits_mean | codes[..., i]
    return cell


def kinds(numbers: Any, spec: Any, shapes: int) -> list[Any]:
    """Returns what the entropy coder writes of codes ``[n, m, shapes + c]``: one array ``[n m]`` of each.

    Of the colors but the first, that is how much larger they are than the one before: red, green and blue are nearly
    the same number. Luma and color differences are not, and stay as they are.
    """
    each = list(numbers.reshape(-1, numbers.shape[-1]).astype(np.int32).T)
    if spec.bits_chroma:
        return each
    return each[: shapes + 1] + [later - former for former, later in itertools.pairwise(each[shapes:])]


def write(mean: np.ndarray, numbers: np.ndarray, spec: Any) -> np.ndarray:
    """Writes codes ``mean [n, m, d]``, sorted where their order is not kept, and ``numbers [n, m, shapes + c]``.

    Raises:
        ValueError: Entropy-coded they are longer than ``bits_gaussian`` allow: steps were changed since they were made
            to fit.
    """
    n, _, d = mean.shape
    channels = numbers.shape[-1] - _shapes(d)
    if spec.order == "sorted":
        keys = cells(mean.astype(np.uint32), spec.bits_mean)
        bits = [packing.multisets_to_bits(keys, 1 << d * spec.bits_mean)]
    else:
        bits = [packing.to_bits(mean, spec.bits_mean)]
    if spec.bits_gaussian:
        data = np.packbits(bits[0]).tobytes() + rans.encode(kinds(numbers, spec, _shapes(d)))
        if len(data) > (room := set_bytes(spec, n, channels, d)):
            raise InputError(
                f"codec.bits_gaussian: {spec.bits_gaussian:g} bits per Gaussian leave {room} bytes, found {len(data)}; "
                "codec.project makes parameters that fit"
            )
        return np.frombuffer(data.ljust(room, b"\0"), np.uint8)
    parts = _parts(spec, channels, d)
    ends = np.cumsum([count for count, _ in parts])
    for part, (_, width) in zip(np.split(numbers, ends[:-1], axis=-1), parts, strict=True):
        bits.append(packing.to_bits(part, width))
    return np.packbits(np.concatenate(bits))


def read(data: np.ndarray, spec: Any, n: int, channels: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    """Reads the codes of ``n`` images back, uint32 and uint16: the inverse of `write`.

    Raises:
        ValueError: The bytes are none that `write` writes.
    """
    m, end, parts = spec.num_points, n * position_bits(spec, d), _parts(spec, channels, d)
    data = np.asarray(data)
    if spec.bits_gaussian:
        positions, numbers = np.unpackbits(data, count=end), _decoded(data[-(-end // 8) :].tobytes(), spec, n, parts, d)
    else:
        sizes = [end, *(n * m * count * width for count, width in parts)]
        positions, *written, padding = np.split(np.unpackbits(data), np.cumsum(sizes))
        if padding.any():
            raise InputError(f"codes: the {padding.size} bits after the last code must be 0")
        each = zip(written, parts, strict=True)
        codes = [packing.from_bits(part, width).reshape(n, m, count) for part, (count, width) in each if count]
        numbers = np.concatenate(codes, axis=-1)
    if spec.order == "kept":
        return packing.from_bits(positions, spec.bits_mean).reshape(n, m, d), numbers
    keys = packing.multisets_from_bits(positions, n, m, 1 << d * spec.bits_mean)
    return keys[..., None] >> np.arange(d, dtype=np.uint32) * spec.bits_mean & (2**spec.bits_mean - 1), numbers


def _decoded(data: bytes, spec: Any, n: int, parts: Any, d: int) -> np.ndarray:
    count, m = sum(count for count, _ in parts), spec.num_points
    found = np.stack(rans.decode(data, [n * m] * count), axis=-1)
    if not spec.bits_chroma:
        found[:, _shapes(d) :].cumsum(-1, out=found[:, _shapes(d) :])
    if found.min() < 0 or found.max() >> CODED_BITS:
        raise InputError(f"codes: entropy-coded numbers must lie in 0 to {(1 << CODED_BITS) - 1}")
    return found.reshape(n, m, count).astype(np.uint16)


def _shapes(d: int) -> int:
    """Returns how many numbers a shape in so many dimensions has."""
    return d * (d + 1) // 2


def _parts(spec: Any, channels: int, d: int) -> tuple[tuple[int, int], ...]:
    """Returns the numbers of a Gaussian but its position, kind by kind: how many, and the bits of each."""
    luma = 1 if spec.bits_chroma else channels
    return (_shapes(d), spec.bits_cholesky), (luma, spec.bits_color), (channels - luma, spec.bits_chroma)
