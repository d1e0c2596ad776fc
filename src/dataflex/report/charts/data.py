"""Charts of the data in the rounds: proportions, passes, scores, weights, and how often samples were planned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from dataflex.report.charts.chart import DOMAINS, Axis, Chart, by_round, curve_of
from dataflex.report.charts.domains import most_cut, most_passed, most_trained, most_weighted, total_cut
from dataflex.report.figures import (
    CHANCE,
    REST,
    Points,
    Style,
    Trace,
    band,
    figure,
    hatching,
    line,
    packed,
    points_per_curve,
    style,
    text,
    whole_numbers,
)
from dataflex.report.measure import LEVELS, MeasuredRun, evenly

PROPORTION_ROUNDS = 400
"""Most rounds whose proportions are drawn."""


CUT_MARKS = 20
"""Most marks on a curve for rounds in which the domain was cut."""


EXACT_TIMES = 12
"""Largest number of times planned that has a separate bar. Larger numbers share bars."""


def proportions(run: MeasuredRun, num_charts: int, looks: Mapping[str, int]) -> Chart:
    """Return a chart of the share of each domain in the rounds of one run, over optimizer steps.

    ``looks`` numbers the domains.
    """
    title = f"Proportions: {run.label}"
    rounds = [each for each in run.record.rounds if each.shares]
    if not rounds:
        return Chart("Data", title, "the run records no rounds.", None)
    if len(run.domain_samples) < 2:
        return Chart("Data", title, "the run has one domain only.", None)
    limit = min(PROPORTION_ROUNDS, points_per_curve(num_charts * DOMAINS))
    shown = evenly(rounds, limit)
    shares = [each.proportions or each.shares for each in shown]
    present = dict.fromkeys(name for each in shares for name, share in each.items() if share > 0)
    names = [name for name in most_trained(run) if name in present]
    steps = [*(each.start_step for each in shown), shown[-1].start_step + shown[-1].steps]
    # The last shares twice: they hold until the end of the last round.
    values = np.array([[each.get(name, 0.0) for name in names] for each in [*shares, shares[-1]]])
    traces = [_area(steps, values[:, i], name, style(looks[name])) for i, name in enumerate(names)]
    caption = "Share of each domain in each round, from the round's first step on. Plans round it to whole samples."
    others = len(present) - len(names)
    if others:
        rest = np.maximum(1.0 - values.sum(axis=1), 0.0)
        label = f"others ({others:,} domain{'s' if others > 1 else ''})"
        traces.append(_area(steps, rest, label, REST))
        caption += f" The {len(names)} domains with the most samples have a band each, the {others:,} others share one."
    chart = figure(traces, "step", "share of the samples")
    chart["layout"]["yaxis"] |= {"range": [0, 1]}
    whole_numbers(chart, steps[-1])
    caption += f" {len(shown):,} of {len(rounds):,} rounds are drawn." if len(shown) < len(rounds) else ""
    return Chart("Data", title, caption, chart)


def _area(steps: Sequence[int], values: NDArray[np.float64], name: str, look: Style) -> Trace:
    """Return the area of one domain's shares, each constant from the first step of its round to the next round."""
    return {
        "type": "scatter",
        "mode": "none",
        "stackgroup": "shares",
        "line": {"shape": "hv"},
        "name": text(name),
        "x": packed(steps, "<i4"),
        "y": packed(values, "<f4"),
        "fillcolor": look.colour,
        "fillpattern": hatching(look),
        "hovertemplate": "from step %{x}: %{y:.3~g}",
    }


def cut_shares(run: MeasuredRun, num_charts: int, looks: Mapping[str, int]) -> list[Chart]:
    """Return a chart of the share of each domain that was wanted and not planned. Empty if no domain was cut.

    ``looks`` numbers the domains.
    """
    rounds, names = run.record.rounds, most_cut(run)
    if not names:
        return []
    picked = evenly(rounds, points_per_curve(num_charts * DOMAINS))
    numbers = [each.round for each in picked]
    cut = {
        name: [
            each.clipped_shares.get(name, each.shares.get(name, 0.0)) - each.shares.get(name, 0.0) for each in picked
        ]
        for name in names
    }
    traces = [line(curve_of(numbers, cut[name]), name, style(looks[name]), len(picked)) for name in names]
    chart = figure(traces, "round", "share wanted, not planned")
    chart["layout"]["yaxis"] |= {"rangemode": "tozero"}
    whole_numbers(chart, rounds[-1].round)
    caption = "Share of a domain that was wanted, and that max_epochs_per_domain gave to the other domains."
    caption += f" {len(picked):,} of {len(rounds):,} rounds are drawn." if len(picked) < len(rounds) else ""
    left_out = len(total_cut(run)) - len(names)
    caption += f" {left_out:,} domains with smaller cuts are not drawn." if left_out else ""
    return [Chart("Data", f"Shares that were cut: {run.label}", caption, chart)]


def loss_weights(run: MeasuredRun, num_charts: int, looks: Mapping[str, int]) -> list[Chart]:
    """Return a chart of each domain's weight in the loss of one run. Empty if the loss has no domain weights.

    ``looks`` numbers the domains.
    """
    known = run.record.loss_weights
    if known is None:
        return []
    means = run.record.mean_loss_weights
    names = [name for name in most_weighted(run) if name in known.names]
    picked = evenly(range(known.steps.size), points_per_curve(num_charts * DOMAINS))
    traces = []
    for name in names:
        values = known.values[picked, known.names.index(name)]
        points = list(zip(known.steps[picked].tolist(), values.tolist(), strict=True))
        mean = f", {means[name]:.4g} on average"
        drawn = line(points, name, style(looks[name]), len(points))
        traces.append({**drawn, "hovertemplate": f"step %{{x}}: %{{y:.4~g}}{mean}"})
    chart = figure(traces, "step", "weight in the loss")
    chart["layout"]["yaxis"] |= {"rangemode": "tozero"}
    caption = "Weight of each domain in the loss of a step."
    if len(picked) < known.total:
        caption += f" {len(picked):,} of {known.total:,} steps are drawn, evenly picked."
    left_out = [name for name in known.names if name not in names]
    if left_out:
        rest = sum(means.get(name, 0.0) for name in left_out)
        caption += f" The {len(names)} domains with the largest mean weights are drawn;"
        caption += f" the {len(left_out):,} others have a mean weight of {rest:.3g} together."
    return [Chart("Data", f"Loss weights of the domains: {run.label}", caption, chart)]


def passes(run: MeasuredRun, num_charts: int, looks: Mapping[str, int]) -> list[Chart]:
    """Return a chart of the passes over each domain up to each round. Empty for a single domain, or without rounds.

    ``looks`` numbers the domains.
    """
    title = f"Passes over each domain: {run.label}"
    rounds, known = run.record.rounds, run.record.passes
    if len(run.domain_samples) < 2 or not rounds:
        return []
    if not known:
        reason = "neither passes nor the sizes of the domains are on record; records of earlier versions lack them."
        return [Chart("Data", title, reason, None)]
    names = most_passed(run)
    picked = evenly(range(len(rounds)), points_per_curve(num_charts * DOMAINS))
    numbers = [rounds[i].round for i in picked]
    traces = [
        line(curve_of(numbers, known[name][picked].tolist()), name, style(looks[name]), len(picked)) for name in names
    ]
    caption = "Samples planned up to each round, divided by the samples of the domain: 1 is one full pass."
    cut: list[tuple[float, float]] = []
    for name in names:
        within = evenly([i for i in picked if name in rounds[i].clipped_shares], CUT_MARKS)
        cut += [(rounds[i].round, float(known[name][i])) for i in within]
    if cut:
        traces.append(_marks(cut, "cut by max_epochs_per_domain"))
        caption += (
            f" Upright marks (at most {CUT_MARKS} on a curve): rounds in which max_epochs_per_domain cut the share."
        )
    chart = figure(traces, "round", "passes")
    chart["layout"]["yaxis"] |= {"rangemode": "tozero"}
    whole_numbers(chart, rounds[-1].round)
    caption += f" {len(picked):,} of {len(rounds):,} rounds are drawn." if len(picked) < len(rounds) else ""
    left_out = len(known) - len(names)
    caption += f" {left_out:,} domains with fewer passes are not drawn." if left_out else ""
    return [Chart("Data", title, caption, chart)]


def _marks(points: Points, name: str) -> Trace:
    """Return upright marks on curves. They are not in the data below a chart, since the curves have their values."""
    return {
        "type": "scatter",
        "mode": "markers",
        "name": text(name),
        "x": packed([x for x, _ in points], "<i4"),
        "y": packed([value for _, value in points], "<f4"),
        "marker": {"symbol": "line-ns-open", "size": 14, "color": CHANCE, "line": {"width": 2, "color": CHANCE}},
        "hoverinfo": "skip",
    }


def scores(run: MeasuredRun, runs: Sequence[MeasuredRun]) -> Chart:
    """Return a chart of the distribution of the scores in each plan of one run."""
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
    traces = band(rounds, quantiles[1], quantiles[5], "5 % to 95 %", look.colour, 0.2)
    traces += band(rounds, quantiles[2], quantiles[4], "25 % to 75 %", look.colour, 0.4)
    for name, values, dash in extremes:
        edge = line(curve_of(rounds, values), name, look, limit)
        traces.append({**edge, "mode": "lines", "line": {"color": look.colour, "dash": dash, "width": 1}})
    median = line(curve_of(rounds, quantiles[3]), "median", look, limit)
    traces.append({**median, "line": {"color": look.colour, "dash": "solid", "width": 2.2}})
    chart = figure(traces, "round", "score")
    whole_numbers(chart, rounds[-1])
    caption = "Quantiles over the samples of each plan that have a score."
    scored = sum(not each.warmup for each in run.record.rounds)
    caption += f" {len(rounds)} of {scored} rounds are drawn." if len(rounds) < scored else ""
    return Chart("Data", title, caption, chart)


def overlap(runs: Sequence[MeasuredRun]) -> Chart:
    """Return a chart of the Jaccard similarity of consecutive plans, for all runs."""
    caption = "Samples in both plans, divided by samples in either. 1 means the same samples."
    chart = Chart("Data", "Overlap of consecutive rounds", caption, None)
    curves = [run.coverage.overlap if run.coverage else [] for run in runs]
    reason = "no run has two rounds whose plans are in its folder."
    return by_round(runs, chart, curves, "Jaccard similarity", {"rangemode": "tozero"}, reason)


def seen(run: MeasuredRun, num_charts: int, looks: Mapping[str, int]) -> Chart:
    """Return a chart of the distinct samples of each domain in the plans so far.

    They are shares of the domain if its size is on record, else numbers. ``looks`` numbers the domains.
    """
    title = f"Share of each domain ever seen: {run.label}"
    if run.coverage is None:
        return Chart("Data", title, _NO_PLANS, None)
    pool = run.record.pool
    names = [name for name in most_trained(run) if run.coverage.seen.get(name)]
    limit = points_per_curve(num_charts * DOMAINS)
    traces = []
    for name in names:
        curve = run.coverage.seen[name]
        points = [(number, count / pool[name]) for number, count in curve] if pool.get(name) else curve
        if pool and not pool.get(name):
            continue
        traces.append(line(points, name, style(looks[name]), limit))
    chart = figure(traces, "round", "share of the domain" if pool else "distinct samples")
    chart["layout"]["yaxis"] |= {"range": [0, 1.02]} if pool else {"rangemode": "tozero"}
    whole_numbers(chart, run.record.rounds[-1].round)
    caption = "Distinct samples in the plans up to each round, divided by those of the domain in the pool."
    if not pool:
        caption = "Distinct samples in the plans up to each round. The sizes of the domains are not on record."
    left_out = len(run.coverage.seen) - len(names)
    caption += f" {left_out} domains with fewer samples are not drawn." if left_out else ""
    return Chart("Data", title, caption, chart)


_NO_PLANS = "the run has no plans in its folder (a run that only weights its samples makes none)."


def repeats(runs: Sequence[MeasuredRun]) -> Chart:
    """Return a chart of the share of each plan's samples that were planned before, for all runs."""
    caption = "Share of the samples that were planned before, in an earlier round or earlier in the same round."
    chart = Chart("Data", "Repeated samples in each round", caption, None)
    curves = [run.coverage.repeats if run.coverage else [] for run in runs]
    reason = "no run has plans in its folder."
    return by_round(runs, chart, curves, "share of the plan's samples", {"range": [-0.02, 1.02]}, reason)


def times(runs: Sequence[MeasuredRun]) -> Chart:
    """Return a chart of the number of samples that were planned once, twice and so on, for all runs."""
    title = "How often samples were planned"
    counted = [(i, run, run.coverage) for i, run in enumerate(runs) if run.coverage and run.coverage.samples]
    if not counted:
        return Chart("Data", title, "no run has plans in its folder.", None)
    most = max(coverage.times.size - 1 for _, _, coverage in counted)
    starts = list(range(1, min(most, EXACT_TIMES) + 1))
    while most > EXACT_TIMES and 2 * starts[-1] <= most:
        starts.append(2 * starts[-1] if starts[-1] > EXACT_TIMES else EXACT_TIMES + 1)
    bounds = list(zip(starts, [*(start - 1 for start in starts[1:]), most], strict=True))
    labels = [f"{first:,}" if first == last else f"{first:,} to {last:,}" for first, last in bounds]
    sized = all(run.record.pool for _, run, _ in counted)
    traces: list[Trace] = []
    for i, run, coverage in counted:
        heights = [int(coverage.times[first : last + 1].sum()) for first, last in bounds]
        never = [sum(run.record.pool.values()) - coverage.distinct] if sized else []
        look = style(i)
        traces.append(
            {
                "type": "bar",
                "name": text(run.label),
                "x": [*(["never"] if sized else []), *labels],
                "y": packed([*never, *heights], "<f8"),
                "marker": {"color": look.colour, "pattern": hatching(look)},
                "hovertemplate": "%{x}: %{y:,}",
            }
        )
    chart = figure(traces, "times planned", "samples")
    chart["layout"]["xaxis"] |= {"type": "category"}
    chart["layout"] |= {"barmode": "group"}
    caption = "Number of distinct samples, by how often they are in the plans of the whole run."
    caption += "" if sized else " The number of samples that were never planned is not on record."
    without = [run.label for run in runs if run.coverage is None]
    caption += f" Without plans: {', '.join(without)}." if without else ""
    return Chart("Data", title, caption, chart)


def weights(runs: Sequence[MeasuredRun], axis: Axis) -> list[Chart]:
    """Return a chart of the smallest and largest sample weight, for runs with a weighter."""
    title = "Sample weights"
    weighted = [(i, run) for i, run in enumerate(runs) if run.record.weights]
    if not weighted:
        asked = any("weight" in run.record.components for run in runs)
        return [Chart("Data", title, "no weights are logged (dataflex/weight_min).", None)] if asked else []
    limit = points_per_curve(2 * len(weighted))
    traces: list[Trace] = []
    for i, run in weighted:
        for name, curve in sorted(run.record.weights.items()):
            edge = line(axis.points(run.record, curve), f"{run.label} {name}", style(i), limit)
            edge["line"]["dash"] = "dot" if name == "min" else "solid"
            traces.append(edge)
    caption = "Smallest (dotted) and largest (solid) weight in the logged step."
    return [Chart("Data", title, caption, figure(traces, axis.name, "weight"))]
