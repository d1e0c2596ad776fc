"""The chart of downstream tasks."""

from __future__ import annotations

from collections.abc import Sequence

from dataflex.record.reader import RunRecord
from dataflex.report.charts.chart import Chart
from dataflex.report.figures import CHANCE, Trace, figure, packed, row_labels, style, text
from dataflex.report.measure import MeasuredRun


def tasks(runs: Sequence[MeasuredRun]) -> list[Chart]:
    """Return a chart of the results of downstream tasks with their standard errors, or the reason why there is none."""
    rows = list(dict.fromkeys(key for run in runs for key in _metrics(run.record)))
    if not rows:
        reason = "no task was evaluated (dataflex-cli eval RUN --tasks ...)."
        return [Chart("Tasks", "Downstream tasks", reason, None)]
    number = {key: i for i, key in enumerate(rows)}
    traces: list[Trace] = []
    chances: dict[int, float] = {}
    for i, run in enumerate(runs):
        found = _metrics(run.record)
        if not found:
            continue
        look = style(i)
        shift = 0.6 * ((i + 0.5) / len(runs) - 0.5)  # puts the runs of a row below each other
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": text(run.label),
                "x": packed([value for value, _, _ in found.values()], "<f8"),
                "y": packed([number[key] + shift for key in found], "<f8"),
                "error_x": {"array": [error for _, error, _ in found.values()], "color": look.colour},
                "marker": {"symbol": look.symbol, "size": 9, "color": look.colour},
                "hovertemplate": "%{x:.4~g}",
            }
        )
        chances |= {number[key]: chance for key, (_, _, chance) in found.items() if chance is not None}
    if chances:
        marker = {"symbol": "line-ns-open", "size": 20, "color": CHANCE, "line": {"width": 3, "color": CHANCE}}
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": "chance",
                "x": packed(list(chances.values()), "<f8"),
                "y": packed(list(chances), "<i4"),
                "marker": marker,
                "hovertemplate": "%{x:.4~g}",
            }
        )
    chart = figure(traces, "value", "")
    names = row_labels([f"{task} {metric}" for task, metric in rows], 28)
    chart["layout"]["yaxis"] |= {
        "tickvals": list(range(len(rows))),
        "ticktext": names,
        "range": [len(rows) - 0.5, -0.5],
    }
    chart["layout"] |= {"height": 110 + 44 * len(rows)}
    without = [run.label for run in runs if not run.record.tasks]
    caption = "Bars show one standard error to each side, upright marks the result of guessing."
    caption += f" Without tasks: {', '.join(without)}." if without else ""
    return [Chart("Tasks", "Downstream tasks", caption, chart)]


def _metrics(record: RunRecord) -> dict[tuple[str, str], tuple[float, float, float | None]]:
    """Return task and metric -> value, standard error (or 0) and chance level, for the metrics that have a value."""
    return {
        (task.task, name): (metric.value, metric.stderr or 0.0, task.chance)
        for task in record.tasks
        for name, metric in task.metrics.items()
        if metric.value is not None
    }
