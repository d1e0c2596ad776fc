"""Charts of the evaluation sets."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dataflex.record.schema import DomainMeasures, Evaluation, Measures
from dataflex.report.charts.chart import CLOCK, DOMAINS, Chart, line_per_run
from dataflex.report.figures import figure, line, points_per_curve, style
from dataflex.report.measure import MeasuredRun


def eval_means(runs: Sequence[MeasuredRun]) -> list[Chart]:
    """Return charts of the loss over all tokens and of the mean over the sets, for all runs.

    Each of the two is drawn against tokens and against time. The accuracy of pairs is drawn against tokens, if there is
    one.
    """
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
        ("time", "seconds", CLOCK, lambda each: each.seconds),
    ]
    note = _changed_data(runs)
    return [
        line_per_run(
            runs,
            Chart("Evaluation", f"Evaluation loss against {against}, {kind}", f"{meaning}{clock}{note}", None),
            [[(place(each), of(each).loss) for each in run.record.evaluations] for run in runs],
            (unit, "loss"),
            2,
        )
        for kind, meaning, of in kinds
        for against, unit, clock, place in places
    ] + _accuracy(runs, note)


def _accuracy(runs: Sequence[MeasuredRun], note: str) -> list[Chart]:
    """Return the chart of the accuracy over all pairs, if a run has one."""
    curves = [
        [
            (each.tokens, each.token_weighted.accuracy)
            for each in run.record.evaluations
            if each.token_weighted.accuracy is not None
        ]
        for run in runs
    ]
    if not any(curves):
        return []
    caption = f"Share of the pairs of all evaluation sets whose reward margin is above 0.{note}"
    chart = Chart("Evaluation", "Evaluation accuracy against tokens", caption, None)
    return [line_per_run(runs, chart, curves, ("tokens", "accuracy"), 1)]


def _changed_data(runs: Sequence[MeasuredRun]) -> str:
    """Return a warning if losses were measured on different data, else an empty text."""
    digests = {each.fingerprint for run in runs for each in run.record.evaluations}
    return " The evaluation data differ, so the losses cannot be compared." if len(digests) > 1 else ""


def eval_domains(runs: Sequence[MeasuredRun]) -> list[Chart]:
    """Return charts of the loss of each evaluation set, and of its bits per byte or of the accuracy of its pairs.

    A single run has one chart of each measure, several runs have one for each set.
    """
    sets = [each for run in runs for evaluation in run.record.evaluations for each in evaluation.domains.values()]
    measures: list[tuple[str, str, Callable[[DomainMeasures], float | None]]] = [
        ("Evaluation loss", "loss", lambda each: each.loss),
    ]
    if not sets or any(each.tokens is not None for each in sets):
        measures.append(("Bits per byte", "bits per byte", lambda each: each.bits_per_byte))
    if any(each.accuracy is not None for each in sets):
        measures.append(("Evaluation accuracy", "accuracy", lambda each: each.accuracy))
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
            caption = f"One curve for each evaluation set.{left_out}"
            found.append(Chart("Evaluation", f"{title} by domain", caption, figure(traces, "tokens", unit)))
        else:
            for name in shown:
                curves = [curves[name] for curves in by_run]
                reason = "" if any(curves) else f"the set has no {unit}."
                chart = Chart("Evaluation", f"{title}: {name}", reason or left_out.strip(), None)
                found.append(line_per_run(runs, chart, curves, ("tokens", unit), len(shown)))
    return found


def eval_loss(runs: Sequence[MeasuredRun]) -> list[Chart]:
    """Return charts of the Trainer's logged loss, one per evaluation set, if a run has no evaluations on record."""
    if all(run.record.evaluations or not run.record.eval_loss for run in runs):
        return []
    names = list(dict.fromkeys(name for run in runs for name in run.record.eval_loss))
    return [
        line_per_run(
            runs,
            Chart("Evaluation", "Trainer's eval_loss" if name == "eval" else f"Trainer's eval_loss: {name}", "", None),
            [run.record.eval_loss.get(name, []) for run in runs],
            ("step", "loss"),
            len(names),
        )
        for name in names
    ]
