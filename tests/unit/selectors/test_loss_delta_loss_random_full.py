"""The selectors loss (quantile focus), delta_loss (sliding window), random and full."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from dataflex.errors import ComponentError
from dataflex.selectors.delta_loss import DeltaLossSelector, window_start, window_weights
from dataflex.selectors.full import FullSelector
from dataflex.selectors.loss import LossSelector, focus_weights
from dataflex.selectors.random import RandomSelector
from unit.fakes import FakeProbe, build, context, decided, group_of, make_pool

N = 3000


def shuffled_losses(seed: int = 0) -> np.ndarray:
    """The numbers 0 to N - 1 in a random order: the loss of a sample is its rank."""
    return np.random.default_rng(seed).permutation(N).astype(np.float32)


# loss


@pytest.mark.parametrize("focus, low, high", [("low", 0, 0.33), ("medium", 0.33, 0.66), ("high", 0.66, 1)])
def test_focused_part_gets_its_expected_share(focus: str, low: float, high: float) -> None:
    losses, pool = shuffled_losses(), make_pool({"a": N})
    selector = build(LossSelector, focus=focus)
    inside, rounds, budget = 0, 150, 30
    for number in range(rounds):
        selection = decided(selector, context(pool, losses, round=number), group_of(pool, budget))
        assert np.array_equal(selection.scores, losses[selection.indices])
        assert np.unique(selection.indices).size == budget
        inside += int(((selection.scores >= low * N) & (selection.scores <= high * N)).sum())
    part = high - low
    share = 5 * part / (5 * part + 1 - part)  # .711 for thirds
    draws = rounds * budget
    assert abs(inside / draws - share) < 4 * np.sqrt(share * (1 - share) / draws)


def test_weights_of_six_samples_equal_a_computation_by_hand() -> None:
    losses = np.array([5, 1, 3, np.nan, 2, 4], dtype=np.float32)
    # sorted 1 2 3 4 5: quantiles .25 and .75 are 2 and 4; low is <= 2, medium is <= 4
    params = LossSelector.Params(focus="medium", quantiles=(0.25, 0.75))
    assert focus_weights(losses, params).tolist() == [1, 1, 5, 0, 1, 5]
    low = LossSelector.Params(focus="low", quantiles=(0.25, 0.75), focus_weight=9)
    assert focus_weights(losses, low).tolist() == [1, 9, 1, 0, 9, 1]
    high = LossSelector.Params(focus="high", quantiles=(0.25, 0.75), focus_weight=0.5)
    assert focus_weights(losses, high).tolist() == [0.5, 1, 1, 0, 1, 1]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("temperature", [0.1, 0.01, 0.001])
def test_a_low_temperature_draws_from_the_focused_part_alone(temperature: float) -> None:
    losses, pool = shuffled_losses(), make_pool({"a": N})
    selector = build(LossSelector, focus="high", temperature=temperature)
    drawn = [decided(selector, context(pool, losses, round=number), group_of(pool, 30)) for number in range(2)]
    for selection in drawn:
        assert selection.scores.min() >= 0.65 * N
    assert np.intersect1d(drawn[0].indices, drawn[1].indices).size < 10  # at random within it


def test_samples_without_a_loss_are_left_out_and_counted() -> None:
    losses = shuffled_losses()
    losses[::3] = np.nan
    pool = make_pool({"a": N})
    selection = decided(build(LossSelector), context(pool, losses), group_of(pool, N // 2))
    assert selection.unscored == N // 3
    assert not np.isin(selection.indices, np.arange(0, N, 3)).any()
    assert np.isfinite(selection.scores).all()


def test_too_few_samples_with_a_loss_is_an_error_that_counts_them() -> None:
    pool = make_pool({"a": 6})
    losses = [1, np.nan, 2, np.nan, np.nan, 3]
    assert decided(build(LossSelector), context(pool, losses), group_of(pool, 3)).indices.tolist() == [0, 2, 5]
    with pytest.raises(ComponentError, match=r"4 samples.* only 3 of 6"):
        decided(build(LossSelector), context(pool, losses), group_of(pool, 4))
    with pytest.raises(ComponentError, match="only 0 of 6"):
        decided(build(LossSelector), context(pool, [np.nan] * 6), group_of(pool, 1))


def test_loss_scores_only_its_group() -> None:
    pool, probe = make_pool({"a": 10, "b": 10}), FakeProbe(np.arange(20))
    selection = decided(build(LossSelector), context(pool, probe=probe), group_of(pool, 4, start=10))
    assert [asked.tolist() for asked in probe.asked] == [list(range(10, 20))]
    assert selection.indices.min() >= 10


@pytest.mark.parametrize("quantiles", [(0.5, 0.5), (0.7, 0.3), (0, 0.5), (0.5, 1), (0.1, 0.2, 0.3)])
def test_bad_quantiles_are_refused(quantiles: tuple[float, ...]) -> None:
    with pytest.raises(ValidationError):
        LossSelector.Params(quantiles=quantiles)


# delta_loss


@pytest.mark.parametrize("update, start", [(2, 7.5), (10, 104.4), (16, 434.4), (25, 770.9), (30, 794.6)])
def test_the_start_of_the_window_has_the_golden_numbers(update: int, start: float) -> None:
    assert window_start(update, 30, 1000, 0.2) == pytest.approx(start, abs=0.05)


def test_window_moves_from_the_fastest_to_the_slowest() -> None:
    delta = np.random.default_rng(1).permutation(1000).astype(float)  # rank r has delta 999 - r
    params = DeltaLossSelector.Params()
    for update, first, last in [(2, 7, 206), (10, 104, 303), (16, 434, 633), (30, 794, 993)]:
        weights = window_weights(delta, update, 30, params)
        assert sorted(set(weights.tolist())) == [0.025, 1.0]
        ranks = 999 - delta[weights == 1]
        assert ranks.min() == first
        assert ranks.max() == last
        assert ranks.size == last - first + 1


@pytest.mark.parametrize(
    "size, update, decisions, window_size, first, last",
    [
        (12, 2, 4, 0.2, 1, 2),  # 1.5 to 3.9
        (12, 3, 4, 0.2, 8, 9),  # 8.1 to 10.5
        (200, 2, 3, 0.07, 93, 106),  # 93 to 107, although 0.93 * 200 / 2 is less than 93 in floating point
        (3, 1, 4, 0.2, 0, 0),  # a window shorter than a rank is one rank
        (3, 4, 4, 0.2, 2, 2),
        (5, 1, 2, 1.0, 0, 4),
    ],
)
def test_window_has_its_share_of_the_ranks(
    size: int, update: int, decisions: int, window_size: float, first: int, last: int
) -> None:
    delta = np.arange(size, 0.0, -1.0)
    weights = window_weights(delta, update, decisions, DeltaLossSelector.Params(window_size=window_size))
    assert np.flatnonzero(weights == 1).tolist() == list(range(first, last + 1))


def test_window_ends_at_the_first_negative_delta() -> None:
    delta = np.linspace(1, -1, 1000)  # 500 samples learned, 500 unlearned
    params = DeltaLossSelector.Params()
    weights = window_weights(delta, 16, 30, params)  # window [434, 634)
    assert np.flatnonzero(weights == 1).tolist() == list(range(434, 500))
    assert np.all(window_weights(delta, 25, 30, params) == 0.025)  # begins at 771: nothing left inside


def test_samples_that_did_not_change_do_not_end_the_window() -> None:
    weights = window_weights(np.zeros(100), 16, 30, DeltaLossSelector.Params())
    assert np.flatnonzero(weights == 1).tolist() == list(range(43, 63))  # 43.4 to 63.4


def test_samples_without_a_loss_have_no_rank_and_no_weight() -> None:
    delta = np.array([np.nan, 3, np.nan, 2, 1, 0])
    # 4 samples have a rank; the middle of three decisions begins at rank 1 of them: ranks 1 and 2
    weights = window_weights(delta, 2, 3, DeltaLossSelector.Params(window_size=0.5))
    assert weights.tolist() == [0, 0.025, 0, 1, 1, 0.025]


def test_first_decision_is_uniform_and_stores_the_losses() -> None:
    pool, losses = make_pool({"a": 40}), np.arange(40, dtype=np.float32)
    counts = np.zeros(40)
    rounds = 2000
    for number in range(rounds):
        selector = build(DeltaLossSelector)
        selection = decided(selector, context(pool, losses, round=number, num_updates=9), group_of(pool, 4))
        assert not selection.scores.any()
        counts[selection.indices] += 1
    assert np.all(np.abs(counts / rounds - 0.1) < 4.5 * np.sqrt(0.09 / rounds))
    assert np.array_equal(selector.state_dict()["baseline"], losses)


def second_decision(selector: DeltaLossSelector, first: np.ndarray, then: np.ndarray, budget: int = 300) -> np.ndarray:
    """Return how often each sample is drawn in 200 second decisions out of three."""
    pool = make_pool({"a": first.size})
    decided(selector, context(pool, first, num_updates=3), group_of(pool, budget))
    counts = np.zeros(first.size)
    for number in range(200):
        ctx = context(pool, then, round=number, update=1, num_updates=3)
        counts[decided(selector, ctx, group_of(pool, budget)).indices] += 1
    return counts


def test_second_decision_draws_from_the_window() -> None:
    # the second of three decisions is in the middle: ranks 400 to 599
    first = np.full(1000, 10, dtype=np.float32)
    then = np.linspace(0, 9, 1000, dtype=np.float32)  # delta falls from 10 to 1
    counts = second_decision(build(DeltaLossSelector), first, then, budget=20)
    inside = counts[400:600].sum() / counts.sum()
    assert inside == pytest.approx(200 / (200 + 800 * 0.025), abs=0.02)  # .909 for the first draw


def test_relative_deltas_rank_by_the_share_of_the_loss_that_fell() -> None:
    # absolute falls 1 for all; relative falls from large (small first loss) to small
    first = np.linspace(2, 20, 1000, dtype=np.float32)
    counts = second_decision(build(DeltaLossSelector, relative=True), first, first - 1, budget=20)
    assert counts[400:600].sum() / counts.sum() > 0.85
    ctx = context(make_pool({"a": 1000}), first - 1, update=1, num_updates=3)
    selector = build(DeltaLossSelector, relative=True)
    selector.load_state_dict({"baseline": first})
    selection = decided(selector, ctx, group_of(ctx.pool, 50))
    np.testing.assert_allclose(selection.scores, 1 / first[selection.indices], rtol=1e-4)


def test_scores_are_the_falls_and_losses_that_vanish_are_counted() -> None:
    pool = make_pool({"a": 6})
    selector = build(DeltaLossSelector)
    selector.load_state_dict({"baseline": np.array([3, 3, 3, np.nan, 3, 3], dtype=np.float32)})
    pool.__dict__["trained"][3] = False
    ctx = context(pool, [1, 2, 3, 1, np.nan, 4], update=1, num_updates=2)
    selection = decided(selector, ctx, group_of(pool, 4))
    assert dict(zip(selection.indices.tolist(), selection.scores.tolist(), strict=True)) == {0: 2, 1: 1, 2: 0, 5: -1}
    assert selection.unscored == 2


def test_a_single_decision_does_not_divide_by_zero() -> None:
    pool = make_pool({"a": 10})
    selection = decided(build(DeltaLossSelector), context(pool, np.ones(10), num_updates=1), group_of(pool, 3))
    assert np.unique(selection.indices).size == 3
    assert np.isfinite(window_weights(np.arange(10.0), 1, 1, DeltaLossSelector.Params())).all()


def test_a_resumed_selector_decides_exactly_as_before() -> None:
    pool, rng = make_pool({"a": 50}), np.random.default_rng(2)
    first, then = rng.random(50), rng.random(50)
    selector, other = build(DeltaLossSelector), build(DeltaLossSelector)
    assert selector.state_dict() == {}
    other.load_state_dict({})
    decided(selector, context(pool, first, num_updates=3), group_of(pool, 5))
    other.load_state_dict(selector.state_dict())
    ctx = {"round": 1, "update": 1, "num_updates": 3}
    here = decided(selector, context(pool, then, **ctx), group_of(pool, 20))
    there = decided(other, context(pool, then, **ctx), group_of(pool, 20))
    assert np.array_equal(here.indices, there.indices)
    assert np.array_equal(here.scores, there.scores)


def test_each_domain_keeps_its_own_first_losses() -> None:
    pool = make_pool({"a": 10, "b": 10})
    selector = build(DeltaLossSelector)
    decided(selector, context(pool, np.full(20, 5.0), num_updates=5), group_of(pool, 2, 0, 10))
    later = context(pool, np.full(20, 4.0), update=1, num_updates=5)
    assert decided(selector, later, group_of(pool, 2, 0, 10)).scores.tolist() == [1, 1]
    # the second domain appears now: a first, uniform decision
    assert not decided(selector, later, group_of(pool, 2, 10, 20)).scores.any()
    assert selector.state_dict()["baseline"].tolist() == [5.0] * 10 + [4.0] * 10


# random and full


def test_random_draws_uniformly_without_replacement() -> None:
    pool = make_pool({"a": 5, "b": 40})
    counts = np.zeros(45)
    rounds = 2000
    for number in range(rounds):
        indices = decided(build(RandomSelector), context(pool, round=number), group_of(pool, 4, start=5)).indices
        assert np.unique(indices).size == 4
        counts[indices] += 1
    assert np.all(counts[:5] == 0)
    assert np.all(np.abs(counts[5:] / rounds - 0.1) < 4.5 * np.sqrt(0.09 / rounds))


def test_random_takes_everything_before_anything_twice() -> None:
    pool = make_pool({"a": 7})
    indices = decided(build(RandomSelector), context(pool), group_of(pool, 17)).indices
    assert sorted(np.bincount(indices).tolist()) == [2, 2, 2, 2, 3, 3, 3]


def test_full_continues_the_pass() -> None:
    pool = make_pool({"a": 10})
    group = group_of(pool, 6)
    parts = [decided(build(FullSelector), context(pool, round=number), group).indices for number in range(5)]
    assert np.bincount(np.concatenate(parts)).tolist() == [3] * 10
    assert np.unique(np.concatenate(parts)[:10]).size == 10
