"""Statistics of the plans of a run, which are read once. The small files of the record are read elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from dataflex.record.reader import Coverage, RunRecord

LEVELS = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
"""Quantiles of the scores of a round."""

SCORE_ROUNDS = 200
"""Most rounds whose scores are read. They are spread evenly, with the first and the last."""

T = TypeVar("T")


@dataclass(frozen=True)
class ScoreQuantiles:
    """Distribution of the scores in some of a run's plans."""

    rounds: list[int]
    values: NDArray[np.float64]
    """Quantiles, shape (rounds, len(LEVELS))."""


@dataclass(frozen=True)
class MeasuredRun:
    """A run, its name in a report, and the statistics of its plans."""

    label: str
    record: RunRecord
    coverage: Coverage | None
    scores: ScoreQuantiles | None

    @cached_property
    def domains(self) -> list[str]:
        """Domains of the plans and of the logged losses, in order of first appearance."""
        named = [name for each in self.record.rounds for name in each.domains]
        return list(dict.fromkeys([*named, *self.record.domain_loss]))

    @cached_property
    def domain_samples(self) -> dict[str, int]:
        """Domain -> number of its samples in all plans together."""
        counts = dict.fromkeys(self.domains, 0)
        for each in self.record.rounds:
            for name, count in each.domains.items():
                counts[name] += count
        return counts


def measure(records: Sequence[RunRecord]) -> list[MeasuredRun]:
    """Read the plans of the runs and give the runs distinct names."""
    labels = _labels([record.path for record in records])
    return [
        MeasuredRun(label, record, record.coverage(), _score_quantiles(record))
        for label, record in zip(labels, records, strict=True)
    ]


def evenly(items: Sequence[T], limit: int) -> list[T]:
    """Return at most ``limit`` of the items, evenly spaced, with the first and the last.

    A limit of 1 gives the last item.
    """
    if len(items) <= limit:
        return list(items)
    if limit == 1:
        return [items[-1]]
    return [items[i] for i in np.linspace(0, len(items) - 1, limit).round().astype(int)]


def _labels(paths: Sequence[Path]) -> list[str]:
    """Return a name for each run: the shortest end of its path that makes all names distinct."""
    parts = [path.resolve().parts for path in paths]
    for depth in range(1, max(len(each) for each in parts) + 1):
        labels = [str(Path(*each[-depth:])) for each in parts]
        if len(set(labels)) == len(labels):
            break
    return labels


def _score_quantiles(record: RunRecord) -> ScoreQuantiles | None:
    if not record.has_plans:
        return None
    rounds: list[int] = []
    values: list[NDArray[np.float64]] = []
    for each in evenly([each for each in record.rounds if not each.warmup], SCORE_ROUNDS):
        scores = record.plan_scores(each.round)
        if scores is not None:
            rounds.append(each.round)
            values.append(np.quantile(scores.astype(np.float64), LEVELS))
    return ScoreQuantiles(rounds, np.stack(values)) if values else None
