"""The charts of the results page: differences with intervals, and ratios of costs with their spread."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from page_claims import side
from page_form import Comparison, CostPart

from dataflex.compare.statistics import signed, title
from dataflex.report.charts.chart import Chart
from dataflex.report.figures import CHANCE, REST, Estimate, Figure, Style, estimates, forest, style, text

_ROW_HEIGHT = 34
_LOOKS = {
    "better": style(2),
    "worse": style(1),
    "unclear": REST,
    "no claim": Style(CHANCE, "solid", "x", ""),
    "above 1": style(2),
    "below 1": style(1),
    "around 1": REST,
    "no spread": Style(CHANCE, "solid", "x", ""),
}
"""Finding, or side of a ratio -> its look."""


@dataclass(frozen=True)
class _Point:
    """One row of a chart: its label, its group in the legend, its value and the ends of its interval."""

    label: str
    group: str
    value: float
    ends: tuple[float, float] | None
    said: str


def forests(section: str, comparison: Comparison) -> list[Chart]:
    """Return a chart of the differences for each claimed metric, with one row per method."""
    return [_forest(section, metric, comparison) for metric in comparison.claims]


def _forest(section: str, metric: str, comparison: Comparison) -> Chart:
    differences = [each for each in comparison.differences if each.metric == metric and each.mean is not None]
    name = f"Difference in {title(metric)}"
    points = []
    for each in differences:
        mean = each.mean or 0.0
        ends = each.t_interval_95
        said = signed(mean) if ends is None else f"{signed(mean)} [{signed(ends[0])}, {signed(ends[1])}]"
        points.append(_Point(each.variant, each.finding, mean, ends, f"{each.variant}: {said}"))
    if not points:
        return Chart(section, name, "no method has a seed in common with the baseline.", None)
    sides = {each.higher_is_better for each in differences} - {None}
    better = f"{'Higher' if sides.pop() else 'Lower'} is better. " if len(sides) == 1 else ""
    caption = (
        f"Method minus {comparison.baseline}, mean over the seeds, with the 95 % t interval of this comparison alone. "
        f"{better}The findings are those of the p values corrected by Holm's method. An open symbol has no interval."
    )
    return Chart(section, name, caption, _drawn(points, f"difference from {comparison.baseline}", 0.0))


def ratios(section: str, costs: Mapping[str, CostPart]) -> list[Chart]:
    """Return a chart of the ratios of seconds, on a logarithmic axis."""
    points = [
        _Point(
            f"{part}: {name}{' (reckoned)' if each.reckoned else ''}",
            side(each),
            each.median,
            (each.low, each.high) if each.low < each.high else None,
            f"{each.median:.3g} ({each.low:.3g} to {each.high:.3g})",
        )
        for part, found in costs.items()
        for name, each in found.ratios.items()
    ]
    title_ = "Seconds of other implementations, relative to DataFlex"
    if not points:
        return [Chart(section, title_, "there is no ratio.", None)]
    drawn = _drawn(points, "seconds of the other implementation / seconds of DataFlex", 1.0)
    drawn["layout"]["xaxis"]["type"] = "log"
    caption = (
        "Median with the whole spread. Above 1, DataFlex is faster. An open symbol is a single pair of measurements."
    )
    return [Chart(section, title_, caption, drawn)]


def _drawn(points: Sequence[_Point], axis: str, level: float) -> Figure:
    """Return a figure with a row for each point and a line at ``level``."""
    traces = [
        estimates(
            group,
            _LOOKS[group],
            [
                Estimate(row, point.value, point.ends, point.said)
                for row, point in enumerate(points)
                if point.group == group
            ],
        )
        for group in dict.fromkeys(point.group for point in points)
    ]
    drawn = forest(traces, [point.label for point in points], text(axis), level)
    drawn["layout"]["height"] = 110 + _ROW_HEIGHT * len(points)
    return drawn
