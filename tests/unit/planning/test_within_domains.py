"""Selectors that compare samples within their domain: shares, chains, the overhead limit, resume."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dataflex.api.schedule import Schedule
from dataflex.api.selector import Selector
from dataflex.commands.offline import counts_chosen, ranks_of_all
from dataflex.errors import ComponentError
from dataflex.mixers.static import StaticMixer
from dataflex.planning import overhead
from dataflex.planning.overhead import LimitedScoring, Spent
from dataflex.planning.planner import Planner
from dataflex.planning.run_plan import notes_of
from dataflex.record.checkpoint import read_state, write_state
from unit.fakes import ScoreSelector, build, in_chains, make_planner, make_pool, plans
from unit.planning.test_chain import Watched, best, chain

SIZES = {"code": 60, "chat": 30, "mail": 10}
RANGES = {"code": (0, 60), "chat": (60, 90), "mail": (90, 100)}
SCORES = np.random.default_rng(7).normal(size=100).astype(np.float32)
SCALED = SCORES + np.repeat([100.0, 0.0, -100.0], [60, 30, 10]).astype(np.float32)
"""On one scale nothing but code would be chosen."""


def selector_of(table: np.ndarray, within: str = "domain", **params: Any) -> Selector:
    return ScoreSelector(lambda candidates: table[candidates], within=within, **params)


def domains_of(indices: np.ndarray) -> list[int]:
    return np.bincount(np.searchsorted([60, 90], indices, side="right"), minlength=3).tolist()


def test_comparing_within_domains_does_not_starve_a_domain() -> None:
    pool = make_pool(SIZES)
    (one_scale,) = plans(make_planner(pool, select=selector_of(SCALED, "pool"), steps=5), 1)
    assert domains_of(one_scale.indices) == [20, 0, 0]
    (plan,) = plans(make_planner(pool, select=selector_of(SCALED), steps=5), 1)
    assert domains_of(plan.indices) == [12, 6, 2]
    for (start, stop), count in zip(RANGES.values(), (12, 6, 2), strict=True):
        here = {index for index in plan.indices.tolist() if start <= index < stop}
        assert here == best(SCORES, np.arange(start, stop), count)
    assert plan.candidates == SIZES
    assert plan.ranks is not None
    for index, rank in zip(plan.indices.tolist(), plan.ranks.tolist(), strict=True):
        start, stop = next(ends for ends in RANGES.values() if ends[0] <= index < ends[1])
        assert rank == 1 + np.count_nonzero(SCORES[start:stop] > SCORES[index])


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_an_increasing_map_of_the_scores_of_a_domain_leaves_the_choice(seed: int) -> None:
    rng = np.random.default_rng(seed)
    pool = make_pool(SIZES)
    expected = plans(make_planner(pool, select=selector_of(SCORES)), 4)
    other = SCORES.astype(np.float64)
    for start, stop in RANGES.values():
        other[start:stop] = np.exp(rng.uniform(0.5, 2) * other[start:stop]) + rng.normal(0, 100)
    again = plans(make_planner(pool, select=selector_of(other)), 4)
    assert all(np.array_equal(one.indices, two.indices) for one, two in zip(expected, again, strict=True))


def test_shares_are_exact_over_the_rounds() -> None:
    planner = make_planner(
        make_pool({"a": 57, "b": 30, "c": 13}), select=selector_of(SCORES), steps=1, batch=7, rounds=9
    )
    counts = np.cumsum(
        [np.bincount(planner.pool.domain_ids(plan.indices), minlength=3) for plan in plans(planner, 9)], 0
    )
    exact = np.outer(np.arange(1, 10) * 7, [0.57, 0.30, 0.13])
    assert np.abs(counts - exact).max() < 1


def test_a_draw_takes_the_share_of_each_domain_and_prefers_its_good_ones() -> None:
    draws = [
        plans(make_planner(make_pool(SIZES), select=selector_of(SCALED, rule="sample"), steps=5, seed=seed), 1)[0]
        for seed in range(60)
    ]
    assert all(domains_of(plan.indices) == [12, 6, 2] for plan in draws)
    times = np.bincount(np.concatenate([plan.indices for plan in draws]), minlength=100)
    assert len(set(map(tuple, (np.sort(plan.indices) for plan in draws)))) > 50
    for start, stop in RANGES.values():
        above = SCORES[start:stop] > np.median(SCORES[start:stop])
        assert times[start:stop][above].sum() > 2 * times[start:stop][~above].sum()


def test_samples_without_scores_in_a_domain_are_replaced_from_other_domains() -> None:
    table = SCALED.copy()
    table[61:90] = np.nan  # one sample of chat is left
    planner = make_planner(make_pool(SIZES), select=selector_of(table), steps=5)
    (plan,) = plans(planner, 1)
    counts = domains_of(plan.indices)
    assert sum(counts) == 20
    assert counts[1] == 1
    assert plan.unscored == 29
    table[:] = np.nan
    table[:19] = 1.0
    with pytest.raises(ComponentError, match="only 19 of 100 have a score"):
        plans(make_planner(make_pool(SIZES), select=selector_of(table), steps=5), 1)


def test_a_round_longer_than_the_pool_takes_the_whole_pool_first() -> None:
    (plan,) = plans(make_planner(make_pool(SIZES), select=selector_of(SCALED), steps=60, batch=2), 1)
    assert domains_of(plan.indices) == [72, 36, 12]
    times = np.bincount(plan.indices, minlength=100)
    assert times.min() == 1
    twice = best(SCORES, np.arange(60), 12) | best(SCORES, np.arange(60, 90), 6) | best(SCORES, np.arange(90, 100), 2)
    assert set(np.flatnonzero(times == 2).tolist()) == twice


def test_a_filter_keeps_its_share_of_each_domain_and_the_next_one_compares_all() -> None:
    first, second = Watched(SCALED, within="domain"), Watched(SCORES)
    planner = make_planner(make_pool(SIZES), select=chain((first, 2, 0.3), (second, 1, None)), steps=2)
    made = plans(planner, 2)
    left = set.union(*(best(SCORES, np.arange(*ends), (ends[1] - ends[0]) * 3 // 10) for ends in RANGES.values()))
    assert [each.tolist() for _, each in second.asked] == [sorted(left)] * 2
    assert set(made[0].indices.tolist()) == best(SCORES, np.array(sorted(left)), 8)
    assert made[0].candidates == {"pool": 30}
    assert made[0].stages[0].kept == {"code": 18, "chat": 9, "mail": 3}
    assert made[0].stages[0].candidates == SIZES
    assert made[1].standing == ("select.0",)
    number = make_planner(make_pool(SIZES), select=chain((first, 1, 37), (second, 1, None)), steps=2)
    assert plans(number, 1)[0].stages[0].kept == {"code": 22, "chat": 11, "mail": 4}


def test_a_filter_that_compares_all_stands_before_one_that_does_not() -> None:
    first, second = Watched(SCALED), Watched(SCALED, within="domain")
    planner = make_planner(make_pool(SIZES), select=chain((first, 1, 0.8), (second, 1, None)), steps=5)
    (plan,) = plans(planner, 1)  # the filter leaves all of code and the better 20 of chat
    assert domains_of(plan.indices) == [13, 7, 0]
    assert plan.candidates == {"code": 60, "chat": 20}


def test_a_domain_without_any_score_is_left_out_by_a_filter() -> None:
    table = SCALED.copy()
    table[60:90] = np.nan
    first, second = Watched(table, within="domain"), Watched(SCORES)
    (plan,) = plans(make_planner(make_pool(SIZES), select=chain((first, 1, 0.5), (second, 1, None))), 1)
    assert plan.stages[0].kept == {"code": 30, "chat": 0, "mail": 5}
    assert plan.stages[0].unscored == 30


def test_scores_hold_between_decisions() -> None:
    one = Watched(SCALED, moving=True, within="domain")
    planner = make_planner(make_pool(SIZES), select=chain((one, 3, None)), steps=5)
    made = plans(planner, 6)
    assert sorted({update for update, _ in one.asked}) == [0, 3]
    for update, plan in enumerate(made):
        table = np.roll(SCALED, 7 * (update // 3 * 3))
        for (start, stop), count in zip(RANGES.values(), (12, 6, 2), strict=True):
            here = {index for index in plan.indices.tolist() if start <= index < stop}
            assert here == best(table, np.arange(start, stop), count)


def resumable() -> Planner:
    selectors = chain(
        (Watched(SCALED, moving=True, within="domain"), 2, 0.7),
        (Watched(SCORES, moving=True, rule="sample", within="domain"), 2, None),
    )
    return make_planner(make_pool(SIZES), select=selectors, steps=1, batch=7)


@pytest.mark.parametrize("done", [1, 2, 5])
def test_a_resumed_run_decides_as_an_uninterrupted_one(done: int, tmp_path: Path) -> None:
    expected = plans(resumable(), 8)
    cut = resumable()
    plans(cut, done)
    write_state(tmp_path, {"version": 5, "planner": cut.state_dict()})
    again = resumable()
    again.load_state_dict(read_state(tmp_path)["planner"])
    for plan, other in zip(expected[done:], plans(again, 8 - done, first=done), strict=True):
        assert np.array_equal(plan.indices, other.indices)


def test_a_limited_decision_takes_each_domains_share(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(0.0, 1e-4)
    monkeypatch.setattr(overhead, "token_clusters", lambda pool, number, seed: np.arange(pool.size) % 8)
    monkeypatch.setattr(overhead.time, "perf_counter", lambda: next(clock))
    pool, schedule = make_pool(SIZES), Schedule(2, 5, -1, 22)
    limit = LimitedScoring(pool, 0.5, 3, schedule, lambda: Spent(1.0, 0.01))
    components = in_chains({"select": selector_of(SCALED, max_overhead=0.5)})
    planner = Planner(pool, components, schedule, seed=1, global_batch_size=4, limit=limit)
    warm, *made = plans(planner, 4)
    assert warm.candidates == {}
    assert all(domains_of(plan.indices) == [12, 6, 2] for plan in made)
    assert made[-1].budget is not None
    assert made[-1].budget.scored > 0


def test_comparing_within_domains_has_no_effect_with_a_mixer_and_gives_a_note() -> None:
    planner = make_planner(make_pool(SIZES), select=selector_of(SCALED), mix=build(StaticMixer, proportions=[1, 1, 2]))
    same = make_planner(
        make_pool(SIZES), select=selector_of(SCALED, "pool"), mix=build(StaticMixer, proportions=[1, 1, 2])
    )
    for plan, other in zip(plans(planner, 3), plans(same, 3), strict=True):
        assert np.array_equal(plan.indices, other.indices)
        assert plan.candidates == other.candidates
    from dataflex.api.schedule import RunOutline
    from dataflex.config.loading import DataFlexConfig

    outline = RunOutline(Schedule(0, 5, -1, 20), 4, 100, domains=3)
    notes = notes_of(DataFlexConfig(), planner.components, outline, {})
    assert [note for note in notes if "within: domain changes nothing; the mixer" in note]
    alone = in_chains({"select": selector_of(SCALED)})
    assert not [note for note in notes_of(DataFlexConfig(), alone, outline, {}) if "within" in note]
    (note,) = [each for each in notes_of(DataFlexConfig(), alone, RunOutline(outline.schedule, 4, 100), {})]
    assert "there is one domain" in note


def test_comparing_within_domains_has_no_effect_on_one_domain() -> None:
    planner = make_planner(make_pool({"a": 100}), select=selector_of(SCORES))
    same = make_planner(make_pool({"a": 100}), select=selector_of(SCORES, "pool"))
    for plan, other in zip(plans(planner, 3), plans(same, 3), strict=True):
        assert np.array_equal(plan.indices, other.indices)
        assert plan.candidates == other.candidates == {"pool": 100}


def test_offline_every_domain_gives_its_share() -> None:
    parts = [SCALED[slice(*ends)] for ends in RANGES.values()]
    assert counts_chosen(parts, 10).tolist() == [6, 3, 1]
    parts[1] = np.full(30, np.nan, dtype=np.float32)
    counts = counts_chosen(parts, 10)
    assert (counts.sum(), counts[1]) == (10, 0)
    assert ranks_of_all(np.array([0.5, np.nan, 2.0]), np.random.default_rng(0)).tolist() == [2, 3, 1]
