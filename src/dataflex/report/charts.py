"""The charts of a report. A chart that has nothing to show says why instead."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dataflex.record.reader import RunRecord
from dataflex.record.schema import DomainMeasures, Evaluation, Measures
from dataflex.record.trainer_log import Curve
from dataflex.report.measure import LEVELS, MeasuredRun, evenly
from dataflex.report.traces import (
    CHANCE,
    REST,
    Figure,
    Points,
    Style,
    Trace,
    band,
    faint_line,
    figure,
    hatching,
    is_smoothed,
    line,
    packed,
    points_per_curve,
    row_labels,
    smooth,
    style,
    text,
    whole_numbers,
)

DOMAINS = 12
"""Domains drawn of a run, at most: the largest of what a chart shows; the others of a plan are added up."""

RAW_RUNS = 3
"""Runs up to which the logged training loss is drawn behind its running mean."""

PROPORTION_ROUNDS = 400
"""Rounds whose proportions are drawn, at most."""

CUT_MARKS = 20
"""Rounds marked of a curve in which a domain was cut, at most."""

LOG_RATIO = 30
"""Largest over smallest place from which an axis of tokens is logarithmic."""

RUNS_ONE_BY_ONE = 12
"""Runs that get charts of their own, at most."""

EXACT_TIMES = 12
"""Times a sample was planned up to which each number has a bar of its own."""


@dataclass(frozen=True)
class Chart:
    """A chart, or what is missing for it."""

    section: str
    title: str
    caption: str
    figure: Figure | None


@dataclass(frozen=True)
class Axis:
    """What losses are drawn against: a name, and where each logged step of a run is on it."""

    name: str
    place: Callable[[RunRecord], Mapping[int, float]] | None
    """None: the step itself."""

    def points(self, record: RunRecord, curve: Curve) -> Points:
        """Return the curve against this axis, without steps whose place is not known."""
        if self.place is None:
            return curve
        known = self.place(record)
        return [(known[step], value) for step, value in curve if step in known]


STEPS = Axis("step", None)
TOKENS = Axis("tokens", lambda record: record.tokens_at)
SECONDS = Axis("seconds", lambda record: record.seconds_at)


def charts(runs: Sequence[MeasuredRun]) -> list[Chart]:
    """Return all charts in the order of the page."""
    axis = TOKENS if all(_is_known(run.record) for run in runs) else STEPS
    alone = runs[:RUNS_ONE_BY_ONE]
    looks = _domain_numbers(alone)
    return [
        train_loss(runs, axis),
        train_loss(runs, SECONDS),
        *(domain_loss(run, len(alone), axis, looks) for run in alone),
        *(chart for run in alone for chart in own_tokens(run, len(alone), looks)),
        *eval_means(runs),
        *eval_domains(runs),
        *eval_loss(runs),
        *(proportions(run, len(alone), looks) for run in alone),
        *(chart for run in alone for chart in cut_shares(run, len(alone), looks)),
        *(chart for run in alone for chart in loss_weights(run, len(alone), looks)),
        *(chart for run in alone for chart in passes(run, len(alone), looks)),
        *(scores(run, runs) for run in alone),
        overlap(runs),
        *(seen(run, len(alone), looks) for run in alone),
        repeats(runs),
        times(runs),
        *weights(runs, axis),
        *_more_runs(runs),
        cost(runs),
        decision_seconds(runs),
        *tasks(runs),
    ]


def _more_runs(runs: Sequence[MeasuredRun]) -> list[Chart]:
    more = len(runs) - RUNS_ONE_BY_ONE
    reason = f"only the first {RUNS_ONE_BY_ONE} runs have charts of their own; the tables have all."
    return [Chart("Data", f"Domains and scores of {more} more runs", reason, None)] if more > 0 else []


def _is_known(record: RunRecord) -> bool:
    """Whether the tokens are known at every step with a training loss."""
    return all(step in record.tokens_at for step, _ in record.train_loss)


def train_loss(runs: Sequence[MeasuredRun], axis: Axis) -> Chart:
    """Training loss against tokens (steps in older records) or time, all runs."""
    title = f"Training loss against {_AGAINST[axis.name]}"
    limit = points_per_curve(2 * len(runs))
    curves = [(axis.points(run.record, run.record.train_loss), run, style(i)) for i, run in enumerate(runs)]
    lines = [line(smooth(points), run.label, look, limit) for points, run, look in curves if points]
    if not lines:
        reason = "no training loss is logged yet (logging_steps)."
        if any(run.record.train_loss for run in runs):
            reason = "the logs have no seconds (dataflex/train_seconds); records of earlier versions lack them."
        return Chart("Loss", title, reason, None)
    caption = "As logged; long curves as a running mean over a fiftieth of the run"
    noisy = [(points, run, look) for points, run, look in curves if is_smoothed(points)]
    if noisy and len(runs) <= RAW_RUNS:
        lines = [faint_line(points, run.label, look, limit) for points, run, look in noisy] + lines
        caption += ", the logged values faint"
    caption += f".{_CLOCK}" if axis is SECONDS else "."
    partly = [run.label for points, run, _ in curves if len(points) < len(run.record.train_loss)]
    caption += f" Not known at every step: {', '.join(partly)}." if partly else ""
    return Chart("Loss", title, caption, figure(lines, axis.name, "loss"))


_AGAINST = {"step": "steps", "tokens": "tokens", "seconds": "time"}
_CLOCK = " Seconds of training, decisions and evaluation together."


def eval_means(runs: Sequence[MeasuredRun]) -> list[Chart]:
    """Loss over all tokens and mean over the evaluation sets, each against tokens and time, all runs."""
    kinds: list[tuple[str, str, Callable[[Evaluation], Measures]]] = [
        ("token-weighted", "Over the tokens of all evaluation sets together.", lambda each: each.token_weighted),
        ("mean of the sets", "Mean over the evaluation sets, each counted once.", lambda each: each.unweighted),
    ]
    if not any(run.record.evaluations for run in runs):
        reason = "no evaluation is on record (eval_dataset or val_size, with eval_steps; evaluations.jsonl)."
        return [
            Chart("Evaluation", f"Evaluation loss against {against}, {kind}", reason, None)
            for kind, _, _ in kinds
            for against in ("tokens", "time")
        ]
    places: list[tuple[str, str, str, Callable[[Evaluation], float]]] = [
        ("tokens", "tokens", "", lambda each: each.tokens),
        ("time", "seconds", _CLOCK, lambda each: each.seconds),
    ]
    note = _changed_data(runs)
    return [
        _lines(
            runs,
            Chart("Evaluation", f"Evaluation loss against {against}, {kind}", f"{meaning}{clock}{note}", None),
            [[(place(each), of(each).loss) for each in run.record.evaluations] for run in runs],
            (unit, "loss"),
            2,
        )
        for kind, meaning, of in kinds
        for against, unit, clock, place in places
    ]


def _changed_data(runs: Sequence[MeasuredRun]) -> str:
    """Warn where losses were measured on different data."""
    digests = {each.fingerprint for run in runs for each in run.record.evaluations}
    return " The evaluation data are not the same everywhere: losses cannot be compared." if len(digests) > 1 else ""


def eval_domains(runs: Sequence[MeasuredRun]) -> list[Chart]:
    """Loss and bits per byte of each evaluation set: one chart for a single run, else one for each set."""
    measures: list[tuple[str, str, Callable[[DomainMeasures], float | None]]] = [
        ("Evaluation loss", "loss", lambda each: each.loss),
        ("Bits per byte", "bits per byte", lambda each: each.bits_per_byte),
    ]
    names = list(dict.fromkeys(name for run in runs for each in run.record.evaluations for name in each.domains))
    if not names:
        reason = "no evaluation is on record (eval_dataset or val_size, with eval_steps; evaluations.jsonl)."
        return [Chart("Evaluation", f"{title} by domain", reason, None) for title, _, _ in measures]
    left_out = f" {len(names) - DOMAINS} more evaluation sets are not drawn." if len(names) > DOMAINS else ""
    left_out += _changed_data(runs)
    shown = names[:DOMAINS]
    found = []
    for title, unit, of in measures:
        by_run = [
            {
                name: [
                    (each.tokens, value)
                    for each in run.record.evaluations
                    if name in each.domains and (value := of(each.domains[name])) is not None
                ]
                for name in shown
            }
            for run in runs
        ]
        if not any(points for curves in by_run for points in curves.values()):
            found.append(Chart("Evaluation", f"{title} by domain", "no evaluation set has text in bytes.", None))
        elif len(runs) == 1:
            limit = points_per_curve(len(shown))
            traces = [
                line(points, name, style(i), limit) for i, (name, points) in enumerate(by_run[0].items()) if points
            ]
            caption = f"Of each evaluation set.{left_out}"
            found.append(Chart("Evaluation", f"{title} by domain", caption, figure(traces, "tokens", unit)))
        else:
            for name in shown:
                curves = [curves[name] for curves in by_run]
                reason = "" if any(curves) else "the set has no text in bytes."
                chart = Chart("Evaluation", f"{title}: {name}", reason or left_out.strip(), None)
                found.append(_lines(runs, chart, curves, ("tokens", unit), len(shown)))
    return found


def eval_loss(runs: Sequence[MeasuredRun]) -> list[Chart]:
    """What the Trainer logged, one chart per evaluation set, where a run has nothing better on record."""
    if all(run.record.evaluations or not run.record.eval_loss for run in runs):
        return []
    names = list(dict.fromkeys(name for run in runs for name in run.record.eval_loss))
    return [
        _lines(
            runs,
            Chart("Evaluation", "Trainer's eval_loss" if name == "eval" else f"Trainer's eval_loss: {name}", "", None),
            [run.record.eval_loss.get(name, []) for run in runs],
            ("step", "loss"),
            len(names),
        )
        for name in names
    ]


def domain_loss(run: MeasuredRun, num_charts: int, axis: Axis, looks: Mapping[str, int]) -> Chart:
    """Training loss of each domain of one run; ``looks`` numbers the domains."""
    title = f"Training loss by domain: {run.label}"
    known = run.record.domain_loss
    if not known:
        return Chart("Loss", title, "no loss of a domain is logged (dataflex/loss/...).", None)
    names = [name for name in _most_trained(run) if name in known]
    limit = points_per_curve(num_charts * DOMAINS)
    traces = [line(smooth(axis.points(run.record, known[name])), name, style(looks[name]), limit) for name in names]
    left_out = len(known) - len(names)
    caption = "Unweighted loss of the trained samples, mean since the last log; long curves as a running mean."
    caption += f" {left_out} domains with fewer samples are not drawn." if left_out else ""
    return Chart("Loss", title, caption, figure(traces, axis.name, "loss"))


def own_tokens(run: MeasuredRun, num_charts: int, looks: Mapping[str, int]) -> list[Chart]:
    """Training loss of each domain of one run against the tokens of that domain alone; nothing for one domain.

    ``looks`` numbers the domains.
    """
    title = f"Training loss against the domain's own tokens: {run.label}"
    losses, tokens = run.record.domain_loss, run.record.domain_tokens
    if len(losses) < 2:
        return []
    curves = {}
    for name in _most_trained(run):
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
        "tokens of the domain",
        "loss",
    )
    places = [place for points in curves.values() for place, _ in points]
    caption = "Unweighted loss of a domain when so many of its tokens that count in the loss were trained on."
    if max(places) > LOG_RATIO * min(places):
        chart["layout"]["xaxis"] |= {"type": "log"}
        caption += " Tokens on a logarithmic scale."
    left_out = len(losses) - len(curves)
    caption += f" {left_out:,} other domains are not drawn." if left_out else ""
    return [Chart("Loss", title, caption, chart)]


def proportions(run: MeasuredRun, num_charts: int, looks: Mapping[str, int]) -> Chart:
    """Share of each domain in the rounds of one run, over its optimizer steps; ``looks`` numbers the domains."""
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
    names = [name for name in _most_trained(run) if name in present]
    steps = [*(each.start_step for each in shown), shown[-1].start_step + shown[-1].steps]
    values = np.array([[each.get(name, 0.0) for name in names] for each in [*shares, shares[-1]]])
    traces = [_area(steps, values[:, i], name, style(looks[name])) for i, name in enumerate(names)]
    caption = "Share of each domain in each round, from its first step on; plans have it to whole samples."
    others = len(present) - len(names)
    if others:
        rest = np.maximum(1.0 - values.sum(axis=1), 0.0)
        label = f"others ({others:,} domain{'s' if others > 1 else ''})"
        traces.append(_area(steps, rest, label, REST))
        caption += (
            f" The {len(names)} domains with the most samples have bands of their own, the {others:,} others one."
        )
    chart = figure(traces, "step", "share of the samples")
    chart["layout"]["yaxis"] |= {"range": [0, 1]}
    whole_numbers(chart, steps[-1])
    caption += f" {len(shown):,} of {len(rounds):,} rounds are drawn." if len(shown) < len(rounds) else ""
    return Chart("Data", title, caption, chart)


def _area(steps: Sequence[int], values: NDArray[np.float64], name: str, look: Style) -> Trace:
    """One domain's shares, each held from the first step of its round to that of the next."""
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
    """Share of each domain of one run that was wanted and not planned; nothing where none was cut.

    ``looks`` numbers the domains.
    """
    rounds, names = run.record.rounds, _most_cut(run)
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
    traces = [line(_curve(numbers, cut[name]), name, style(looks[name]), len(picked)) for name in names]
    chart = figure(traces, "round", "share wanted, not planned")
    chart["layout"]["yaxis"] |= {"rangemode": "tozero"}
    whole_numbers(chart, rounds[-1].round)
    caption = "What max_epochs_per_domain took from the wanted share of a domain and gave to the others."
    caption += f" {len(picked):,} of {len(rounds):,} rounds are drawn." if len(picked) < len(rounds) else ""
    left_out = len(_cut(run)) - len(names)
    caption += f" {left_out:,} domains that were cut by less are not drawn." if left_out else ""
    return [Chart("Data", f"Shares that were cut: {run.label}", caption, chart)]


def _cut(run: MeasuredRun) -> dict[str, float]:
    """Return how much was cut of each domain that was, shares added up over the rounds."""
    lost: dict[str, float] = {}
    for each in run.record.rounds:
        for name, share in each.clipped_shares.items():
            lost[name] = lost.get(name, 0.0) + share - each.shares.get(name, 0.0)
    return lost


def loss_weights(run: MeasuredRun, num_charts: int, looks: Mapping[str, int]) -> list[Chart]:
    """Weight of each domain in the loss over the steps of one run; nothing where the loss is not weighted so.

    ``looks`` numbers the domains.
    """
    known = run.record.loss_weights
    if known is None:
        return []
    means = run.record.mean_loss_weights
    names = [name for name in _most_weighted(run) if name in known.names]
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
    caption = "What a domain counts in the loss of a step."
    if len(picked) < known.total:
        caption += f" {len(picked):,} of {known.total:,} steps are drawn, evenly picked."
    left_out = [name for name in known.names if name not in names]
    if left_out:
        rest = sum(means.get(name, 0.0) for name in left_out)
        caption += f" The {len(names)} domains with the largest mean weights are drawn;"
        caption += f" the {len(left_out):,} others have a mean weight of {rest:.3g} together."
    return [Chart("Data", f"Loss weights of the domains: {run.label}", caption, chart)]


def passes(run: MeasuredRun, num_charts: int, looks: Mapping[str, int]) -> list[Chart]:
    """Passes over each domain of one run up to each round; nothing for one domain, or without rounds.

    ``looks`` numbers the domains.
    """
    title = f"Passes over each domain: {run.label}"
    rounds, known = run.record.rounds, run.record.passes
    if len(run.domain_samples) < 2 or not rounds:
        return []
    if not known:
        reason = "neither passes nor the sizes of the domains are on record; records of earlier versions lack them."
        return [Chart("Data", title, reason, None)]
    names = _most_passed(run)
    picked = evenly(range(len(rounds)), points_per_curve(num_charts * DOMAINS))
    numbers = [rounds[i].round for i in picked]
    traces = [
        line(_curve(numbers, known[name][picked].tolist()), name, style(looks[name]), len(picked)) for name in names
    ]
    caption = "Samples planned up to each round over samples of the domain: 1 is once through all of them."
    cut: list[tuple[float, float]] = []
    for name in names:
        within = evenly([i for i in picked if name in rounds[i].clipped_shares], CUT_MARKS)
        cut += [(rounds[i].round, float(known[name][i])) for i in within]
    if cut:
        traces.append(_marks(cut, "cut by max_epochs_per_domain"))
        caption += (
            f" Upright marks, at most {CUT_MARKS} on a curve: rounds in which max_epochs_per_domain cut the share."
        )
    chart = figure(traces, "round", "passes")
    chart["layout"]["yaxis"] |= {"rangemode": "tozero"}
    whole_numbers(chart, rounds[-1].round)
    caption += f" {len(picked):,} of {len(rounds):,} rounds are drawn." if len(picked) < len(rounds) else ""
    left_out = len(known) - len(names)
    caption += f" {left_out:,} domains with fewer passes are not drawn." if left_out else ""
    return [Chart("Data", title, caption, chart)]


def _marks(points: Points, name: str) -> Trace:
    """Upright marks on curves. The lines have their numbers, so they are not in the data below a chart."""
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
    traces = band(rounds, quantiles[1], quantiles[5], "5 % to 95 %", look.colour, 0.2)
    traces += band(rounds, quantiles[2], quantiles[4], "25 % to 75 %", look.colour, 0.4)
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
    caption = "Samples in both plans over samples in either; 1: the same set."
    chart = Chart("Data", "Overlap of consecutive rounds", caption, None)
    curves = [run.coverage.overlap if run.coverage else [] for run in runs]
    reason = "no run has two rounds whose plans are in its folder."
    return _by_round(runs, chart, curves, "Jaccard similarity", {"rangemode": "tozero"}, reason)


def _by_round(
    runs: Sequence[MeasuredRun],
    chart: Chart,
    curves: Sequence[Points],
    y_title: str,
    y_axis: dict[str, object],
    reason: str,
) -> Chart:
    """Return a chart with a line per run against the round; ``reason`` is said where no run has one."""
    drawn = _lines(runs, chart, curves, ("round", y_title), 1)
    if drawn.figure is None:
        return Chart(chart.section, chart.title, reason, None)
    drawn.figure["layout"]["yaxis"] |= y_axis
    whole_numbers(drawn.figure, max(len(run.record.rounds) for run in runs))
    return drawn


def seen(run: MeasuredRun, num_charts: int, looks: Mapping[str, int]) -> Chart:
    """Distinct samples of each domain in the plans so far, as a share of the domain where its size is on record.

    ``looks`` numbers the domains.
    """
    title = f"Share of each domain ever seen: {run.label}"
    if run.coverage is None:
        return Chart("Data", title, _NO_PLANS, None)
    pool = run.record.pool
    names = [name for name in _most_trained(run) if run.coverage.seen.get(name)]
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
        caption = "Distinct samples in the plans up to each round; the record does not say how many the pool has."
    left_out = len(run.coverage.seen) - len(names)
    caption += f" {left_out} domains with fewer samples are not drawn." if left_out else ""
    return Chart("Data", title, caption, chart)


_NO_PLANS = "the run has no plans in its folder (one that only weights its samples makes none)."


def repeats(runs: Sequence[MeasuredRun]) -> Chart:
    """Share of each plan's samples that were planned before, all runs."""
    caption = "Samples planned before, in an earlier round or earlier in the same, over all."
    chart = Chart("Data", "Repeated samples in each round", caption, None)
    curves = [run.coverage.repeats if run.coverage else [] for run in runs]
    reason = "no run has plans in its folder."
    return _by_round(runs, chart, curves, "share of the plan's samples", {"range": [-0.02, 1.02]}, reason)


def times(runs: Sequence[MeasuredRun]) -> Chart:
    """How many samples were planned once, twice and so on, all runs."""
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
    caption = "Different samples by how often they are in the plans of the whole run."
    caption += "" if sized else " How many never are is not on record."
    without = [run.label for run in runs if run.coverage is None]
    caption += f" Without plans: {', '.join(without)}." if without else ""
    return Chart("Data", title, caption, chart)


def weights(runs: Sequence[MeasuredRun], axis: Axis) -> list[Chart]:
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
            edge = line(axis.points(run.record, curve), f"{run.label} {name}", style(i), limit)
            edge["line"]["dash"] = "dot" if name == "min" else "solid"
            traces.append(edge)
    caption = "Smallest (dotted) and largest (solid) weight in the logged step."
    return [Chart("Data", title, caption, figure(traces, axis.name, "weight"))]


def cost(runs: Sequence[MeasuredRun]) -> Chart:
    """Seconds of training, decisions and evaluation, one bar per run."""
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
    caption = "Training, the decisions made for it, and evaluation."
    for name, seconds in (parts[0], parts[2]):
        unknown = [run.label for run, value in zip(runs, seconds, strict=True) if value is None]
        caption += f" Seconds of {name} are not on record: {', '.join(unknown)}." if unknown else ""
    partly = [
        f"{run.label} up to step {run.record.trained[0]:,}"
        for run in runs
        if run.record.summary is None and run.record.trained
    ]
    caption += f" Not finished, seconds of training are those of {', '.join(partly)}." if partly else ""
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
    chart = Chart("Cost", title, "Seconds between two rounds spent on the plan of the next.", None)
    curves = [[(each.round, each.cost.seconds) for each in run.record.rounds] for run in runs]
    return _by_round(runs, chart, curves, "seconds", {"rangemode": "tozero"}, "no run records a round.")


def tasks(runs: Sequence[MeasuredRun]) -> list[Chart]:
    """Results of downstream tasks with their standard errors; nothing where no run has any."""
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
        shift = 0.6 * ((i + 0.5) / len(runs) - 0.5)  # the runs of a row, one below the other
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
    caption = "Bars: one standard error to each side; the upright marks: what guessing gives."
    caption += f" Without tasks: {', '.join(without)}." if without else ""
    return [Chart("Tasks", "Downstream tasks", caption, chart)]


def _metrics(record: RunRecord) -> dict[tuple[str, str], tuple[float, float, float | None]]:
    """Return each task and metric that has a value with it, its standard error (or 0) and what chance gives."""
    return {
        (task.task, name): (metric.value, metric.stderr or 0.0, task.chance)
        for task in record.tasks
        for name, metric in task.metrics.items()
        if metric.value is not None
    }


def _lines(
    runs: Sequence[MeasuredRun], chart: Chart, curves: Sequence[Points], axes: tuple[str, str], num_charts: int
) -> Chart:
    """Return ``chart`` with one line per run, and the runs that have none named in its caption."""
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


def _most_trained(run: MeasuredRun) -> list[str]:
    """Return the domains with the most samples, in the order of their first mention."""
    return _largest(run.domain_samples)


def _most_weighted(run: MeasuredRun) -> list[str]:
    """Return the domains with the largest mean weights in the loss."""
    return _largest(run.record.mean_loss_weights)


def _most_passed(run: MeasuredRun) -> list[str]:
    """Return the domains that were gone through most often."""
    return _largest({name: float(np.nanmax(values)) for name, values in run.record.passes.items()})


def _most_cut(run: MeasuredRun) -> list[str]:
    """Return the domains that ``max_epochs_per_domain`` took most from."""
    return _largest(_cut(run))


def _largest(sizes: Mapping[str, float]) -> list[str]:
    kept = set(sorted(sizes, key=lambda name: -sizes[name])[:DOMAINS])
    return [name for name in sizes if name in kept]


def _domain_numbers(runs: Sequence[MeasuredRun]) -> dict[str, int]:
    """Number the domains that are drawn of any run, so that one looks the same in every chart."""
    choices = (_most_trained, _most_weighted, _most_passed, _most_cut)
    names = dict.fromkeys(name for chosen in choices for run in runs for name in chosen(run))
    return {name: i for i, name in enumerate(names)}


def _curve(rounds: Sequence[int], values: Sequence[float]) -> Curve:
    return [(number, float(value)) for number, value in zip(rounds, values, strict=True)]
