"""Permutations and passes, against their definitions."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from scipy import stats

from dataflex.data.sampling import KeyedPermutation, PassSampler

TABLE = 1 << 16  # sizes up to this one are stored, larger ones computed
SMALL = 1e-4  # p-values below it reject; keys are fixed, so a test that passes once passes always


def everything(size: int, key: int = 7) -> np.ndarray:
    return KeyedPermutation(size, key)(np.arange(size, dtype=np.int64))


SIZES = [0, 1, 2, 3, 7, 64, 1000, TABLE - 1, TABLE, TABLE + 1, TABLE + 2, 300**2 - 1, 300**2, 300**2 + 1, 10**6 + 3]


@pytest.mark.parametrize("size", SIZES)
def test_permutation_is_a_bijection(size: int) -> None:
    values = everything(size)
    assert values.dtype == np.int64
    assert np.array_equal(np.bincount(values, minlength=size), np.ones(size))


@pytest.mark.parametrize("size", [5, TABLE, TABLE + 1, 200_003])
def test_random_access_equals_whole_evaluation(size: int) -> None:
    whole = everything(size, key=11)
    rng = np.random.default_rng(0)
    for shape in [(1,), (3, 50), (400,)]:
        positions = rng.integers(0, size, shape)
        assert np.array_equal(KeyedPermutation(size, 11)(positions), whole[positions])
    assert KeyedPermutation(size, 11)(np.empty(0, dtype=np.int64)).shape == (0,)


def test_huge_sizes_stay_in_range_and_distinct() -> None:
    size = 10**12 + 39
    positions = np.unique(np.random.default_rng(1).integers(0, size, 200_000))
    values = KeyedPermutation(size, 5)(positions)
    assert values.min() >= 0
    assert values.max() < size
    assert np.unique(values).size == positions.size
    # 50 equal parts of the range are hit equally often
    counts = np.bincount((values * 50 // size).astype(np.int64), minlength=50)
    assert stats.chisquare(counts).pvalue > SMALL


@pytest.mark.parametrize("size", [2, 1000, TABLE + 1])
def test_permutation_depends_on_the_key_alone(size: int) -> None:
    assert np.array_equal(everything(size, 3), everything(size, 3))
    seen = {everything(size, key).tobytes() for key in range(12)}
    assert len(seen) == (2 if size == 2 else 12)


def test_small_permutations_are_all_equally_likely() -> None:
    drawn = [tuple(everything(3, key)) for key in range(6000)]
    counts = [drawn.count(order) for order in set(drawn)]
    assert len(counts) == 6
    assert stats.chisquare(counts).pvalue > SMALL


def test_a_large_permutation_spreads_a_position_uniformly() -> None:
    size, keys = 90_001, 3000
    positions = np.array([0, 1, 2, 45_000, 89_999, 90_000])
    drawn = np.stack([KeyedPermutation(size, key)(positions) for key in range(keys)])
    bins = drawn * 40 // size
    for column in bins.T:
        assert stats.chisquare(np.bincount(column, minlength=40)).pvalue > SMALL
    for left, right in pairwise(range(positions.size)):
        table = np.zeros((8, 8))
        np.add.at(table, (drawn[:, left] * 8 // size, drawn[:, right] * 8 // size), 1)
        assert stats.chi2_contingency(table).pvalue > SMALL
        ascending = int((drawn[:, left] < drawn[:, right]).sum())
        assert stats.binomtest(ascending, keys).pvalue > SMALL
    # small offsets are what a weak mixing of the low digits would show in
    assert stats.chisquare(np.bincount(drawn[:, 0] % 16, minlength=16)).pvalue > SMALL


def test_a_large_permutation_does_not_correlate_with_the_positions() -> None:
    size, fixed_points = 90_001, 0
    bound = 5 / np.sqrt(size)
    for key in range(12):
        values = everything(size, key)
        fixed_points += int((values == np.arange(size)).sum())
        steps = np.diff(values)
        assert abs(np.corrcoef(values, np.arange(size))[0, 1]) < bound
        assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < bound
        assert abs(np.corrcoef(values[:-2], values[2:])[0, 1]) < bound
        assert stats.binomtest(int((steps > 0).sum()), size - 1).pvalue > 1e-9  # eulerian numbers: narrower still
        assert np.unique(steps).size > size / 2  # for a random permutation about 60 %; a shift has few
    assert fixed_points <= 30  # Poisson of mean 12


def test_pass_sampler_draws_each_element_once_per_pass() -> None:
    for size in (1, 10, TABLE + 5):
        sampler = PassSampler(size, seed=3, name="pool")
        passes = [sampler.draw(size) for _ in range(3)]
        for values in passes:
            assert np.array_equal(np.sort(values), np.arange(size))
        if size > 1:
            assert not np.array_equal(passes[0], passes[1])
            assert not np.array_equal(passes[1], passes[2])


def test_split_draws_equal_one_draw() -> None:
    whole = PassSampler(17, seed=3, name="pool").draw(100)
    sampler = PassSampler(17, seed=3, name="pool")
    parts = [sampler.draw(count) for count in (0, 1, 16, 5, 40, 38)]
    assert np.array_equal(np.concatenate(parts), whole)
    assert parts[0].dtype == np.int64
    assert np.array_equal(np.bincount(whole[:85]), np.full(17, 5))  # five whole passes


def test_pass_sampler_resumes_from_its_count() -> None:
    first = PassSampler(17, seed=3, name="pool")
    first.draw(23)
    second = PassSampler(17, seed=3, name="pool")
    second.drawn = first.drawn
    assert np.array_equal(first.draw(40), second.draw(40))


def test_pass_sampler_order_depends_on_seed_and_name() -> None:
    base = PassSampler(50, seed=3, name="pool").draw(50)
    assert not np.array_equal(base, PassSampler(50, seed=4, name="pool").draw(50))
    assert not np.array_equal(base, PassSampler(50, seed=3, name="domain/a").draw(50))


def test_pass_sampler_without_shuffling_keeps_the_natural_order() -> None:
    sampler = PassSampler(4, seed=3, name="pool", shuffle=False)
    assert sampler.draw(6).tolist() == [0, 1, 2, 3, 0, 1]
    assert sampler.draw(3).tolist() == [2, 3, 0]
