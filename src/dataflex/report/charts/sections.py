"""All charts of a report in the order of the page. A chart without data gives the reason instead."""

from __future__ import annotations

from collections.abc import Sequence

from dataflex.record.reader import RunRecord
from dataflex.report.charts.chart import SECONDS, STEPS, TOKENS, Chart
from dataflex.report.charts.cost import cost, decision_seconds
from dataflex.report.charts.data import (
    cut_shares,
    loss_weights,
    overlap,
    passes,
    proportions,
    repeats,
    scores,
    seen,
    times,
    weights,
)
from dataflex.report.charts.domains import domain_numbers
from dataflex.report.charts.evaluation import eval_domains, eval_loss, eval_means
from dataflex.report.charts.loss import domain_loss, own_tokens, train_loss
from dataflex.report.charts.tasks import tasks
from dataflex.report.charts.weights import token_weights
from dataflex.report.measure import MeasuredRun

RUNS_ONE_BY_ONE = 12
"""Most runs that have separate charts."""


def charts(runs: Sequence[MeasuredRun]) -> list[Chart]:
    """Return all charts in the order of the page."""
    axis = TOKENS if all(_is_known(run.record) for run in runs) else STEPS
    alone = runs[:RUNS_ONE_BY_ONE]
    looks = domain_numbers(alone)
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
        *(chart for run in alone for chart in token_weights(run, len(alone), looks)),
        *_more_runs(runs),
        cost(runs),
        decision_seconds(runs),
        *tasks(runs),
    ]


def _more_runs(runs: Sequence[MeasuredRun]) -> list[Chart]:
    more = len(runs) - RUNS_ONE_BY_ONE
    reason = f"only the first {RUNS_ONE_BY_ONE} runs have separate charts; the tables list all runs."
    return [Chart("Data", f"Domains and scores of {more} more runs", reason, None)] if more > 0 else []


def _is_known(record: RunRecord) -> bool:
    """Return whether the tokens are known at every step with a training loss."""
    return all(step in record.tokens_at for step, _ in record.train_loss)
