"""Chains of selectors in the planner: filters, shares of domains, cadences, the overhead limit, resume."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dataflex.api.components import Components, Entry
from dataflex.api.context import RoundContext
from dataflex.api.schedule import Schedule
from dataflex.api.selector import Selector
from dataflex.data.sampling import IndexArray
from dataflex.errors import ConfigError
from dataflex.mixers.static import StaticMixer
from dataflex.planning import overhead
from dataflex.planning.overhead import LimitedScoring, Spent
from dataflex.planning.planner import Planner
from dataflex.record.checkpoint import read_state, write_state
from dataflex.selectors.random import RandomSelector
from unit.fakes import FakeProbe, build, make_planner, make_pool, plans

SIZES = {"a": 60, "b": 30, "c": 10}
RNG = np.random.default_rng(4)
FIRST, SECOND = RNG.normal(size=100).astype(np.float32), RNG.normal(size=100).astype(np.float32)


class Watched(Selector):
    """Gives the scores of a table, which ``moving`` changes with every decision, and notes what it is asked."""

    family, name = "selector", "watched"

    def __init__(self, table: np.ndarray, moving: bool = False, **params: Any) -> None:
        super().__init__(self.Params(**params))
        self.table, self.moving, self.shift = table, moving, 0
        self.begun: list[tuple[int, IndexArray]] = []
        self.asked: list[tuple[int, IndexArray]] = []

    def begin(self, ctx: RoundContext) -> None:
        self.begun.append((ctx.update, ctx.candidates))
        self.shift = 7 * ctx.update if self.moving else 0

    def score(self, ctx: RoundContext, candidates: IndexArray) -> np.ndarray:
        self.asked.append((ctx.update, candidates))
        return np.roll(self.table, self.shift)[candidates]


def chain(*parts: tuple[Selector, int, float | None]) -> tuple[Entry[Selector], ...]:
    """Return a chain of selectors with their cadences and what they keep."""
    return tuple(Entry(each, f"select.{n}", every, keep) for n, (each, every, keep) in enumerate(parts))


def best(scores: np.ndarray, among: np.ndarray, count: int) -> set[int]:
    """The best of some samples by a full sort."""
    return set(sorted(among.tolist(), key=lambda index: -scores[index])[:count])


def test_a_filter_leaves_the_best_of_which_the_last_one_chooses_the_best() -> None:
    first, second = Watched(FIRST), Watched(SECOND)
    planner = make_planner(make_pool(SIZES), select=chain((first, 1, 0.3), (second, 1, None)))
    (plan,) = plans(planner, 1)
    left = best(FIRST, np.arange(100), 30)
    assert set(plan.indices.tolist()) == best(SECOND, np.array(sorted(left)), 8)
    assert [each.tolist() for _, each in second.asked] == [sorted(left)]
    assert plan.candidates == {"pool": 30}
    (stage,) = plan.stages
    assert (stage.key, stage.candidates, stage.kept, stage.of_update) == (
        "select.0", {"pool": 100}, {"pool": 30}, {"pool": 0}
    )  # fmt: skip
    assert set(stage.samples[stage.is_kept].tolist()) == left
    assert stage.ranks is not None
    assert np.array_equal(np.argsort(stage.ranks), np.argsort(-FIRST, kind="stable"))
    assert np.array_equal(stage.is_kept, stage.ranks <= 30)


def test_a_filter_keeps_its_share_of_each_domain_and_begins_once() -> None:
    first, second = Watched(FIRST), Watched(SECOND)
    mixer = build(StaticMixer, proportions=[0.25, 0.25, 0.5])
    planner = make_planner(make_pool(SIZES), select=chain((first, 1, 0.5), (second, 1, None)), mix=mixer)
    (plan,) = plans(planner, 1)
    ranges = {"a": (0, 60), "b": (60, 90), "c": (90, 100)}
    left = {name: best(FIRST, np.arange(*ends), (ends[1] - ends[0]) // 2) for name, ends in ranges.items()}
    for (start, stop), name, count in zip(ranges.values(), "abc", (2, 2, 4), strict=True):
        chosen = {index for index in plan.indices.tolist() if start <= index < stop}
        assert chosen == best(SECOND, np.array(sorted(left[name])), count)
    assert [(update, each.size) for update, each in first.begun] == [(0, 100)]
    assert [(update, each.size) for update, each in second.begun] == [(0, 50)]
    assert len(first.asked) == len(second.asked) == 3


def test_a_number_is_kept_in_proportion_and_a_domain_may_come_in_passes() -> None:
    mixer = build(StaticMixer, proportions=[0.0, 0.0, 1.0])
    pool = make_pool({"a": 60, "b": 30, "c": 10})
    even = build(StaticMixer, proportions=[0.4, 0.3, 0.3])
    planner = make_planner(pool, select=chain((Watched(FIRST), 1, 37), (Watched(SECOND), 1, None)), mix=even)
    assert plans(planner, 1)[0].stages[0].kept == {"a": 22, "b": 11, "c": 4}  # of 37 in all
    repeated = make_planner(pool, select=chain((Watched(FIRST), 1, 0.3), (Watched(SECOND), 1, None)), mix=mixer)
    (plan,) = plans(repeated, 1)  # 8 samples of the 3 that are left of c: twice each, and the best two once more
    left = best(FIRST, np.arange(90, 100), 3)
    counts = {index: plan.indices.tolist().count(index) for index in left}
    assert sum(counts.values()) == 8
    assert {index for index, count in counts.items() if count == 3} == best(SECOND, np.array(sorted(left)), 2)


def test_samples_without_a_score_are_left_out_by_a_filter() -> None:
    table = FIRST.copy()
    table[:20] = np.nan
    planner = make_planner(make_pool(SIZES), select=chain((Watched(table), 1, 0.5), (Watched(SECOND), 1, None)))
    (stage,) = plans(planner, 1)[0].stages
    assert (stage.kept, stage.unscored) == ({"pool": 40}, 20)  # half of those with a score
    assert not stage.is_kept[:20].any()


def test_the_last_result_of_a_selector_holds_until_its_next_decision() -> None:
    first, second = Watched(FIRST, moving=True), Watched(SECOND, moving=True)
    planner = make_planner(make_pool(SIZES), select=chain((first, 4, 0.5), (second, 2, None)))
    made = plans(planner, 6)
    assert [update for update, _ in first.asked] == [0, 4]
    assert [update for update, _ in second.asked] == [0, 2, 4]
    for update, plan in enumerate(made):
        left = np.array(sorted(best(np.roll(FIRST, 7 * (update // 4 * 4)), np.arange(100), 50)))
        assert set(plan.indices.tolist()) == best(np.roll(SECOND, 7 * (update // 2 * 2)), left, 8)
    assert [plan.stages[0].of_update for plan in made[::2]] == [{"pool": 0}, {"pool": 0}, {"pool": 4}]
    assert [plan.stages[0].samples.size for plan in made] == [100, 0, 0, 0, 100, 0]


def resumable(mixed: bool) -> Planner:
    """Return a planner with a chain whose entries decide at different times, one of them at random."""
    selectors = chain(
        (build(RandomSelector), 4, 0.8), (Watched(FIRST, moving=True), 2, 0.7),
        (Watched(SECOND, moving=True, rule="sample"), 2, None),
    )  # fmt: skip
    given = {"mix": build(StaticMixer, proportions=[0.5, 0.25, 0.25])} if mixed else {}
    return make_planner(make_pool(SIZES), select=selectors, **given)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("done", [1, 2, 3, 5])
def test_a_resumed_chain_decides_as_an_uninterrupted_one(mixed: bool, done: int, tmp_path: Path) -> None:
    expected = plans(resumable(mixed), 8)
    cut = resumable(mixed)
    plans(cut, done)
    write_state(tmp_path, {"version": 5, "planner": cut.state_dict()})
    again = resumable(mixed)
    again.load_state_dict(read_state(tmp_path)["planner"])
    for plan, other in zip(expected[done:], plans(again, 8 - done, first=done), strict=True):
        assert np.array_equal(plan.indices, other.indices)
        assert plan.stages[0].kept == other.stages[0].kept


def test_results_of_other_parameters_are_discarded_at_a_resume(caplog: pytest.LogCaptureFixture) -> None:
    def planner(**params: Any) -> tuple[Planner, Watched]:
        last = Watched(SECOND, **params)
        return make_planner(make_pool(SIZES), select=chain((Watched(FIRST), 4, 0.5), (last, 4, None))), last

    before, _ = planner()
    plans(before, 1)
    after, last = planner(temperature=2.0)
    after.load_state_dict(before.state_dict())
    plans(after, 1, first=1)
    assert [update for update, _ in last.asked] == [1]
    assert "select.1 watched: method, keep or parameters differ from the checkpoint" in caplog.text


def test_two_entries_of_one_method_draw_different_random_numbers() -> None:
    select = chain((build(RandomSelector), 1, 0.5), (build(RandomSelector), 1, None))
    (plan,) = plans(make_planner(make_pool(SIZES), select=select), 1)
    alone = make_planner(make_pool(SIZES), select=(Entry(build(RandomSelector), "select"),))
    assert set(plan.indices.tolist()) <= set(plan.stages[0].samples[plan.stages[0].is_kept].tolist())
    assert set(plans(alone, 1)[0].indices.tolist()) != set(plan.indices.tolist())


def test_filters_that_leave_too_few_samples_are_an_error() -> None:
    few = make_planner(make_pool(SIZES), select=chain((Watched(FIRST), 1, 0.05), (Watched(SECOND), 1, None)))
    with pytest.raises(ConfigError, match=r"dataflex.select.0.keep: watched leaves 5 of .* 100 .*round takes 8"):
        plans(few, 1)
    many = make_planner(make_pool(SIZES), select=chain((Watched(FIRST), 1, 101), (Watched(SECOND), 1, None)))
    with pytest.raises(ConfigError, match=r"dataflex.select.0.keep: 101 samples are to be left, and only 100 come"):
        plans(many, 1)


class Clock:
    """A run in which a step takes 1 s, a score of the filter 0.01 s and one of the last selector 0.1 s."""

    def __init__(self, keep: float, every: int = 1, last_every: int = 1) -> None:
        self.now = self.began = self.train = self.decided = 0.0
        clock = self

        class Priced(Watched):
            price = 0.01

            def score(self, ctx: RoundContext, candidates: IndexArray) -> np.ndarray:
                clock.now += self.price * candidates.size
                return super().score(ctx, candidates)

        table = np.random.default_rng(1).normal(size=1000).astype(np.float32)
        self.filter, self.last = Priced(table), Priced(table[::-1].copy(), max_overhead=0.5)
        self.last.price = 0.1
        pool, schedule = make_pool({"a": 1000}), Schedule(20, 20, -1, 220)
        self.limit = LimitedScoring(pool, 0.5, 7, schedule, self.spent)
        select = chain((self.filter, every, keep), (self.last, last_every, None))
        self.planner = Planner(pool, Components(select=select), schedule, seed=1, global_batch_size=4, limit=self.limit)

    def spent(self) -> Spent:
        return Spent(self.train, self.decided + self.now - self.began)

    def run(self) -> list[Any]:
        """Decide and train all rounds."""
        made, step = [], 0
        while step < 220:
            slot = self.planner.schedule.slot_at(step)
            self.began = self.now
            made.append(self.planner.plan(slot, FakeProbe()))
            self.decided += self.now - self.began
            self.train += slot.steps
            step += slot.steps
        return made[1:]


def timed(run: Clock, monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Have the seconds of decisions read from a run's own clock."""
    monkeypatch.setattr(overhead, "time", SimpleNamespace(perf_counter=lambda: run.now))
    monkeypatch.setattr(overhead, "token_clusters", lambda pool, number, seed: np.arange(pool.size, dtype=np.int32) % 9)
    return run


@pytest.mark.parametrize("every", [1, 5])
def test_the_limit_counts_all_selectors(every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    run = timed(Clock(0.5, every), monkeypatch)
    made = run.run()
    assert run.decided <= 0.5 * run.train
    assert run.decided > 0.3 * run.train
    scored = sum(plan.budget.scored for plan in made)
    assert scored == sum(each.size for _, each in run.last.asked)
    left = set(made[0].stages[0].samples[made[0].stages[0].is_kept].tolist())
    assert all(set(each.tolist()) <= left for _, each in run.last.asked)
    # A filter takes 10 s of every decision of its own, which the last selector then has not.
    assert run.now == pytest.approx(0.1 * scored + 10 * (10 // every))


def test_the_limited_selector_scores_only_when_it_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    run = timed(Clock(0.5, every=4, last_every=2), monkeypatch)
    made = run.run()
    assert [update for update, plan in enumerate(made) if plan.budget.scored] == [0, 2, 4, 6, 8]
    assert all(plan.indices.size == 80 for plan in made)
