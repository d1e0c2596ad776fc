"""A chart of a report, and how those with a line for each run are made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dataflex.record.reader import RunRecord
from dataflex.record.trainer_log import Curve
from dataflex.report.figures import Figure, Points, figure, line, points_per_curve, style, whole_numbers
from dataflex.report.measure import MeasuredRun

DOMAINS = 12
"""Domains drawn of a run, at most: the largest of what a chart shows; the others of a plan are added up."""


@dataclass(frozen=True)
class Chart:
    """A chart, or what is missing for it."""

    section: str
    title: str
    caption: str
    figure: Figure | None


@dataclass(frozen=True)
class Axis:
    """What losses are drawn against: a name, and where each logged step of a run is on it."""

    name: str
    place: Callable[[RunRecord], Mapping[int, float]] | None
    """None: the step itself."""

    def points(self, record: RunRecord, curve: Curve) -> Points:
        """Return the curve against this axis, without steps whose place is not known."""
        if self.place is None:
            return curve
        known = self.place(record)
        return [(known[step], value) for step, value in curve if step in known]


STEPS = Axis("step", None)
TOKENS = Axis("tokens", lambda record: record.tokens_at)
SECONDS = Axis("seconds", lambda record: record.seconds_at)

CLOCK = " Seconds of training, decisions and evaluation together."


def line_per_run(
    runs: Sequence[MeasuredRun], chart: Chart, curves: Sequence[Points], axes: tuple[str, str], num_charts: int
) -> Chart:
    """Return ``chart`` with one line per run, and the runs that have none named in its caption."""
    limit = points_per_curve(len(runs) * num_charts)
    traces = [
        line(curve, run.label, style(i), limit)
        for i, (run, curve) in enumerate(zip(runs, curves, strict=True))
        if curve
    ]
    if not traces:
        return chart
    without = [run.label for run, curve in zip(runs, curves, strict=True) if not curve]
    note = f"Without data: {', '.join(without)}." if without else ""
    return Chart(chart.section, chart.title, f"{chart.caption} {note}".strip(), figure(traces, *axes))


def by_round(
    runs: Sequence[MeasuredRun],
    chart: Chart,
    curves: Sequence[Points],
    y_title: str,
    y_axis: dict[str, object],
    reason: str,
) -> Chart:
    """Return a chart with a line per run against the round; ``reason`` is said where no run has one."""
    drawn = line_per_run(runs, chart, curves, ("round", y_title), 1)
    if drawn.figure is None:
        return Chart(chart.section, chart.title, reason, None)
    drawn.figure["layout"]["yaxis"] |= y_axis
    whole_numbers(drawn.figure, max(len(run.record.rounds) for run in runs))
    return drawn


def curve_of(rounds: Sequence[int], values: Sequence[float]) -> Curve:
    """Return one value for each round as a curve."""
    return [(number, float(value)) for number, value in zip(rounds, values, strict=True)]
