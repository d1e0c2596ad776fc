"""What a run came to: read from its folder once, kept in ``complete.json``."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dataflex.compare.experiment import (
    AVERAGES,
    COMPLETE_FILE,
    FAILED_FILE,
    FORMAT,
    KEY_FILE,
    MEASURES,
    Experiment,
    Run,
)
from dataflex.errors import ConfigError
from dataflex.files import write_atomically
from dataflex.record.files import read_object
from dataflex.trainer.checkpoint import checkpoints, last_complete

State = Literal["complete", "to evaluate", "to resume", "to run"]

COSTS = ("train_seconds", "decision_seconds", "evaluate_seconds", "task_seconds", "tokens", "steps")
"""Costs of a run; ``task_seconds`` where tasks were evaluated."""

_MODELS = (
    "adapter_model.safetensors",
    "adapter_model.bin",
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


@dataclass(frozen=True)
class Result:
    """The numbers of a complete run.

    Attributes:
        metrics: name -> number, finite: ``token_weighted_loss``, ``<data set>_loss``, ``<task>/acc`` and so on.
        costs: name of :data:`COSTS` -> number.
        fingerprint: of the evaluation data; None without any.
        domains: evaluation data sets.
        spent_before: tokens that were trained on at the last log before the last step; None where nothing was logged.
        chance: task -> accuracy of guessing, where there is such a thing.
    """

    metrics: dict[str, float]
    costs: dict[str, float]
    fingerprint: str | None
    domains: tuple[str, ...]
    spent_before: float | None
    chance: dict[str, float]


def state_of(run: Run, experiment: Experiment) -> State:
    """Return how far a run is.

    Raises:
        ConfigError: if its folder belongs to another run or release.
    """
    key = read_object(run.folder / KEY_FILE)
    if key is not None and (key.get("format"), key.get("key")) != (FORMAT, run.key):
        raise ConfigError(
            f"{run.folder / KEY_FILE}: expected format {FORMAT} and key {run.key}, found format {key.get('format')!r} "
            f"and key {key.get('key')!r}; move the folder away, or choose another output_dir."
        )
    if read_result(run, experiment) is not None:
        return "complete"
    if trained_problem(run, experiment) is None:
        return "to evaluate"
    return "to resume" if last_complete(run.folder)[0] is not None else "to run"


def needs_overwriting(run: Run) -> bool:
    """Return whether the folder of a run that is not trained holds a model and nothing to go on from."""
    return not checkpoints(run.folder) and any((run.folder / name).is_file() for name in _MODELS)


def failure_of(run: Run) -> str | None:
    """Return why the last attempt at a run failed, if it did."""
    failed = _object(run.folder / FAILED_FILE)
    return None if failed is None else str(failed.get("error"))


def read_result(run: Run, experiment: Experiment) -> Result | None:
    """Return the numbers of a complete run; None where it is not complete, or not with these tasks."""
    stored = _object(run.folder / COMPLETE_FILE)
    expected = {"format": FORMAT, "key": run.key, "tasks_key": experiment.tasks_key}
    if stored is None or any(stored.get(name) != value for name, value in expected.items()):
        return None
    try:
        return Result(
            metrics={str(name): float(value) for name, value in stored["metrics"].items()},
            costs={str(name): value for name, value in stored["costs"].items() if _is_number(value)},
            fingerprint=stored["fingerprint"],
            domains=tuple(stored["domains"]),
            spent_before=stored["spent_before"],
            chance=dict(stored["chance"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def trained_problem(run: Run, experiment: Experiment) -> str | None:
    """Return why a run's training is not whole, or None where it is.

    Whole is a record whose summary speaks of its last step, with the evaluation made there, and the Trainer's state,
    which is saved after the model, from the same training.
    """
    summary_file = run.folder / "dataflex" / "summary.json"
    summary = _object(summary_file)
    if summary is None:
        return f"{summary_file} is missing or not readable: training has not ended"
    missing = [name for name in COSTS if name != "task_seconds" and not _is_number(summary.get(name))]
    if missing:
        return f"{summary_file} has no number {', '.join(missing)}"
    evaluation = summary.get("evaluation")
    if experiment.evaluates:
        if not isinstance(evaluation, dict) or evaluation.get("step") != summary["steps"]:
            return f"{summary_file} has no evaluation of step {summary['steps']}, the last one"
        absent = [name for name in ("domains", *AVERAGES) if not isinstance(evaluation.get(name), dict)]
        if absent or not isinstance(evaluation.get("fingerprint"), str):
            return f"{summary_file}: its evaluation has no {', '.join(absent) or 'fingerprint'}"
    state, config = run.folder / "trainer_state.json", run.folder / "dataflex" / "config.yaml"
    if not config.is_file() or not state.is_file() or state.stat().st_mtime < config.stat().st_mtime:
        return f"{state} is not of this training: the model was not saved"
    return None


def task_file(run: Run, task: Mapping[str, Any]) -> Path:
    """Return where ``dataflex-cli eval`` writes what it found."""
    return run.folder / "dataflex" / "tasks" / f"{task['name']}.json"


def complete(run: Run, experiment: Experiment) -> None:
    """Read what a run came to, and keep it.

    Raises:
        ConfigError: if something is missing; the text says what.
    """
    problem = trained_problem(run, experiment)
    if problem is not None:
        raise ConfigError(problem)
    summary = read_object(run.folder / "dataflex" / "summary.json")
    assert summary is not None
    evaluation = summary.get("evaluation") if experiment.evaluates else None
    costs = {name: summary[name] for name in COSTS if name in summary}
    metrics = {} if evaluation is None else _evaluation_metrics(evaluation)
    chance: dict[str, float] = {}
    for task in experiment.tasks:
        file = task_file(run, task)
        found = read_object(file)
        if found is None or not isinstance(found.get("metrics"), dict):
            raise ConfigError(f"{file} is missing or has no metrics: the task was not evaluated")
        metrics |= _task_metrics(str(task["name"]), found)
        costs["task_seconds"] = costs.get("task_seconds", 0.0) + float(found.get("seconds") or 0.0)
        if _is_number(found.get("chance")):
            chance[str(task["name"])] = float(found["chance"])
    stored = {
        "format": FORMAT,
        "key": run.key,
        "tasks_key": experiment.tasks_key,
        "variant": run.variant,
        "seed": run.seed,
        "status": "complete",
        "metrics": metrics,
        "costs": costs,
        "fingerprint": None if evaluation is None else evaluation["fingerprint"],
        "domains": [] if evaluation is None else list(evaluation["domains"]),
        "spent_before": _spent_before(run.folder / "trainer_state.json", int(summary["steps"])),
        "chance": chance,
    }
    write_atomically(run.folder / COMPLETE_FILE, (json.dumps(stored, indent=2) + "\n").encode())


def _evaluation_metrics(evaluation: Mapping[str, Any]) -> dict[str, float]:
    groups = {**evaluation["domains"], **{name: evaluation[name] for name in AVERAGES}}
    return {
        f"{group}_{measure}": float(numbers[measure])
        for group, numbers in groups.items()
        for measure in MEASURES
        if _is_number(numbers.get(measure))
    }


def _task_metrics(name: str, found: Mapping[str, Any]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    parts = {"": found, **{f"{subject}/": part for subject, part in (found.get("subjects") or {}).items()}}
    for subject, part in parts.items():
        for metric, numbers in part["metrics"].items():
            if _is_number(numbers.get("value")):
                metrics[f"{name}/{subject}{metric}"] = float(numbers["value"])
            if not subject and _is_number(numbers.get("stderr")):
                metrics[f"{name}/{metric}/stderr"] = float(numbers["stderr"])
    return metrics


def _spent_before(state_file: Path, steps: int) -> float | None:
    history = (read_object(state_file) or {}).get("log_history") or []
    earlier = [entry["dataflex/tokens"] for entry in history if entry["step"] < steps and "dataflex/tokens" in entry]
    return max(earlier, default=None)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _object(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file; None where there is none, or half of one."""
    try:
        return read_object(path)
    except ConfigError:
        return None
