"""What a run came to: read from its folder once, kept in ``complete.json``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dataflex.compare.experiment import AVERAGES, COMPLETE_FILE, FAILED_FILE, FORMAT, KEY_FILE, MEASURES, Plan, Run
from dataflex.compare.tasks import Task
from dataflex.config.checks import MODEL_FILES
from dataflex.errors import ConfigError
from dataflex.files import json_text, write_atomically
from dataflex.record.checkpoint import checkpoints
from dataflex.record.files import read_object
from dataflex.trainer.resume import last_of

State = Literal["complete", "to record", "to evaluate", "to resume", "to run"]
"""``to record``: only its numbers have to be read; ``to evaluate``: tasks are missing, and nothing is trained."""

COSTS = ("train_seconds", "decision_seconds", "evaluate_seconds", "task_seconds", "tokens", "steps")
"""Costs of a run; ``task_seconds`` where tasks were evaluated."""


@dataclass(frozen=True)
class Result:
    """The numbers of a complete run.

    Attributes:
        metrics: name -> number, finite: ``token_weighted_loss``, ``<data set>_loss``, ``<task>/acc`` and so on.
        not_finite: names of those that were measured and are not finite.
        higher_is_better: name -> direction, of those whose direction is known.
        costs: name of :data:`COSTS` -> number.
        fingerprint: of the evaluation data; None without any.
        domains: evaluation data sets.
        tasks: the tasks of the comparison.
        spent_before: tokens that were trained on at the last log before the last step; None where nothing was logged.
        chance: task -> accuracy of guessing, where there is such a thing.
    """

    metrics: dict[str, float]
    not_finite: tuple[str, ...]
    higher_is_better: dict[str, bool]
    costs: dict[str, float]
    fingerprint: str | None
    domains: tuple[str, ...]
    tasks: tuple[str, ...]
    spent_before: float | None
    chance: dict[str, float]


def state_of(run: Run, plan: Plan) -> State:
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
    if read_result(run, plan) is not None:
        return "complete"
    if trained_problem(run, plan) is None:
        return "to evaluate" if tasks_to_evaluate(run, plan) else "to record"
    return "to resume" if last_of(run.folder) is not None else "to run"


def needs_overwriting(run: Run) -> bool:
    """Return whether the folder of a run that is not trained holds a model or checkpoints, but none to go on from."""
    left = bool(checkpoints(run.folder)) or any((run.folder / name).is_file() for name in MODEL_FILES)
    return left and last_of(run.folder) is None


def failure_of(run: Run) -> str | None:
    """Return why the last attempt at a run failed, if it did."""
    failed = _object(run.folder / FAILED_FILE)
    return None if failed is None else str(failed.get("error"))


def tasks_to_evaluate(run: Run, plan: Plan) -> list[Task]:
    """Return the tasks that a run lacks: not on record, or with other settings, files or another harness."""
    known = _recorded(run).get("tasks", {})
    return [task for task in plan.tasks if known.get(task.name, {}).get("key") != task.key]


def _recorded(run: Run) -> dict[str, Any]:
    """Return what :func:`complete` wrote about this run; empty where it did not."""
    stored = _object(run.folder / COMPLETE_FILE) or {}
    return stored if (stored.get("format"), stored.get("key")) == (FORMAT, run.key) else {}


def read_result(run: Run, plan: Plan) -> Result | None:
    """Return the numbers of a complete run; None where it is not complete, or not with these tasks."""
    stored = _recorded(run)
    if not stored or tasks_to_evaluate(run, plan):
        return None
    try:
        parts = [stored, *(stored["tasks"][task.name] for task in plan.tasks)]
        costs = {str(name): value for name, value in stored["costs"].items() if _is_number(value)}
        if plan.tasks:
            costs["task_seconds"] = sum(part["seconds"] for part in parts[1:])
        chances = {task.name: stored["tasks"][task.name]["chance"] for task in plan.tasks}
        return Result(
            metrics={str(name): float(value) for part in parts for name, value in part["metrics"].items()},
            not_finite=tuple(name for part in parts for name in part["not_finite"]),
            higher_is_better={
                str(name): bool(value) for part in parts for name, value in part["higher_is_better"].items()
            },
            costs=costs,
            fingerprint=stored["fingerprint"],
            domains=tuple(stored["domains"]),
            tasks=tuple(chances),
            spent_before=stored["spent_before"],
            chance={name: float(value) for name, value in chances.items() if value is not None},
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def trained_problem(run: Run, plan: Plan) -> str | None:
    """Return why a run's training is not whole, or None where it is.

    Whole is a record whose summary speaks of its last step, with the evaluation made there, and says that the model was
    saved.
    """
    summary_file = run.folder / "dataflex" / "summary.json"
    summary = _object(summary_file)
    if summary is None:
        return f"{summary_file} is missing or not readable: training has not ended"
    missing = [name for name in COSTS if name != "task_seconds" and not _is_number(summary.get(name))]
    if missing:
        return f"{summary_file} has no number {', '.join(missing)}"
    evaluation = summary.get("evaluation")
    if plan.evaluates:
        if not isinstance(evaluation, dict) or evaluation.get("step") != summary["steps"]:
            return f"{summary_file} has no evaluation of step {summary['steps']}, the last one"
        absent = [name for name in ("domains", *AVERAGES) if not isinstance(evaluation.get(name), dict)]
        if absent or not isinstance(evaluation.get("fingerprint"), str):
            return f"{summary_file}: its evaluation has no {', '.join(absent) or 'fingerprint'}"
    if "model" not in summary.get("saved", ()) or not (run.folder / "trainer_state.json").is_file():
        return f"{summary_file} does not say that the model was saved"
    return None


def complete(run: Run, plan: Plan, evaluated: Sequence[Task]) -> None:
    """Read what a run came to, and keep it beside the tasks that are on record already.

    Args:
        run: trained.
        plan: what it belongs to.
        evaluated: the tasks that were evaluated just now.

    Raises:
        ConfigError: if something is missing; the text says what.
    """
    problem = trained_problem(run, plan)
    if problem is not None:
        raise ConfigError(problem)
    summary = read_object(run.folder / "dataflex" / "summary.json")
    assert summary is not None
    evaluation = summary.get("evaluation") if plan.evaluates else None
    costs = {name: summary[name] for name in COSTS if name in summary}
    tasks = {**_recorded(run).get("tasks", {}), **{task.name: _task_record(run, task) for task in evaluated}}
    stored = {
        "format": FORMAT,
        "key": run.key,
        "variant": run.variant,
        "seed": run.seed,
        "status": "complete",
        **_evaluation_metrics(evaluation or {}),
        "costs": costs,
        "fingerprint": None if evaluation is None else evaluation["fingerprint"],
        "domains": [] if evaluation is None else list(evaluation["domains"]),
        "spent_before": _spent_before(run.folder / "trainer_state.json", int(summary["steps"])),
        "tasks": tasks,
    }
    write_atomically(run.folder / COMPLETE_FILE, (json_text(stored, indent=2) + "\n").encode())


_ALWAYS_MEASURED = ("loss", "perplexity")
"""Null only where they are not finite; bits per byte are null of a text without bytes too."""


def _evaluation_metrics(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """Return metrics, names of those that are not finite, and directions of what an evaluation measured."""
    measured = {name: group for name, group in (evaluation.get("domains") or {}).items() if group.get("tokens") != 0}
    groups = {**measured, **{name: evaluation[name] for name in AVERAGES if name in evaluation}}
    values = {
        f"{group}_{measure}": numbers.get(measure)
        for group, numbers in groups.items()
        for measure in MEASURES
        if numbers.get(measure) is not None or (measure in numbers and measure in _ALWAYS_MEASURED)
    }
    return _sorted_out(values, dict.fromkeys(values, False))


def _task_record(run: Run, task: Task) -> dict[str, Any]:
    """Return what ``dataflex-cli eval`` wrote about a task, as it is kept.

    Raises:
        ConfigError: if it wrote nothing.
    """
    file = run.folder / "dataflex" / "tasks" / f"{task.name}.json"
    found = read_object(file)
    if found is None or not isinstance(found.get("metrics"), dict):
        raise ConfigError(f"{file} is missing or has no metrics: the task was not evaluated")
    values: dict[str, Any] = {}
    directions: dict[str, bool | None] = {}
    parts = {"": found, **{f"{subject}/": part for subject, part in (found.get("subjects") or {}).items()}}
    for subject, part in parts.items():
        for metric, numbers in part["metrics"].items():
            name = f"{task.name}/{subject}{metric}"
            values[name], directions[name] = numbers.get("value"), numbers.get("higher_is_better")
            if not subject and _is_number(numbers.get("stderr")):
                values[f"{name}/stderr"] = numbers["stderr"]
    chance = found.get("chance")
    return {
        "key": task.key,
        **_sorted_out({name: value for name, value in values.items() if value is not None}, directions),
        "chance": chance if _is_number(chance) else None,
        "seconds": float(found.get("seconds") or 0.0),
    }


def _sorted_out(values: Mapping[str, Any], directions: Mapping[str, bool | None]) -> dict[str, Any]:
    """Return the finite numbers, the names of the others, and the directions that are known."""
    return {
        "metrics": {name: float(value) for name, value in values.items() if _is_number(value)},
        "not_finite": [name for name, value in values.items() if not _is_number(value)],
        "higher_is_better": {name: value for name, value in directions.items() if value is not None},
    }


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
