"""Plans: exact sizes and counts, passes without repeats, and the same plans after a resume."""

from __future__ import annotations

import hashlib
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from dataflex.api.components import Components, only
from dataflex.api.context import RoundContext
from dataflex.api.mixer import Mixer
from dataflex.api.params import ComponentParams
from dataflex.api.schedule import Schedule
from dataflex.api.selection import Selection
from dataflex.api.selector import Selector
from dataflex.data.apportion import apportion
from dataflex.data.sampling import IndexArray
from dataflex.errors import ComponentError, ConfigError
from dataflex.mixers.ado import ADOMixer
from dataflex.mixers.odm import OdmMixer
from dataflex.mixers.static import StaticMixer
from dataflex.mixers.uniform import UniformMixer
from dataflex.orders.shuffle import ShuffleOrder
from dataflex.planning.planner import Planner, Readings, epoch_limits
from dataflex.record.checkpoint import STATE_VERSION, read_state, write_state
from dataflex.record.reader import read_run
from dataflex.record.schema import Cost
from dataflex.selectors.delta_loss import DeltaLossSelector
from dataflex.selectors.full import FullSelector
from dataflex.selectors.loss import LossSelector
from dataflex.selectors.random import RandomSelector
from unit.fakes import FakeProbe, ScoreSelector, begin_record, build, make_planner, make_pool, plans

LOSSES = np.random.default_rng(3).random(100)


def make(**given):
    """Return a planner over 60 + 30 + 10 samples, 2 steps of 4 per round."""
    return make_planner(make_pool({"a": 60, "b": 30, "c": 10}), **given)


COMPONENTS = {
    "nothing": {},
    "random": {"select": RandomSelector},
    "full": {"select": FullSelector},
    "loss": {"select": LossSelector},
    "mix": {"mix": UniformMixer},
    "mix and loss": {"mix": UniformMixer, "select": LossSelector},
    "all": {"mix": UniformMixer, "select": LossSelector, "order": ShuffleOrder},
}


@pytest.mark.parametrize("name", COMPONENTS)
def test_every_plan_has_exactly_its_size(name: str) -> None:
    components = {key: build(cls) for key, cls in COMPONENTS[name].items()}
    planner = make(steps=3, batch=5, warmup=2, rounds=3, **components)
    made = plans(planner, 4, FakeProbe(LOSSES))
    assert [plan.indices.size for plan in made] == [10, 15, 15, 15]
    for plan in made:
        assert plan.indices.dtype == np.int64
        assert plan.indices.min() >= 0
        assert plan.indices.max() < 100
        assert plan.scores is None or plan.scores.shape == plan.indices.shape
        if name in ("loss", "mix and loss", "all") and plan.slot.update is not None:
            np.testing.assert_allclose(plan.scores, LOSSES[plan.indices].astype(np.float32))


def test_counts_of_the_domains_are_their_shares_over_the_rounds() -> None:
    # quotas of 8 are 5.2, 1.6 and 1.2
    planner = make(mix=build(StaticMixer, proportions=[0.65, 0.2, 0.15]), rounds=200)
    total = np.zeros(3)
    for number, plan in enumerate(plans(planner, 200), start=1):
        total += np.bincount(planner.pool.domain_ids(plan.indices), minlength=3)
        np.testing.assert_allclose(plan.proportions, [0.65, 0.2, 0.15])
        assert (np.abs(total - number * np.array([5.2, 1.6, 1.2])) < 1).all()


@pytest.mark.parametrize("changes", [False, True])
def test_counts_follow_the_shares_over_short_rounds_and_a_resume(changes: bool) -> None:
    pool = make_pool({f"d{number}": 300 + number for number in range(22)})
    rng = np.random.default_rng(8)
    shares = rng.dirichlet(np.ones(22), 97) if changes else 1 / np.arange(1.0, 23.0)[None]

    def new():
        return make_planner(pool, mix=changing(*shares), steps=1, batch=4, rounds=1500, warmup=3)

    planner, exact, counted = new(), np.zeros(22), np.zeros(22)
    made = plans(planner, 1500)
    for plan in made:
        exact += plan.proportions * plan.indices.size
        counted += pool.domain_counts(plan.indices)
        assert np.abs(exact - counted).max() < 1
    first, second = new(), new()
    plans(first, 700)
    write_state_and_read(first, second)
    for plan, again in zip(made[700:800], plans(second, 100, first=700), strict=True):
        assert np.array_equal(plan.indices, again.indices)


def write_state_and_read(first, second) -> None:
    """Hand the state over as a checkpoint does."""
    with tempfile.TemporaryDirectory() as folder:
        write_state(Path(folder), {"version": STATE_VERSION, "planner": first.state_dict()})
        second.load_state_dict(read_state(Path(folder))["planner"])


def test_a_domain_of_share_zero_gives_no_sample() -> None:
    planner = make(mix=build(StaticMixer, proportions=[0, 1, 1]))
    (plan,) = plans(planner, 1)
    assert np.bincount(planner.pool.domain_ids(plan.indices)).tolist() == [0, 4, 4]


def test_without_a_mixer_the_record_has_the_shares_that_resulted() -> None:
    planner = make(steps=25)
    (plan,) = plans(planner, 1)  # one whole pass
    assert plan.proportions.tolist() == [0.6, 0.3, 0.1]


def test_samples_repeat_only_when_the_pool_is_exhausted() -> None:
    seen = np.zeros(100, dtype=int)
    for plan in plans(make(steps=3, batch=5, rounds=20), 20):
        seen += np.bincount(plan.indices, minlength=100)
        assert np.ptp(seen) <= 1
    assert seen.tolist() == [3] * 100


def test_samples_of_a_domain_repeat_only_when_it_is_exhausted() -> None:
    planner = make(mix=build(StaticMixer, proportions=[1, 1, 2]))
    made = [plan.indices for plan in plans(planner, 5)]
    for count in range(1, 6):
        seen = np.bincount(np.concatenate(made[:count]), minlength=100)
        assert seen[:60].max() == 1
        assert seen[60:90].max() == 1
        assert seen[90:].max() - seen[90:].min() <= 1
    assert seen[90:].sum() == 20


def test_warm_up_draws_uniformly_with_any_selector() -> None:
    pool = make_pool({"a": 40})
    counts = np.zeros(40)
    seeds = 1000
    for seed in range(seeds):
        selector = ScoreSelector(lambda candidates: candidates.astype(float))
        planner = make_planner(pool, warmup=1, seed=seed, select=selector)
        warm, decided = plans(planner, 2)
        assert warm.scores is None
        assert np.unique(warm.indices).size == 4
        assert sorted(decided.indices.tolist()) == list(range(32, 40))
        counts[warm.indices] += 1
    assert stats.chisquare(counts).pvalue > 1e-4


def test_warm_up_uses_the_initial_proportions() -> None:
    class Only(Mixer):
        family, name = "mixer", "only"

        def mix(self, ctx: RoundContext) -> np.ndarray:
            return np.array([1.0, 0, 0])

    planner = make(warmup=5, mix=build(Only, initial_proportions=[0, 1, 1]))
    warm, decided = plans(planner, 2)
    assert np.bincount(planner.pool.domain_ids(warm.indices), minlength=3).tolist() == [0, 10, 10]
    assert np.bincount(planner.pool.domain_ids(decided.indices), minlength=3).tolist() == [8, 0, 0]
    by_size = make(warmup=5, mix=build(Only))
    (warm,) = plans(by_size, 1)
    assert np.bincount(by_size.pool.domain_ids(warm.indices), minlength=3).tolist() == [12, 6, 2]


def test_warm_up_and_decided_rounds_share_the_passes() -> None:
    made = plans(make(warmup=5, steps=5, rounds=4, select=build(FullSelector)), 5)
    assert np.bincount(np.concatenate([plan.indices for plan in made])).tolist() == [1] * 100


@pytest.mark.parametrize("name", COMPONENTS)
@pytest.mark.parametrize("done", [1, 3])
def test_a_restored_planner_makes_the_same_plans(name: str, done: int) -> None:
    components = {key: build(cls) for key, cls in COMPONENTS[name].items()}
    first = make(warmup=1, **components)
    expected = plans(first, 6, FakeProbe(LOSSES))
    half = make(warmup=1, **components)
    plans(half, done, FakeProbe(LOSSES))
    second = make(warmup=1, **components)
    second.load_state_dict(half.state_dict())
    for plan, again in zip(expected[done:], plans(second, 6 - done, FakeProbe(LOSSES), first=done), strict=True):
        assert np.array_equal(plan.indices, again.indices)
        assert np.array_equal(plan.proportions, again.proportions)


def test_plans_depend_on_the_seed() -> None:
    for name, classes in COMPONENTS.items():
        one, two = (
            plans(make(seed=seed, **{key: build(cls) for key, cls in classes.items()}), 1, FakeProbe(LOSSES))[0]
            for seed in (1, 2)
        )
        assert not np.array_equal(one.indices, two.indices), name
        assert one.sha256 != two.sha256


def test_every_round_shuffles_the_same_selection_differently() -> None:
    selector = ScoreSelector(lambda candidates: candidates.astype(float))
    made = [plan.indices.tolist() for plan in plans(make(select=selector), 5)]
    assert {tuple(sorted(indices)) for indices in made} == {tuple(range(92, 100))}
    assert len(set(map(tuple, made))) == 5


def test_sequential_arrangement_keeps_the_order_of_the_data() -> None:
    made = plans(make(arrangement="sequential", rounds=13), 13)
    assert np.concatenate([plan.indices for plan in made]).tolist() == [*range(100), *range(4)]


def test_sequential_arrangement_with_a_selector_trains_in_its_order() -> None:
    (plan,) = plans(make(arrangement="sequential", select=build(RandomSelector)), 1)
    assert plan.indices.tolist() == sorted(plan.indices.tolist())


def test_group_by_length_puts_similar_lengths_together() -> None:
    lengths = np.random.default_rng(1).integers(1, 1000, 4000)
    pool = make_pool({"a": 3000, "b": 1000}, lengths=lengths)
    grouped, next_pass = plans(make_planner(pool, steps=500, batch=8, arrangement="group_by_length"), 2)
    shuffled, _ = plans(make_planner(pool, steps=500, batch=8), 2)
    for plan in (grouped, next_pass, shuffled):
        assert np.array_equal(np.sort(plan.indices), np.arange(4000))

    def spread(indices: np.ndarray) -> float:
        return float(np.ptp(lengths[indices].reshape(-1, 8), axis=1).mean())

    assert spread(grouped.indices) < 0.1 * spread(shuffled.indices)
    assert lengths[grouped.indices[0]] == lengths.max()  # the longest first, so that it runs out of memory soon
    assert not np.array_equal(grouped.indices, next_pass.indices)
    again = plans(make_planner(pool, steps=500, batch=8, arrangement="group_by_length"), 1)[0]
    assert np.array_equal(grouped.indices, again.indices)


ARRANGED = {
    "nothing": {},
    "in the order of the data": {"arrangement": "sequential"},
    "grouped by length": {"arrangement": "group_by_length"},
    "order: shuffle": {"order": ShuffleOrder},
    "full": {"select": FullSelector},
    "full and shuffle": {"select": FullSelector, "order": ShuffleOrder},
    "full, grouped": {"select": FullSelector, "arrangement": "group_by_length"},
}


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("name", ARRANGED)
def test_no_sample_is_trained_again_before_its_pass_has_ended(name: str, mixed: bool) -> None:
    given = {key: value if key == "arrangement" else build(value) for key, value in ARRANGED[name].items()}
    if mixed:
        given["mix"] = changing([1, 2, 5], [3, 1, 1], [1, 1, 1])
    pool = make_pool({"a": 60, "b": 30, "c": 10}, lengths=np.random.default_rng(0).integers(1, 90, 100))
    # rounds of 33, so that passes end inside them, and of c several times
    made = plans(make_planner(pool, steps=11, batch=3, warmup=5, rounds=20, **given), 20)
    trained = np.concatenate([plan.indices for plan in made])
    groups = [(0, 60), (60, 90), (90, 100)] if mixed else [(0, 100)]
    for low, high in groups:
        own = trained[(trained >= low) & (trained < high)]
        assert own.size > 2 * (high - low)
        for begin in range(0, own.size - (high - low), high - low):
            assert np.array_equal(np.sort(own[begin : begin + high - low]), np.arange(low, high))
    assert name == "in the order of the data" or not np.array_equal(np.sort(trained[:33]), trained[:33])


def test_domains_are_mixed_within_a_plan() -> None:
    planner = make(steps=10, batch=10, mix=build(UniformMixer))
    (plan,) = plans(planner, 1)
    ids = planner.pool.domain_ids(plan.indices)
    changes = int((np.diff(ids) != 0).sum())
    assert 50 <= changes <= 80  # 99 neighbours differ with probability 2/3


def test_selections_in_different_domains_are_independent() -> None:
    pool = make_pool({"a": 200, "b": 200})
    for selector in (RandomSelector, LossSelector):
        common = 0
        for seed in range(10):
            planner = make_planner(pool, steps=1, batch=80, seed=seed, mix=build(UniformMixer), select=build(selector))
            (plan,) = plans(planner, 1, FakeProbe(np.tile(np.arange(200), 2)))
            first = plan.indices[plan.indices < 200]
            second = plan.indices[plan.indices >= 200] - 200
            common += np.intersect1d(first, second).size
        # 40 of 200 twice: 8 in common by chance, 14 at the loss selector's weights
        assert common / 10 < 20, selector.name


def test_the_digest_is_of_the_indices_in_order() -> None:
    (plan,) = plans(make(), 1)
    packed = b"".join(struct.pack("<q", index) for index in plan.indices.tolist())
    assert plan.sha256 == hashlib.sha256(packed).hexdigest()


@pytest.mark.parametrize(
    "selection, text",
    [
        (Selection(np.arange(7)), "7,.*needed are 8"),
        (Selection(np.arange(8.0)), "float64.*needed are 8 integers"),
        (Selection(np.arange(93, 101)), r"outside 'pool', whose range is \[0, 100\)"),
        (Selection(np.arange(-1, 7)), r"outside 'pool', whose range is \[0, 100\)"),
        (Selection(np.arange(8), np.zeros(7, dtype=np.float32)), "scores"),
        (Selection(np.arange(8), ranks=np.arange(7), ranked=100), r"ranks of shape \(7,\)"),
        (Selection(np.arange(8), ranks=np.arange(8.0), ranked=100), "float64 ranks"),
        (Selection(np.arange(8), ranks=np.arange(1, 9), ranked=7), r"outside the range from 0 \(no rank\) to 7"),
        (Selection(np.arange(8), ranks=np.arange(-1, 7), ranked=100), "outside the range from 0"),
    ],
)
def test_an_unusable_selection_names_the_selector(selection: Selection, text: str) -> None:
    class Broken(Selector):
        family, name = "selector", "broken"
        Params = ComponentParams

        def select(self, ctx, group):
            return selection

    with pytest.raises(ComponentError, match=f"selector 'broken' .*{text}"):
        plans(make(select=build(Broken)), 1)


@pytest.mark.parametrize("kind", [np.int64, np.uint64, np.int16])
def test_a_selector_may_return_numpy_scalars(kind: type, tmp_path: Path) -> None:
    class Numpys(Selector):
        family, name = "selector", "numpys"
        Params = ComponentParams

        def choose(self, ctx, candidates, count):
            ranks = np.arange(1, count + 1).astype(kind)
            return Selection(candidates[:count], unscored=kind(2), ranks=ranks, ranked=kind(count))

    planner = make(select=build(Numpys), mix=build(StaticMixer, proportions=[1, 1, 0]))
    (plan,) = plans(planner, 1)
    assert plan.ranks.dtype == np.int64
    assert plan.candidates == {"a": 4, "b": 4}
    begin_record(tmp_path, planner.pool).round(plan, planner.pool, Cost())
    (line,) = read_run(tmp_path).rounds
    assert (line.candidates, line.unscored) == ({"a": 4, "b": 4}, 4)


def ranks_within(scores: np.ndarray, start: int, stop: int) -> dict[int, int]:
    """The rank of each sample of a range by a full sort, ties to the lower index."""
    ordered = sorted(range(start, stop), key=lambda i: (-scores[i], i))
    return {index: rank for rank, index in enumerate(ordered, start=1)}


@pytest.mark.parametrize("rule", ["top_k", "sample"])
@pytest.mark.parametrize("order", [{}, {"order": ShuffleOrder}, {"arrangement": "sequential"}])
@pytest.mark.parametrize("mixed", [False, True])
def test_ranks_stay_with_their_samples(rule: str, order: dict, mixed: bool) -> None:
    scores = np.random.default_rng(5).integers(0, 15, 100).astype(np.float32)
    given = {key: build(value) if key == "order" else value for key, value in order.items()}
    # with the mixer: 2 of a, 8 of b, and 10 of the 10 samples of c and 5 of them twice
    given |= {"mix": build(StaticMixer, proportions=[2, 8, 15])} if mixed else {}
    selector = ScoreSelector(lambda candidates: scores[candidates], rule=rule)
    planner = make(steps=5, batch=5, warmup=1, select=selector, **given)
    warm, *made = plans(planner, 4)
    assert warm.ranks is None
    assert warm.candidates == {}
    bounds = {"a": (0, 60), "b": (60, 90), "c": (90, 100)} if mixed else {"pool": (0, 100)}
    expected = {}
    for name, (start, stop) in bounds.items():
        expected |= {name: ranks_within(scores, start, stop)}
    for plan in made:
        assert plan.candidates == {name: stop - start for name, (start, stop) in bounds.items()}
        for index, score, rank in zip(plan.indices.tolist(), plan.scores, plan.ranks.tolist(), strict=True):
            if rank == 0:  # of the whole pass over c
                assert mixed
                assert index >= 90
                assert np.isnan(score)
            else:
                group = "abc"[(index >= 60) + (index >= 90)] if mixed else "pool"
                assert rank == expected[group][index]
        assert np.count_nonzero(plan.ranks == 0) == (10 if mixed else 0)


def test_a_domain_taken_whole_is_not_ranked() -> None:
    selector = ScoreSelector(lambda candidates: candidates.astype(float))
    planner = make(steps=5, batch=4, mix=build(StaticMixer, proportions=[1, 0, 1]), select=selector)
    (plan,) = plans(planner, 1)
    assert plan.candidates == {"a": 60}
    assert np.array_equal(plan.ranks == 0, plan.indices >= 90)
    assert sorted(plan.ranks[plan.ranks > 0].tolist()) == list(range(1, 11))


def test_a_component_gets_the_context_of_its_round() -> None:
    seen: list[RoundContext] = []

    class Watching(Selector):
        family, name = "selector", "watching"
        Params = ComponentParams

        def choose(self, ctx, candidates, count):
            seen.append(ctx)
            return Selection(candidates[:count])

    plans(make(warmup=3, steps=2, rounds=2, select=build(Watching)), 3)
    facts = [(c.round, c.update, c.num_updates, c.start_step, c.steps, c.size, c.total_steps) for c in seen]
    assert facts == [(1, 0, 2, 3, 2, 8, 7), (2, 1, 2, 5, 2, 8, 7)]
    assert seen[0].rng.integers(2**62) != seen[1].rng.integers(2**62)


def test_a_pool_counts_domains_and_tokens() -> None:
    pool = make_pool({"a": 2, "b": 3}, lengths=[1, 2, 4, 8, 16])
    assert pool.size == 5
    assert pool.domain_ids(np.array([0, 1, 2, 4])).tolist() == [0, 0, 1, 1]
    assert pool.domain_tokens.tolist() == [3, 28]


class Changing(Mixer):
    """Other proportions in every round, given in a list."""

    family, name = "mixer", "changing"

    def __init__(self, params, shares=()):
        super().__init__(params)
        self.shares = shares

    def mix(self, ctx):
        return np.asarray(self.shares[ctx.round % len(self.shares)], dtype=float)


def changing(*shares, **params):
    return Changing(Changing.Params(**params), shares)


def test_no_sample_repeats_before_its_domain_is_exhausted_for_any_proportions() -> None:
    rng = np.random.default_rng(7)
    planner = make(steps=3, batch=7, mix=changing(*rng.dirichlet(np.ones(3), 40)), rounds=40)
    seen = np.zeros(100, dtype=int)
    for plan in plans(planner, 40):
        seen += np.bincount(plan.indices, minlength=100)
        for low, high in ((0, 60), (60, 90), (90, 100)):
            assert np.ptp(seen[low:high]) <= 1
        drawn = np.array([seen[:60].sum(), seen[60:90].sum(), seen[90:].sum()])
        np.testing.assert_allclose(plan.epochs, drawn / [60, 30, 10])
    assert seen.min() >= 3


LATER = np.empty(0, dtype=np.int64)


def fill(wanted: list[float], total: int, limits: list[int]) -> list[int]:
    """Water-filling by handing out one sample at a time to the domain that is furthest behind its share."""
    counts = [0] * len(wanted)
    for _ in range(total):
        free = [k for k in range(len(wanted)) if counts[k] < limits[k] and wanted[k] > 0]
        best = min(free, key=lambda k: ((counts[k] + 1) / wanted[k], k))
        counts[best] += 1
    return counts


def test_shares_beyond_a_limit_go_to_the_other_domains_by_their_shares() -> None:
    rng = np.random.default_rng(11)
    for _ in range(300):
        size = int(rng.integers(1, 8))
        wanted = np.where(rng.random(size) < 0.2, 0, rng.dirichlet(np.ones(size)))
        limits = rng.integers(0, 40, size)
        room = int(limits[wanted > 0].sum())
        if not room:
            continue
        total = int(rng.integers(1, room + 1))
        found = apportion(np.zeros(size), wanted, total, LATER, limits)
        counts, in_force = found.counts, found.shares
        assert counts.sum() == total
        assert (counts <= limits).all()
        assert (counts[wanted == 0] == 0).all()
        np.testing.assert_allclose(in_force.sum(), 1)
        # every domain below its limit is within one sample of the same multiple of its share
        assert np.abs(counts - in_force * total).max() <= 1
        assert np.abs(counts - fill(wanted.tolist(), total, limits.tolist())).max() <= size
        open_ = in_force * total < limits - 1e-9
        ratio = in_force[open_ & (wanted > 0)] / wanted[open_ & (wanted > 0)]
        if ratio.size:
            np.testing.assert_allclose(ratio, ratio[0])
            assert (in_force <= wanted * ratio[0] + 1e-12).all()  # nobody at a limit has more than the others' multiple
        if total == room:
            assert np.array_equal(counts[wanted > 0], limits[wanted > 0])
        with pytest.raises(ValueError, match="do not fit"):
            apportion(np.zeros(size), wanted, room + 1, LATER, limits)


def test_shares_after_a_cap_equal_a_computation_by_hand() -> None:
    # of 20: 10, 6, 4 wanted; at most 4 of the first, so 6 more by 3:2, but at most 8 of the second
    found = apportion(np.zeros(3), np.array([5, 3, 2]), 20, LATER, np.array([4, 8, 100]))
    assert found.counts.tolist() == [4, 8, 8]
    np.testing.assert_allclose(found.shares, [0.2, 0.4, 0.4])
    assert found.cut.tolist() == [True, False, False]  # the second got more than it wanted
    found = apportion(np.zeros(3), np.array([5, 3, 2]), 20, LATER, np.array([4, 50, 100]))
    assert found.counts.tolist() == [4, 10, 6]  # 16 by 3:2 are 9.6 and 6.4
    np.testing.assert_allclose(found.shares, [0.2, 0.48, 0.32])
    np.testing.assert_allclose(found.owed, [0, -0.4, 0.4], atol=1e-12)


def test_a_cap_on_passes_is_rounded_down_without_rounding_error() -> None:
    pool = make_pool({"a": 100, "b": 10, "c": 3})  # 1.15 x 100 is 114.99999999999999 in floating point
    found = epoch_limits(changing([1, 1, 1], max_epochs_per_domain=1.15), pool)
    assert found is not None
    assert found.tolist() == [115, 11, 3]


def test_no_domain_is_repeated_more_often_than_allowed(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    mixer = changing([0.2, 0.2, 0.6], max_epochs_per_domain=1.55)
    planner = make(mix=mixer, steps=2, batch=4)
    made = plans(planner, 5)  # 8 each, 4.8 of them c; of its 10 samples 15 may be planned: 5, 5, 4, 1, and then none
    counts = [np.bincount(planner.pool.domain_ids(plan.indices), minlength=3).tolist() for plan in made]
    assert [row[2] for row in counts] == [5, 5, 4, 1, 0]
    assert [sum(row) for row in counts] == [8] * 5
    assert sorted(counts[3]) == [1, 3, 4]
    # within one of the shares in force, summed
    wanted = np.cumsum([plan.proportions * 8 for plan in made], axis=0)
    assert (np.abs(wanted - np.cumsum(counts, axis=0)) < 1).all()
    assert [plan.clipped_shares for plan in made] == [{}, {}, {}, {"c": pytest.approx(0.6)}, {"c": pytest.approx(0.6)}]
    np.testing.assert_allclose(made[2].proportions, [0.2, 0.2, 0.6])
    np.testing.assert_allclose(made[3].proportions, [0.4375, 0.4375, 0.125])
    np.testing.assert_allclose(made[4].proportions, [0.5, 0.5, 0])
    assert made[4].epochs[2] == 1.5
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 1
    assert "max_epochs_per_domain is reached by c in round 3" in warnings[0]
    writer = begin_record(tmp_path, planner.pool)
    for plan in made:
        writer.round(plan, planner.pool, Cost())
    lines = read_run(tmp_path).rounds
    assert not lines[2].clipped_shares
    assert lines[3].clipped_shares == {"c": pytest.approx(0.6)}
    assert lines[3].epochs == dict(zip("abc", made[3].epochs.tolist(), strict=True))


def test_an_exhausted_mixture_is_an_error_that_counts_the_samples_left() -> None:
    planner = make(mix=changing([0, 1, 1], max_epochs_per_domain=1), steps=5, batch=4)
    plans(planner, 2)  # all 40 samples of b and c
    with pytest.raises(ConfigError) as caught:
        plans(planner, 1, first=2)
    text = str(caught.value)
    for part in (
        "dataflex.mix.max_epochs_per_domain",
        "round 2",
        "20 samples",
        "only 0",
        "b, c",
        "step 10",
        "max_steps",
    ):
        assert part in text, part


@pytest.mark.parametrize("selector", [None, RandomSelector, LossSelector])
def test_a_capped_planner_resumes_exactly(selector: type[Selector] | None, caplog: pytest.LogCaptureFixture) -> None:
    def new():
        given = {} if selector is None else {"select": build(selector)}
        return make(mix=changing([1, 1, 2], [1, 0, 5], max_epochs_per_domain=2), steps=2, batch=4, **given)

    expected = plans(new(), 8, FakeProbe(LOSSES))
    assert any(plan.clipped_shares for plan in expected)
    first, second = new(), new()
    plans(first, 6, FakeProbe(LOSSES))
    second.load_state_dict(first.state_dict())
    caplog.clear()
    for plan, again in zip(expected[6:], plans(second, 2, FakeProbe(LOSSES), first=6), strict=True):
        assert np.array_equal(plan.indices, again.indices)
        assert np.array_equal(plan.proportions, again.proportions)
        assert np.array_equal(plan.epochs, again.epochs)
        assert plan.clipped_shares == again.clipped_shares
    assert not caplog.records  # what was said before the checkpoint is not said again


def test_epochs_count_planned_samples_also_without_a_mixer() -> None:
    planner = make(steps=5, batch=5, select=build(RandomSelector))
    total = np.zeros(3)
    for plan in plans(planner, 4):
        total += np.bincount(planner.pool.domain_ids(plan.indices), minlength=3)
        np.testing.assert_allclose(plan.epochs, total / [60, 30, 10])


def test_an_error_in_proportions_of_many_domains_is_short() -> None:
    pool = make_pool({f"d{number}": 2 for number in range(1000)})
    with pytest.raises(ComponentError) as caught:
        plans(make_planner(pool, mix=changing([np.nan] * 1000)), 1)
    assert "and 990 more" in str(caught.value)
    assert len(str(caught.value)) < 500


def test_each_component_gets_its_own_validation_samples() -> None:
    seen = {}

    class Looking(Selector):
        family, name = "selector", "looking"
        Params = ComponentParams

        def choose(self, ctx, candidates, count):
            seen["select"] = ctx.validation_pool
            return Selection(candidates[:count])

    class Mixing(Changing):
        def mix(self, ctx):
            seen["mix"] = ctx.validation_pool
            return np.ones(3)

    mine, other = make_pool({"x": 3}), make_pool({"y": 4})
    for targets in ({"select": mine, "mix": other}, {"mix": other}):
        components = Components(select=only("select", build(Looking)), mix=Mixing(Mixing.Params()))
        pool = make_pool({"a": 60, "b": 30, "c": 10})
        planner = Planner(
            pool, components, Schedule(0, 2, -1, 4), seed=1, global_batch_size=4, readings=Readings(targets)
        )
        plans(planner, 1)
        assert seen["mix"] is other
        assert seen["select"] is targets.get("select")


# Rounds in which a method decides nothing


def test_a_round_of_the_whole_pool_is_not_decided_by_its_selector() -> None:
    pool = make_pool({"a": 8})
    for size, undecided in ((2, {"select": "every sample is taken"}), (1, {})):
        planner = make_planner(pool, steps=size, select=ScoreSelector(lambda candidates: candidates))
        (plan,) = plans(planner, 1)
        assert plan.undecided == undecided
        assert plan.not_chosen == ({"pool": "every sample is taken"} if undecided else {})
    (plan,) = plans(make_planner(pool, steps=2, select=build(FullSelector)), 1)
    assert plan.undecided == {}  # that is what it is for


def test_a_round_is_decided_if_one_domain_leaves_a_choice() -> None:
    pool = make_pool({"a": 4, "b": 100})
    given = {"select": ScoreSelector(lambda candidates: candidates), "mix": build(StaticMixer, proportions=[1, 1])}
    (plan,) = plans(make_planner(pool, steps=2, **given), 1)  # 4 of each
    assert plan.undecided == {}
    assert plan.not_chosen == {"a": "every sample is taken"}


def test_a_mixer_that_has_learned_nothing_decides_nothing() -> None:
    pool = make_pool({"a": 50, "b": 50})
    for mixer, words in ((OdmMixer, "exploration keeps the shares equal"), (ADOMixer, "there are no laws yet")):
        planner = make_planner(pool, steps=2, warmup=2, mix=build(mixer))
        warmup, first = plans(planner, 2)
        assert warmup.undecided == {}
        assert words in first.undecided["mix"]
    (plan,) = plans(make_planner(make_pool({"a": 9}), mix=build(StaticMixer, proportions=[1])), 1)
    assert plan.undecided == {"mix": "there is one domain"}


def test_the_first_decision_of_delta_loss_is_a_uniform_draw() -> None:
    planner = make_planner(make_pool({"a": 50}), steps=2, select=build(DeltaLossSelector))
    first, second = plans(planner, 2, FakeProbe(np.linspace(1, 2, 50)))
    assert "first losses are only noted" in first.undecided["select"]
    assert second.undecided == {}


def test_notes_of_components_are_stored_until_they_are_read() -> None:
    class Telling(ScoreSelector):
        def choose(self, ctx: RoundContext, candidates: IndexArray, count: int) -> Selection:
            ctx.note(f"round {ctx.round}")
            return Selection(candidates[:count])

    planner = make_planner(make_pool({"a": 20, "b": 20}), select=Telling(lambda candidates: candidates))
    plans(planner, 2)
    assert planner.notes == ["round 0", "round 1"]
