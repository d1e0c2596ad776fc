"""A run apart from any trainer: its number of steps, and which checkpoints it goes on from."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dataflex.config import split_config
from dataflex.data.plan import Planner
from dataflex.errors import CheckpointError, ConfigError
from dataflex.trainer.run import DynamicRun
from unit.fakes import FakeProbe, make_pool


def arguments(**changes: Any) -> Any:
    given = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "world_size": 2}
    return SimpleNamespace(**{**given, "max_steps": -1, "num_train_epochs": 3.0, "ignore_data_skip": False, **changes})


def run_of(sizes: dict[str, int] | None = None, **section: Any) -> DynamicRun:
    dynamic = DynamicRun(split_config({"dataflex": section}))
    if dynamic.plans_data:
        dynamic.pool = make_pool(sizes or {"a": 100, "b": 60}, rows=[{"input_ids": [1] * 7}] * 160)
    return dynamic


SELECT = {"select": {"method": "loss"}}


@pytest.mark.parametrize(
    "section, changes, expected",
    [
        ({**SELECT, "update_steps": 10, "updates": 2, "warmup_steps": 5}, {}, 75),
        ({**SELECT, "update_steps": 10, "updates": 2, "train_steps": 7}, {}, 7),
        ({**SELECT, "update_steps": 10, "updates": 2}, {"max_steps": 9}, 9),
        ({**SELECT, "update_steps": 10}, {}, 60),  # 160 samples in steps of 8, three times
        ({**SELECT}, {"num_train_epochs": 0.5}, 10),
        ({"weight": {"method": "loss"}, "update_steps": 10, "updates": 2, "warmup_steps": 5}, {}, 75),
        ({"weight": {"method": "loss"}, "update_steps": 10, "updates": 2}, {"max_steps": 9}, 9),
        ({"weight": {"method": "loss"}, "train_steps": 7}, {}, 7),
        ({"weight": {"method": "loss"}}, {}, -1),  # LLaMA-Factory's own count
    ],
)
def test_number_of_steps(section: dict[str, Any], changes: dict[str, Any], expected: int) -> None:
    args = arguments(**changes)
    run_of(**section).set_steps(args)
    assert args.max_steps == expected


def test_a_round_is_one_pass_by_default() -> None:
    dynamic = run_of(**SELECT)
    dynamic.set_steps(arguments())
    assert dynamic.schedule.update_steps == 20
    assert dynamic.schedule.num_updates == 3


def test_a_round_longer_than_the_pool_leaves_a_selector_no_choice() -> None:
    section = {"update_steps": 21, "updates": 1}
    with pytest.raises(ConfigError, match=r"dataflex.update_steps: .*21 steps needs 168 samples.* 160.*at most 20"):
        run_of(**SELECT, **section).set_steps(arguments())
    for others in ({"select": {"method": "random"}}, {**SELECT, "mix": {"method": "uniform"}}):
        run_of(**others, **section).set_steps(arguments())
    run_of(**SELECT, **{**section, "update_steps": 20}).set_steps(arguments())


def test_a_pool_of_uneven_size_needs_no_update_steps() -> None:
    dynamic = run_of({"a": 100, "b": 57}, **SELECT)  # 157 samples are 19.6 steps of 8
    dynamic.set_steps(arguments())
    assert dynamic.schedule.update_steps == 19
    others = run_of({"a": 100, "b": 57}, select={"method": "full"})
    others.set_steps(arguments())
    assert others.schedule.update_steps == 20


def started(**section: Any) -> DynamicRun:
    dynamic = run_of(**{**SELECT, "update_steps": 4, "warmup_steps": 2, "updates": 3, **section})
    dynamic.set_steps(arguments(num_train_epochs=1.0))
    dynamic.planner = Planner(
        dynamic.pool, dynamic.components, dynamic.schedule, seed=dynamic.settings.seed, global_batch_size=8
    )
    dynamic.probe = FakeProbe(np.arange(160))
    dynamic.probe.cost = SimpleNamespace()
    return dynamic


@pytest.fixture(autouse=True)
def plain_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plan without the bookkeeping of a real probe."""
    monkeypatch.setattr(DynamicRun, "_decide", lambda self, slot: self.planner.plan(slot, self.probe))


def test_state_goes_on_with_the_plan_and_the_counts() -> None:
    first, second = started(), started()
    for step in range(5):
        first.plan_for(step)
    first.train_seconds, first.decision_seconds, first.tokens = 1.5, 0.5, 300
    second.load_state_dict(first.state_dict(5))
    assert np.array_equal(second.plan_for(5).indices, first.plan.indices)
    assert second.plan.slot == first.plan.slot
    assert (second.train_seconds, second.decision_seconds, second.tokens) == (1.5, 0.5, 300)
    for step in range(6, 14):
        assert np.array_equal(first.plan_for(step).indices, second.plan_for(step).indices)


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"seed": 1}, "dataflex.seed = 42, this run has 1"),
        ({"update_steps": 5}, "dataflex.update_steps = 4"),
        ({"warmup_steps": 3}, "dataflex.warmup_steps = 2"),
        ({"updates": 2}, "dataflex.updates = 3"),
        ({"select": {"method": "random"}}, "components = .*loss.*random"),
        ({"order": {"method": "shuffle"}}, "components"),
        ({"sizes": {"a": 60, "b": 100}}, "other training data"),
    ],
)
def test_another_run_is_not_gone_on_with(changes: dict[str, Any], text: str) -> None:
    first = started()
    first.plan_for(0)
    with pytest.raises(CheckpointError, match=f"step 1 .*{text}"):
        started(**changes).load_state_dict(first.state_dict(1))


def test_another_global_batch_size_is_not_gone_on_with() -> None:
    first, second = started(), started()
    second.global_batch_size = 16
    with pytest.raises(CheckpointError, match=r"global batch size .* = 8, this run has 16"):
        second.load_state_dict(first.state_dict(0))


@pytest.mark.parametrize("total, fine", [(30, True), (6, True), (5, False), (2, False)])
def test_a_total_that_cuts_the_running_round_is_not_gone_on_with(total: int, fine: bool) -> None:
    first = started(train_steps=14)
    for step in range(4):
        first.plan_for(step)  # inside the round of steps 2 to 5
    second = started(train_steps=total)
    if fine:
        second.load_state_dict(first.state_dict(4))
    else:
        with pytest.raises(CheckpointError, match="inside a round of 4 steps"):
            second.load_state_dict(first.state_dict(4))


def test_a_run_that_only_weights_needs_a_section() -> None:
    with pytest.raises(ValueError, match="dataflex: section"):
        DynamicRun(split_config({}))
