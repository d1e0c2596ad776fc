"""Whole samples from shares: counts stay within one of the exact sums after every round."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest
from numpy.typing import NDArray

from dataflex.data.apportion import LATER_ROUNDS, apportion

Floats = NDArray[np.float64]
NOTHING_KNOWN = np.empty(0, dtype=np.int64)


def errors(rounds: Iterator[tuple[Floats, int]], domains: int, later: int = LATER_ROUNDS) -> Iterator[Floats]:
    """Apportion rounds of the same size each, and yield exact sums minus sums of counts after every one."""
    owed, exact, counted = np.zeros(domains), np.zeros(domains), np.zeros(domains, dtype=np.int64)
    before: Floats | None = None
    for shares, size in rounds:
        same = before is None or np.array_equal(shares, before)
        found = apportion(owed, shares, size, size * np.arange(1, later + 1) if same else NOTHING_KNOWN)
        assert found.counts.sum() == size
        assert found.counts.min() >= 0
        assert not found.counts[shares == 0].any()
        owed, before = found.owed, shares
        exact, counted = exact + shares / shares.sum() * size, counted + found.counts
        assert np.abs(owed - (exact - counted)).max() < 1e-6
        yield exact - counted


def fixed(shares: Floats, size: int, rounds: int) -> Iterator[tuple[Floats, int]]:
    return ((shares, size) for _ in range(rounds))


ZIPF = 1 / np.arange(1, 23)


@pytest.mark.parametrize("size", [1, 2, 4, 7])
def test_counts_of_constant_shares_never_drift(size: int) -> None:
    worst = max(np.abs(each).max() for each in errors(fixed(ZIPF, size, 5000), 22))
    assert worst < 1 - 1e-6


def test_counts_of_one_domain_equal_a_computation_by_hand() -> None:
    # 5,000 rounds of 4 samples, a seventh of them: 2,857.14
    shares = np.array([1.0, 2.0, 4.0])
    *_, last = errors(fixed(shares, 4, 5000), 3, later=8)
    assert round(20_000 / 7 - last[0], 6) in (2857, 2858)
    owed, counts = np.zeros(2), []
    for _ in range(4):  # 0.5, 1.0, 1.5, 2.0 of either
        found = apportion(owed, np.array([1.0, 1.0]), 1, np.arange(1, 9))
        owed = found.owed
        counts.append(found.counts.tolist())
    assert counts == [[1, 0], [0, 1], [1, 0], [0, 1]]


def shapes(rng: np.random.Generator, number: int) -> Floats:
    size = int(rng.integers(2, 60))
    return (
        rng.dirichlet(np.full(size, 0.15)) + 1e-12,
        rng.dirichlet(np.full(size, 0.6)) + 1e-12,
        1 / np.arange(1, size + 1) ** rng.uniform(0.3, 2.5),
        np.r_[rng.integers(2, 9), np.full(size - 1, rng.uniform(0.1, 3) / size)],
        2.0 ** -np.minimum(np.arange(size), 20),
    )[number % 5]


def test_counts_of_constant_shares_of_any_shape_stay_within_one() -> None:
    rng = np.random.default_rng(3)
    for number in range(50):
        shares, size = shapes(rng, number), int(rng.choice([1, 1, 2, 3, 5, 16]))
        worst = max(np.abs(each).max() for each in errors(fixed(shares, size, 250), shares.size))
        assert worst < 1, (shares, size)


def test_rounding_by_the_largest_fraction_alone_exceeds_one() -> None:
    """The look-ahead is what keeps the promise; this case was found by search."""
    shares = np.array([22, 9, 9, 9, 9, 8, 6, 5, *[1] * 14], dtype=float)
    assert max(np.abs(each).max() for each in errors(fixed(shares, 2, 100), 22, later=0)) >= 1
    assert max(np.abs(each).max() for each in errors(fixed(shares, 2, 100), 22)) < 1


@pytest.mark.parametrize("spread", [1.0, 10.0])
@pytest.mark.parametrize("size", [4, 8])
def test_counts_of_changing_shares_stay_within_one(size: int, spread: float) -> None:
    rng = np.random.default_rng(1)
    rounds = ((rng.dirichlet(np.full(22, spread)), size) for _ in range(5000))
    assert max(np.abs(each).max() for each in errors(rounds, 22)) < 1


def test_counts_of_shares_that_move_slowly_or_in_steps_stay_within_one() -> None:
    angles = np.arange(22)
    waves = ((1.01 + np.sin(number / 7 + angles), 4) for number in range(3000))
    assert max(np.abs(each).max() for each in errors(waves, 22)) < 1
    rng = np.random.default_rng(2)
    steps = [rng.dirichlet(np.full(22, 0.5)) for _ in range(30)]
    assert max(np.abs(each).max() for each in errors(((steps[n // 100], 4) for n in range(3000)), 22)) < 1


def test_a_domain_of_a_small_share_gets_its_samples() -> None:
    shares = np.array([0.9, 0.0999, 0.0001])
    owed, got = np.zeros(3), []
    for number in range(5000):
        found = apportion(owed, shares, 4, 4 * np.arange(1, LATER_ROUNDS + 1))
        owed = found.owed
        got += [number] * int(found.counts[2])
    assert len(got) == 2  # of 20,000 samples
    assert got[0] < 2500 <= got[1]


def test_a_domain_of_share_zero_gets_no_sample_even_if_samples_are_owed() -> None:
    found = apportion(np.array([0.6, 0.3, -0.9]), np.array([0.0, 0.0, 1.0]), 1, NOTHING_KNOWN)
    assert found.counts.tolist() == [0, 0, 1]
    np.testing.assert_allclose(found.owed, [0.6, 0.3, -0.9])


def test_samples_owed_beyond_the_size_of_a_round_are_given_later() -> None:
    found = apportion(np.array([0.6, 0.5, -0.5, -0.6]), np.array([1.0, 1.0, 0.0, 0.0]), 1, NOTHING_KNOWN)
    assert found.counts.tolist() == [1, 0, 0, 0]
    np.testing.assert_allclose(found.owed.sum(), 0, atol=1e-12)


def test_counts_of_one_round_are_within_one_of_its_shares() -> None:
    rng = np.random.default_rng(5)
    for _ in range(500):
        shares = rng.random(rng.integers(1, 9)) * 10.0 ** rng.integers(-3, 6)
        shares[rng.random(shares.size) < 0.15] = 0
        if not shares.any():
            continue
        total = int(rng.integers(0, 5000))
        counts = apportion(np.zeros(shares.size), shares, total, NOTHING_KNOWN).counts.tolist()
        whole = sum(map(Fraction, shares.tolist()))
        for share, count in zip(shares.tolist(), counts, strict=True):
            assert abs(Fraction(share) * total / whole - count) < 1 + Fraction(1, 10**9)
        assert sum(counts) == total


def test_counts_stay_exact_for_a_million_samples_and_a_thousand_domains() -> None:
    shares = np.random.default_rng(0).dirichlet(np.ones(1000))
    later = 10**6 * np.arange(1, LATER_ROUNDS + 1)
    owed = np.zeros(1000)
    for _ in range(20):
        found = apportion(owed, shares, 10**6, later)
        owed = found.owed
        assert np.abs(owed).max() < 1
