"""Results of downstream tasks: numbers with standard errors, as JSON and as tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from pydantic import BaseModel, Field

from dataflex.report.tables import NOTHING, Table

CHOICE_METRICS = ("acc", "acc_norm")
"""Shares of questions whose right choice was found, which guessing finds too."""


class Metric(BaseModel):
    """A number, its standard error and its direction.

    Attributes:
        value: the number.
        stderr: its standard error; None where it cannot be known (one sample).
        higher_is_better: what the task says; None where it does not.
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
        form: ``multiple_choice``, ``generation``, or what the harness calls the kind of its own task.
        file: the questions; None for a task of the harness.
        samples: questions asked.
        num_fewshot: examples before each.
        metrics: over all questions.
        chance: mean over the questions of 1 / number of choices; None where nothing is chosen.
        subjects: results of each subject, where there are several.
        subject_mean: mean of the subjects' values, each subject counting the same.
        notes: what a reader of the numbers should know.
        model: the model as it was loaded.
        adapter: the adapter on it.
        settings: settings of the task and of the evaluation.
        versions: packages.
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
    """Return the mean and its standard error, the sample deviation over the root of the number.

    Args:
        values: one number for each question, at least one.
        higher_is_better: direction of the metric, where it is known.
    """
    found = np.asarray(values, dtype=np.float64)
    error = float(found.std(ddof=1) / math.sqrt(len(found))) if len(found) > 1 else None
    return Metric(value=float(found.mean()), stderr=error, higher_is_better=higher_is_better)


def mean_of_subjects(subjects: Mapping[str, SubjectResult]) -> dict[str, Metric]:
    """Return the mean over the subjects of each metric; its error takes the subjects as independent."""
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
    """Return a warning where a value is within two standard errors of guessing, else None.

    The standard error is the larger of the measured one and that of guessing, which differ where few questions are
    all right or all wrong.

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
        f"{name} {metric.value:.4f} cannot be told from chance ({chance:.4f}): it is within two standard errors "
        f"({error:.4f} each) of it."
    )


def result_tables(results: Sequence[TaskResult]) -> list[Table]:
    """Return a table of all tasks, and one of the subjects of each task that has several."""
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
