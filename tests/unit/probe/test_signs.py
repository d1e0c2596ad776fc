"""Random signs by a hash: equal to the hash written out in Python's integers, the same in any piece, and random."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from dataflex.data.rng import key_of
from dataflex.probe.signs import SignTables, random_numbers, random_signs

CPU = torch.device("cpu")
KEY = key_of(0, "a test")


def triple32(value: int, injected: int = 0) -> int:
    """Return Wellons' hash of 32 bits, with a number put in behind its first step."""
    value ^= value >> 17
    value = value * 0xED5AD4BB % 2**32 ^ injected
    value ^= value >> 11
    value = value * 0xAC4C1B51 % 2**32
    value ^= value >> 15
    value = value * 0x31848BAB % 2**32
    return value ^ value >> 14


def word(key: int, row: int, place: int) -> int:
    one, two, three, four = (key >> shift & 0xFFFFFFFF for shift in (0, 32, 64, 96))
    left = triple32(triple32(row % 2**32 ^ one) ^ row >> 32 ^ two)
    right = triple32(triple32(row % 2**32 ^ three) ^ row >> 32 ^ four)
    return triple32((place + left) % 2**32, right)


@pytest.mark.parametrize("first", [0, 2**32 - 2, 2**40 + 5])
@pytest.mark.parametrize("key", [0, KEY, 2**128 - 1])
def test_signs_equal_the_hash_in_python_integers(key: int, first: int) -> None:
    found = random_signs(key, first, 4, 100, CPU)
    assert found.dtype == torch.int8
    for row in range(4):
        expected = [2 * (word(key, first + row, place // 32) >> place % 32 & 1) - 1 for place in range(100)]
        assert found[row].tolist() == expected
    expected = [word(key, first + row, 2**32 - 1) * 8191 // 2**32 for row in range(4)]
    assert random_numbers(key, first, 4, 8191, CPU).tolist() == expected


def test_any_piece_of_the_signs_can_be_computed_alone() -> None:
    whole = random_signs(KEY, 0, 600, 4000, CPU)  # several chunks
    assert torch.equal(whole[437:441, :77], random_signs(KEY, 437, 4, 77, CPU))
    assert torch.equal(random_numbers(KEY, 0, 50, 1000, CPU)[7:9], random_numbers(KEY, 7, 2, 1000, CPU))


def standardised(left: Tensor, right: Tensor) -> float:
    """Return the sum of products of independent signs in standard deviations."""
    return float((left.int() * right.int()).sum()) / left.numel() ** 0.5


def test_signs_are_random() -> None:
    """Everything is a sum of independent signs, so 4.5 deviations are one in 150,000; nothing is drawn anew."""
    rows, length = 2000, 1000
    signs = random_signs(KEY, 0, rows, length, CPU)
    assert set(signs.unique().tolist()) == {-1, 1}
    assert abs(standardised(signs, torch.ones_like(signs))) < 4.5
    for lag in [*range(1, 66), 96, 128, 256]:  # neighbours, also across words
        assert abs(standardised(signs[:, lag:], signs[:, :-lag])) < 4.5, lag
        assert abs(standardised(signs[lag:], signs[:-lag])) < 4.5, lag
        assert abs(standardised(signs[lag:, lag:], signs[:-lag, :-lag])) < 4.5, lag
    for bit in range(0, 128, 5):  # keys that differ in one bit
        assert abs(standardised(signs[:500], random_signs(KEY ^ 1 << bit, 0, 500, length, CPU))) < 4.5, bit
    for number in range(32):  # keys that are made as the projections make them
        other = random_signs(key_of(number, "count", "w"), 0, 500, length, CPU)
        assert abs(standardised(signs[:500], other)) < 4.5
    for far in (2**31, 2**32, 2**33, 2**40):
        assert abs(standardised(signs[:500], random_signs(KEY, far, 500, length, CPU))) < 4.5


def test_sums_of_rows_and_columns_have_the_variance_of_independent_signs() -> None:
    signs = random_signs(KEY, 0, 4096, 4096, CPU).float()
    halves = signs[:, :2048] * signs[:, 2048:]
    for values in (signs, signs.T, signs.reshape(-1, 32), halves, halves.T):
        sums = values.sum(1)
        ratio = float(sums.square().mean()) / values.shape[1]
        assert abs(ratio - 1) < 4.5 * (2 / sums.numel()) ** 0.5


def test_runs_have_the_lengths_of_coin_tosses() -> None:
    flat = random_signs(KEY, 0, 1000, 3200, CPU).flatten().numpy()
    ends = np.flatnonzero(np.diff(flat)) + 1
    lengths = np.diff(ends)
    found = np.bincount(np.minimum(lengths, 15), minlength=16)[1:]
    expected = np.array([0.5**length for length in range(1, 15)] + [0.5**14]) * lengths.size
    assert chisquare(found, expected).pvalue > 1e-4


def test_words_have_all_bytes_equally_often() -> None:
    bits = random_signs(KEY, 0, 2000, 1024, CPU).view(-1, 8) > 0
    found = np.bincount((bits.int() << torch.arange(8)).sum(1).numpy(), minlength=256)
    assert chisquare(found).pvalue > 1e-4


@pytest.mark.parametrize("below", [1, 2, 100, 8192])
def test_hash_values_are_spread_evenly(below: int) -> None:
    found = random_numbers(KEY, 0, 100_000, below, CPU).numpy()
    counts = np.bincount(found, minlength=below)
    assert counts.size == below
    assert below == 1 or chisquare(counts).pvalue > 1e-4


def test_tables_hold_no_more_than_they_may() -> None:
    tables = SignTables(limit=10_000)
    for key in (KEY, KEY + 1, KEY):
        for first, count in ((0, 3), (20, 30)):
            assert torch.equal(tables.rows(key, first, count, 100, 60), random_signs(key, first, count, 100, CPU))
    assert tables.bytes == 6000
    kept = tables.rows(KEY, 20, 30, 100, 60)
    assert kept.data_ptr() == tables.rows(KEY, 20, 30, 100, 60).data_ptr()
    other = tables.rows(KEY + 1, 20, 30, 100, 60)
    assert other.data_ptr() != tables.rows(KEY + 1, 20, 30, 100, 60).data_ptr()
