"""The page of a comparison: its tables and charts, then the report's charts of one run of each variant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from dataflex.compare.files import HTML, tables
from dataflex.compare.outcome import Outcome
from dataflex.compare.statistics import Difference, signed, title
from dataflex.record.reader import read_run
from dataflex.report.charts.chart import Chart
from dataflex.report.charts.sections import charts
from dataflex.report.figures import Figure, Trace, figure, hatching, packed, row_labels, style, text
from dataflex.report.measure import measure
from dataflex.report.report import write_page

_SECTION = "Comparison"
_KINDS = {
    "loss": "Differences in loss",
    "perplexity": "Differences in perplexity",
    "bits_per_byte": "Differences in bits per byte",
    "task": "Differences in task metrics",
}
_COSTS = {
    "train_seconds": "training",
    "decision_seconds": "decisions",
    "evaluate_seconds": "evaluation",
    "task_seconds": "tasks",
}
_ROW_HEIGHT = 34


def write(outcome: Outcome) -> None:
    """Write the page into the folder of the comparison.

    Raises:
        ConfigError: if Plotly is not installed, a file there is not a DataFlex page, or a run cannot be read.
    """
    baseline = outcome.experiment.settings.baseline
    own = [*forest_charts(outcome), cost_chart(outcome)]
    write_page(
        outcome.experiment.output / HTML,
        f"Comparison with {baseline} - DataFlex",
        tables(outcome),
        [*own, *run_charts(outcome)],
    )


def forest_charts(outcome: Outcome) -> list[Chart]:
    """Return a chart of the differences for every kind of metric, with one row per variant and metric."""
    if not outcome.differences:
        return [Chart(_SECTION, "Differences", "no metric is compared.", None)]
    return [
        _forest(name, [each for each in outcome.differences if _kind(each.metric) == kind], outcome)
        for kind, name in _KINDS.items()
        if any(_kind(each.metric) == kind for each in outcome.differences)
    ]


def _kind(metric: str) -> str:
    if "/" in metric:
        return "task"
    return next(kind for kind in ("bits_per_byte", "perplexity", "loss") if metric.endswith(kind))


def _forest(name: str, differences: Sequence[Difference], outcome: Outcome) -> Chart:
    settings = outcome.experiment.settings
    drawn = [each for each in differences if each.mean is not None]
    if not drawn:
        return Chart(_SECTION, name, "there is no seed for which a variant and the baseline both have values.", None)
    rows = {(each.metric, each.variant): number for number, each in enumerate(drawn)}
    traces: list[Trace] = []
    for number, variant in enumerate(settings.variants):
        own = [each for each in drawn if each.variant == variant]
        if own:
            traces.append(_estimates(variant, own, [rows[each.metric, each.variant] for each in own], number))
    chart = figure(traces, f"difference from {text(settings.baseline)}", "")
    labels = row_labels([f"{each.variant}: {title(each.metric)}" for each in drawn], 44)
    chart["layout"]["yaxis"] |= {
        "tickvals": list(range(len(drawn))),
        "ticktext": labels,
        "range": [len(drawn) - 0.5, -0.5],
    }
    zero = {
        "type": "line",
        "x0": 0,
        "x1": 0,
        "yref": "paper",
        "y0": 0,
        "y1": 1,
        "line": {"color": "#8A8A8A", "width": 1},
    }
    chart["layout"] |= {"shapes": [zero], "height": 174 + _ROW_HEIGHT * len(drawn)}
    sides = {"higher" if each.higher_is_better else "lower" for each in drawn if each.higher_is_better is not None}
    better = f"{' or '.join(sorted(sides)).capitalize()} is better. " if sides else ""
    caption = (
        f"Variant minus {settings.baseline}, mean over the seeds, with the 95 % t interval. An open symbol has no "
        f"interval. {better}An interval that contains 0 supports no claim."
    )
    return Chart(_SECTION, name, caption, chart)


def _estimates(variant: str, differences: Sequence[Difference], rows: list[int], number: int) -> Trace:
    """Return the points of one variant with their intervals."""
    look = style(number)
    means = [each.mean or 0.0 for each in differences]
    ends = [each.interval or (mean, mean) for each, mean in zip(differences, means, strict=True)]
    said = [f"{title(each.metric)}: {_estimate(each)}" for each in differences]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": text(variant),
        "x": packed(means, "<f8"),
        "y": packed(rows, "<i4"),
        "error_x": {
            "type": "data",
            "symmetric": False,
            "array": packed([high - mean for (_, high), mean in zip(ends, means, strict=True)], "<f8"),
            "arrayminus": packed([mean - low for (low, _), mean in zip(ends, means, strict=True)], "<f8"),
            "color": look.colour,
            "thickness": 2,
            "width": 6,
        },
        "marker": {
            "color": look.colour,
            "size": 10,
            "symbol": [look.symbol if each.interval else f"{look.symbol}-open" for each in differences],
        },
        "text": [text(line) for line in said],
        "hovertemplate": "%{text}",
    }


def _estimate(found: Difference) -> str:
    mean = signed(found.mean or 0.0)
    return mean if found.interval is None else f"{mean} [{signed(found.interval[0])}, {signed(found.interval[1])}]"


def cost_chart(outcome: Outcome) -> Chart:
    """Return the mean seconds of each variant, split into training, decisions, evaluation and tasks."""
    name = "Mean seconds of a run"
    costs = {variant: outcome.costs(variant) for variant in outcome.experiment.settings.variants}
    known = [variant for variant, found in costs.items() if found]
    if not known:
        return Chart(_SECTION, name, "no run is complete yet.", None)
    rows = list(range(len(known)))
    spent = [cost for cost in _COSTS if any(costs[variant][cost] for variant in known)]
    traces: list[Trace] = [
        {
            "type": "bar",
            "orientation": "h",
            "name": _COSTS[cost],
            "x": packed([costs[variant][cost] for variant in known], "<f4"),
            "y": packed(rows, "<i4"),
            "marker": {"color": style(number).colour, "pattern": hatching(style(number))},
            "hovertemplate": "%{x:.4~g} s",
        }
        for number, cost in enumerate(spent)
    ]
    chart: Figure = figure(traces, "seconds", "")
    labels = row_labels(known, 24)
    chart["layout"]["yaxis"] |= {"tickvals": rows, "ticktext": labels, "autorange": "reversed"}
    chart["layout"] |= {"barmode": "stack", "height": 174 + _ROW_HEIGHT * len(known)}
    missing = [variant for variant, found in costs.items() if not found]
    caption = "Means over the complete runs, without the start of the processes."
    caption += f" Without a complete run: {', '.join(missing)}." if missing else ""
    return Chart(_SECTION, name, caption, chart)


def run_charts(outcome: Outcome) -> list[Chart]:
    """Return the report's charts of one complete run per variant, for the first seed that most variants share."""
    seeds = outcome.experiment.settings.seeds
    complete = {
        variant: {
            row.run.seed: row.run
            for row in outcome.rows
            # The record of a run that was taken over is not here.
            if row.run.variant == variant and row.result is not None and row.result.taken_over_from is None
        }
        for variant in outcome.experiment.settings.variants
    }
    seed = max(seeds, key=lambda each: sum(each in runs for runs in complete.values()))
    chosen = {variant: runs[seed] for variant, runs in complete.items() if seed in runs}
    if not chosen:
        return []
    measured: list[Any] = measure([read_run(run.folder) for run in chosen.values()])
    named = [replace(each, label=variant) for each, variant in zip(measured, chosen, strict=True)]
    return [replace(chart, section=f"{chart.section} (seed {seed})") for chart in charts(named)]
