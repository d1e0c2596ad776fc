"""Orders of whole passes: the pool is put in order once, and the rounds walk along it."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dataflex.api.mixer import Mixer
from dataflex.api.schedule import RunOutline, Schedule
from dataflex.config.checks.section import problems_of_section
from dataflex.config.loading import split_config
from dataflex.data.sampling import PassSampler, Walk
from dataflex.errors import ComponentError
from dataflex.mixers.static import StaticMixer
from dataflex.orders.fold import FoldOrder
from dataflex.orders.score_column import ScoreColumnOrder
from dataflex.orders.shuffle import ShuffleOrder
from dataflex.orders.sort import SortOrder
from dataflex.orders.zigzag import ZigzagOrder
from dataflex.planning.planner import Planner
from dataflex.record.checkpoint import STATE_VERSION, read_state, write_state
from unit.fakes import FakeProbe, build, make_planner, make_pool, plans

LENGTHS = np.random.default_rng(5).permutation(100) + 1
LOSSES = np.random.default_rng(6).random(100)
SWEEPS = np.concatenate([np.argsort(LENGTHS)[layer::3] for layer in range(3)])
BY_LENGTH = {"by": "length", "layers": 3, "scope": "run"}


def make(**given: Any) -> Planner:
    return make_planner(make_pool({"a": 60, "b": 30, "c": 10}, lengths=LENGTHS), **{"rounds": 80, **given})


def walked(planner: Planner, count: int, probe: Any = None, first: int = 0) -> np.ndarray:
    return np.concatenate([plan.indices for plan in plans(planner, count, probe, first)])


def handed_over(first: Planner, second: Planner) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_state(Path(folder), {"version": STATE_VERSION, "planner": first.state_dict()})
        second.load_state_dict(read_state(Path(folder))["planner"])


@pytest.mark.parametrize("steps", [1, 2, 7, 25, 60])
def test_rounds_walk_along_one_order_whatever_their_length(steps: int) -> None:
    rounds = -(-300 // (steps * 4))
    trained = walked(make(steps=steps, order=build(FoldOrder, **BY_LENGTH)), rounds)
    assert np.array_equal(trained[:300], np.tile(SWEEPS, 3))


@pytest.mark.parametrize("passes", ["same", "new"])
def test_the_model_is_asked_once_or_at_the_beginning_of_every_pass(passes: str) -> None:
    class Turning(FakeProbe):
        """Every measurement finds the opposite of the one before."""

        def losses(self, measurement, indices, samples):
            self.values = -self.values
            return super().losses(measurement, indices, samples)

    probe = Turning(LOSSES)
    trained = walked(make(steps=5, order=build(SortOrder, scope="run", passes=passes)), 15, probe)
    assert [asked.tolist() for asked in probe.asked] == [list(range(100))] * (1 if passes == "same" else 3)
    falling = np.argsort(-LOSSES).tolist()
    expected = [falling, falling if passes == "same" else falling[::-1], falling]
    assert trained.reshape(3, 100).tolist() == expected


def test_what_is_left_of_a_pass_may_be_put_in_order_at_every_decision() -> None:
    losses = np.random.default_rng(8).random((20, 100))

    class Learning(FakeProbe):
        """The losses of one decision after another."""

        def losses(self, measurement, indices, samples):
            self.values = losses[len(self.asked)]
            return super().losses(measurement, indices, samples)

    probe = Learning(LOSSES)
    order = build(SortOrder, scope="run", passes="rest")
    planner = make(steps=10, order=order)
    trained = walked(planner, 5, probe)
    assert [asked.size for asked in probe.asked] == [100, 60, 20, 100, 80, 40]  # the third round begins a pass
    measured = RunOutline(Schedule(0, 10, -1, 50), 4, 100)
    assert order.measured_samples(order.needs(None).measurements[0], measured) == 400
    left = np.arange(100)
    for number, (begin, end) in enumerate([(0, 40), (40, 80), (80, 100)]):
        expected = left[np.argsort(losses[number][left])][: end - begin]
        assert trained[begin:end].tolist() == expected.tolist()
        left = np.setdiff1d(left, expected)
    assert np.array_equal(np.sort(trained[100:200]), np.arange(100))
    second, half = make(steps=10, order=order), make(steps=10, order=order)
    plans(half, 2, Learning(LOSSES))
    handed_over(half, second)
    again = Learning(LOSSES)
    again.asked = probe.asked[:2]
    assert np.array_equal(walked(second, 3, again, first=2), trained[80:])


def test_chance_is_keyed_by_the_pass_and_not_by_the_round() -> None:
    given = {"by": "length", "jit": 9, "scope": "run"}
    found = [
        walked(make(steps=steps, order=build(SortOrder, passes=passes, **given)), rounds)
        for passes, steps, rounds in (("same", 5, 10), ("same", 25, 2), ("new", 5, 10), ("new", 25, 2))
    ]
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[2], found[3])
    assert np.array_equal(found[0][:100], found[0][100:])
    assert not np.array_equal(found[2][:100], found[2][100:])
    assert np.array_equal(np.sort(found[2][100:]), np.arange(100))
    assert not np.array_equal(found[0], np.tile(np.argsort(LENGTHS), 2))


def test_after_a_warm_up_the_rest_of_the_pass_is_put_in_order_and_then_whole_passes() -> None:
    planner = make(warmup=5, steps=4, order=build(FoldOrder, **BY_LENGTH))
    trained = walked(planner, 18)
    warm, rest, later = trained[:20], trained[20:100], trained[100:]
    left = np.setdiff1d(np.arange(100), warm)
    ranked = left[np.argsort(LENGTHS[left])]
    assert rest.tolist() == np.concatenate([ranked[layer::3] for layer in range(3)]).tolist()
    assert np.array_equal(later[:180], np.tile(SWEEPS, 2)[:180])


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("done", [1, 3, 8])
def test_a_restored_walk_goes_on_without_asking_the_model_again(done: int, mixed: bool) -> None:
    def new() -> Planner:
        mixer = {"mix": build(StaticMixer, proportions=[1, 1, 2])} if mixed else {}
        return make(steps=3, warmup=2, order=build(ZigzagOrder, scope="run", layers=4), **mixer)

    expected = plans(new(), 14, FakeProbe(LOSSES))
    half, second = new(), new()
    plans(half, done, FakeProbe(LOSSES))
    handed_over(half, second)
    # another model would order otherwise, but whole passes are repeated and begun ones go on
    probe = FakeProbe(LOSSES)
    for plan, again in zip(expected[done:], plans(second, 14 - done, probe, first=done), strict=True):
        assert np.array_equal(plan.indices, again.indices)
    if done == 8 and not mixed:
        assert [asked.size for asked in probe.asked] == [100]  # only of the pass after the one with a warm-up in it
    assert half.state_dict()["orders"].keys() == (
        {"domain/a", "domain/b", "domain/c"} if mixed and done > 1 else {"pool"} if done > 1 else set()
    )


AFTER = {
    "nothing": {},
    "shuffle": {"order": (ShuffleOrder, {})},
    "sorted rounds": {"order": (SortOrder, {"by": "length"})},
    "another walk": {"order": (ZigzagOrder, {"by": "length", "scope": "run"})},
    "the walk with another parameter": {"order": (FoldOrder, {**BY_LENGTH, "descending": True})},
}


@pytest.mark.parametrize("name", AFTER)
@pytest.mark.parametrize("back", [False, True])
def test_a_resume_with_another_order_repeats_no_sample_of_the_pass(name: str, back: bool) -> None:
    def other() -> Planner:
        return make(steps=5, **{key: build(cls, **params) for key, (cls, params) in AFTER[name].items()})

    first, second = make(steps=5, order=build(FoldOrder, **BY_LENGTH)), other()
    if back:
        first, second = second, first
    before = walked(first, 2)
    handed_over(first, second)
    trained = np.concatenate([before, walked(second, 8, first=2)])
    for begin in (0, 100):
        assert np.array_equal(np.sort(trained[begin : begin + 100]), np.arange(100))
    if back:  # the rest of the pass, and then whole ones
        left = np.setdiff1d(np.arange(100), before)
        ranked = left[np.argsort(LENGTHS[left])]
        assert trained[40:100].tolist() == np.concatenate([ranked[layer::3] for layer in range(3)]).tolist()
        assert np.array_equal(trained[100:200], SWEEPS)
    elif name in ("nothing", "shuffle"):
        assert set(trained[40:100].tolist()) == set(SWEEPS[40:].tolist())
        assert second.state_dict()["orders"] == {}


def test_with_a_mixer_each_domain_is_walked_in_its_own_order() -> None:
    planner = make(steps=10, mix=build(StaticMixer, proportions=[2, 1, 1]), order=build(FoldOrder, **BY_LENGTH))
    trained = walked(planner, 5)
    mixed = 0
    for low, high in ((0, 60), (60, 90), (90, 100)):
        own = trained[(trained >= low) & (trained < high)]
        ranked = low + np.argsort(LENGTHS[low:high])
        sweeps = np.concatenate([ranked[layer::3] for layer in range(3)])
        assert np.array_equal(own, np.tile(sweeps, 10)[: own.size])
        mixed += int(np.ptp(np.flatnonzero((trained[:40] >= low) & (trained[:40] < high))) >= 20)
    assert mixed == 3  # spread over the round, not one domain after another
    counts = planner.pool.domain_counts(trained)
    assert counts.tolist() == [100, 50, 50]


def test_a_cap_on_passes_ends_a_domains_walk() -> None:
    mixer = build(StaticMixer, proportions=[1, 1, 2], max_epochs_per_domain=1)
    planner = make(steps=5, mix=mixer, order=build(FoldOrder, **BY_LENGTH))
    trained = walked(planner, 5)
    assert np.array_equal(np.sort(trained), np.arange(100))
    own = trained[trained >= 90]
    ranked = 90 + np.argsort(LENGTHS[90:])
    assert own.tolist() == np.concatenate([ranked[layer::3] for layer in range(3)]).tolist()


def test_orders_of_rounds_keep_no_order_of_passes() -> None:
    for order in (None, ShuffleOrder, SortOrder, ScoreColumnOrder):
        planner = make()
        if order is not None:
            planner.components.order = build(order, **({"column": "q"} if order is ScoreColumnOrder else {}))
        planner.pool.keep_column("q", LOSSES.copy())
        plans(planner, 3, FakeProbe(LOSSES))
        assert planner.state_dict()["orders"] == {}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_draws_with_and_without_a_walk_go_through_passes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(20):
        size = int(rng.integers(1, 30))
        sampler = PassSampler(size, seed=seed, name="x", shuffle=bool(rng.integers(2)))
        drawn: list[int] = []
        for _ in range(12):
            maker = str(rng.integers(3))
            walk = Walk(maker, lambda number, left: np.arange(left.size)[::-1], bool(rng.integers(2)))
            drawn += sampler.draw(int(rng.integers(0, 20)), walk if rng.random() < 0.6 else None).tolist()
        for begin in range(0, len(drawn), size):
            part = drawn[begin : begin + size]
            assert len(set(part)) == len(part)


def test_an_order_that_is_no_permutation_of_the_pass_is_refused() -> None:
    class Broken(FoldOrder):
        family, name = "order", "broken"

        def arrange(self, ctx, selection):
            return np.zeros(selection.indices.size, dtype=np.int64)

    with pytest.raises(ComponentError, match=r"order 'broken' .*100 positions"):
        plans(make(order=build(Broken, **BY_LENGTH)), 1)


def test_a_selector_beside_a_walk_is_refused() -> None:
    order = {"method": "fold", "by": "length", "scope": "run"}
    raw = {"stage": "sft", "dataset": "a", "dataflex": {"select": {"method": "full"}, "order": order}}
    (problem,) = [each for each in problems_of_section(split_config(raw)) if each.key == "dataflex.order"]
    assert "'fold' orders the whole pool, but select chooses the samples of every round" in str(problem)
    raw["dataflex"]["order"] = {"method": "fold", "by": "length"}
    assert not [each for each in problems_of_section(split_config(raw)) if each.key == "dataflex.order"]


def run(steps: int, round_steps: int, pool: int | None = 100) -> RunOutline:
    return RunOutline(Schedule(0, round_steps, -1, steps), 4, pool)


def test_what_a_walk_costs_and_when_it_cannot_act() -> None:
    once, anew = (build(FoldOrder, scope="run", passes=passes) for passes in ("same", "new"))
    measurement = once.needs(None).measurements[0]
    assert once.measured_samples(measurement, run(60, 5)) == 100
    assert anew.measured_samples(measurement, run(60, 5)) == 300
    assert build(FoldOrder).measured_samples(measurement, run(60, 5)) == 240
    assert once.cannot_act(run(25, 1)) is None  # rounds of one step, but the steps are in order
    assert "every round is one optimizer step" in str(build(FoldOrder).cannot_act(run(25, 1)))
    assert "trains on 96 samples and the pool has 100" in str(once.cannot_act(run(24, 5)))
    assert "every round is one optimizer step" in str(once.cannot_act(run(1, 1)))
    assert once.outline(run(60, 5), False) == [
        "the pool is put in order by loss once, at the first decision; the rounds walk along it"
    ]
    assert anew.outline(run(60, 5), True)[0].startswith("each domain is put in order by loss when a pass over it")
    assert build(FoldOrder).outline(run(60, 5), False) == []
    warm = RunOutline(Schedule(5, 5, -1, 60), 4, 100)
    assert once.measured_samples(measurement, warm) == 200  # the rest of the first pass, and a whole one
    windows = build(FoldOrder, by="length", scope="run", jit=30)
    sizes = dataclasses.replace(run(60, 5), sizes={"a": 60, "b": 30, "c": 10})
    assert "holds all of b, c, so the order there is random" in windows.outline(sizes, True)[1]
    assert len(windows.outline(sizes, False)) == 1


def test_the_mixers_shares_are_what_they_are_without_a_walk() -> None:
    class Falling(Mixer):
        family, name = "mixer", "falling"

        def mix(self, ctx):
            return np.array([3.0, 1, ctx.round])

    walking = make(mix=build(Falling), order=build(FoldOrder, **BY_LENGTH))
    plain = make(mix=build(Falling))
    for plan, other in zip(plans(walking, 10), plans(plain, 10), strict=True):
        assert np.array_equal(walking.pool.domain_counts(plan.indices), plain.pool.domain_counts(other.indices))
