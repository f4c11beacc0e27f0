"""Codes of any width as bytes, and sets of codes without their order.

Host-side and exact: NumPy for the bits, Python's integers for the combinatorics. What the codes mean is the codec's
affair.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from gsdd_jax.errors import InputError


def to_bits(codes: np.ndarray, width: int) -> np.ndarray:
    """Returns the binary digits of each code, most significant first, one after the other: ``[codes.size * width]``."""
    codes = codes.reshape(-1)
    bits = np.empty((codes.size, width), np.uint8)
    for digit in range(width):
        bits[:, digit] = codes >> (width - 1 - digit) & 1
    return bits.reshape(-1)


def from_bits(bits: np.ndarray, width: int) -> np.ndarray:
    """Returns the codes, uint16, of which ``bits`` are the digits, at most 16 each; the inverse of `to_bits`."""
    # Digit by digit: a file comes from anyone, and 32 bits for each of its own are more than reading may take.
    codes = np.zeros(bits.size // width, np.uint16)
    for digit in bits.reshape(-1, width).T:
        codes <<= 1
        codes |= digit
    return codes


def multiset_bits(count: int, symbols: int) -> int:
    """Returns the bits that number all multisets of ``count`` codes below ``symbols``."""
    return (math.comb(symbols + count - 1, count) - 1).bit_length()


def multisets_to_bits(codes: np.ndarray, symbols: int) -> np.ndarray:
    """Writes each row's codes without their order, at a fixed rate.

    Args:
        codes: ``[n, m]``, each row sorted, all below ``symbols``.
        symbols: How many different codes there are.

    Returns:
        ``[n * multiset_bits(m, symbols)]`` binary digits.
    """
    width = multiset_bits(codes.shape[1], symbols)
    size = -(-width // 8)
    ranks = b"".join(rank(row).to_bytes(size, "big") for row in codes.tolist())
    bits = np.unpackbits(np.frombuffer(ranks, np.uint8)).reshape(len(codes), 8 * size)
    return bits[:, 8 * size - width :].reshape(-1)


def multisets_from_bits(bits: np.ndarray, rows: int, count: int, symbols: int) -> np.ndarray:
    """Reads what `multisets_to_bits` wrote: ``[rows, count]`` uint32, each row sorted.

    Raises:
        ValueError: A number that no multiset has.
    """
    width = multiset_bits(count, symbols)
    size = -(-width // 8)
    padded = np.pad(bits.reshape(rows, width), [(0, 0), (8 * size - width, 0)])
    codes = np.zeros((rows, count), np.uint32)
    for i, row in enumerate(np.packbits(padded, axis=1)):
        codes[i] = unrank(int.from_bytes(row.tobytes(), "big"), count, symbols)
    return codes


def rank(codes: Sequence[int]) -> int:
    """Numbers a multiset, given as sorted codes, among all of its size (combinatorial number system).

    Adding 0, 1, ... to sorted codes makes them distinct; ``d_1 < ... < d_m`` has the number ``sum C(d_i, i)``.
    """
    return sum(math.comb(code + i, i + 1) for i, code in enumerate(codes))


def unrank(number: int, count: int, symbols: int) -> list[int]:
    """Returns the sorted codes of a multiset from its number.

    Raises:
        ValueError: No multiset of ``count`` codes below ``symbols`` has the number.
    """
    if number >= math.comb(symbols + count - 1, count):
        raise InputError(f"no set of {count} of {symbols} codes has the number {number:#x}")
    codes = [0] * count
    for i in range(count, 0, -1):
        top, ways = _largest(number, i)
        number -= ways
        codes[i - 1] = top - (i - 1)
    return codes


def _largest(number: int, i: int) -> tuple[int, int]:
    """Returns the largest d with C(d, i) <= number, and C(d, i)."""
    # C(d, i) i! is about (d - (i - 1) / 2)^i; what this misses is walked.
    root = math.exp((math.log(number) + math.lgamma(i + 1)) / i) if number else 0.0
    top = max(round(root + (i - 1) / 2), i)
    ways = math.comb(top, i)
    while ways > number:
        ways = ways * (top - i) // top
        top -= 1
    while (more := ways * (top + 1) // (top + 1 - i) if top >= i else 1) <= number:
        ways, top = more, top + 1
    return top, ways
