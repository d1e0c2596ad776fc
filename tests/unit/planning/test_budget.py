"""The policy of the overhead limit: how many candidates are scored, which ones, and estimates for the others."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

from dataflex.planning.budget import NEVER, Budget, Costs, ScoreBook, affordable, draw_by_rule

HALF = Budget(max_overhead=0.5, safety=1.0, minimum=4)


def costs(**changes: Any) -> Costs:
    """100 s for 10 steps, nothing spent on decisions, 1 s a sample, 5 s a decision."""
    return replace(Costs(100.0, 10, 0.0, 1.0, 5.0), **changes)


def allowed(given: Costs, budget: Budget = HALF, **changes: Any) -> int:
    defaults: dict[str, Any] = {"round_steps": 10, "remaining_steps": 100, "candidates": 1000, "has_scores": True}
    return affordable(given, budget, **(defaults | changes))


def test_the_allowance_is_the_cap_times_all_training_minus_past_decisions() -> None:
    assert allowed(costs()) == 95  # 0.5 x (100 + 100) - 0 - 5
    assert allowed(costs(decision_seconds=60.0)) == 35
    assert allowed(costs(), round_steps=20) == 145
    assert allowed(costs(), replace(HALF, safety=0.8)) == 75
    assert allowed(costs(seconds_per_sample=2.0)) == 47
    assert allowed(costs(step_seconds=2.0)) == 55
    assert allowed(costs(), candidates=30) == 30


def test_a_decision_not_worth_its_fixed_cost_is_skipped_and_saves_its_allowance() -> None:
    assert allowed(costs(decision_seconds=97.0)) == 0  # 3 s are left, 5 s are fixed
    assert allowed(costs(decision_seconds=91.0)) == 0  # 4 samples, but less on them than on the rest
    assert allowed(costs(decision_seconds=91.0, fixed_seconds=4.0)) == 5
    assert allowed(costs(decision_seconds=91.0), round_steps=11) == 9  # a little later
    assert allowed(costs(decision_seconds=400.0)) == 0


def test_the_last_decision_saves_nothing() -> None:
    assert allowed(costs(decision_seconds=91.0), remaining_steps=10) == 4
    assert allowed(costs(decision_seconds=92.0), remaining_steps=10) == 0  # fewer than the minimum


def test_a_first_decision_takes_an_advance_that_later_ones_pay_back() -> None:
    dear = costs(train_seconds=0.0, train_steps=0, step_seconds=1.0, seconds_per_sample=2.0, fixed_seconds=30.0)
    assert allowed(dear, has_scores=True) == 0
    assert allowed(dear, has_scores=False) == 10  # of the run's 50 s, 30 are fixed
    assert allowed(dear, has_scores=False, remaining_steps=200) == 15  # no more than makes it worth its fixed cost
    assert allowed(dear, has_scores=False, remaining_steps=70) == 0  # not even the minimum
    afterwards = costs(train_seconds=10.0, decision_seconds=44.0, seconds_per_sample=2.0, fixed_seconds=30.0)
    assert allowed(afterwards, remaining_steps=90) == 0


def test_nothing_is_spent_before_a_step_was_timed() -> None:
    assert allowed(costs(train_seconds=0.0, train_steps=0), has_scores=False) == 0


def test_few_candidates_count_as_all_of_them() -> None:
    assert allowed(costs(decision_seconds=93.0), candidates=2) == 2


@pytest.mark.parametrize(
    "changes", [{"max_overhead": 0.0}, {"safety": 1.1}, {"safety": 0.0}, {"minimum": 0}, {"prior": 0.0}]
)
def test_bad_parameters_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        Budget(**({"max_overhead": 0.25} | changes))


def test_a_sample_must_cost_something() -> None:
    with pytest.raises(ValueError, match="seconds_per_sample"):
        allowed(costs(seconds_per_sample=0.0))


def overhead(rng: np.random.Generator, *, warmup: int, fixed: float, noise: float = 0.3) -> float:
    """Decision seconds over training seconds of a run of 12 rounds of 50 steps with a cap of 0.25.

    Scoring the pool takes ten times a round's training. Every duration has log-normal noise, and what is measured of a
    sample's cost is that of the decisions before (of a small calibration before the first).
    """

    def noisy(seconds: float) -> float:
        return seconds * float(rng.lognormal(-(noise**2) / 2, noise))

    budget, pool, per_sample = Budget(0.25), 10_000, 10 * 50 / 10_000
    train, decided = sum(noisy(1.0) for _ in range(warmup)), noisy(20 * per_sample)
    scored, scoring = 20, decided
    total = warmup + 12 * 50
    for start in range(warmup, total, 50):
        known = Costs(train, start, decided, scoring / scored, fixed, step_seconds=None if start else noisy(1.0))
        count = affordable(
            known, budget, round_steps=50, remaining_steps=total - start, candidates=pool, has_scores=scored > 20
        )
        if count:
            spent = noisy(count * per_sample)
            scored, scoring, decided = scored + count, scoring + spent, decided + spent + noisy(fixed)
        train += sum(noisy(1.0) for _ in range(50))
    return decided / train


@pytest.mark.parametrize("warmup", [0, 50])
@pytest.mark.parametrize("fixed", [0.5, 4.0, 12.0])
def test_runs_of_a_selector_that_would_cost_ten_times_training_end_under_the_cap(warmup: int, fixed: float) -> None:
    rng = np.random.default_rng(0)
    ends = np.array([overhead(rng, warmup=warmup, fixed=fixed) for _ in range(200)])
    assert ends.max() <= 0.3
    assert np.mean(ends <= 0.25) > 0.9
    assert ends.min() >= 0.15


def test_without_noise_a_run_spends_the_planned_seconds() -> None:
    assert overhead(np.random.default_rng(0), warmup=0, fixed=2.0, noise=0.0) == pytest.approx(0.9 * 0.25, abs=0.001)


BUDGET = Budget(0.25)


def book_of(clusters: Any, budget: Budget = BUDGET) -> ScoreBook:
    return ScoreBook(np.asarray(clusters, dtype=np.int32), budget)


def test_a_pick_is_distinct_and_in_proportion_to_the_clusters() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        clusters = rng.integers(0, rng.integers(1, 9), 60).astype(np.int32)
        candidates = rng.permutation(60)[: rng.integers(1, 61)]
        count = int(rng.integers(0, 70))
        picked = book_of(clusters).pick(candidates, count, rng)
        assert picked.size == min(count, candidates.size)
        assert np.array_equal(picked, np.unique(picked))
        assert np.isin(picked, candidates).all()
        exact = np.bincount(clusters[candidates], minlength=9) * picked.size / candidates.size
        assert (np.abs(np.bincount(clusters[picked], minlength=9) - exact) < 1).all()


def test_candidates_of_small_and_large_clusters_are_equally_likely_to_be_picked() -> None:
    clusters = np.repeat(np.arange(10), [40, 20, 1, 1, 10, 3, 2, 1, 1, 1])
    rng = np.random.default_rng(2)
    times = np.zeros(80)
    for _ in range(4000):
        times[book_of(clusters).pick(np.arange(80), 6, rng)] += 1
    assert times / 4000 == pytest.approx(6 / 80, abs=4.5 * np.sqrt(6 / 80 / 4000))


def test_candidates_without_a_score_are_picked_first_then_the_oldest_scores() -> None:
    book = book_of(np.zeros(12))
    candidates, rng = np.arange(12), np.random.default_rng(3)
    seen: list[int] = []
    for update in range(3):
        picked = book.pick(candidates, 4, rng)
        seen += picked.tolist()
        book.record(picked, np.arange(4, dtype=np.float32), update)
    assert sorted(seen) == list(range(12))
    again = book.pick(candidates, 6, rng)
    assert set(seen[:4]) < set(again.tolist()) < set(seen[:8])


def test_samples_without_a_score_are_never_picked_again() -> None:
    book = book_of([0, 0, 1, 1])
    book.record(np.array([0, 2]), np.array([np.nan, 1.0], dtype=np.float32), 0)
    assert book.pick(np.arange(4), 4, np.random.default_rng(0)).tolist() == [1, 2, 3]
    assert book.unscorable(np.arange(4)).tolist() == [True, False, False, False]
    assert book.has_scores(np.array([2, 3]))
    assert not book.has_scores(np.array([0, 1, 3]))


def test_a_pick_depends_on_its_arguments_alone() -> None:
    book = book_of(np.arange(1000) % 7)
    first, second, other = (book.pick(np.arange(1000), 90, np.random.default_rng(seed)) for seed in (5, 5, 6))
    assert np.array_equal(first, second)
    assert not np.array_equal(first, other)


def test_a_score_expires_when_enough_newer_scores_exist() -> None:
    book = book_of(np.zeros(1000))
    everyone = np.arange(1000)
    for update in range(6):
        book.record(np.arange(100 * update, 100 * update + 100), np.zeros(100, dtype=np.float32), update)
    assert [book.max_age(everyone, wanted, 5) for wanted in (1, 25, 26, 75, 76, 900)] == [1, 1, 2, 3, 4, 6]
    assert book.max_age(everyone, 25, 7) == 3  # decisions 6 and 7 were skipped
    assert book.max_age(np.arange(200), 25, 5) == 5  # of these candidates, decision 1 scored the latest
    assert book_of(np.zeros(3)).max_age(np.arange(3), 1, 0) == 1


def test_samples_without_a_score_do_not_count_as_scored() -> None:
    book = book_of(np.zeros(20), Budget(0.25, coverage=1.0))
    book.record(np.arange(10), np.zeros(10, dtype=np.float32), 0)
    book.record(np.arange(10, 20), np.array([1.0] * 5 + [np.nan] * 5, dtype=np.float32), 1)
    assert book.max_age(np.arange(20), 5, 1) == 1
    assert book.max_age(np.arange(20), 6, 1) == 2


def test_estimates_equal_a_computation_by_hand() -> None:
    book = book_of([0, 0, 0, 1, 1, 2, 3, 3], Budget(0.25, prior=1.0))
    # Decision 0: mean 20, deviation 10. Decision 1: mean 3, deviation 2, on a scale of its own.
    book.record(np.array([0, 3, 6]), np.array([10, 30, np.nan], dtype=np.float32), 0)
    book.record(np.array([1, 4]), np.array([1, 5], dtype=np.float32), 1)
    everyone = np.arange(8)
    # Own z-scores -1, -1 in cluster 0 and 1, 1 in cluster 1; mean of all 0; two samples against a prior of one.
    both = book.estimates(everyone, 1, 2)
    assert both.dtype == np.float32
    np.testing.assert_allclose(both, [-1, -1, -2 / 3, 1, 1, 0, np.nan, 0], rtol=1e-6)
    # Only decision 1 counts: samples 0 and 3 are estimated as the rest of their clusters are.
    np.testing.assert_allclose(book.estimates(everyone, 1, 1), [-0.5, -1, -0.5, 0.5, 1, 0, np.nan, 0], rtol=1e-6)
    # The mean of all is that of the candidates' own scores.
    np.testing.assert_allclose(book.estimates(np.array([5, 3, 4, 2]), 1, 2), [1, 1, 1, 1], rtol=1e-6)
    assert book_of([0, 1]).estimates(np.arange(2), 0, 1).tolist() == [0, 0]


@pytest.mark.parametrize("values", [[3.3, 3.3, 3.3], [7.0], [0.0, 0.0]])
def test_equal_scores_give_equal_estimates(values: list[float]) -> None:
    book = book_of(np.zeros(4))
    book.record(np.arange(len(values)), np.array(values, dtype=np.float32), 0)
    assert book.estimates(np.arange(4), 0, 1).tolist() == [0, 0, 0, 0]


def test_bad_scores_are_refused() -> None:
    book = book_of(np.zeros(4))
    with pytest.raises(ValueError, match="pool index 2 is infinite"):
        book.record(np.array([1, 2]), np.array([1, np.inf], dtype=np.float32), 0)
    with pytest.raises(ValueError, match="2 samples were scored"):
        book.record(np.array([1, 2]), np.zeros(3, dtype=np.float32), 0)
    assert (book.scored_at == NEVER).all()


def test_the_best_estimates_are_chosen_and_ties_are_random() -> None:
    book = book_of([0] * 4 + [1] * 96)
    book.record(np.array([0, 1, 4, 5]), np.array([9, 8, 1, 2], dtype=np.float32), 0)
    drawn = set()
    for seed in range(200):
        book.used[:] = False
        chosen, estimated = book.choose(np.arange(100), 3, 0, np.random.default_rng(seed), draw=draw_by_rule)
        assert {0, 1} < set(chosen.tolist())
        assert np.array_equal(chosen, np.unique(chosen))
        assert estimated == pytest.approx(book.estimates(chosen, 0, 1), abs=0.5)
        drawn |= set(chosen.tolist())
    assert drawn == {0, 1, 2, 3}


def test_the_temperature_controls_how_draws_prefer_better_estimates() -> None:
    book = book_of(np.repeat([0, 1], 500))
    book.record(np.arange(0, 1000, 2), np.repeat(np.float32([1, 2]), 250), 0)
    everyone = np.arange(1000)

    def share(temperature: float) -> float:
        draw = partial(draw_by_rule, rule="sample", temperature=temperature)
        chosen, _ = book.choose(everyone, 100, 0, np.random.default_rng(1), draw=draw)
        assert np.unique(chosen).size == 100
        return float(np.mean(chosen >= 500))

    assert share(0.05) > 0.98
    assert 0.75 < share(1.0) < 0.95  # exp(2) against 1, less what was drawn already
    assert 0.35 < share(1e6) < 0.65


def test_with_nothing_scored_the_choice_is_random() -> None:
    book = book_of(np.arange(100) % 5)
    first, _ = book.choose(np.arange(100), 10, 0, np.random.default_rng(1), draw=draw_by_rule)
    second, _ = book.choose(np.arange(100), 10, 0, np.random.default_rng(2), draw=draw_by_rule)
    assert not np.array_equal(first, second)


def test_samples_without_a_score_are_not_chosen() -> None:
    book = book_of(np.zeros(10))
    book.record(np.arange(6), np.array([np.nan] * 3 + [1, 2, 3], dtype=np.float32), 0)
    for rule in ("top_k", "sample"):
        draw = partial(draw_by_rule, rule=rule)  # type: ignore[arg-type]
        chosen, _ = book.choose(np.arange(10), 7, 0, np.random.default_rng(0), draw=draw)
        assert chosen.tolist() == [3, 4, 5, 6, 7, 8, 9]
    with pytest.raises(ValueError, match="only 7 of 10"):
        book.choose(np.arange(10), 8, 0, np.random.default_rng(0), draw=draw_by_rule)


def test_a_sample_is_chosen_once_for_each_of_its_scores() -> None:
    book = book_of([0] * 10)
    book.record(np.arange(10), np.arange(10, dtype=np.float32), 0)
    rng = np.random.default_rng(0)
    assert book.choose(np.arange(10), 4, 0, rng, draw=draw_by_rule)[0].tolist() == [6, 7, 8, 9]
    book.record(np.array([9]), np.float32([3.0]), 1)  # scored anew, so that it counts again
    assert set(book.choose(np.arange(10), 7, 1, rng, draw=draw_by_rule)[0].tolist()) == {0, 1, 2, 3, 4, 5, 9}
    again = book.choose(np.arange(10), 3, 2, rng, draw=draw_by_rule)[0]  # all are used: the best come again
    assert set(again.tolist()) <= {6, 7, 8}


def decide(book: ScoreBook, truth: np.ndarray, count: int, wanted: int, update: int) -> np.ndarray:
    """One decision as the framework makes it; the model moves and stretches all scores as it trains."""
    rng = np.random.default_rng([7, update])
    everyone = np.arange(truth.size)
    picked = book.pick(everyone, count, rng)
    book.record(picked, (truth[picked] * 0.9**update - update).astype(np.float32), update)
    book.used[:] = False  # what is asked is how good the estimates are
    return book.choose(everyone, wanted, update, rng, draw=draw_by_rule)[0]


def test_scoring_a_few_percent_finds_much_of_the_best_tenth() -> None:
    rng = np.random.default_rng(4)
    clusters = rng.integers(0, 40, 10_000)
    truth = rng.normal(size=40)[clusters] + rng.normal(size=10_000)
    best = set(np.argsort(truth)[-1000:].tolist())

    def found(labels: np.ndarray) -> list[float]:
        book = book_of(labels)
        return [len(best & set(decide(book, truth, 300, 1000, update).tolist())) / 1000 for update in range(10)]

    informative, uninformative = found(clusters), found(rng.integers(0, 40, 10_000))
    assert informative[0] > 0.3  # 3 % scored; random: 0.1
    assert informative[9] > 0.45  # 30 % scored by then
    assert uninformative[9] > 0.25  # clusters that say nothing: own scores alone


def test_a_resumed_run_decides_as_an_uninterrupted_one() -> None:
    rng = np.random.default_rng(5)
    clusters, truth = rng.integers(0, 9, 500), rng.normal(size=500)
    whole, cut = book_of(clusters), book_of(clusters)
    for update in range(3):
        decide(whole, truth, 40, 60, update)
        decide(cut, truth, 40, 60, update)
    state = cut.state_dict()
    decide(cut, truth, 40, 60, 3)
    resumed = book_of(np.zeros(500))  # the clusters are part of the state
    resumed.load_state_dict(state)
    for update in range(3, 6):
        expected = decide(whole, truth, 40, 60, update)
        assert np.array_equal(decide(resumed, truth, 40, 60, update), expected)
    with pytest.raises(ValueError, match="500 samples, the pool has 4"):
        book_of(np.zeros(4)).load_state_dict(state)


def test_the_order_of_the_candidates_and_the_names_of_the_clusters_do_not_matter_to_estimates() -> None:
    rng = np.random.default_rng(6)
    clusters = rng.integers(0, 6, 200)
    indices, scores = rng.permutation(200)[:50], rng.normal(size=50).astype(np.float32)
    book, renamed = book_of(clusters), book_of(rng.permutation(6)[clusters])
    book.record(indices, scores, 0)
    renamed.record(indices[::-1], scores[::-1], 0)
    order = rng.permutation(200)
    plain = book.estimates(np.arange(200), 0, 1)
    np.testing.assert_allclose(renamed.estimates(order, 0, 1), plain[order], atol=1e-6)
