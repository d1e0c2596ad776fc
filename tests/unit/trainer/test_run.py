"""A run without a trainer: its number of steps, and the checkpoints it can resume."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from dataflex.api.context import StepStatistics
from dataflex.api.schedule import Schedule
from dataflex.config.loading import split_config
from dataflex.data.pool import Pool
from dataflex.errors import CheckpointError, ConfigError
from dataflex.trainer.expected_cost import expected_cost
from dataflex.trainer.inputs import RunData, RunInputs, check_processes
from dataflex.trainer.planned import PlannedRounds
from dataflex.trainer.probing import make_probe
from dataflex.trainer.recording import Recorder
from dataflex.trainer.run import LoadedRun, StartedRun
from dataflex.trainer.steps import RunSteps, decide_steps
from unit.fakes import FakeProbe, make_pool


def arguments(**changes: Any) -> Any:
    given = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "world_size": 2}
    given |= {"eval_strategy": SimpleNamespace(value="no"), "eval_steps": None, "logging_steps": 500}
    given |= {"save_strategy": SimpleNamespace(value="no"), "save_steps": 500, "do_eval": False}
    return SimpleNamespace(**{**given, "max_steps": -1, "num_train_epochs": 3.0, "ignore_data_skip": False, **changes})


@dataclass(frozen=True)
class Case:
    """A run's inputs and data."""

    inputs: RunInputs
    data: RunData

    def steps(self, args: Any) -> RunSteps:
        return decide_steps(self.inputs, self.data, args)


def run_of(sizes: dict[str, int] | None = None, whole: Pool | None = None, **section: Any) -> Case:
    inputs = RunInputs.of(split_config({"dataflex": section}))
    if not inputs.plans_data:
        return Case(inputs, RunData(whole=whole))
    return Case(inputs, RunData(make_pool(sizes or {"a": 100, "b": 60}, rows=[{"input_ids": [1] * 7}] * 160)))


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
def test_the_number_of_steps_follows_epochs_and_batch_size(
    section: dict[str, Any], changes: dict[str, Any], expected: int
) -> None:
    args, case = arguments(**changes), run_of(**section)
    case.steps(args).set_in(args, case.inputs.plans_data)
    assert args.max_steps == expected
    assert args.ignore_data_skip == case.inputs.plans_data


TWO_DOMAINS = {"a": 100, "b": 60}  # 20 steps of 8


@pytest.mark.parametrize(
    "section, changes, length, decisions",
    [
        (SELECT, {}, 5, 12),  # a quarter of the pool, three passes
        (SELECT, {"max_steps": 8}, 2, 4),  # a quarter of the run
        ({**SELECT, "warmup_steps": 4}, {"max_steps": 8}, 1, 4),
        ({**SELECT, "train_steps": 1}, {}, 1, 1),
        ({**SELECT, "updates": 2}, {"num_train_epochs": 1.0}, 5, 2),  # the run is 2 rounds, whatever they are
        ({**SELECT, "train_tokens": 8 * 7 * 8}, {}, 2, 4),
        ({"select": {"method": "random"}}, {}, 5, 12),  # the control has the rounds of what it is compared with
        ({"select": {"method": "full"}}, {}, 20, 3),
        ({"order": {"method": "sort"}}, {}, 20, 3),
        ({"mix": {"method": "odm"}}, {}, 2, 30),
        ({"mix": {"method": "odm"}}, {"max_steps": 10}, 1, 10),
        ({"mix": {"method": "static", "proportions": [1, 1]}}, {}, 20, 3),
        ({"mix": {"method": "uniform"}, **SELECT}, {}, 5, 12),
        ({"mix": {"method": "odm"}, **SELECT}, {}, 2, 30),
        ({"mix": {"method": "group_dro"}}, {}, 20, 3),
        ({"mix": {"method": "aioli", "validation": "v", "exploit_rounds": 2}}, {}, 2, 30),  # 4 x 2 + 2 rounds a pass
    ],
)
def test_without_update_steps_rounds_have_their_default_length(
    section: dict[str, Any], changes: dict[str, Any], length: int, decisions: int
) -> None:
    steps = run_of(TWO_DOMAINS, **section).steps(arguments(**changes))
    assert steps.plan.run.schedule.update_steps == steps.schedule.update_steps == length
    assert steps.plan.run.decisions == decisions


def test_a_round_of_the_whole_pool_leaves_a_selector_no_choice() -> None:
    for steps in (20, 21):
        section = {"update_steps": steps, "updates": 1}
        with pytest.raises(
            ConfigError, match=rf"dataflex.update_steps: .*{steps} steps needs {8 * steps} samples.* 160.*at most 19"
        ):
            run_of(**SELECT, **section).steps(arguments())
        for others in ({"select": {"method": "random"}}, {**SELECT, "mix": {"method": "uniform"}}):
            run_of(**others, **section).steps(arguments())
    run_of(**SELECT, update_steps=19).steps(arguments())
    run_of(**SELECT, update_steps=20, train_steps=19).steps(arguments())  # its only round is cut


def test_a_step_of_the_whole_pool_leaves_a_selector_no_choice() -> None:
    with pytest.raises(ConfigError, match=r"per_device_train_batch_size: .*8 samples, and the pool has 8.*'loss'"):
        run_of({"a": 8}, **SELECT).steps(arguments())
    run_of({"a": 9}, **SELECT).steps(arguments())


@pytest.mark.parametrize(
    "section",
    [SELECT, {"mix": {"method": "odm"}}, {"order": {"method": "sort"}}, {"weight": {"method": "loss"}}],
)
def test_a_run_of_warm_up_alone_is_refused(section: dict[str, Any]) -> None:
    ((key, part),) = section.items()
    for changes in ({"train_steps": 6}, {"train_tokens": 6 * 8 * 7}):
        case = run_of(TWO_DOMAINS, make_pool({"all": 160}), **section, warmup_steps=6, **changes)
        text = rf"dataflex.warmup_steps: the run has 6 steps, all of them warm-up \(6\), so {key} {part['method']} "
        with pytest.raises(ConfigError, match=text):
            case.steps(arguments())
    run_of(TWO_DOMAINS, **section, warmup_steps=5, train_steps=6).steps(arguments())


def test_a_run_that_only_weights_has_the_steps_of_the_trainer() -> None:
    whole = make_pool({"all": 161})  # 41 batches of 2 on each of two processes, 21 steps
    with pytest.raises(ConfigError, match="the run has 63 steps"):
        run_of(whole=whole, weight={"method": "loss"}, warmup_steps=63).steps(arguments())
    steps = run_of(whole=whole, weight={"method": "loss"}, warmup_steps=62).steps(arguments())
    assert steps.max_steps is None
    assert steps.expected == 63


def started(**section: Any) -> StartedRun:
    case = run_of(**{**SELECT, "update_steps": 4, "warmup_steps": 2, "updates": 3, **section})
    run = LoadedRun.of(case.inputs, case.data, case.steps(arguments(num_train_epochs=1.0)))
    planner = run.make_planner(run.data.pool, "shuffle", lambda: 0.0, {})
    recorder = Recorder(run.inputs, run.data, run.clock, [])
    rounds = PlannedRounds(
        run.inputs.components, run.data.pool, FakeProbe(np.arange(160)), planner, run.clock, recorder
    )
    return StartedRun(run, rounds, recorder, lambda: 0.0)


@pytest.fixture(autouse=True)
def plain_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plan without the bookkeeping of a real probe."""
    monkeypatch.setattr(PlannedRounds, "decide", lambda self, slot: self.planner.plan(slot, self.probe))


def test_a_restored_state_continues_plan_and_counts() -> None:
    first, second = started(), started()
    for step in range(5):
        first.planned.plan_for(step)
    counted = {"train_seconds": 1.5, "decision_seconds": 0.5, "evaluate_seconds": 0.25, "tokens": 300}
    first.clock.load_state_dict(counted)
    second.load_state_dict(first.state_dict(5))
    assert np.array_equal(second.planned.plan_for(5).indices, first.planned.plan.indices)
    assert second.planned.plan.slot == first.planned.plan.slot
    assert second.clock.state_dict() == counted
    for step in range(6, 14):
        assert np.array_equal(first.planned.plan_for(step).indices, second.planned.plan_for(step).indices)


def test_components_receive_which_steps_are_warm_up() -> None:
    heard: list[tuple[int, bool]] = []
    dynamic = started()  # a warm-up of 2 steps and 3 rounds of 4
    ((_, selector),) = dynamic.inputs.components.items()
    selector.on_step = lambda statistics: heard.append((statistics.step, statistics.warmup))  # type: ignore[method-assign]
    for step in range(14):
        dynamic.planned.plan_for(step)
        counts = np.array([4, 4])
        dynamic.end_of_step(StepStatistics(step + 1, np.ones(2), counts, counts))
    assert [step for step, warmup in heard if warmup] == [1, 2]
    assert len(heard) == 14


def test_a_resume_with_other_training_data_is_refused() -> None:
    first = started()
    first.planned.plan_for(0)
    other = started(sizes={"a": 60, "b": 100})
    with pytest.raises(CheckpointError, match=r"dataset: the checkpoint of step 1 .*other training data"):
        other.data.check(first.state_dict(1), other.inputs.methods)
    started().data.check(first.state_dict(1), first.inputs.methods)


def test_a_resume_with_another_global_batch_size_is_refused() -> None:
    first = started()  # 2 per device x 2 x 2 processes
    state = {**first.state_dict(0), "processes": 2}
    other = {"gradient_accumulation_steps": 4, "world_size": 1}
    assert check_processes(state, arguments(deepspeed="zero.json")) is None
    assert "by a run of 2 processes, and this run has 1" in check_processes(state, arguments(**other, deepspeed=None))
    with pytest.raises(CheckpointError, match=r"split over 2 processes, and this run has 1"):
        check_processes(state, arguments(**other, deepspeed="zero.json"))
    with pytest.raises(CheckpointError, match=r"global batch size .* of 8, this run has 16"):
        check_processes(state, arguments(world_size=4))


def test_another_method_starts_without_the_state_of_the_earlier_one() -> None:
    first, second = started(select={"method": "delta_loss"}), started()
    for step in range(6):
        first.planned.plan_for(step)
    assert first.state_dict(6)["components"]["select"]["baseline"] is not None
    second.load_state_dict(first.state_dict(6))
    again = started(select={"method": "delta_loss"})
    again.load_state_dict({**first.state_dict(6), "methods": {"select": "loss"}})
    assert "baseline" not in again.inputs.components.select[0].component.state_dict()


@pytest.mark.parametrize("given", [[1, 3], "shares.json"])
def test_a_state_of_other_parameters_is_computed_again(tmp_path: Path, given: Any, caplog: Any) -> None:
    """The shares of a file and those of points are part of the state, and must follow a change of the parameter."""
    for name, shares in (("old.json", {"a": 1, "b": 1}), ("shares.json", {"a": 1, "b": 3})):
        (tmp_path / name).write_text(json.dumps(shares))
    old = str(tmp_path / "old.json")
    new = str(tmp_path / given) if isinstance(given, str) else given
    for method, key, make in (
        ("static", "proportions", lambda shares: shares),
        ("schedule", "points", lambda shares: [{"step": 0, "proportions": shares}]),
    ):
        first = started(mix={"method": method, key: make(old)})
        first.planned.plan_for(0)
        state = first.state_dict(2)
        assert state["made_with"]["mix"].keys() == {key}
        again = started(mix={"method": method, key: make(new)})
        caplog.clear()
        again.load_state_dict(state)
        (note,) = again.recorder.notes
        expected = f"its state up to step 2 was computed with another {key}. It is discarded and computed again."
        assert note == f"mix {method}: {expected}"
        assert [record.message for record in caplog.records] == [note]
        assert again.planned.plan_for(2).proportions.tolist() == [0.25, 0.75]
        same = started(mix={"method": method, key: make(old)})
        (tmp_path / "old.json").write_text(json.dumps({"a": 1, "b": 9}))  # a file may change while a run goes on
        same.load_state_dict(state)
        assert same.recorder.notes == []
        assert same.planned.plan_for(2).proportions.tolist() == [0.5, 0.5]
        (tmp_path / "old.json").write_text(json.dumps({"a": 1, "b": 1}))


@pytest.mark.parametrize("total, fine", [(30, True), (6, True), (5, False), (3, False)])
def test_a_total_that_ends_inside_the_running_round_is_refused(total: int, fine: bool) -> None:
    first = started(train_steps=14)
    for step in range(4):
        first.planned.plan_for(step)  # inside the round of steps 2 to 5
    second = started(train_steps=total)
    if fine:
        second.load_state_dict(first.state_dict(4))
    else:
        with pytest.raises(CheckpointError, match="inside a round of 4 steps"):
            second.load_state_dict(first.state_dict(4))


def test_a_resumed_run_of_another_length_keeps_its_default_rounds() -> None:
    def made(steps: int) -> RunSteps:
        return run_of(TWO_DOMAINS, **SELECT).steps(arguments(max_steps=steps))

    assert (made(8).schedule.update_steps, made(20).schedule.update_steps) == (2, 5)
    marker = SimpleNamespace(config={"dataflex.update_steps": 2}, step=8)
    case = run_of(TWO_DOMAINS, **SELECT)
    inputs = replace(case.inputs, resume=SimpleNamespace(marker=marker))
    resumed = LoadedRun.of(inputs, case.data, decide_steps(inputs, case.data, arguments(max_steps=20)))
    assert resumed.steps.schedule == Schedule(0, 2, -1, 20)
    recorder = Recorder(inputs, case.data, resumed.clock, [])
    assert StartedRun(resumed, None, recorder, lambda: 0.0).snapshot["dataflex.update_steps"] == 2


def test_a_run_that_only_weights_needs_a_section() -> None:
    with pytest.raises(ValueError, match="dataflex: section"):
        RunInputs.of(split_config({}))


@pytest.mark.parametrize("method", ["loss", "grand", "less"])
@pytest.mark.parametrize("size, measured", [(160, 8), (5, 5), (2, 2), (1, 1)])
def test_a_probe_first_compares_two_samples(method: str, size: int, measured: int) -> None:
    """What a probe finds out about a model at its first call it finds out by comparing two."""
    case = run_of({"a": size}, select={"method": method, **({"validation": "v"} if method == "less" else {})})
    run = LoadedRun.of(case.inputs, case.data, RunSteps(Schedule(0, 1, -1, 1), 1, 1))
    probe = FakeProbe(np.arange(size))
    assert method in str(expected_cost(run, case.data.pool, probe))
    warm_up, timed = probe.asked
    assert warm_up.size == min(2, size)
    assert timed.size == measured
    assert run.clock.decision_seconds > 0


@pytest.mark.parametrize(
    "sharded, checkpointing, given, expected",
    [
        (False, "no", None, 4 * 50),
        (False, "by layers", None, 4 * 50),
        (False, "by its own code", None, 4 * 50),
        (True, "no", None, 4 * 50),
        (True, "by layers", None, 4 * 50),
        (True, "by its own code", None, 50),
        (True, "by its own code", 70, 70),
        (False, "no", 70, 70),
    ],
)
@pytest.mark.parametrize("zero", [False, True])
def test_the_tokens_of_a_gradient_batch_depend_on_sharding_and_checkpointing(
    sharded: bool, checkpointing: str, given: int | None, expected: int, zero: bool
) -> None:
    """Where the probe cannot recompute what a sharded training does, it has no memory to spare and cannot halve."""
    model = torch.nn.ModuleList([GradientCheckpointingLayer(), torch.nn.Linear(1, 1)])
    model[0].gradient_checkpointing = checkpointing == "by layers"
    model.__dict__["is_gradient_checkpointing"] = checkpointing != "no"
    case = run_of({"a": 3}, **SELECT, probe_batch_tokens=given)
    args = SimpleNamespace(
        per_device_train_batch_size=4, device="cpu", process_index=0, disable_tqdm=True, output_dir="."
    )
    tokenizer = SimpleNamespace(pad_token_id=0, eos_token_id=2, decode=lambda tokens, **_: "")
    trainer: Any = SimpleNamespace(
        dataflex=LoadedRun.of(case.inputs, case.data, RunSteps.none(case.inputs.settings)),
        args=args,
        stage_loss=None,
        is_fsdp_enabled=sharded and not zero,
        zero_stage=lambda: 3 if sharded and zero else 2 if zero else 0,
        causal_model=lambda: model,
        raw_model=lambda: None,
        data_collator=None,
        plain_collators=(),
        accelerator=SimpleNamespace(autocast=None),
        processing_class=tokenizer,
        stop_tokens=None,
    )
    probe = make_probe(trainer, make_pool({"a": 3}, lengths=[10, 50, 20]))
    assert probe.gradient_batch_tokens == expected
    assert probe.batch_tokens == (given or 4 * 4 * 50)
    assert probe.sharded == sharded


def test_other_evaluation_data_gives_a_note() -> None:
    """It changes no decision, and makes two halves of a curve that do not belong together."""
    first, same, other = (
        RunData(evaluation=make_pool({"held": 4}, rows=[{"input_ids": [tokens]}] * 4)) for tokens in (1, 1, 2)
    )
    state = {"step": 3, **first.fingerprints()}
    assert same.says_of_evaluation(state) is None
    assert "evaluation data differs from the data used up to step 3" in str(other.says_of_evaluation(state))
    assert RunData().says_of_evaluation(state) is None


@pytest.mark.parametrize("section", [SELECT, {"weight": {"method": "loss"}}])
def test_a_run_that_ends_in_its_warm_up_gives_a_note(section: dict[str, Any]) -> None:
    """As where a budget, or early stopping, ends it."""
    method = next(f"{key} {part['method']}" for key, part in section.items())
    for step, expected in ((4, True), (5, True), (6, False)):
        case = run_of(TWO_DOMAINS, **section, warmup_steps=5, train_steps=20)
        run = LoadedRun.of(case.inputs, case.data, case.steps(arguments()))
        recorder = Recorder(run.inputs, run.data, run.clock, [])
        notes = StartedRun(run, None, recorder, lambda: 0.0).finish(step).notes
        assert notes == recorder.notes
        assert len(notes) == expected
        if expected:
            assert notes[0] == f"the run ended at step {step}, inside its warm-up of 5: {method} decided nothing."
