"""Charts of the training loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dataflex.report.charts.chart import CLOCK, DOMAINS, SECONDS, Axis, Chart
from dataflex.report.charts.domains import most_trained
from dataflex.report.figures import faint_line, figure, is_smoothed, line, points_per_curve, smooth, style
from dataflex.report.measure import MeasuredRun

RAW_RUNS = 3
"""Most runs for which the logged training loss is drawn behind its running mean."""


LOG_RATIO = 30
"""Ratio of the largest to the smallest position above which an axis of tokens is logarithmic."""


_AGAINST = {"step": "steps", "tokens": "tokens", "seconds": "time"}


def train_loss(runs: Sequence[MeasuredRun], axis: Axis) -> Chart:
    """Return a chart of the training loss against tokens (steps in older records) or time, for all runs."""
    title = f"Training loss against {_AGAINST[axis.name]}"
    limit = points_per_curve(2 * len(runs))
    curves = [(axis.points(run.record, run.record.train_loss), run, style(i)) for i, run in enumerate(runs)]
    lines = [line(smooth(points), run.label, look, limit) for points, run, look in curves if points]
    if not lines:
        reason = "no training loss is logged yet (logging_steps)."
        if any(run.record.train_loss for run in runs):
            reason = "the logs have no seconds (dataflex/train_seconds); records of earlier versions lack them."
        return Chart("Loss", title, reason, None)
    caption = "As logged. Long curves are a running mean over a fiftieth of the run"
    noisy = [(points, run, look) for points, run, look in curves if is_smoothed(points)]
    if noisy and len(runs) <= RAW_RUNS:
        lines = [faint_line(points, run.label, look, limit) for points, run, look in noisy] + lines
        caption += ", with the logged values as a faint line"
    caption += f".{CLOCK}" if axis is SECONDS else "."
    partly = [run.label for points, run, _ in curves if len(points) < len(run.record.train_loss)]
    caption += f" Not known at every step: {', '.join(partly)}." if partly else ""
    return Chart("Loss", title, caption, figure(lines, axis.name, "loss"))


def domain_loss(run: MeasuredRun, num_charts: int, axis: Axis, looks: Mapping[str, int]) -> Chart:
    """Return a chart of the training loss of each domain of one run. ``looks`` numbers the domains."""
    title = f"Training loss by domain: {run.label}"
    known = run.record.domain_loss
    if not known:
        return Chart("Loss", title, "no loss of a domain is logged (dataflex/loss/...).", None)
    names = [name for name in most_trained(run) if name in known]
    limit = points_per_curve(num_charts * DOMAINS)
    traces = [line(smooth(axis.points(run.record, known[name])), name, style(looks[name]), limit) for name in names]
    left_out = len(known) - len(names)
    caption = "Unweighted loss of the trained samples, mean since the last log. Long curves are a running mean."
    caption += f" {left_out} domains with fewer samples are not drawn." if left_out else ""
    return Chart("Loss", title, caption, figure(traces, axis.name, "loss"))


def own_tokens(run: MeasuredRun, num_charts: int, looks: Mapping[str, int]) -> list[Chart]:
    """Return a chart of each domain's training loss against the tokens of that domain. Empty for a single domain.

    ``looks`` numbers the domains.
    """
    title = f"Training loss against the domain's own {run.record.counted}: {run.label}"
    losses, tokens = run.record.domain_loss, run.record.domain_tokens
    if len(losses) < 2:
        return []
    curves = {}
    for name in most_trained(run):
        seen_at = dict(tokens.get(name, []))
        points = [(int(seen_at[step]), value) for step, value in losses.get(name, []) if seen_at.get(step)]
        if points:
            curves[name] = points
    if not curves:
        reason = (
            "the logs have no tokens by domain (dataflex/domain_tokens/...); records of earlier versions lack them."
        )
        return [Chart("Loss", title, reason, None)]
    limit = points_per_curve(num_charts * DOMAINS)
    chart = figure(
        [line(smooth(points), name, style(looks[name]), limit) for name, points in curves.items()],
        f"{run.record.counted} of the domain",
        "loss",
    )
    places = [place for points in curves.values() for place, _ in points]
    caption = f"Unweighted loss of a domain against the domain's {run.record.counted} that were trained on"
    caption += " and count in the loss." if run.record.counted == "tokens" else "."
    if max(places) > LOG_RATIO * min(places):
        chart["layout"]["xaxis"] |= {"type": "log"}
        caption += f" {run.record.counted.capitalize()} on a logarithmic scale."
    left_out = len(losses) - len(curves)
    caption += f" {left_out:,} other domains are not drawn." if left_out else ""
    return [Chart("Loss", title, caption, chart)]
