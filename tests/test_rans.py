"""The entropy coder, against entropies of NumPy and a reader of one number at a time in Python's integers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gsdd_jax import rans

RNG = np.random.default_rng(0)


def clipped(values) -> np.ndarray:
    return np.clip(np.rint(values), -rans.LARGEST, rans.LARGEST).astype(np.int64)


def kinds_of(n: int) -> list[np.ndarray]:
    """All alike, narrow, wide, with far outliers, all different, and two far apart."""
    rng = np.random.default_rng(n)
    return [
        np.full(n, 7),
        clipped(rng.normal(3, 0.6, n)),
        clipped(rng.normal(-100, 40, n)),
        clipped(rng.standard_cauchy(n)),
        rng.integers(-rans.LARGEST, rans.LARGEST + 1, n),
        rng.choice([-rans.LARGEST, rans.LARGEST], n),
    ]


def counts_of(kinds) -> np.ndarray:
    return np.stack([np.bincount(kind + rans.LARGEST, minlength=2 * rans.LARGEST + 1) for kind in kinds])


def entropy(counts) -> float:
    """Returns the bits of an ideal coder that knows the frequencies."""
    share = counts / counts.sum(-1, keepdims=True)
    return float(-(counts * np.log2(share, where=counts > 0, out=np.zeros(counts.shape))).sum())


def one_by_one(data: bytes, sizes) -> list[list[int]]:
    """Reads what the format says, number after number, with exact integers."""
    text, at = "".join(f"{byte:08b}" for byte in data), 0

    def number(width: int) -> int:
        nonlocal at
        at += width
        return int(text[at - width : at], 2)

    tables = []
    for _ in sizes:
        first = number(11)
        levels = {}
        last, i = first + number(11), first
        while i <= last:
            if level := number(5):
                levels[i] = round(2 ** (level / 2))
                i += 1
            else:
                i += 1 + number(5)
        shared, total = 2**14 - len(levels), sum(levels.values())
        frequency = {i: 1 + weight * shared // total for i, weight in levels.items()}
        most = max(levels, key=lambda i: (levels[i], -i))
        frequency[most] += 2**14 - sum(frequency.values())
        tables.append(frequency)
    at += -at % 8
    states = [number(32) for _ in range(min(max(sum(sizes) // 2048, 1), 64))]
    found, i = [], 0
    for size, frequency in zip(sizes, tables, strict=True):
        slots = [value for value, f in frequency.items() for _ in range(f)]
        found.append([])
        for _ in range(size):
            lane = i % len(states)
            quotient, slot = divmod(states[lane], 2**14)
            value = slots[slot]
            states[lane] = frequency[value] * quotient + slot - slots.index(value)
            if states[lane] < 2**16:
                states[lane] = states[lane] * 2**16 + number(16)
            found[-1].append(value - 1023)
            i += 1
    assert set(states) == {2**16} and at == len(text)
    return found


@pytest.mark.parametrize("n", [1, 5, 800])
def test_numbers_come_back_and_are_those_of_an_exact_reader(n):
    kinds = kinds_of(n)
    data = rans.encode(kinds)
    for zeros in (0, 1, 6):
        back = rans.decode(data + bytes(zeros), [n] * len(kinds))
        for values, found in zip(kinds, back, strict=True):
            np.testing.assert_array_equal(found, values)
    assert one_by_one(data, [n] * len(kinds)) == [values.tolist() for values in kinds]


@pytest.mark.parametrize("n", [1, 40, 3000, 60000])
def test_bytes_are_at_most_as_many_as_promised_and_near_the_entropy(n):
    for kinds in (kinds_of(n), kinds_of(n)[1:3], kinds_of(n)[:1]):
        counts = counts_of(kinds)
        size, most = 8 * len(rans.encode(kinds)), rans.most_bits(counts, counts.sum())
        assert entropy(counts) <= size <= most
        compiled = jax.jit(lambda counts: rans.most_bits(counts, int(n * len(counts)), jnp))
        np.testing.assert_allclose(compiled(counts.astype(np.int32)), most, rtol=1e-5, atol=30)
        distinct = np.count_nonzero(counts)
        assert size <= 1.01 * entropy(counts) + 0.01 * counts.sum() + 17 * distinct + 32 * 64 + 200


def test_most_bits_hold_for_one_number_among_many_and_for_every_span():
    for share in (1, 2, 50):
        values = np.zeros(20_000, np.int64)
        values[:share] = np.arange(share) * 37 % 1500 - 700
        counts = counts_of([values])
        assert 8 * len(rans.encode([values])) <= rans.most_bits(counts, values.size)


def test_bytes_of_others_are_one_error_or_numbers_in_range():
    kinds = kinds_of(60)
    data, sizes = rans.encode(kinds), [60] * len(kinds)
    hostile = [data[:cut] for cut in range(0, len(data), 7)]
    hostile += [bytes(64), b"\xff" * 64, RNG.bytes(len(data)), data + b"\1", data[:-1] + bytes([data[-1] ^ 1])]
    for at in range(0, 8 * len(data), 11):
        flipped = bytearray(data)
        flipped[at // 8] ^= 1 << at % 8
        hostile.append(bytes(flipped))
    refused = 0
    for one in hostile:
        try:
            found = rans.decode(one, sizes)
        except ValueError as error:
            assert str(error).startswith("codes: ")
            refused += 1
        else:
            assert all(len(values) == 60 and np.abs(values).max() <= rans.LARGEST for values in found)
    # The last states tell all but where tables begin, which nothing depends on but the numbers.
    assert refused > 0.85 * len(hostile)
