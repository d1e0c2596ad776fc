from __future__ import annotations

import json
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import numpy as np
import pytest

from dataflex import (
    ComponentParams,
    Losses,
    Measurement,
    Needs,
    RunOutline,
    RunView,
    Selector,
    SelectorParams,
    ValidationParams,
    register_measurement,
)
from dataflex.api import registry
from dataflex.api.component import Component
from dataflex.api.schedule import Schedule
from dataflex.config.checks import problems_of
from dataflex.config.loading import DataFlexConfig, RunConfig, split_config
from dataflex.errors import ComponentError
from dataflex.mixers.doge import DogeMixer
from dataflex.mixers.doremi import DoReMiMixer
from dataflex.mixers.group_dro import GroupDroMixer
from dataflex.mixers.skill_it import SkillItMixer
from dataflex.orders.sort import SortOrder
from dataflex.planning.run_plan import expected_forwards
from dataflex.selectors.cluster_less import ClusterLessSelector
from dataflex.weighters.loss import LossWeighter
from dataflex.weighters.uniform import UniformWeighter
from unit.fakes import build, context, make_pool


class FocusParams(SelectorParams):
    focus: float = 0.5


class NarrowParams(FocusParams):
    width: int = 1


FocusT = TypeVar("FocusT", bound=FocusParams, covariant=True)


class Focus(Selector[FocusParams]):
    def score(self, ctx, candidates):
        return np.full(candidates.size, self.params.focus)


class OpenFocus(Selector[FocusT]):
    pass


class Narrow(OpenFocus[NarrowParams]):
    pass


class Given(Selector):
    Params = FocusParams


class Plain(Selector):
    pass


class GivenBoth(Selector[FocusParams]):
    Params = NarrowParams


T = TypeVar("T", bound=ComponentParams)


class OpenAgain(Focus):
    pass


class OpenWide(Selector[T]):
    pass


@pytest.mark.parametrize(
    ("cls", "params"),
    [
        (Focus, FocusParams),
        (OpenFocus, FocusParams),
        (Narrow, NarrowParams),
        (Given, FocusParams),
        (Plain, SelectorParams),
        (GivenBoth, NarrowParams),
        (OpenAgain, FocusParams),
        (OpenWide, SelectorParams),
        (Component, ComponentParams),
    ],
)
def test_the_type_argument_names_the_parameters(cls, params):
    assert cls.Params is params


def test_a_component_asks_for_nothing_unless_it_says_so():
    run: RunView = RunConfig({}, None)
    assert Focus(FocusParams()).needs(run) == Needs()
    assert Needs().step_losses == "nothing"


def test_what_a_component_may_read_of_its_run(tmp_path):
    zero = {"zero_optimization": {"stage": 2}}
    (tmp_path / "zero.json").write_text(json.dumps(zero))
    plain: RunView = RunConfig({"optim": "lomo"}, None)
    assert (plain.llamafactory["optim"], plain.deepspeed, plain.warmup_steps, plain.offline) == ("lomo", None, 0, False)
    for given in (zero, json.dumps(zero), str(tmp_path / "zero.json")):
        assert RunConfig({"deepspeed": given}, None).deepspeed == zero
    assert RunConfig({"deepspeed": str(tmp_path / "none.json")}, None).deepspeed == {}
    assert RunConfig({}, DataFlexConfig(warmup_steps=7), offline=True).warmup_steps == 7
    assert (plain.zero_stage, plain.sharded_by) == (0, None)
    assert (RunConfig({"deepspeed": zero}, None).zero_stage, RunConfig({"deepspeed": zero}, None).sharded_by) == (
        2,
        None,
    )
    assert RunConfig({"deepspeed": {"zero_optimization": {"stage": 3}}}, None).sharded_by == "ZeRO-3"
    assert RunConfig({"fsdp": "full_shard"}, None).sharded_by == "fsdp"


def test_validation_samples_are_there_for_those_who_asked():
    held = make_pool({"x": 3})
    assert context(make_pool({"a": 4}), validation_pool=held).validation is held
    with pytest.raises(ComponentError, match=r"return Needs\(validation=self.params\) from its needs\(\)"):
        _ = context(make_pool({"a": 4})).validation


# What plug-ins ask for, and what follows from it


class AskingParams(SelectorParams, ValidationParams):
    ask: str = "nothing"


@register_measurement("test_slow")
@dataclass(frozen=True)
class Slow(Measurement):
    forwards: ClassVar[float] = 7.0

    def measure(self, batch):
        raise NotImplementedError

    def problems(self, run):
        if run.llamafactory.get("optim") == "lomo":
            yield "ask", "does not go with lomo."


class Unnamed(Losses):
    pass


class Asking(Selector[AskingParams]):
    family, name = "selector", "test_asking"

    def needs(self, run):
        if self.params.ask == "slow":
            return Needs(measurements=(Slow(), Losses()), validation=self.params)
        asked = {"class": Needs(measurements=Losses), "unnamed": Needs(measurements=(Unnamed(),))}
        return {"nothing": Needs(), "dict": {}, **asked}[self.params.ask]

    def score(self, ctx, candidates):
        return np.zeros(candidates.size)


class Bare(Selector[SelectorParams]):
    family, name = "selector", "test_bare"

    def needs(self, run):
        return Needs(validation=self.params)

    def score(self, ctx, candidates):
        return np.zeros(candidates.size)


@pytest.fixture
def asking(monkeypatch):
    registry.load_components([])
    for cls in (Asking, Bare):
        monkeypatch.setitem(registry._registered, ("selector", cls.name), cls)
    return lambda **changes: split_config({"dataflex": {"select": {"method": "test_asking", **changes}}})


@pytest.mark.parametrize(
    ("select", "said"),
    [
        ({"ask": "dict"}, "returned a dict from needs()"),
        ({"ask": "class"}, "a tuple of measurements"),
        ({"ask": "unnamed"}, "asks for Unnamed, which is no measurement with a name"),
        ({"method": "test_bare"}, "must extend dataflex.ValidationParams"),
    ],
)
def test_needs_that_nothing_can_provide_are_refused_by_check(asking, select, said):
    (problem,) = [each for each in problems_of(asking(**select)) if each.key.startswith("dataflex")]
    assert problem.key == "dataflex.select"
    assert said in problem.message
    assert select.get("method", "test_asking") in problem.message


def test_problems_of_a_measurement_are_those_of_who_asks_for_it(asking):
    config = asking(ask="slow")
    config.llamafactory["optim"] = "lomo"
    found = {each.key: each.message for each in problems_of(config)}
    assert found["dataflex.select.ask"] == "does not go with lomo."
    assert "needs validation samples" in found["dataflex.select.validation"]


def outline(**changes):
    return RunOutline(Schedule(0, 5, -1, 20), 8, **{"pool_size": 100, "validation": 6, **changes})


def cost(component, **changes):
    return expected_forwards(component, component.needs(RunConfig({}, None)), outline(**changes))


def test_the_cost_of_a_selector_follows_from_what_it_measures():
    assert cost(Asking(AskingParams(ask="slow"))) == 4 * (100 + 6) * (7 + 1)  # 4 decisions
    assert cost(Asking(AskingParams())) == 0
    clusters = {"cluster_size": 10, "representatives": 2, "checkpoints": []}
    assert cost(build(ClusterLessSelector, **clusters)) == 4 * (20 + 6) * 3 + 100  # and the pool's embeddings, once


def test_the_cost_of_other_families_follows_from_what_they_measure(tmp_path):
    steps = 20 * 8
    assert cost(build(SortOrder, by="loss")) == steps
    assert cost(build(SortOrder, by="length")) == 0
    assert cost(build(SkillItMixer)) == 4 * 6
    assert cost(build(DogeMixer)) == 3 * steps
    assert cost(build(DogeMixer, target="validation", validation_size=4)) == 3 * 20 * (8 + 4)
    for params, forwards in (({}, 0), ({"accumulation": 2}, steps)):
        assert cost(build(GroupDroMixer), **params) == forwards
        assert cost(build(GroupDroMixer, weights="previous"), **params) == 0
        assert cost(build(LossWeighter), **params) == forwards
        assert cost(build(UniformWeighter), **params) == 0
        assert cost(build(DoReMiMixer, reference_model="ref"), **params) == steps + forwards
        assert cost(build(DoReMiMixer, reference_losses="table"), **params) == forwards
