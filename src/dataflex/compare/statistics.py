"""Intervals of paired differences over a few seeds, and sentences about the conclusions they support.

The difference of a variant is its value minus the baseline's with the same seed. The interval is Student's t interval
of the mean of the differences (scipy.stats.ttest_1samp). If the differences are about normal, its coverage is 95 %,
even for three seeds. The percentile bootstrap (scipy.stats.bootstrap) assumes no shape, but is too narrow below some
thirty seeds. It is shown, and nothing is concluded from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95

BOOTSTRAP_SEEDS = 30
"""Number of seeds below which the bootstrap is too narrow."""

_RESAMPLES = 2000

Floats = NDArray[np.float64]
Finding = Literal["better", "worse", "unclear", "no claim", "no data"]


def t_interval(differences: Floats) -> tuple[Floats, Floats]:
    """Return the ends of the 95 % t interval of the mean over the last axis.

    Args:
        differences: (..., n), n >= 2.
    """
    from scipy.stats import ttest_1samp

    interval = ttest_1samp(differences, 0.0, axis=-1).confidence_interval(CONFIDENCE)
    return np.asarray(interval.low), np.asarray(interval.high)


def bootstrap_interval(differences: Floats, resamples: int = _RESAMPLES) -> tuple[Floats, Floats]:
    """Return the ends of the 95 % percentile bootstrap interval of the mean over the last axis.

    Args:
        differences: (..., n), n >= 2.
        resamples: number of times that n differences are drawn with replacement. The draws are always the same.
    """
    from scipy.stats import bootstrap

    found = bootstrap(
        (differences,),
        np.mean,
        axis=-1,
        n_resamples=resamples,
        confidence_level=CONFIDENCE,
        method="percentile",
        vectorized=True,
        batch=max(1, 20_000_000 // differences.size),  # limits the memory to so many values at a time
        rng=np.random.default_rng(0),
    ).confidence_interval
    return np.asarray(found.low), np.asarray(found.high)


@dataclass(frozen=True)
class Difference:
    """The difference between a variant and the baseline in one metric.

    Attributes:
        variant: name of the variant.
        baseline: name of the baseline.
        metric: name of the metric.
        seeds: the seeds for which both have a value.
        values: variant minus baseline, for each of these seeds.
        mean: mean of the values. None without values.
        interval: 95 % t interval. None for fewer than two values, or if all are equal.
        bootstrap: 95 % bootstrap interval. None in the same cases.
        higher_is_better: direction of the metric. None if unknown.
        finding: the conclusion that the t interval supports.
    """

    variant: str
    baseline: str
    metric: str
    seeds: tuple[int, ...]
    values: tuple[float, ...]
    mean: float | None
    interval: tuple[float, float] | None
    bootstrap: tuple[float, float] | None
    higher_is_better: bool | None
    finding: Finding


def difference(
    variant: str,
    baseline: str,
    metric: str,
    own: Mapping[int, float],
    others: Mapping[int, float],
    higher_is_better: bool | None,
) -> Difference:
    """Compare a variant with the baseline.

    Args:
        variant: name of the variant.
        baseline: name of the baseline.
        metric: name of the metric.
        own: seed -> value of the variant.
        others: seed -> value of the baseline.
        higher_is_better: direction of the metric. None if unknown.
    """
    better = higher_is_better
    seeds = tuple(seed for seed in own if seed in others)
    values = np.array([own[seed] - others[seed] for seed in seeds], dtype=np.float64)
    if not seeds:
        return Difference(variant, baseline, metric, (), (), None, None, None, better, "no data")
    mean = float(values.mean())
    numbers = tuple(values.tolist())
    # One seed, or equal differences: without a spread there is no interval.
    if np.ptp(values) <= 1e-12 * max(1.0, float(np.abs(values).max())):
        return Difference(variant, baseline, metric, seeds, numbers, mean, None, None, better, "no claim")
    low, high = (float(end) for end in t_interval(values))
    least, most = (float(end) for end in bootstrap_interval(values))
    finding: Finding = "unclear"
    if low > 0 or high < 0:
        finding = "no claim" if better is None else "better" if (low > 0) == better else "worse"
    return Difference(variant, baseline, metric, seeds, numbers, mean, (low, high), (least, most), better, finding)


def title(metric: str) -> str:
    """Return a metric's name in words."""
    if "/" in metric:
        task, _, name = metric.partition("/")
        return f"{task} {name}"
    return (
        metric.replace("token_weighted", "token-weighted").replace("bits_per_byte", "bits per byte").replace("_", " ")
    )


def number(value: float) -> str:
    """Return a number with four decimals, or with two significant digits if it is below 0.001."""
    return f"{value:.4f}" if value == 0 or abs(value) >= 0.001 else f"{value:.2g}"


def signed(value: float) -> str:
    """Return :func:`number` with its sign."""
    return ("-" if value < 0 else "+") + number(abs(value))


def sentence(found: Difference, budget: str, asked: int) -> str:
    """Return the conclusion that a difference supports, in one sentence.

    Args:
        found: the difference.
        budget: the budget of every run, such as "200,000 tokens".
        asked: number of seeds of the comparison. The sentence says so if fewer were compared.
    """
    few = f" ({len(found.seeds)} of {asked} seeds)" if 0 < len(found.seeds) < asked else ""
    what = f"{found.variant}{few}: {title(found.metric)}"
    seeds = f"{len(found.seeds)} seeds"
    if found.mean is None:
        return f"{what} cannot be compared with {found.baseline}: there is no seed for which both have a value."
    side = "lower" if found.mean < 0 else "higher"
    size = f"{number(abs(found.mean))} {side} than {found.baseline}" if found.mean else f"equal to {found.baseline}"
    if len(found.seeds) == 1:
        return f"{what} {size} for the only seed compared: no claim is possible from one seed."
    if found.interval is None:
        return f"{what} {size} for each of {seeds}: without a spread there is no interval, and so no claim."
    low, high = found.interval
    if found.finding == "unclear":
        most = number(max(abs(low), abs(high)))
        return (
            f"{what}: {seeds} show no clear difference from {found.baseline} (mean {signed(found.mean)}, 95 % "
            f"interval [{signed(low)}, {signed(high)}]); differences as large as {most} cannot be ruled out."
        )
    said = f"{what} {size} at {budget}, {seeds}, 95 % interval [{signed(low)}, {signed(high)}]"
    if found.higher_is_better is None:
        return f"{said}: no claim, because it is unknown whether higher or lower is better."
    return f"{said}: {found.finding}."


def chance_line(comparisons: int) -> str:
    """Return a sentence on how many of the comparisons would stand out by chance."""
    expected = (1 - CONFIDENCE) * comparisons
    return (
        f"{comparisons} comparison{'s were' if comparisons != 1 else ' was'} made at 95 %: if no variant really "
        f"differed, about {expected:.2g} of them would stand out by chance."
    )


def as_json(found: Difference) -> dict[str, Any]:
    """Return a difference as JSON values."""
    return {
        "variant": found.variant,
        "baseline": found.baseline,
        "metric": found.metric,
        "higher_is_better": found.higher_is_better,
        "seeds": list(found.seeds),
        "differences": list(found.values),
        "mean": found.mean,
        "t_interval_95": found.interval and list(found.interval),
        "bootstrap_interval_95": found.bootstrap and list(found.bootstrap),
        "finding": found.finding,
    }
