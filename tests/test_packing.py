"""Bits on disk, against Python's own integers and texts."""

import itertools
import math
import time

import numpy as np
import pytest

from gsdd_jax import packing


def text(bits) -> str:
    return "".join(map(str, bits.tolist()))


@pytest.mark.parametrize("width", [1, 5, 16])
def test_bits_are_the_binary_texts_of_the_codes(width):
    rng = np.random.default_rng(width)
    codes = np.concatenate([[0, 2**width - 1], rng.integers(0, 2**width, 19)]).astype(np.uint32)
    bits = packing.to_bits(codes, width)
    assert text(bits) == "".join(f"{code:0{width}b}" for code in codes.tolist())
    np.testing.assert_array_equal(packing.from_bits(bits, width), codes)


def test_codes_of_any_shape_and_small_dtype_are_written_row_by_row():
    codes = np.array([[[1, 2], [3, 0]], [[2, 2], [1, 3]]], np.uint16)
    assert text(packing.to_bits(codes, 2)) == "01101100" + "10100111"
    assert packing.to_bits(codes[:0], 2).size == 0 and packing.from_bits(np.zeros(0, np.uint8), 2).size == 0


@pytest.mark.parametrize(("symbols", "count"), [(1, 3), (4, 3), (16, 2), (6, 0)])
def test_ranks_number_all_multisets_without_a_gap(symbols, count):
    every = list(itertools.combinations_with_replacement(range(symbols), count))
    ranks = [packing.rank(codes) for codes in every]
    assert sorted(ranks) == list(range(len(every)))
    assert [packing.unrank(rank, count, symbols) for rank in ranks] == [list(codes) for codes in every]
    assert packing.multiset_bits(count, symbols) == math.ceil(math.log2(len(every)))
    # Colexicographic: the largest code decides first.
    assert ranks == [sorted(every, key=lambda codes: codes[::-1]).index(codes) for codes in every]


@pytest.mark.parametrize(
    "codes",
    [
        [0] * 40,
        [0] * 20 + [2**32 - 1] * 20,
        [7] * 39 + [2**16],
        [0, *[2**31 + i // 3 for i in range(300)]],
    ],
    ids=["zeros", "both ends", "nearly equal", "crowded"],
)
def test_extreme_multisets_come_back(codes):
    number = packing.rank(codes)
    assert number < math.comb(2**32 + len(codes) - 1, len(codes))
    assert packing.unrank(number, len(codes), 2**32) == codes


def test_first_and_last_number_are_all_lowest_and_all_highest():
    last = math.comb(256 + 4, 5) - 1
    assert packing.unrank(0, 5, 256) == [0] * 5 and packing.unrank(last, 5, 256) == [255] * 5
    with pytest.raises(ValueError, match=f"no set of 5 of 256 codes has the number {last + 1:#x}"):
        packing.unrank(last + 1, 5, 256)


@pytest.mark.parametrize(("rows", "count", "symbols"), [(7, 5, 2**6), (3, 22, 2**16), (2, 1, 4), (4, 0, 4), (0, 3, 4)])
def test_rows_of_multisets_are_their_ranks_in_binary(rows, count, symbols):
    codes = np.sort(np.random.default_rng(count).integers(0, symbols, (rows, count)), axis=1)
    bits = packing.multisets_to_bits(codes, symbols)
    width = packing.multiset_bits(count, symbols)
    numbers = [sum(math.comb(c + i, i + 1) for i, c in enumerate(row)) for row in codes.tolist()]
    assert text(bits) == "".join(f"{number:0{width}b}" for number in numbers if width)
    np.testing.assert_array_equal(packing.multisets_from_bits(bits, rows, count, symbols), codes)


def test_a_distilled_set_is_written_and_read_in_seconds():
    rows, count, width = 171, 170, 18
    codes = np.sort(np.random.default_rng(0).integers(0, 2**width, (rows, count)), axis=1)
    began = time.process_time()
    bits = packing.multisets_to_bits(codes, 2**width)
    np.testing.assert_array_equal(packing.multisets_from_bits(bits, rows, count, 2**width), codes)
    # Measured: 0.7 s.
    assert time.process_time() - began < 10
