"""Results of downstream tasks: metrics with standard errors, as JSON and as tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from pydantic import BaseModel, Field

from dataflex.report.tables import NOTHING, Table

CHOICE_METRICS = ("acc", "acc_norm")
"""Shares of questions answered by the right choice. Guessing has a known expected value for these."""


class Metric(BaseModel):
    """The value of a metric, its standard error and its direction.

    Attributes:
        value: the value.
        stderr: standard error of the value. None if unknown, as for a single question.
        higher_is_better: direction of the metric. None if the task does not define it.
    """

    value: float | None
    stderr: float | None
    higher_is_better: bool | None = None


class SubjectResult(BaseModel):
    """Results of the questions of one subject."""

    samples: int
    metrics: dict[str, Metric]


class TaskResult(BaseModel):
    """Content of ``tasks/NAME.json``.

    Attributes:
        task: name of the task.
        form: ``multiple_choice``, ``generation``, or the harness's name for the kind of its own task.
        file: file of the questions. None for a task of the harness.
        samples: number of questions.
        num_fewshot: examples before each question.
        metrics: metrics over all questions.
        chance: mean over the questions of 1 / number of choices. None if there are no choices.
        subjects: results of each subject, if there are several.
        subject_mean: mean over the subjects, with equal weights.
        notes: facts that a reader of the result should know.
        model: folder or name that the model was loaded from.
        adapter: folder of the adapter, if there is one.
        settings: settings of the task and of the evaluation.
        versions: versions of the packages.
        seconds: wall time of this task, without loading the model.
    """

    task: str
    form: str
    file: str | None
    samples: int
    num_fewshot: int
    metrics: dict[str, Metric]
    chance: float | None
    subjects: dict[str, SubjectResult] = Field(default_factory=dict)
    subject_mean: dict[str, Metric] = Field(default_factory=dict)
    notes: list[str] = Field(default_factory=list)
    model: str
    adapter: str | None
    settings: dict[str, object]
    versions: dict[str, str]
    seconds: float


def mean_metric(values: Sequence[float], higher_is_better: bool | None = None) -> Metric:
    """Return the mean and its standard error: the sample deviation over the square root of the number of values.

    Args:
        values: one value for each question, at least one.
        higher_is_better: direction of the metric. None if unknown.
    """
    found = np.asarray(values, dtype=np.float64)
    error = float(found.std(ddof=1) / math.sqrt(len(found))) if len(found) > 1 else None
    return Metric(value=float(found.mean()), stderr=error, higher_is_better=higher_is_better)


def mean_of_subjects(subjects: Mapping[str, SubjectResult]) -> dict[str, Metric]:
    """Return the mean over the subjects of each metric. Its standard error treats the subjects as independent."""
    means = {}
    for name in dict.fromkeys(name for subject in subjects.values() for name in subject.metrics):
        found = [subject.metrics[name] for subject in subjects.values() if name in subject.metrics]
        values = [metric.value for metric in found if metric.value is not None]
        errors = [metric.stderr for metric in found if metric.stderr is not None]
        if len(values) == len(subjects):
            known = len(errors) == len(values)
            error = math.sqrt(sum(each**2 for each in errors)) / len(errors) if known else None
            directions = {metric.higher_is_better for metric in found}
            higher = directions.pop() if len(directions) == 1 else None
            means[name] = Metric(value=sum(values) / len(values), stderr=error, higher_is_better=higher)
    return means


def chance_note(name: str, metric: Metric, chances: Sequence[float]) -> str | None:
    """Return a warning if a value is within two standard errors of guessing, else None.

    The standard error is the larger of the measured one and that of guessing. The two differ if the questions are few
    and all answers are right, or all are wrong.

    Args:
        name: name of the metric.
        metric: its value over the questions.
        chances: probability of guessing each question right.
    """
    assert metric.value is not None
    chance = sum(chances) / len(chances)
    guessing = math.sqrt(sum(each * (1 - each) for each in chances)) / len(chances)
    error = max(guessing, metric.stderr or 0.0)
    if abs(metric.value - chance) > 2 * error:
        return None
    return (
        f"{name} {metric.value:.4f} does not differ clearly from chance ({chance:.4f}): the distance is at most two "
        f"standard errors of {error:.4f}."
    )


def result_tables(results: Sequence[TaskResult]) -> list[Table]:
    """Return a table of all tasks, and a table of subjects for each task that has several."""
    rows = []
    for result in results:
        rows += [_row(result, name, metric, "") for name, metric in result.metrics.items()]
        rows += [_row(result, name, metric, ", mean over subjects") for name, metric in result.subject_mean.items()]
    header = ["task", "metric", "value", "std. error", "chance", "samples", "shots"]
    notes = tuple(f"warning: {result.task}: {note}" for result in results for note in result.notes)
    tables = [Table("Downstream tasks", header, rows, 2, notes)]
    return tables + [_subject_table(result) for result in results if len(result.subjects) > 1]


def _row(result: TaskResult, name: str, metric: Metric, suffix: str) -> list[str]:
    with_chance = result.chance is not None and name in CHOICE_METRICS
    return [
        result.task,
        name + suffix,
        _number(metric.value),
        _number(metric.stderr),
        _number(result.chance) if with_chance else NOTHING,
        f"{result.samples:,}",
        str(result.num_fewshot),
    ]


def _subject_table(result: TaskResult) -> Table:
    names = list(dict.fromkeys(name for subject in result.subjects.values() for name in subject.metrics))
    header = ["subject", "samples"]
    for name in names:
        header += [name, "std. error"]
    rows = []
    for subject, found in result.subjects.items():
        row = [subject, f"{found.samples:,}"]
        for name in names:
            metric = found.metrics.get(name, Metric(value=None, stderr=None))
            row += [_number(metric.value), _number(metric.stderr)]
        rows.append(row)
    return Table(f"Subjects of {result.task}", header, rows, 1)


def _number(value: float | None) -> str:
    return NOTHING if value is None or math.isnan(value) else f"{value:.4f}"
