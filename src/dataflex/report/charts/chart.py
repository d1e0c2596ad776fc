"""The chart class, and functions that make charts with a line for each run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dataflex.record.reader import RunRecord
from dataflex.record.trainer_log import Curve
from dataflex.report.figures import Figure, Points, figure, line, points_per_curve, style, whole_numbers
from dataflex.report.measure import MeasuredRun

DOMAINS = 12
"""Most domains drawn of a run: the largest ones by the chart's own measure. Charts of shares add up the others."""


@dataclass(frozen=True)
class Chart:
    """A chart, or the reason why it is missing.

    The reason is the caption of a chart without a figure.
    """

    section: str
    title: str
    caption: str
    figure: Figure | None


@dataclass(frozen=True)
class Axis:
    """An x axis for losses.

    Attributes:
        name: name of the axis.
        place: returns step -> position on the axis, for a run. None means that the position is the step.
    """

    name: str
    place: Callable[[RunRecord], Mapping[int, float]] | None

    def points(self, record: RunRecord, curve: Curve) -> Points:
        """Return the curve against this axis, without the steps whose position is unknown."""
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
    """Return ``chart`` with one line per run. Its caption names the runs without a line."""
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
    """Return a chart with a line per run against the round. ``reason`` is its caption if no run has a line."""
    drawn = line_per_run(runs, chart, curves, ("round", y_title), 1)
    if drawn.figure is None:
        return Chart(chart.section, chart.title, reason, None)
    drawn.figure["layout"]["yaxis"] |= y_axis
    whole_numbers(drawn.figure, max(len(run.record.rounds) for run in runs))
    return drawn


def curve_of(rounds: Sequence[int], values: Sequence[float]) -> Curve:
    """Return one value for each round as a curve."""
    return [(number, float(value)) for number, value in zip(rounds, values, strict=True)]
