"""Charts of the seconds that a run took."""

from __future__ import annotations

from collections.abc import Sequence

from dataflex.report.charts.chart import Chart, by_round
from dataflex.report.figures import Trace, figure, hatching, packed, row_labels, style
from dataflex.report.measure import MeasuredRun


def cost(runs: Sequence[MeasuredRun]) -> Chart:
    """Return a chart of the seconds of training, decisions and evaluation, with one bar per run."""
    title = "Seconds by run"
    parts: list[tuple[str, list[float | None]]] = [
        ("training", [run.record.train_seconds for run in runs]),
        ("decisions", [run.record.decision_seconds or None for run in runs]),
        ("evaluation", [run.record.evaluate_seconds for run in runs]),
    ]
    if not any(value for _, seconds in parts for value in seconds):
        return Chart("Cost", title, "no cost is recorded yet.", None)
    rows = list(range(len(runs)))
    traces = [
        _cost_bar(name, rows, [value or 0.0 for value in seconds], number)
        for number, (name, seconds) in enumerate(parts)
        if any(seconds)
    ]
    chart = figure(traces, "seconds", "")
    names = row_labels([run.label for run in runs], 24)
    chart["layout"]["yaxis"] |= {"tickvals": rows, "ticktext": names, "autorange": "reversed"}
    chart["layout"] |= {"barmode": "stack", "height": 110 + 34 * len(runs)}
    caption = "Seconds of training, of decisions and of evaluation."
    for name, seconds in (parts[0], parts[2]):
        unknown = [run.label for run, value in zip(runs, seconds, strict=True) if value is None]
        caption += f" Seconds of {name} are not on record: {', '.join(unknown)}." if unknown else ""
    partly = [
        f"{run.label} up to step {run.record.trained[0]:,}"
        for run in runs
        if run.record.summary is None and run.record.trained
    ]
    caption += f" Not finished: seconds of training are known for {', '.join(partly)}." if partly else ""
    return Chart("Cost", title, caption, chart)


def _cost_bar(name: str, rows: list[int], seconds: list[float], number: int) -> Trace:
    look = style(number)
    return {
        "type": "bar",
        "orientation": "h",
        "name": name,
        "x": packed(seconds, "<f4"),
        "y": packed(rows, "<i4"),
        "marker": {"color": look.colour, "pattern": hatching(look)},
        "hovertemplate": "%{x:.4~g} s",
    }


def decision_seconds(runs: Sequence[MeasuredRun]) -> Chart:
    """Return a chart of the seconds that each round's decision took, for all runs."""
    title = "Seconds of each decision"
    chart = Chart("Cost", title, "Seconds between two rounds that the plan of the next round took.", None)
    curves = [[(each.round, each.cost.seconds) for each in run.record.rounds] for run in runs]
    return by_round(runs, chart, curves, "seconds", {"rangemode": "tozero"}, "no run records a round.")
