"""Integers in about as many bits as their frequencies are worth: range asymmetric numeral systems (Duda 2013).

Host-side and exact, NumPy alone. Each kind of numbers has a table of frequencies, which is written ahead of them: half
octaves of 5 bits, which are within 0.01 bits per number of the frequencies themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gsdd_jax.errors import InputError

# Numbers lie in [-LARGEST, LARGEST].
LARGEST = 1023
# Frequencies of a table add up to 2^PRECISION; states lie in [2^WORD, 2^(2 WORD)).
PRECISION, WORD = 14, 16
LEVEL_BITS, SPAN_BITS, STATE_BITS = 5, 11, 2 * WORD
TOTAL, LOWEST = 1 << PRECISION, 1 << WORD
WEIGHTS = np.array([0, *np.rint(2 ** (np.arange(1, 1 << LEVEL_BITS) / 2))], np.int32)
# Zeros that one entry of a table stands for at most.
RUN = 1 << LEVEL_BITS
# Share of the bits that states of finite size lose at most, as measured.
LOSS = 2.0**-10


def lanes(count: int) -> int:
    """Returns how many states share out so many numbers; they are independent of one another, for NumPy's sake."""
    return min(max(count >> 11, 1), 64)


def encode(kinds: Sequence[np.ndarray]) -> bytes:
    """Writes the numbers of each kind: the tables, the states, and their words.

    Args:
        kinds: Integers in [-LARGEST, LARGEST], ``[n_i]``, at least one of each kind.
    """
    counts = np.stack([np.bincount(values + LARGEST, minlength=2 * LARGEST + 1) for values in kinds])
    table = levels(counts)
    frequency, below = _intervals(table)
    number = np.concatenate(list(kinds)) + LARGEST
    kind = np.repeat(np.arange(len(kinds)), [values.size for values in kinds])
    f, c = frequency[kind, number], below[kind, number]
    words: list[np.ndarray] = []
    states = np.full(lanes(f.size), LOWEST, np.int64)
    for start in reversed(range(0, f.size, states.size)):
        part = slice(start, start + states.size)
        x, f_part = states[: f[part].size], f[part]
        full = x >= f_part << 2 * WORD - PRECISION
        words.append(x[full] & LOWEST - 1)
        x[full] >>= WORD
        x[:] = (x // f_part << PRECISION) + x % f_part + c[part]
    header = "".join(map(_written, table))
    bits = np.frombuffer((header + "0" * (-len(header) % 8)).encode(), np.uint8) - ord("0")
    stream = np.concatenate(words[::-1]).astype(">u2").tobytes()
    return np.packbits(bits).tobytes() + states.astype(">u4").tobytes() + stream


def decode(data: bytes, sizes: Sequence[int]) -> list[np.ndarray]:
    """Reads so many numbers of each kind, int64: the inverse of `encode`. Zeros may follow.

    Raises:
        ValueError: The bytes are none that `encode` writes.
    """
    bits, at, table = np.unpackbits(np.frombuffer(data, np.uint8)), 0, np.zeros((len(sizes), 2 * LARGEST + 1), np.int32)
    for row in table:
        at = _read(bits, at, row)
    count, at = sum(sizes), -(-at // 8)
    width = lanes(count)
    stream = at + width * STATE_BITS // 8
    if stream > len(data):
        raise InputError("codes: they end before the states of the entropy coder")
    states = np.frombuffer(data[at:stream], ">u4").astype(np.int64)
    words = np.frombuffer(data[stream : len(data) - (len(data) - stream) % 2], ">u2").astype(np.int64)
    frequency, below = _intervals(table)
    number = np.stack([np.repeat(np.arange(row.size), row) for row in frequency])
    kind, found, taken = np.repeat(np.arange(len(sizes)), sizes), np.empty(count, np.int64), 0
    for start in range(0, count, width):
        k = kind[start : start + width]
        x = states[: k.size]
        slot = x & TOTAL - 1
        s = found[start : start + width] = number[k, slot]
        x[:] = frequency[k, s] * (x >> PRECISION) + slot - below[k, s]
        empty = x < LOWEST
        more = words[taken : taken + int(np.count_nonzero(empty))]
        taken += int(np.count_nonzero(empty))
        if taken > words.size:
            raise InputError("codes: they end before the last number")
        x[empty] = x[empty] << WORD | more
    if (states != LOWEST).any() or any(data[stream + 2 * taken :]):
        raise InputError("codes: the entropy coder did not write them")
    return np.split(found - LARGEST, np.cumsum(sizes)[:-1])


def levels(counts: Any, xp: Any = np) -> Any:
    """Returns how often numbers are there, ``[k, s]`` counts, as half octaves below the most frequent of a row.

    That one has the highest level, what is not there has 0. ``xp`` is the module of the arrays, NumPy or jax.numpy.
    """
    share = xp.maximum(counts, 1) / counts.max(-1, keepdims=True)
    level = xp.maximum(xp.rint(2 * xp.log2(share)) + len(WEIGHTS) - 1, 1)
    return xp.where(counts > 0, level, 0).astype(np.int32)


def frequencies(levels: Any, xp: Any = np) -> Any:
    """Returns the frequencies that the levels ``[k, s]`` stand for; every row adds up to ``TOTAL``."""
    weights = xp.asarray(WEIGHTS)[levels]
    there = weights > 0
    shares = there + weights * (TOTAL - there.sum(-1, keepdims=True)) // weights.sum(-1, keepdims=True)
    most = xp.arange(shares.shape[-1]) == weights.argmax(-1)[:, None]
    return shares + most * (TOTAL - shares.sum(-1, keepdims=True))


def least_bits(kinds: int, count: int) -> int:
    """Returns the bits that `encode` takes at most besides frequencies and numbers, which have ``kinds``."""
    return kinds * 2 * SPAN_BITS + 7 + lanes(count) * (STATE_BITS + WORD)


def most_bits(counts: Any, count: int, xp: Any = np) -> Any:
    """Returns the bits that `encode` takes at most.

    Args:
        counts: ``[k, 2 LARGEST + 1]``: how often each number of each kind is there.
        count: How many numbers there are in all.
        xp: Module of ``counts``.
    """
    frequency = frequencies(levels(counts, xp), xp)
    there = counts > 0
    written = xp.where(there, counts * (PRECISION - xp.log2(xp.maximum(frequency, 1))), 0).sum()
    # A run of zeros costs two entries, and so does every 32nd of them.
    gaps = (there[:, :-1] & ~there[:, 1:]).sum()
    span = xp.where(there.any(-1), there.shape[-1] - there.argmax(-1) - there[:, ::-1].argmax(-1), 0)
    entries = there.sum() + 2 * gaps + 2 * ((span - there.sum(-1)) // RUN).sum()
    return written * (1 + LOSS) + LEVEL_BITS * entries + least_bits(len(counts), count)


def _intervals(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the frequency of each number of each table of levels, and the sum of those below it."""
    frequency = frequencies(table).astype(np.int64)
    return frequency, frequency.cumsum(-1) - frequency


def _written(table: np.ndarray) -> str:
    """Writes levels in binary: where they begin, how many follow, themselves, and after a 0 how many more."""
    first, last = np.flatnonzero(table)[[0, -1]]
    text, i = f"{first:0{SPAN_BITS}b}{last - first:0{SPAN_BITS}b}", first
    while i <= last:
        zeros = int((table[i : i + RUN] > 0).argmax()) or RUN
        text += f"{table[i]:0{LEVEL_BITS}b}"
        if not table[i]:
            text += f"{zeros - 1:0{LEVEL_BITS}b}"
        i += 1 if table[i] else zeros
    return text


def _read(bits: np.ndarray, at: int, table: np.ndarray) -> int:
    """Reads into ``table`` what `_written` wrote, from a bit on; returns the bit after it."""

    def number(width: int) -> int:
        nonlocal at
        digits, at = bits[at : at + width], at + width
        if digits.size < width:
            raise InputError("codes: they end within a table of frequencies")
        return int("".join(map(str, digits)), 2)

    i = number(SPAN_BITS)
    last = i + number(SPAN_BITS)
    while i <= last < table.size:
        table[i] = number(LEVEL_BITS)
        i += 1 if table[i] else 1 + number(LEVEL_BITS)
    if i != last + 1 or not table[last]:
        raise InputError("codes: a table of frequencies that the entropy coder does not write")
    return at
