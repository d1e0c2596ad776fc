"""The result of a run: read from its folder once, then stored in ``complete.json``."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
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
    STDERR,
    Plan,
    Run,
)
from dataflex.compare.tasks import Task
from dataflex.config.checks import MODEL_FILES
from dataflex.errors import ConfigError
from dataflex.files import json_text, write_atomically
from dataflex.record.checkpoint import checkpoints
from dataflex.record.files import read_object
from dataflex.record.identity import FOLDER
from dataflex.record.reader import read_header, read_rounds
from dataflex.trainer.resume import last_of

SUMMARY_FILE = Path(FOLDER, "summary.json")
"""Summary of a training, in the folder of its run."""

State = Literal["complete", "to record", "to evaluate", "to resume", "to run"]
"""State of a run.

``to record``: the run is trained and evaluated, and only its results must be read. ``to evaluate``: the run is trained,
and tasks are missing.
"""

COSTS = ("train_seconds", "decision_seconds", "evaluate_seconds", "task_seconds", "tokens", "steps")
"""Costs of a run. ``task_seconds`` exists if tasks were evaluated."""


@dataclass(frozen=True)
class Result:
    """Metrics and costs of a complete run.

    Attributes:
        metrics: name -> finite value: ``token_weighted_loss``, ``<data set>_loss``, ``<task>/acc`` and so on. The
            standard error of a metric has its name with :data:`STDERR`.
        not_finite: names of the metrics that were measured and are not finite.
        higher_is_better: name -> direction, for the metrics whose direction is known.
        costs: name of :data:`COSTS` -> value.
        fingerprint: fingerprint of the evaluation data. None without evaluation data.
        domains: names of the evaluation data sets.
        tasks: names of the tasks of the comparison.
        spent_before: tokens trained on at the last log before the last step. None if there is no such log.
        chance: task -> accuracy of guessing, for tasks that have one.
        runs_at_once: number of runs that shared a device when it was trained. None for a run whose folder does not say
            it.
        seconds: seconds from the start of its first process to the end of its last one, with loading. None unless the
            run was made on this machine in one attempt.
        taken_over_from: output_dir of another comparison that made the run. None for a run of this comparison.
        chosen: name of a data set -> samples of it in the rounds after the warm-up. Empty for a run without decisions.
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
    runs_at_once: int | None
    seconds: float | None
    taken_over_from: str | None
    chosen: dict[str, int]


def state_of(run: Run, plan: Plan) -> State:
    """Return the state of a run.

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
    """Return whether the folder of an untrained run has a model or checkpoints, but none that can be resumed."""
    left = bool(checkpoints(run.folder)) or any((run.folder / name).is_file() for name in MODEL_FILES)
    return left and last_of(run.folder) is None


def failure_of(run: Run) -> str | None:
    """Return the error of the last attempt at a run, or None if it did not fail."""
    failed = _object(run.folder / FAILED_FILE)
    return None if failed is None else str(failed.get("error"))


def tasks_to_evaluate(run: Run, plan: Plan) -> list[Task]:
    """Return the tasks of a run that have no valid result.

    A result is valid if the settings and the files of the task and the version of the harness have not changed since.
    """
    known = _recorded(run).get("tasks", {})
    return [task for task in plan.tasks if known.get(task.name, {}).get("key") != task.key]


def _recorded(run: Run) -> dict[str, Any]:
    """Return the object that :func:`complete` stored for this run, or an empty one."""
    stored = _object(run.folder / COMPLETE_FILE) or {}
    return stored if (stored.get("format"), stored.get("key")) == (FORMAT, run.key) else {}


def read_result(run: Run, plan: Plan) -> Result | None:
    """Return the result of a complete run. None if the run, or one of the plan's tasks, is not complete."""
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
            runs_at_once=stored["runs_at_once"],
            seconds=None if "taken_over_from" in stored else stored["seconds"],
            taken_over_from=stored.get("taken_over_from"),
            chosen={str(name): int(count) for name, count in stored.get("chosen", {}).items()},
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def cost_notes(results: Sequence[Result]) -> Iterator[str]:
    """Yield the reasons why the seconds of complete runs are not those of runs alone on one machine."""
    counts = sorted({result.runs_at_once for result in results if result.runs_at_once is not None})
    if len(counts) > 1:
        listed = ", ".join(map(str, counts))
        yield f"Runs with different numbers of runs at a time ({listed}) cannot be compared by their seconds."
    if counts and counts[-1] > 1:
        yield "Seconds of runs that were made several at a time include waiting for each other."
    origins = [result.taken_over_from for result in results if result.taken_over_from is not None]
    if origins:
        yield (
            f"{len(origins)} of {len(results)} complete runs were taken over from {', '.join(dict.fromkeys(origins))}. "
            "Seconds of runs on different machines cannot be compared."
        )


def trained_problem(run: Run, plan: Plan) -> str | None:
    """Return the reason why the training of a run is not complete, or None if it is.

    A run that was taken over has results, but no model. Otherwise training is complete if the summary on record says
    that the model was saved. If the plan evaluates, the summary must also have an evaluation of the last step.
    """
    elsewhere = _recorded(run).get("taken_over_from")
    if elsewhere is not None:
        return f"the run was taken over from {elsewhere}, and its model is not in {run.folder}"
    summary_file = run.folder / SUMMARY_FILE
    summary = _object(summary_file)
    if summary is None:
        return f"{summary_file} is missing or cannot be read: training has not ended"
    missing = [name for name in COSTS if name != "task_seconds" and not _is_number(summary.get(name))]
    if missing:
        return f"{summary_file} has no finite number for {', '.join(missing)}"
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


def complete(run: Run, plan: Plan, evaluated: Sequence[Task], seconds: float | None) -> None:
    """Read the result of a run and store it beside the results of tasks that are on record already.

    Args:
        run: a trained run.
        plan: the plan that the run belongs to.
        evaluated: the tasks that were just evaluated.
        seconds: seconds of the whole run, if it was made in one attempt.

    Raises:
        ConfigError: if something is missing. The text names it.
    """
    problem = trained_problem(run, plan)
    if problem is not None:
        raise ConfigError(problem)
    summary = read_object(run.folder / SUMMARY_FILE)
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
        "runs_at_once": (read_object(run.folder / KEY_FILE) or {}).get("runs_at_once"),
        "seconds": None if seconds is None else round(seconds, 3),
        "chosen": _chosen(run.folder),
    }
    write_atomically(run.folder / COMPLETE_FILE, (json_text(stored, indent=2) + "\n").encode())


def _chosen(folder: Path) -> dict[str, int]:
    """Return the samples of each data set in the plans after the warm-up, as their decisions are on record."""
    chosen: Counter[str] = Counter()
    record = folder / FOLDER
    for each in read_rounds(record, read_header(record)):
        if not each.warmup:
            chosen.update(each.domains)
    return dict(chosen)


def _evaluation_metrics(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """Return the finite metrics, the names of the others, and the directions, of an evaluation.

    A null is a value that is not finite, except for a measure that the data or the training stage does not have. Bits
    per byte are null for a text without bytes, and perplexity if a sample has one loss and its tokens have none.
    """
    of_samples = any(group.get("tokens", 0) is None for group in (evaluation.get("domains") or {}).values())
    always = ("loss",) if of_samples else ("loss", "perplexity")
    measured = {name: group for name, group in (evaluation.get("domains") or {}).items() if group.get("tokens") != 0}
    groups = {**measured, **{name: evaluation[name] for name in AVERAGES if name in evaluation}}
    values = {
        f"{group}_{measure}": numbers.get(measure)
        for group, numbers in groups.items()
        for measure in MEASURES
        if numbers.get(measure) is not None or (measure in numbers and measure in always)
    }
    directions: dict[str, bool | None] = {
        name: higher for name in values for measure, higher in MEASURES.items() if name.endswith(f"_{measure}")
    }
    for group, numbers in groups.items():
        if _is_number(numbers.get("loss_stderr")):
            values[f"{group}_loss{STDERR}"] = numbers["loss_stderr"]
    return _sorted_out(values, directions)


def _task_record(run: Run, task: Task) -> dict[str, Any]:
    """Return the result that ``dataflex-cli eval`` wrote for a task, in the form that is stored.

    Raises:
        ConfigError: if there is no result.
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
                values[f"{name}{STDERR}"] = numbers["stderr"]
    chance = found.get("chance")
    return {
        "key": task.key,
        **_sorted_out({name: value for name, value in values.items() if value is not None}, directions),
        "chance": chance if _is_number(chance) else None,
        "seconds": float(found.get("seconds") or 0.0),
    }


def _sorted_out(values: Mapping[str, Any], directions: Mapping[str, bool | None]) -> dict[str, Any]:
    """Return the finite values, the names of the others, and the known directions."""
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
    """Return the JSON object in a file, or None if the file is missing or cannot be parsed."""
    try:
        return read_object(path)
    except ConfigError:
        return None
