"""Scoring under an overhead limit with simulated clocks: scored samples, chosen samples, remembered scores."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dataflex.api.components import Components, only
from dataflex.api.context import RoundContext
from dataflex.api.mixer import Mixer, MixerParams
from dataflex.api.schedule import Schedule
from dataflex.api.selector import Selector, SelectorParams
from dataflex.config.loading import split_config
from dataflex.data.pool import Pool
from dataflex.errors import ComponentError
from dataflex.planning import overhead
from dataflex.planning.budget import ScoreBook
from dataflex.planning.overhead import LimitedScoring, Spent
from dataflex.planning.planner import Plan, Planner
from dataflex.trainer import clock as trainer_clock
from dataflex.trainer import expected_cost as trainer_cost
from dataflex.trainer.inputs import RunData, RunInputs
from dataflex.trainer.run import LoadedRun
from dataflex.trainer.steps import RunSteps
from unit.fakes import FakeProbe, MeasuringProbe, make_pool

COSTS = ("seconds_per_sample", "fixed_seconds", "step_seconds")


class Costly(Selector):
    """Selector with given scores, whose clock advances by a price for each sample and each decision."""

    family, name = "selector", "costly"

    def __init__(self, simulation: Simulation, **params: Any) -> None:
        super().__init__(SelectorParams(**params))
        self.simulation = simulation
        self.asked: list[np.ndarray] = []

    def begin(self, ctx: RoundContext) -> None:
        self.simulation.clock += self.simulation.fixed

    def score(self, ctx: RoundContext, candidates: np.ndarray) -> np.ndarray:
        self.simulation.clock += self.simulation.per_sample * candidates.size
        self.asked.append(candidates)
        return self.simulation.truth[candidates]


class Shares(Mixer):
    family, name = "mixer", "shares"

    def __init__(self, shares: list[float]) -> None:
        super().__init__(MixerParams())
        self.shares = np.array(shares)

    def mix(self, ctx: RoundContext) -> np.ndarray:
        return self.shares


class Simulation:
    """A run of 10 rounds of 20 steps of 1 s on a pool of 1000 samples."""

    def __init__(
        self,
        *,
        per_sample: float = 0.05,
        fixed: float = 0.5,
        warmup: int = 0,
        rounds: int = 10,
        batch: int = 4,
        sizes: dict[str, int] | None = None,
        shares: list[float] | None = None,
        max_overhead: float = 0.25,
        **params: Any,
    ) -> None:
        self.per_sample, self.fixed = per_sample, fixed
        self.clock = self.began = self.train = self.decided = 0.0
        self.pool: Pool = make_pool(sizes or {"a": 600, "b": 400})
        self.truth = np.random.default_rng(3).normal(size=self.pool.size).astype(np.float32)
        self.selector = Costly(self, max_overhead=max_overhead, **params)
        self.schedule = Schedule(warmup, 20, -1, warmup + 20 * rounds)
        self.limit = LimitedScoring(self.pool, max_overhead, 7, self.schedule, self.spent)
        components = Components(select=only("select", self.selector), mix=None if shares is None else Shares(shares))
        self.planner = Planner(self.pool, components, self.schedule, seed=1, global_batch_size=batch, limit=self.limit)
        self.step = 0

    def spent(self) -> Spent:
        return Spent(self.train, self.decided + self.clock - self.began)

    def round(self) -> Plan:
        """Decide and train a round."""
        slot = self.schedule.slot_at(self.step)
        self.began = self.clock
        plan = self.planner.plan(slot, FakeProbe())
        self.decided += self.clock - self.began
        self.train += slot.steps
        self.step += slot.steps
        return plan

    def run(self) -> list[Plan]:
        made = []
        while self.step < self.schedule.total_steps:
            made.append(self.round())
        return made

    @property
    def overhead(self) -> float:
        return self.decided / self.train


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Have the seconds of a decision read from the simulation that runs."""
    running = SimpleNamespace(simulation=None)
    original = Simulation.round

    def round_(self: Simulation) -> Plan:
        running.simulation = self
        return original(self)

    monkeypatch.setattr(Simulation, "round", round_)
    monkeypatch.setattr(overhead, "time", SimpleNamespace(perf_counter=lambda: running.simulation.clock))
    monkeypatch.setattr(overhead, "token_clusters", lambda pool, number, seed: np.arange(pool.size, dtype=np.int32) % 9)
    return running


def scored(plans: list[Plan]) -> list[int]:
    return [plan.budget.scored for plan in plans if plan.budget is not None]


MIXED = {"sizes": {"a": 900, "b": 60, "c": 40}, "shares": [0.2, 0.4, 0.4]}


@pytest.mark.parametrize("warmup", [0, 20])
@pytest.mark.parametrize("fixed", [0.0, 1.0, 4.0])
@pytest.mark.parametrize("per_sample", [0.02, 0.1])
@pytest.mark.parametrize("groups", [{}, {"shares": [0.7, 0.3]}, {"shares": [0.02, 0.98]}])
def test_a_run_ends_under_its_cap(per_sample: float, fixed: float, warmup: int, groups: dict[str, Any]) -> None:
    simulation = Simulation(per_sample=per_sample, fixed=fixed, warmup=warmup, **groups)
    simulation.run()
    assert 0.17 < simulation.overhead <= 0.25


@pytest.mark.parametrize("rule", ["top_k", "sample"])
@pytest.mark.parametrize("case", ["fresh", "used", "mixed"])
def test_samples_are_ranked_by_their_estimates_and_those_used_come_last(
    case: str, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    original = ScoreBook.choose

    def choose(self: ScoreBook, candidates: np.ndarray, count: int, update: int, rng: Any, **given: Any) -> Any:
        estimates = self.estimates(candidates, update, self.max_age(candidates, count, update))
        asked.append((candidates, estimates, self.used[candidates]))
        return original(self, candidates, count, update, rng, **given)

    monkeypatch.setattr(ScoreBook, "choose", choose)
    changes: dict[str, Any] = {
        "fresh": {},
        "used": {"batch": 20, "per_sample": 5.0},
        "mixed": {**MIXED, "per_sample": 5.0},
    }[case]
    simulation = Simulation(rounds=5, rule=rule, **changes)
    simulation.truth[::9] = np.nan  # all of a cluster, without a token to train on
    again = 0
    for _ in range(5):
        asked.clear()
        plan = simulation.round()
        assert sum(plan.candidates.values()) == sum(int((~np.isnan(estimates)).sum()) for _, estimates, _ in asked)
        for candidates, estimates, used in asked:
            inside = np.flatnonzero(np.isin(plan.indices, candidates) & (plan.ranks > 0))
            ranks = dict(zip(plan.indices[inside].tolist(), plan.ranks[inside].tolist(), strict=True))
            keys = [
                (bool(late), -float(value)) for value, late in zip(estimates, used, strict=True) if not np.isnan(value)
            ]
            for index, rank in ranks.items():
                place = int(np.searchsorted(candidates, index))
                key = (bool(used[place]), -float(estimates[place]))
                better = sum(other < key for other in keys)
                assert better < rank <= better + sum(other == key for other in keys)
                again += key[0]
            if rule == "top_k":
                assert sorted(ranks.values()) == list(range(1, len(ranks) + 1))
    assert (again > 0) == (case != "fresh")


def test_a_cheap_selector_scores_everything() -> None:
    simulation = Simulation(per_sample=1e-4, fixed=0.01, warmup=20)
    assert scored(simulation.run()) == [1000] * 10
    assert simulation.overhead < 0.02


def test_candidates_beyond_the_allowance_are_not_scored() -> None:
    simulation = Simulation(per_sample=5.0, fixed=1.0, rounds=6)
    plans = simulation.run()
    assert scored(plans) == [32, 0, 0, 0, 0, 0]  # what it costs is not known before
    for plan in plans:
        assert np.unique(plan.indices).size == plan.indices.size == 80
        assert plan.budget.max_age >= 1


def test_the_first_decision_measures_the_cost_of_scoring() -> None:
    simulation = Simulation(per_sample=0.04, fixed=0.6, warmup=20)
    simulation.round()
    plan = simulation.round()
    lead, rest, more = simulation.selector.asked
    assert (lead.size, rest.size) == (16, 16)
    assert np.unique(np.concatenate([lead, rest, more])).size == plan.budget.scored == 32 + more.size
    assert plan.budget.seconds_per_sample == pytest.approx(0.04)
    assert plan.budget.step_seconds == pytest.approx(1.0)
    # 0.9 x 0.25 of the training until the next decision, 40 s; validation is paid for already
    assert more.size == int((0.9 * 0.25 * 40 - 0.6 - 32 * 0.04) / 0.04)
    following = simulation.round()
    assert [asked.size for asked in simulation.selector.asked[3:]] == [16, following.budget.scored - 16]
    assert following.budget.seconds_per_sample == pytest.approx(0.04)
    assert following.budget.fixed_seconds == pytest.approx(0.6)
    assert following.budget.scored == int((0.9 * 0.25 * 20 - 0.6) / 0.04)


def test_a_cap_too_small_for_the_first_decision_gives_a_note(caplog: pytest.LogCaptureFixture) -> None:
    dear = Simulation(per_sample=5.0, fixed=1.0, warmup=20, rounds=2)  # 161 s against a quarter of 60 s
    dear.round()
    dear.round()
    assert "max_overhead of 0.25 allows 15 s of decisions in the whole run" in caplog.text
    assert "took 161 s" in caplog.text
    caplog.clear()
    cheap = Simulation(warmup=20)
    cheap.round()
    cheap.round()
    assert caplog.text == ""


def test_the_summary_explains_how_a_run_kept_to_its_cap() -> None:
    simulation = Simulation(warmup=20)
    plans = simulation.run()
    found = simulation.limit.closing(Spent(simulation.train, simulation.decided))
    assert found["kept"] is True
    assert found["decisions"] == 10
    assert found["scores"] == sum(scored(plans)) > 100
    assert found["decisions_that_scored"] == sum(count > 0 for count in scored(plans))
    assert found["text"].startswith("within max_overhead (0.25); it was decided 10 times, on ")


def test_the_summary_explains_why_a_run_missed_its_cap() -> None:
    dear = Simulation(per_sample=5.0, fixed=1.0, warmup=20, rounds=2)  # 161 s against a quarter of 60 s
    dear.run()
    found = dear.limit.closing(Spent(dear.train, dear.decided))
    assert (found["kept"], found["decisions"], found["decisions_that_scored"], found["scores"]) == (False, 2, 1, 32)
    for words in ("above max_overhead (0.25)", "the limit is 15 s", "first decision", "took 161 s", "5 s to score"):
        assert words in found["text"]
    assert "decided 2 times, on 32 scores, made at 1 of the decisions" in found["text"]
    again = Simulation(per_sample=5.0, fixed=1.0, warmup=20, rounds=2)
    again.limit.load_state_dict(dear.limit.state_dict())
    assert again.limit.closing(Spent(dear.train, dear.decided)) == found
    assert "were not scoring" in dear.limit.closing(Spent(1000.0, 500.0))["text"]
    assert "longer" in dear.limit.closing(Spent(750.0, 200.0))["text"]


def test_before_a_step_was_timed_only_the_cost_is_measured() -> None:
    simulation = Simulation(per_sample=0.04, fixed=0.6)
    assert simulation.round().budget.scored == 32
    assert simulation.round().budget.scored > 100


@pytest.mark.parametrize("warmup", [0, 20])
def test_groups_share_one_allowance(warmup: int) -> None:
    simulation = Simulation(per_sample=0.01, fixed=0.3, warmup=warmup, rounds=4, **MIXED)
    domains = simulation.pool.domain_ids(np.arange(simulation.pool.size))
    while simulation.step < simulation.schedule.total_steps:
        plan = simulation.round()
        if plan.budget is None:
            continue
        asked, simulation.selector.asked = np.concatenate(simulation.selector.asked), []
        assert np.unique(asked).size == asked.size == plan.budget.scored
        wanted = plan.budget.allowed * np.array([0.2, 0.4, 0.4])
        counts = np.bincount(domains[asked], minlength=3)
        if plan.budget.allowed > 32 and plan.slot.update:
            assert counts.tolist() == np.minimum(np.round(wanted), [900, 60, 40]).tolist()
        assert (counts <= wanted + 32 * 0.2 + 1).all()  # before the first decision's allowance come the two draws
    assert simulation.overhead <= 0.25


def test_the_scores_of_a_group_are_charged_at_their_cost() -> None:
    """The validation features are paid for by the first group of a decision; the others' seconds are all scoring."""
    simulation = Simulation(per_sample=0.01, fixed=0.3, warmup=20, **MIXED)
    for plan in simulation.run():
        if plan.budget is not None:
            assert plan.budget.seconds_per_sample == pytest.approx(0.01)
            if plan.slot.update:
                assert plan.budget.fixed_seconds == pytest.approx(0.3)


def test_a_tiny_first_group_does_not_hide_the_fixed_cost() -> None:
    simulation = Simulation(per_sample=0.01, fixed=2.0, warmup=20, shares=[0.03, 0.97])
    notes = [plan.budget for plan in simulation.run() if plan.budget is not None]
    assert all(note.seconds_per_sample == pytest.approx(0.01) for note in notes)
    assert notes[1].fixed_seconds == pytest.approx(2.0)


def test_the_record_explains_each_decision() -> None:
    plans = Simulation(warmup=20).run()
    assert plans[0].budget is None  # a warm-up round
    for plan in plans[1:]:
        assert min(getattr(plan.budget, name) for name in COSTS) > 0
        assert plan.budget.clusters == 9
        assert 0 <= plan.budget.chosen_by_own_score <= 1
        assert plan.budget.scored <= plan.budget.allowed + 32
    assert len({id(plan.budget) for plan in plans}) == len(plans)


def test_the_record_counts_the_scores_behind_a_choice() -> None:
    simulation = Simulation(per_sample=0.02, warmup=20)
    seen: set[int] = set()
    for plan in simulation.run():
        if plan.budget is None:
            continue
        seen |= {int(index) for part in simulation.selector.asked for index in part}
        own = np.mean([int(index) in seen for index in plan.indices])
        assert plan.budget.chosen_by_own_score <= own + 1e-4  # those that are not too old
    assert plan.budget.chosen_by_own_score > 0.5


def test_the_best_known_samples_are_chosen() -> None:
    simulation = Simulation(per_sample=0.02, warmup=20)
    simulation.round()
    plan = simulation.round()
    known = np.concatenate(simulation.selector.asked)
    best = known[np.argsort(-simulation.truth[known])[:40]]
    assert set(best.tolist()) <= set(plan.indices.tolist())
    assert simulation.truth[plan.indices].mean() > 0.8


def test_a_whole_pool_of_scores_chooses_as_without_a_cap() -> None:
    simulation = Simulation(per_sample=1e-5, fixed=0.0, warmup=20)
    simulation.round()
    chosen = simulation.round().indices
    assert sorted(chosen.tolist()) == sorted(np.argsort(-simulation.truth)[:80].tolist())


def test_samples_are_not_chosen_again_for_the_same_score() -> None:
    simulation = Simulation(per_sample=5.0, fixed=0.0, warmup=20, rounds=6)
    plans = [plan for plan in simulation.run() if plan.budget is not None]
    assert scored(plans) == [32, 0, 0, 0, 0, 0]
    everything = np.concatenate([plan.indices for plan in plans])
    assert np.unique(everything).size == everything.size == 480
    # Scored anew in every round, the best are chosen every time.
    often = [set(plan.indices.tolist()) for plan in Simulation(per_sample=1e-5, fixed=0.0, warmup=20).run()[1:]]
    assert all(chosen == often[0] for chosen in often)


def test_samples_without_a_score_are_left_out() -> None:
    simulation = Simulation(per_sample=1e-5, fixed=0.0, warmup=20)
    simulation.truth[::3] = np.nan
    simulation.round()
    for plan in (simulation.round(), simulation.round()):
        assert (plan.indices % 3 != 0).all()
        assert plan.unscored == 334
    few = Simulation(per_sample=1e-5, fixed=0.0, warmup=20)
    few.truth[50:] = np.nan
    few.round()
    with pytest.raises(ComponentError, match="selector 'costly': 80 samples are wanted but only 50 of 1000"):
        few.round()


def test_bad_scores_are_named() -> None:
    simulation = Simulation(per_sample=1e-5, fixed=0.0, warmup=20)
    simulation.truth[:] = np.inf
    simulation.round()
    with pytest.raises(ComponentError, match=r"selector 'costly' .*returned 16 scores that are infinite"):
        simulation.round()


def test_draws_follow_the_rule_of_the_selector() -> None:
    def mean(**params: Any) -> float:
        simulation = Simulation(per_sample=1e-5, fixed=0.0, warmup=20, rule="sample", **params)
        simulation.round()
        return float(simulation.truth[simulation.round().indices].mean())

    assert mean(temperature=0.05) > 1.6
    assert 0.3 < mean(temperature=1.0) < 1.3
    assert abs(mean(temperature=1e6)) < 0.3


def test_the_choose_method_of_the_selector_is_not_called() -> None:
    simulation = Simulation()
    assert simulation.planner.chain is not None
    assert simulation.planner.chain.limit is simulation.limit
    plain = Planner(
        simulation.pool,
        Components(select=only("select", simulation.selector)),
        simulation.schedule,
        seed=1,
        global_batch_size=4,
    )
    plan = plain.plan(simulation.schedule.slot_at(0), FakeProbe())
    assert plan.budget is None
    assert simulation.selector.asked[0].size == 1000


def test_a_round_of_whole_passes_needs_no_scores() -> None:
    simulation = Simulation(warmup=20, sizes={"a": 40}, rounds=3)
    assert all(plan.budget is None for plan in simulation.run())
    assert simulation.selector.asked == []


@pytest.mark.parametrize("done", [1, 2, 4])
def test_a_resumed_run_decides_as_an_uninterrupted_one(done: int) -> None:
    whole, cut = Simulation(warmup=20, **MIXED), Simulation(warmup=20, **MIXED)
    for _ in range(done):
        whole.round()
        cut.round()
    state = cut.planner.state_dict()
    resumed = Simulation(warmup=20, **MIXED)
    resumed.planner.load_state_dict(state)
    for name in ("clock", "train", "decided", "step"):
        setattr(resumed, name, getattr(cut, name))
    for expected, plan in zip(whole.run(), resumed.run(), strict=True):
        assert plan.sha256 == expected.sha256
        assert plan.budget == expected.budget
        np.testing.assert_array_equal(plan.scores, expected.scores)


def test_scores_of_other_parameters_are_computed_again(caplog: pytest.LogCaptureFixture) -> None:
    cut, choice, other = Simulation(warmup=20), Simulation(warmup=20, rule="sample"), Simulation(warmup=20)
    for _ in range(3):
        cut.round()
    known = int(np.concatenate(cut.selector.asked).size)

    class OtherParams(SelectorParams):
        preconditioner: str = "none"

    other.selector.params = OtherParams(max_overhead=0.25)
    for resumed in (choice, other):
        resumed.planner.load_state_dict(cut.planner.state_dict())
        for name in ("clock", "train", "decided", "step"):
            setattr(resumed, name, getattr(cut, name))
    assert known > 32
    choice.round()
    assert choice.limit._samples > 32
    assert caplog.text == ""
    other.round()
    assert "select costly: its parameters changed" in caplog.text
    seen = np.unique(np.concatenate(other.selector.asked)).size
    assert np.isfinite(other.limit._book.scores).sum() == seen


# The estimate of a run without a cap


class PricedProbe(MeasuringProbe):
    """Takes a second for a sample's loss, three for its gradient, and a while at the very first."""

    def __init__(self) -> None:
        self.clock, self.settings, self.asked = 0.0, [], []

    def losses(self, measurement: Any, indices: np.ndarray, samples: None) -> None:
        self.clock += indices.size + (50.0 if not self.asked else 0.0)
        self.asked.append(indices)

    embeddings = losses

    def gradient_norms(self, measurement: Any, indices: np.ndarray, samples: None) -> None:
        self.settings.append(measurement.settings)
        self.losses(measurement, np.repeat(indices, 3), samples)


@pytest.fixture
def priced(monkeypatch: pytest.MonkeyPatch) -> PricedProbe:
    probe = PricedProbe()
    for module in (trainer_cost, trainer_clock):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: probe.clock))
    return probe


def expected_cost(probe: PricedProbe, select: dict[str, Any], targets: Pool | None = None) -> tuple[str | None, float]:
    pool = make_pool({"a": 160}, lengths=np.arange(160) + 1)
    data = RunData(pool, validation={} if targets is None else {"select": targets})
    steps = RunSteps(Schedule(4, 10, -1, 34), 8, 34)
    run = LoadedRun.of(RunInputs.of(split_config({"dataflex": {"select": select}})), data, steps)
    told = trainer_cost.expected_cost(run, pool, probe)  # type: ignore[arg-type]
    return told, run.clock.decision_seconds


def test_the_expected_cost_of_losses_follows_the_measured_time(priced: PricedProbe) -> None:
    text, seconds = expected_cost(priced, {"method": "loss"})
    # 3 decisions x 160 s; training: 34 steps x 8 samples x 3 s
    assert text == (
        "select loss: scoring 160 samples, 3 times in this run, is expected to take 8.0 min, 0.59 times the training "
        "itself (after 8 samples)."
    )
    assert seconds == 50 + 2 + 8
    assert priced.asked[1].tolist() == [0, 22, 45, 68, 90, 113, 136, 159]  # short ones and long ones


def test_the_expected_cost_of_gradients_follows_the_measured_time(priced: PricedProbe) -> None:
    select = {"method": "less", "validation": "held", "proj_dim": 64}
    text, _ = expected_cost(priced, select, make_pool({"held": 20}))
    assert text is not None
    assert "scoring 160 samples and 20 validation samples, 3 times in this run" in text
    assert "27 min, 2 times the training" in text  # 3 x 180 x 3 s over 34 x 8 x 3 s
    assert {asked.preconditioner for asked in priced.settings} == {"none"}  # there are no moments yet
    few = {**select, "method": "cluster_less", "cluster_size": 16, "representatives": 2}
    text, _ = expected_cost(priced, few, make_pool({"held": 20}))
    assert text is not None
    assert "20 samples and 20 validation samples" in text
    assert "8.7 min" in text  # 3 x 40 x 3 s, and 160 s for the embeddings of the pool


@pytest.mark.parametrize("select", [{"method": "random"}, {"method": "el2n", "max_overhead": 0.2}])
def test_no_cost_is_measured_if_none_is_expected(priced: PricedProbe, select: dict[str, Any]) -> None:
    assert expected_cost(priced, select) == (None, 0.0)
    assert priced.asked == []
