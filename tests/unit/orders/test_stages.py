"""Stages: named domains one after another, for given shares of the run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dataflex.api.schedule import RunOutline, Schedule
from dataflex.config.checks.section import problems_of_section
from dataflex.config.loading import split_config
from dataflex.errors import ConfigError
from dataflex.orders.stages import StagesOrder
from dataflex.planning.planner import Planner
from unit.fakes import build, make_planner, make_pool, plans

SIZES = {"a": 60, "b": 30, "c": 10}


def make(*stages: dict[str, Any], rounds: int = 25, left_out: list[str] | None = None, **given: Any) -> Planner:
    order = build(StagesOrder, stages=list(stages), left_out=left_out or [])
    return make_planner(make_pool(SIZES), rounds=rounds, order=order, **given)


def trained(planner: Planner, count: int) -> np.ndarray:
    return np.concatenate([plan.indices for plan in plans(planner, count)])


def domains(indices: np.ndarray) -> list[str]:
    return ["abc"[number] for number in make_pool(SIZES).domain_ids(indices)]


def check_passes(part: np.ndarray, members: range | list[int]) -> None:
    for begin in range(0, part.size, len(members)):
        piece = part[begin : begin + len(members)]
        assert np.unique(piece).size == piece.size
        assert set(piece.tolist()) <= set(members)


@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_shares_of_the_run_whatever_the_length_of_rounds(steps: int) -> None:
    stages = {"domains": ["a"], "share": 0.25}, {"domains": ["b", "c"], "share": 0.45}, {"domains": ["c"], "share": 0.3}
    planner = make(*stages, steps=steps, rounds=-(-50 // steps))
    total = planner.schedule.total_steps * 4
    found = trained(planner, planner.schedule.num_rounds)
    assert found.size == total
    first, second = round(0.25 * total), round(0.7 * total)
    check_passes(found[:first], range(60))
    check_passes(found[first:second], range(60, 100))
    check_passes(found[second:], range(90, 100))
    assert np.unique(found[first:second]).size == min(40, second - first)
    if steps in (1, 2, 50):
        whole = make(*stages, steps=50, rounds=1)
        assert np.array_equal(found, trained(whole, 1))
    assert not np.array_equal(found[:first], np.sort(found[:first]))
    assert domains(found[first:second]) != sorted(domains(found[first:second]))  # b and c are mixed


def test_without_shares_every_pass_goes_through_the_stages() -> None:
    planner = make({"domains": ["b"]}, {"domains": ["a", "c"]}, steps=3, rounds=20)
    found = trained(planner, 20)
    for begin in (0, 100):
        assert np.array_equal(np.sort(found[begin : begin + 30]), np.arange(60, 90))
        assert np.array_equal(np.sort(found[begin + 30 : begin + 100]), [*range(60), *range(90, 100)])
    assert not np.array_equal(found[:30], found[100:130])
    assert set(domains(found[200:230])) == {"b"}


def test_a_stage_without_a_share_is_one_pass_and_the_last_takes_what_is_left() -> None:
    planner = make({"domains": ["c"]}, {"domains": ["a"], "share": 0.5}, {"domains": "b, c"}, steps=5, rounds=10)
    found = trained(planner, 10)
    assert np.array_equal(np.sort(found[:10]), np.arange(90, 100))
    check_passes(found[10:110], range(60))
    check_passes(found[110:], range(60, 100))
    assert np.unique(found[110:]).size == 40


def test_stages_hold_in_warm_up_rounds_and_after_a_resume() -> None:
    stages = {"domains": ["a"], "share": 0.5}, {"domains": ["b", "c"]}
    planner = make(*stages, warmup=3, steps=4, rounds=8)
    found = plans(planner, 9)
    assert set(domains(found[0].indices)) == {"a"}
    second = make(*stages, warmup=3, steps=4, rounds=8)
    half = make(*stages, warmup=3, steps=4, rounds=8)
    plans(half, 4)
    second.load_state_dict(half.state_dict())
    for plan, again in zip(found[4:], plans(second, 5, first=4), strict=True):
        assert np.array_equal(plan.indices, again.indices)
    counts = planner.pool.domain_counts(np.concatenate([plan.indices for plan in found]))
    assert counts[0] == 70
    np.testing.assert_allclose(found[-1].epochs, counts / [60, 30, 10])


def test_another_seed_shuffles_otherwise() -> None:
    stages = {"domains": ["a"], "share": 0.5}, {"domains": ["b", "c"]}
    assert not np.array_equal(trained(make(*stages, seed=1), 3), trained(make(*stages, seed=2), 3))


@pytest.mark.parametrize(
    "stages, text",
    [
        ([{"domains": ["a"], "share": 0.5}, {"domains": ["b"], "share": 0.4}], "add up to 0.9 instead of 1"),
        ([{"domains": ["a"], "share": 0.7}, {"domains": ["b"], "share": 0.4}], "add up to 1.1 instead of 1"),
        ([{"domains": ["a"]}, {"domains": ["b"], "share": 0.4}], "the last stage lasts until the run ends"),
        ([{"domains": ["a"], "share": 1.0}, {"domains": ["b"]}], "nothing is left"),
        ([{"domains": ["a"], "share": 0}, {"domains": ["b"]}], "share"),
        ([{"domains": ["a"]}], "stages"),
        ([{"domains": []}, {"domains": ["b"]}], "domains"),
        ([{"domain": ["a"]}, {"domains": ["b"]}], "domain"),
    ],
)
def test_what_cannot_be_is_refused(stages: list[Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        split_config({"dataflex": {"order": {"method": "stages", "stages": stages}}})


@pytest.mark.parametrize(
    "stages, left_out, key, text",
    [
        ([["alpa"], ["beta"]], [], "stages.0.domains", "unknown domain 'alpa'; did you mean 'alpha'"),
        ([["alpha"], ["beta"]], [], "stages", "in no stage: 7, True"),
        ([["alpha", "alpha"], ["beta"]], [], "stages.0.domains", "names a domain twice"),
        ([["alpha"], ["beta", 7]], ["true", "beta"], "left_out", "beta: also in a stage"),
        ([["alpha"], ["beta", 7]], ["gamma"], "left_out", "unknown domain 'gamma'"),
    ],
)
def test_domains_that_do_not_fit_are_refused(stages: list[Any], left_out: list[str], key: str, text: str) -> None:
    order = build(StagesOrder, stages=[{"domains": each} for each in stages], left_out=left_out)
    found = order.check_domains(("alpha", "beta", "7", "True"))
    assert found is not None
    assert found[0] == key
    assert text in found[1]
    assert list(order.pool_problems(make_pool({"alpha": 1, "beta": 1, "7": 1, "True": 1}))) == [found]


def test_a_domain_may_come_twice_or_be_left_out() -> None:
    order = build(StagesOrder, stages=[{"domains": ["a"]}, {"domains": ["b", "a"]}], left_out=["c"])
    assert order.check_domains(("a", "b", "c")) is None
    planner = make({"domains": ["a"]}, {"domains": ["b", "a"]}, left_out=["c"], rounds=40)
    assert set(domains(trained(planner, 40))) == {"a", "b"}


def test_neither_a_mixer_nor_a_selector_goes_with_it() -> None:
    order = {"method": "stages", "stages": [{"domains": "x"}, {"domains": "y"}]}
    for other, method in (("mix", "uniform"), ("select", "loss")):
        raw = {"stage": "sft", "dataset": "x,y", "dataflex": {"order": order, other: {"method": method}}}
        (problem,) = [each for each in problems_of_section(split_config(raw)) if each.key == "dataflex.order"]
        assert f"so {other} has nothing to decide" in problem.message
    raw = {"stage": "sft", "dataset": "x,z", "dataflex": {"order": order}}
    (problem,) = problems_of_section(split_config(raw))
    assert problem.key == "dataflex.order.stages.1.domains"


def test_the_plan_says_how_long_each_stage_is() -> None:
    def outline(total: int, *stages: dict[str, Any], sizes: dict[str, int] | None = SIZES) -> list[str]:
        run = RunOutline(Schedule(0, 5, -1, total), 4, 100, sizes=sizes)
        order = build(StagesOrder, stages=list(stages))
        never = order.cannot_act(run)
        assert (never is not None) == (total == 5 and sizes is not None)
        assert never is None or "stage 2 (a, c) never begins: the stages before use all 20 samples" in never
        return order.outline(run, False)

    shared = {"domains": ["a"], "share": 0.3}, {"domains": ["b", "c"]}
    assert outline(50, *shared) == [
        "stage 1 (a): 15 steps, from 0 on, 1 passes over its domains",
        "stage 2 (b, c): 35 steps, from 15 on, 3.5 passes over its domains",
    ]
    assert outline(50, *shared, sizes=None)[0] == "stage 1 (a): 15 steps, from 0 on"
    passes = {"domains": ["b"]}, {"domains": ["a", "c"]}
    assert outline(50, *passes) == [
        "stage 1 (b): 7.5 steps, from 0 on, 1 passes over its domains",
        "stage 2 (a, c): 17.5 steps, from 7.5 on, 1 passes over its domains",
        "after the last stage the first comes again",
    ]
    assert outline(5, *passes)[1] == "stage 2 (a, c): nothing: the run ends before it"
    assert outline(5, *passes, sizes=None)[0].endswith("which are not counted yet")
