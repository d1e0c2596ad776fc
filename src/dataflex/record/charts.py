"""The charts of a report. A chart that has nothing to show says why instead."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dataflex.record.measure import LEVELS, MeasuredRun, evenly
from dataflex.record.reader import Round
from dataflex.record.traces import (
    Figure,
    Trace,
    band,
    faint_line,
    figure,
    hatching,
    is_smoothed,
    line,
    packed,
    points_per_curve,
    shortened,
    smooth,
    style,
    text,
    whole_numbers,
)
from dataflex.record.trainer_log import Curve

DOMAINS = 12
"""Domains drawn of a run, at most: those with the most samples; the others of a plan are added up."""

BARS = 60
"""Rounds up to which proportions are drawn as bars; more are drawn as areas."""

RAW_RUNS = 3
"""Runs up to which the logged training loss is drawn behind its running mean."""

PROPORTION_ROUNDS = 400
"""Rounds whose proportions are drawn, at most."""


@dataclass(frozen=True)
class Chart:
    """A chart, or what is missing for it."""

    section: str
    title: str
    caption: str
    figure: Figure | None


def charts(runs: Sequence[MeasuredRun]) -> list[Chart]:
    """Return all charts in the order of the page."""
    return [
        train_loss(runs),
        *eval_loss(runs),
        *(domain_loss(run, runs) for run in runs),
        *(proportions(run, runs) for run in runs),
        *(scores(run, runs) for run in runs),
        overlap(runs),
        *weights(runs),
        cost(runs),
        decision_seconds(runs),
    ]


def train_loss(runs: Sequence[MeasuredRun]) -> Chart:
    """Training loss against the step, all runs."""
    limit = points_per_curve(2 * len(runs))
    curves = [(run.record.train_loss, run.label, style(i)) for i, run in enumerate(runs)]
    lines = [line(smooth(curve), label, look, limit) for curve, label, look in curves if curve]
    if not lines:
        return Chart("Loss", "Training loss", "no training loss is logged yet (logging_steps).", None)
    caption = "As logged; long curves as a running mean over a fiftieth of the run."
    noisy = [(curve, label, look) for curve, label, look in curves if is_smoothed(curve)]
    if noisy and len(runs) <= RAW_RUNS:
        lines = [faint_line(curve, label, look, limit) for curve, label, look in noisy] + lines
        caption = caption.removesuffix(".") + ", the logged values faint."
    return Chart("Loss", "Training loss", caption, figure(lines, "step", "loss"))


def eval_loss(runs: Sequence[MeasuredRun]) -> list[Chart]:
    """One chart per evaluation set."""
    names = list(dict.fromkeys(name for run in runs for name in run.record.eval_loss))
    if not names:
        reason = "no evaluation was made (eval_dataset or val_size, with eval_steps)."
        return [Chart("Loss", "Evaluation loss", reason, None)]
    return [
        _per_run(
            runs,
            Chart("Loss", "Evaluation loss" if name == "eval" else f"Evaluation loss: {name}", "", None),
            lambda run, name=name: run.record.eval_loss.get(name, []),  # type: ignore[misc]
            ("step", "loss"),
            len(names),
        )
        for name in names
    ]


def domain_loss(run: MeasuredRun, runs: Sequence[MeasuredRun]) -> Chart:
    """Training loss of each domain of one run."""
    title = f"Training loss by domain: {run.label}"
    known = run.record.domain_loss
    if not known:
        return Chart("Loss", title, "no loss of a domain is logged (dataflex/loss/...).", None)
    names = [name for name in _most_trained(run) if name in known]
    limit = points_per_curve(len(runs) * DOMAINS)
    looks = _domain_numbers(runs)
    traces = [line(smooth(known[name]), name, style(looks[name]), limit) for name in names]
    left_out = len(known) - len(names)
    caption = "Unweighted loss of the trained samples; long curves as a running mean."
    caption += f" {left_out} domains with fewer samples are not drawn." if left_out else ""
    return Chart("Loss", title, caption, figure(traces, "step", "loss"))


def proportions(run: MeasuredRun, runs: Sequence[MeasuredRun]) -> Chart:
    """Share of each domain in the plans of one run."""
    title = f"Proportions: {run.label}"
    rounds = [each for each in run.record.rounds if each.shares]
    if not rounds:
        return Chart("Data", title, "the run records no rounds.", None)
    if len(run.domain_samples) < 2:
        return Chart("Data", title, "the run has one domain only.", None)
    limit = min(PROPORTION_ROUNDS, points_per_curve(len(runs) * DOMAINS))
    shown = evenly(rounds, limit)
    names = [name for name in _most_trained(run) if run.domain_samples[name]]
    looks = _domain_numbers(runs)
    traces = [_shares(shown, name, [each.shares.get(name, 0.0) for each in shown], looks[name]) for name in names]
    if any(count and name not in names for name, count in run.domain_samples.items()):
        rest = [1.0 - sum(each.shares.get(name, 0.0) for name in names) for each in shown]
        traces.append(_shares(shown, "other domains", rest, len(looks)))
    chart = figure(traces, "round", "share of the plan's samples")
    chart["layout"]["yaxis"] |= {"range": [0, 1]}
    chart["layout"] |= {"barmode": "stack", "bargap": 0.08}
    whole_numbers(chart, rounds[-1].round)
    caption = "Share of each domain in the samples of each round's plan."
    caption += f" {len(shown)} of {len(rounds)} rounds are drawn." if len(shown) < len(rounds) else ""
    return Chart("Data", title, caption, chart)


def _shares(rounds: Sequence[Round], name: str, values: Sequence[float], number: int) -> Trace:
    """One domain's shares: bars where the rounds are few, else an area."""
    look = style(number)
    trace: Trace = {
        "name": text(name),
        "x": packed([each.round for each in rounds], "<i4"),
        "y": packed(values, "<f4"),
        "hovertemplate": "round %{x}: %{y:.3f}",
    }
    if len(rounds) <= BARS:
        return {**trace, "type": "bar", "marker": {"color": look.colour, "pattern": hatching(look)}}
    area = {"mode": "none", "stackgroup": "shares", "fillcolor": look.colour, "fillpattern": hatching(look)}
    return {**trace, "type": "scatter", **area}


def scores(run: MeasuredRun, runs: Sequence[MeasuredRun]) -> Chart:
    """Distribution of the scores in each plan of one run."""
    title = f"Scores of the selected samples: {run.label}"
    if run.scores is None:
        reason = "its plans hold no scores." if run.record.has_plans else "the run has no plans in its folder."
        return Chart("Data", title, reason, None)
    limit = points_per_curve(len(runs) * len(LEVELS))
    chosen = evenly(range(len(run.scores.rounds)), limit)
    rounds = [run.scores.rounds[i] for i in chosen]
    quantiles = run.scores.values[chosen].T
    look = style(next(i for i, each in enumerate(runs) if each is run))
    extremes = (("lowest", quantiles[0], "dot"), ("highest", quantiles[-1], "dash"))
    traces = band(rounds, quantiles[1], quantiles[5], "5 % to 95 %", look.colour)
    traces += band(rounds, quantiles[2], quantiles[4], "25 % to 75 %", look.colour)
    for name, values, dash in extremes:
        edge = line(_curve(rounds, values), name, look, limit)
        traces.append({**edge, "mode": "lines", "line": {"color": look.colour, "dash": dash, "width": 1}})
    median = line(_curve(rounds, quantiles[3]), "median", look, limit)
    traces.append({**median, "line": {"color": look.colour, "dash": "solid", "width": 2.2}})
    chart = figure(traces, "round", "score")
    whole_numbers(chart, rounds[-1])
    caption = "Quantiles over the samples of each plan that have a score."
    scored = sum(not each.warmup for each in run.record.rounds)
    caption += f" {len(rounds)} of {scored} rounds are drawn." if len(rounds) < scored else ""
    return Chart("Data", title, caption, chart)


def overlap(runs: Sequence[MeasuredRun]) -> Chart:
    """Jaccard similarity of consecutive plans, all runs."""
    title = "Overlap of consecutive rounds"
    reason = "no run has two rounds whose plans are in its folder."
    chart = _per_run(
        runs,
        Chart("Data", title, "Samples in both plans over samples in either; 1: the same set.", None),
        lambda run: run.coverage.overlap if run.coverage else [],
        ("round", "Jaccard similarity"),
        1,
    )
    if chart.figure is None:
        return Chart("Data", title, reason, None)
    chart.figure["layout"]["yaxis"] |= {"rangemode": "tozero"}
    whole_numbers(chart.figure, max(len(run.record.rounds) for run in runs))
    return chart


def weights(runs: Sequence[MeasuredRun]) -> list[Chart]:
    """Smallest and largest sample weight, for the runs that have a weighter."""
    title = "Sample weights"
    weighted = [(i, run) for i, run in enumerate(runs) if run.record.weights]
    if not weighted:
        asked = any("weight" in run.record.components for run in runs)
        return [Chart("Data", title, "no weights are logged (dataflex/weight_min).", None)] if asked else []
    limit = points_per_curve(2 * len(weighted))
    traces: list[Trace] = []
    for i, run in weighted:
        for name, curve in sorted(run.record.weights.items()):
            edge = line(curve, f"{run.label} {name}", style(i), limit)
            edge["line"]["dash"] = "dot" if name == "min" else "solid"
            traces.append(edge)
    caption = "Smallest (dotted) and largest (solid) weight in the logged step."
    return [Chart("Data", title, caption, figure(traces, "step", "weight"))]


def cost(runs: Sequence[MeasuredRun]) -> Chart:
    """Seconds of training and of decisions, one bar per run."""
    title = "Seconds by run"
    train = [run.record.summary.train_seconds if run.record.summary else 0.0 for run in runs]
    decide = [run.record.decision_seconds for run in runs]
    if not any(train) and not any(decide):
        return Chart("Cost", title, "no cost is recorded yet.", None)
    rows = list(range(len(runs)))
    traces = [_cost_bar("training", rows, train, 0), _cost_bar("decisions", rows, decide, 1)]
    chart = figure(traces, "seconds", "")
    names = [text(shortened(run.label, 24)) for run in runs]
    chart["layout"]["yaxis"] |= {"tickvals": rows, "ticktext": names, "autorange": "reversed"}
    chart["layout"] |= {"barmode": "stack", "height": 174 + 34 * len(runs)}
    unfinished = [run.label for run in runs if run.record.summary is None]
    caption = "Training and the decisions made for it."
    caption += f" Seconds of training are not known yet: {', '.join(unfinished)}." if unfinished else ""
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
    """Seconds that each round's decision took, all runs."""
    title = "Seconds of each decision"
    chart = _per_run(
        runs,
        Chart("Cost", title, "Seconds between two rounds spent on the plan of the next.", None),
        lambda run: [(each.round, each.cost.seconds) for each in run.record.rounds],
        ("round", "seconds"),
        1,
    )
    if chart.figure is None:
        return Chart("Cost", title, "no run records a round.", None)
    chart.figure["layout"]["yaxis"] |= {"rangemode": "tozero"}
    whole_numbers(chart.figure, max(len(run.record.rounds) for run in runs))
    return chart


def _per_run(
    runs: Sequence[MeasuredRun],
    chart: Chart,
    curve_of: Callable[[MeasuredRun], Curve],
    axes: tuple[str, str],
    num_charts: int,
) -> Chart:
    """Return ``chart`` with one line per run, and the runs that have none named in its caption."""
    limit = points_per_curve(len(runs) * num_charts)
    curves = [curve_of(run) for run in runs]
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


def _most_trained(run: MeasuredRun) -> list[str]:
    """Return the domains with the most samples, in the order of their first mention."""
    counts = run.domain_samples
    kept = set(sorted(counts, key=lambda name: -counts[name])[:DOMAINS])
    return [name for name in counts if name in kept]


def _domain_numbers(runs: Sequence[MeasuredRun]) -> dict[str, int]:
    """Number the domains of all runs, so that one looks the same in every chart."""
    names = dict.fromkeys(name for run in runs for name in run.domains)
    return {name: i for i, name in enumerate(names)}


def _curve(rounds: Sequence[int], values: Sequence[float]) -> Curve:
    return [(number, float(value)) for number, value in zip(rounds, values, strict=True)]
