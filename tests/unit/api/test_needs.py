from __future__ import annotations

import json
from typing import TypeVar

import numpy as np
import pytest

from dataflex import ComponentParams, Needs, RunView, Selector, SelectorParams
from dataflex.api.component import Component
from dataflex.config.loading import DataFlexConfig, RunConfig
from dataflex.errors import ComponentError
from unit.fakes import context, make_pool


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


def test_validation_samples_are_there_for_those_who_asked():
    held = make_pool({"x": 3})
    assert context(make_pool({"a": 4}), validation_pool=held).validation is held
    with pytest.raises(ComponentError, match=r"return Needs\(validation=self.params\) from its needs\(\)"):
        _ = context(make_pool({"a": 4})).validation
