"""Charts of the token weights: the tokens that count, the effective tokens, and the distribution of the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from dataflex.record.schema import WEIGHT_EDGES, TokenWeights
from dataflex.report.charts.chart import DOMAINS, Chart
from dataflex.report.charts.domains import most_counted
from dataflex.report.figures import (
    CHANCE,
    REST,
    Style,
    Trace,
    figure,
    hatching,
    line,
    packed,
    points_per_curve,
    style,
    text,
    whole_numbers,
)
from dataflex.report.measure import MeasuredRun

BARS = 40
"""Most bars of the distribution of the weights. Each adds up several intervals between two logs if there are more."""

_ALL = "all domains"
_COLOURS = ((0x1B, 0x5E, 0xA8), (0xF0, 0xC8, 0x60), (0xA8, 0x2A, 0x10))
"""Colours (red, green, blue) of the smallest weights, of 1, and of the largest. Those between are mixed."""

Measure = Callable[[TokenWeights, str | None], float]
"""Returns a number for the tokens of a domain in an interval, or of all domains (None)."""


def token_weights(run: MeasuredRun, num_charts: int, looks: Mapping[str, int]) -> list[Chart]:
    """Return the charts of the token weights of one run. Empty if no weights are on record.

    ``looks`` numbers the domains.
    """
    if not run.record.token_weights:
        return []
    counted = run.record.counted
    counting = Chart(
        "Data",
        f"{counted.capitalize()} that count: {run.label}",
        f"Trained {counted} with a weight above 0, divided by all trained {counted}, between two logs.",
        None,
    )
    effective = Chart(
        "Data",
        f"Effective {counted} of a step: {run.label}",
        "(Sum of the weights)^2 / (sum of the squared weights), mean of the steps between two logs. It equals "
        f"the number of {counted} if all have the same weight.",
        None,
    )
    drawn = [
        _by_domain(run, counting, _share, f"share of the trained {counted}", num_charts, looks),
        _by_domain(run, effective, _effective, f"{counted} of a step", num_charts, looks),
    ]
    return [*drawn, _distribution(run)]


def _share(each: TokenWeights, domain: str | None) -> float:
    """Return the share of the trained tokens with a weight above 0; NaN without a token."""
    if domain is None:
        return each.counting_share
    return each.counting[domain] / each.tokens[domain] if each.tokens.get(domain) else np.nan


def _effective(each: TokenWeights, domain: str | None) -> float:
    """Return the mean number of effective tokens of a step."""
    return (each.effective_tokens if domain is None else each.effective.get(domain, 0.0)) / each.steps


def _by_domain(
    run: MeasuredRun, chart: Chart, measure: Measure, y_title: str, num_charts: int, looks: Mapping[str, int]
) -> Chart:
    """Return ``chart`` with a line for all domains together, and one for each domain if there are several."""
    known = run.record.token_weights
    names = most_counted(run)
    several = len({name for each in known for name in each.tokens}) > 1
    curves: list[tuple[str | None, str, Style]] = [(None, _ALL if several else run.label, REST)]
    curves += [(name, name, style(looks[name])) for name in names if several]
    limit = points_per_curve(num_charts * (DOMAINS + 1))
    traces = [
        line([(each.step, measure(each, key)) for each in known], name, look, limit) for key, name, look in curves
    ]
    drawn = figure(traces, "step", y_title)
    drawn["layout"]["yaxis"] |= {"rangemode": "tozero"}
    whole_numbers(drawn, known[-1].step)
    left_out = len({name for each in known for name in each.tokens}) - len(names)
    note = f" {left_out:,} domains with fewer {run.record.counted} are not drawn." if left_out else ""
    return Chart(chart.section, chart.title, f"{chart.caption}{note}", drawn)


def _distribution(run: MeasuredRun) -> Chart:
    """Return a chart of the share of the trained tokens in each bin of weights, over the run."""
    known = run.record.token_weights
    groups = np.array_split(np.arange(len(known)), min(BARS, len(known)))
    counts = np.array([np.sum([list(known[i].bins.values()) for i in group], axis=(0, 1)) for group in groups])
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    steps = [f"{known[group[-1]].step:,}" for group in groups]
    filled = [number for number in range(counts.shape[1]) if counts[:, number].any()]
    traces = [_bar(steps, shares[:, number], number) for number in filled]
    chart = figure(traces, "step", f"share of the trained {run.record.counted}")
    chart["layout"]["xaxis"] |= {"type": "category"}
    chart["layout"]["yaxis"] |= {"range": [0, 1]}
    chart["layout"] |= {"barmode": "stack", "bargap": 0.05}
    counted = run.record.counted
    caption = f"Shares of the trained {counted} by their weight. A bar has the steps since the bar before."
    title = "Token weights" if counted == "tokens" else "Distribution of the sample weights"
    return Chart("Data", f"{title}: {run.label}", caption, chart)


def _bar(steps: list[str], shares: np.ndarray, number: int) -> Trace:
    look = _look(number)
    return {
        "type": "bar",
        "name": text(bin_name(number)),
        "x": steps,
        "y": packed(shares, "<f4"),
        "marker": {"color": look.colour, "pattern": hatching(look)},
        "hovertemplate": "up to step %{x}: %{y:.3~g}",
    }


def bin_name(number: int) -> str:
    """Return the range of a bin of weights as text."""
    if number == 0:
        return "weight 0"
    if number == len(WEIGHT_EDGES):
        return f"above {WEIGHT_EDGES[-1]:.2g}"
    return f"{WEIGHT_EDGES[number - 1]:.2g} to {WEIGHT_EDGES[number]:.2g}"


def _look(number: int) -> Style:
    """Return the look of a bin: gray for the weight 0. Every second bin is hatched, so neighbours always differ."""
    if number == 0:
        return Style(CHANCE, "solid", "circle", "")
    place = 2 * (number - 1) / (len(WEIGHT_EDGES) - 1)  # 0 for the smallest weights, 1 for 1, 2 for the largest
    low, high = _COLOURS[:2] if place <= 1 else _COLOURS[1:]
    share = place if place <= 1 else place - 1
    mixed = (round(first + share * (last - first)) for first, last in zip(low, high, strict=True))
    return Style("#" + "".join(f"{part:02X}" for part in mixed), "solid", "circle", "/" if number % 2 else "")
