"""The page of a comparison: its tables and charts, then the report's charts of one run of each variant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from dataflex.compare.files import HTML, tables
from dataflex.compare.outcome import Outcome
from dataflex.compare.statistics import Difference, number, signed, title
from dataflex.record.reader import read_run
from dataflex.report.charts.chart import Chart
from dataflex.report.charts.sections import charts
from dataflex.report.figures import (
    Estimate,
    Figure,
    Trace,
    estimates,
    figure,
    forest,
    hatching,
    packed,
    row_labels,
    style,
    text,
)
from dataflex.report.measure import measure
from dataflex.report.report import write_page

_SECTION = "Comparison"
_KINDS = {
    "loss": "Differences in loss",
    "perplexity": "Differences in perplexity",
    "bits_per_byte": "Differences in bits per byte",
    "accuracy": "Differences in accuracy",
    "margin": "Differences in reward margin",
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
    return next(kind for kind in _KINDS if metric.endswith(f"_{kind}"))


def _forest(name: str, differences: Sequence[Difference], outcome: Outcome) -> Chart:
    settings = outcome.experiment.settings
    drawn = [each for each in differences if each.mean is not None]
    if not drawn:
        return Chart(_SECTION, name, "there is no seed for which a variant and the baseline both have values.", None)
    rows = {(each.metric, each.variant): place for place, each in enumerate(drawn)}
    traces: list[Trace] = []
    for place, variant in enumerate(settings.variants):
        own = [each for each in drawn if each.variant == variant]
        if own:
            points = [
                Estimate(
                    rows[each.metric, each.variant],
                    each.mean or 0.0,
                    each.interval,
                    f"{title(each.metric)}: {_estimate(each)}",
                )
                for each in own
            ]
            traces.append(estimates(variant, style(place), points))
    labels = [f"{each.variant}: {title(each.metric)}" for each in drawn]
    chart = forest(traces, labels, f"difference from {text(settings.baseline)}", 0.0)
    chart["layout"]["height"] = 174 + _ROW_HEIGHT * len(drawn)
    sides = {"higher" if each.higher_is_better else "lower" for each in drawn if each.higher_is_better is not None}
    better = f"{' or '.join(sorted(sides)).capitalize()} is better. " if sides else ""
    caption = (
        f"Variant minus {settings.baseline}, mean over the seeds, with the 95 % t interval. An open symbol has no "
        f"interval. {better}An interval that contains 0 supports no claim. Any other supports a claim only if its p "
        "value, corrected for the number of comparisons, is below 0.05: p (Holm) in the table."
    )
    return Chart(_SECTION, name, caption, chart)


def _estimate(found: Difference) -> str:
    mean = signed(found.mean or 0.0)
    if found.interval is None or found.p_holm is None:
        return mean
    return f"{mean} [{signed(found.interval[0])}, {signed(found.interval[1])}], p (Holm) {number(found.p_holm)}"


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
            "marker": {"color": style(place).colour, "pattern": hatching(style(place))},
            "hovertemplate": "%{x:.4~g} s",
        }
        for place, cost in enumerate(spent)
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
