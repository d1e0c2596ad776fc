"""The domains that are drawn of a run, and their numbers, so that a domain has the same look in every chart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from dataflex.report.charts.chart import DOMAINS
from dataflex.report.measure import MeasuredRun


def most_trained(run: MeasuredRun) -> list[str]:
    """Return the domains with the most samples, in order of first appearance."""
    return _largest(run.domain_samples)


def most_weighted(run: MeasuredRun) -> list[str]:
    """Return the domains with the largest mean weights in the loss."""
    return _largest(run.record.mean_loss_weights)


def most_counted(run: MeasuredRun) -> list[str]:
    """Return the domains with the most trained tokens in the statistics of the token weights."""
    sizes: dict[str, float] = {}
    for each in run.record.token_weights:
        for name, tokens in each.tokens.items():
            sizes[name] = sizes.get(name, 0) + tokens
    return _largest(sizes)


def most_passed(run: MeasuredRun) -> list[str]:
    """Return the domains with the most passes."""
    return _largest({name: float(np.nanmax(values)) for name, values in run.record.passes.items()})


def most_cut(run: MeasuredRun) -> list[str]:
    """Return the domains that ``max_epochs_per_domain`` cut most."""
    return _largest(total_cut(run))


def total_cut(run: MeasuredRun) -> dict[str, float]:
    """Return domain -> share that was cut, summed over the rounds, for the domains that were cut."""
    lost: dict[str, float] = {}
    for each in run.record.rounds:
        for name, share in each.clipped_shares.items():
            lost[name] = lost.get(name, 0.0) + share - each.shares.get(name, 0.0)
    return lost


def _largest(sizes: Mapping[str, float]) -> list[str]:
    kept = set(sorted(sizes, key=lambda name: -sizes[name])[:DOMAINS])
    return [name for name in sizes if name in kept]


def domain_numbers(runs: Sequence[MeasuredRun]) -> dict[str, int]:
    """Number the domains that are drawn of any run, so that each has the same look in every chart."""
    choices = (most_trained, most_weighted, most_passed, most_cut, most_counted)
    names = dict.fromkeys(name for chosen in choices for run in runs for name in chosen(run))
    return {name: i for i, name in enumerate(names)}
