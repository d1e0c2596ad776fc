"""Intervals, p values and their correction, and the sentences about the conclusions that they support."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from dataflex.compare.statistics import (
    LEVEL,
    Difference,
    bootstrap_interval,
    corrected,
    correction_line,
    difference,
    holm,
    sentence,
    t_interval,
    t_test,
)


def test_t_interval_of_known_numbers() -> None:
    # Mean 2, standard deviation 1, and 4.302653 is the 97.5 % quantile of Student's t with 2 degrees of freedom.
    low, high = t_interval(np.array([1.0, 2.0, 3.0]))
    assert low == pytest.approx(2 - 4.302653 / math.sqrt(3), abs=1e-5)
    assert high == pytest.approx(2 + 4.302653 / math.sqrt(3), abs=1e-5)


@pytest.mark.parametrize("seeds", [2, 3, 30])
def test_the_t_test_equals_that_of_scipy(seeds: int) -> None:
    differences = np.random.default_rng(seeds).normal(1.0, 2.0, (20, seeds))
    expected = stats.ttest_1samp(differences, 0.0, axis=-1)
    interval = expected.confidence_interval(0.95)
    low, high, p_values = t_test(differences)
    np.testing.assert_allclose(p_values, expected.pvalue, rtol=1e-9)
    np.testing.assert_allclose(low, interval.low, rtol=1e-9)
    np.testing.assert_allclose(high, interval.high, rtol=1e-9)


def test_bootstrap_interval_of_all_resamples() -> None:
    values = np.array([0.0, 1.0, 3.0, 4.5, 9.0])
    means = [np.mean(drawn) for drawn in itertools.product(values, repeat=5)]
    low, high = bootstrap_interval(values, 50_000)
    assert (low, high) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.11)


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_t_intervals_cover_the_truth_at_their_stated_rate(seeds: int) -> None:
    differences = np.random.default_rng(seeds).normal(0.3, 2.0, (2000, seeds))
    low, high = t_interval(differences)
    assert 0.93 <= np.mean((low <= 0.3) & (high >= 0.3)) <= 0.97


def test_the_bootstrap_covers_the_truth_with_many_seeds_only() -> None:
    rng = np.random.default_rng(1)
    covered = {}
    for seeds in (3, 40):
        low, high = bootstrap_interval(rng.normal(0.3, 2.0, (1000, seeds)), 499)
        covered[seeds] = np.mean((low <= 0.3) & (high >= 0.3))
    assert 0.93 <= covered[40] <= 0.97
    assert covered[3] < 0.85  # why nothing is concluded from it


@pytest.mark.parametrize(
    "p_values, expected",
    [
        ([], []),
        ([0.03], [0.03]),
        # 3 x 0.01, 2 x 0.02, 1 x 0.04.
        ([0.02, 0.04, 0.01], [0.04, 0.04, 0.03]),
        # 4 x 0.005 = 0.02, 3 x 0.011 = 0.033, 2 x 0.02 = 0.04, and 0.04.
        ([0.005, 0.011, 0.02, 0.04], [0.02, 0.033, 0.04, 0.04]),
        # 3 x 0.03 = 0.09 is more than 2 x 0.035 = 0.07: a larger p value never gets the smaller corrected one.
        ([0.01, 0.03, 0.035, 0.2], [0.04, 0.09, 0.09, 0.2]),
        ([0.9, 0.5, 0.5], [1.0, 1.0, 1.0]),
        ([0.0, 1.0], [0.0, 1.0]),
    ],
)
def test_holms_correction_of_known_p_values(p_values: list[float], expected: list[float]) -> None:
    assert holm(np.array(p_values)).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5, 6])
def test_holms_correction_is_the_closed_test_of_bonferroni(number: int) -> None:
    """A hypothesis is rejected if every set with it is: if a p value of the set is at most the level over its size."""
    rng = np.random.default_rng(number)
    for _ in range(40):
        p_values = rng.choice([*rng.uniform(0, 0.1, 4), 0.02, 0.5], number)  # with ties
        sets = [chosen for size in range(1, number + 1) for chosen in itertools.combinations(range(number), size)]
        expected = [
            max(min(1.0, len(chosen) * min(p_values[i] for i in chosen)) for chosen in sets if own in chosen)
            for own in range(number)
        ]
        np.testing.assert_allclose(holm(p_values), expected)


OTHERS = {1: 1.0, 2: 2.0, 3: 3.0, 4: 9.0}


@pytest.mark.parametrize(
    "higher, own, finding, said",
    [
        (False, [0.9, 1.88, 2.92], "better", "a: token-weighted loss 0.1000 lower than b at 9 steps, 3"),
        (False, [1.1, 2.12, 3.08], "worse", "0.1000 higher than b"),
        (True, [1.1, 2.12, 3.08], "better", "0.1000 higher than b"),
        (True, [0.9, 1.88, 2.92], "worse", "0.1000 lower than b"),
        (None, [1.1, 2.12, 3.08], "no claim", "no claim, because it is unknown whether higher or lower is better"),
        (False, [1.1, 1.9, 3.0], "unclear", "3 seeds show no clear difference from b (mean +0"),
        (False, [1.5], "no claim", "a (1 of 3 seeds): token-weighted loss 0.5000 higher than b for the only seed comp"),
        (
            False,
            [1.5, 2.5],
            "no claim",
            "a (2 of 3 seeds): token-weighted loss 0.5000 higher than b for each of 2 seeds",
        ),
        (False, [], "no data", "there is no seed for which both have a value"),
    ],
)
def test_sentences_state_only_conclusions_that_the_interval_supports(
    higher: bool | None, own: list[float], finding: str, said: str
) -> None:
    (found,) = corrected([compared(own, higher)])
    assert found.finding == finding
    text = sentence(found, "9 steps", 3, 1)
    assert said in text
    if found.interval is not None:
        test = stats.ttest_rel(own, [1.0, 2.0, 3.0])
        expected = test.confidence_interval(0.95)
        assert found.interval == pytest.approx((expected.low, expected.high))
        assert found.p_holm == found.p_value == pytest.approx(test.pvalue)
        assert ("cannot be ruled out" in text) == (expected.low <= 0 <= expected.high)
        if finding == "unclear":
            assert f"as large as {max(-expected.low, expected.high):.4f}" in text
    else:
        assert (found.p_value, found.p_holm, found.bootstrap) == (None, None, None)


def compared(own: list[float], higher: bool | None = False) -> Difference:
    return difference("a", "b", "token_weighted_loss", dict(zip((1, 2, 3), own, strict=False)), OTHERS, higher)


def test_only_seeds_of_both_are_paired() -> None:
    found = difference("a", "b", "x_loss", {1: 1.0, 2: 5.0, 4: 7.0}, {2: 4.0, 3: 0.0, 4: 5.5}, False)
    assert (found.seeds, found.values, found.mean) == ((2, 4), (1.0, 1.5), 1.25)


@pytest.mark.parametrize("higher", [False, None])
def test_a_difference_that_stands_out_alone_only_is_unclear(higher: bool | None) -> None:
    alone = compared([0.9, 1.88, 2.92], higher)
    no_spread, one_seed = compared([1.5, 2.5]), compared([1.5])
    assert alone.p_value == pytest.approx(0.0131, abs=1e-4)
    found = corrected([no_spread, *[replace(alone, variant=str(i)) for i in range(4)], one_seed])
    assert found[0] == no_spread  # without p values, they are not counted
    assert found[-1] == one_seed
    for each in found[1:-1]:
        assert each.p_holm == pytest.approx(4 * alone.p_value)
        assert each.finding == "unclear"
        assert (each.interval, each.p_value) == (alone.interval, alone.p_value)  # each alone, as before
    assert sentence(found[1], "9 steps", 3, 4) == (
        "0: token-weighted loss 0.1000 lower than b at 9 steps, 3 seeds, 95 % interval [-0.1497, -0.0503]: stands out "
        "alone, but not after correction for 4 comparisons (p 0.0131, corrected 0.0523), so it is unclear."
    )
    three = corrected([no_spread, *[alone] * 3, one_seed])
    assert {each.finding for each in three[1:-1]} == {"better" if higher is False else "no claim"}


def test_the_correction_is_said_in_words() -> None:
    assert correction_line(1).startswith("1 comparison was made, and findings hold after Holm's correction")
    assert correction_line(12).startswith("12 comparisons were made")
    assert correction_line(12).endswith(
        "if no variant really differed, at most 5 % of such tables would have any finding."
    )


def table(rng: np.random.Generator, seeds: int, effect: float = 0.0) -> tuple[Difference, ...]:
    """Return the differences of nine variants from one baseline in two correlated metrics.

    A value is an effect of the seed, which all variants share, and noise. ``effect`` is subtracted from one variant's.
    """
    shared = rng.normal(0, 1.0, seeds)
    noise = rng.normal(0, 0.1, (10, seeds, 2))  # (variant, seed, metric)
    noise[..., 1] = 0.8 * noise[..., 0] + 0.6 * noise[..., 1]  # a correlation of 0.8
    values = 2.0 + shared[:, None] + noise
    values[1] -= effect
    by_seed = [[dict(enumerate(values[v, :, m].tolist(), 1)) for m in (0, 1)] for v in range(10)]
    return corrected(
        [
            difference(f"v{v}", "v0", f"m{m}_loss", by_seed[v][m], by_seed[0][m], False)
            for v in range(1, 10)
            for m in (0, 1)
        ]
    )


@pytest.mark.parametrize("seeds", [3, 5])
def test_without_an_effect_few_tables_have_a_finding(seeds: int) -> None:
    rng = np.random.default_rng(seeds)
    tables = [table(rng, seeds) for _ in range(500)]
    with_finding = np.mean([any(each.finding in ("better", "worse") for each in found) for found in tables])
    alone = np.mean([any((each.p_value or 0) < LEVEL for each in found) for found in tables])
    assert with_finding <= 0.05
    assert alone > 0.2  # without the correction


def test_a_large_effect_is_found() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        found = table(rng, 5, effect=3.0)  # thirty times the noise of a run
        assert [each.finding for each in found[:2]] == ["better", "better"]
