"""Intervals of paired differences over a few seeds, and sentences about the conclusions they support.

The difference of a variant is its value minus the baseline's with the same seed. The interval is Student's t interval
of the mean of the differences, and the p value is that of the paired t test. If the differences are about normal, the
coverage of the interval is 95 %, even for three seeds. The p values of all differences of a comparison are corrected
together, and findings rest on the corrected ones. The percentile bootstrap (scipy.stats.bootstrap) assumes no shape,
but is too narrow below some thirty seeds. It is shown, and nothing is concluded from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.05
"""Bound on the probability of any false finding in a table of differences. Intervals have the confidence 1 - LEVEL."""

BOOTSTRAP_SEEDS = 30
"""Number of seeds below which the bootstrap is too narrow."""

_RESAMPLES = 2000

Floats = NDArray[np.float64]
Finding = Literal["better", "worse", "unclear", "no claim", "no data"]


def t_test(differences: Floats) -> tuple[Floats, Floats, Floats]:
    """Return the ends of the 95 % t interval of the mean over the last axis, and the two-sided p value of a mean of 0.

    Args:
        differences: (..., n), n >= 2, not all equal.
    """
    # Many times as fast as scipy.stats.ttest_1samp, with the same numbers.
    from scipy.special import stdtr, stdtrit

    number = differences.shape[-1]
    mean = differences.mean(axis=-1)
    error = differences.std(axis=-1, ddof=1) / np.sqrt(number)
    half = stdtrit(number - 1, 1 - LEVEL / 2) * error
    return mean - half, mean + half, 2 * stdtr(number - 1, -np.abs(mean / error))


def t_interval(differences: Floats) -> tuple[Floats, Floats]:
    """Return the ends of the 95 % t interval of the mean over the last axis.

    Args:
        differences: (..., n), n >= 2, not all equal.
    """
    low, high, _ = t_test(differences)
    return low, high


def holm(p_values: Floats) -> Floats:
    """Return p values corrected for their number by Holm's step-down procedure.

    If every corrected value below 0.05 is called a finding, the probability of any false finding is at most 5 %. This
    holds for any number of true hypotheses and any dependence of the tests (S. Holm, A simple sequentially rejective
    multiple test procedure, Scandinavian Journal of Statistics 6, 1979).

    Args:
        p_values: one p value for each hypothesis, (m,).
    """
    order = np.argsort(p_values, kind="stable")
    factors = np.arange(len(p_values), 0, -1)
    found = np.empty(len(p_values))
    found[order] = np.minimum(1.0, np.maximum.accumulate(factors * p_values[order]))
    return found


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
        confidence_level=1 - LEVEL,
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
        higher_is_better: direction of the metric. None if unknown.
        seeds: the seeds for which both have a value.
        values: variant minus baseline, for each of these seeds.
        mean: mean of the values. None without values.
        interval: 95 % t interval of this difference alone. None for fewer than two values, or if all are equal.
        p_value: two-sided p value of the paired t test. None in the same cases.
        p_holm: the p value corrected for the number of differences; see :func:`corrected`. None in the same cases.
    """

    variant: str
    baseline: str
    metric: str
    higher_is_better: bool | None
    seeds: tuple[int, ...] = ()
    values: tuple[float, ...] = ()
    mean: float | None = None
    interval: tuple[float, float] | None = None
    p_value: float | None = None
    p_holm: float | None = None

    @cached_property
    def bootstrap(self) -> tuple[float, float] | None:
        """95 % bootstrap interval. None if there is no t interval."""
        if self.interval is None:
            return None
        low, high = bootstrap_interval(np.array(self.values))
        return float(low), float(high)

    @property
    def finding(self) -> Finding:
        """The conclusion that the corrected p value supports."""
        if self.mean is None:
            return "no data"
        if self.p_holm is None:
            return "no claim"
        if self.p_holm >= LEVEL:
            return "unclear"
        if self.higher_is_better is None:
            return "no claim"
        return "better" if (self.mean > 0) == self.higher_is_better else "worse"


def difference(
    variant: str,
    baseline: str,
    metric: str,
    own: Mapping[int, float],
    others: Mapping[int, float],
    higher_is_better: bool | None,
) -> Difference:
    """Compare a variant with the baseline. The p value is not corrected: :func:`corrected` does it for a whole table.

    Args:
        variant: name of the variant.
        baseline: name of the baseline.
        metric: name of the metric.
        own: seed -> value of the variant.
        others: seed -> value of the baseline.
        higher_is_better: direction of the metric. None if unknown.
    """
    seeds = tuple(seed for seed in own if seed in others)
    values = np.array([own[seed] - others[seed] for seed in seeds], dtype=np.float64)
    found = Difference(variant, baseline, metric, higher_is_better)
    if not seeds:
        return found
    found = replace(found, seeds=seeds, values=tuple(values.tolist()), mean=float(values.mean()))
    # One seed, or equal differences: without a spread there is no interval.
    if np.ptp(values) <= 1e-12 * max(1.0, float(np.abs(values).max())):
        return found
    low, high, p_value = (float(each) for each in t_test(values))
    return replace(found, interval=(low, high), p_value=p_value, p_holm=p_value)


def corrected(differences: Sequence[Difference]) -> tuple[Difference, ...]:
    """Return the differences of a comparison with their p values corrected together by :func:`holm`.

    A difference without a p value is not counted.
    """
    p_values = [each.p_value for each in differences if each.p_value is not None]
    adjusted = iter(holm(np.array(p_values)).tolist())
    return tuple(each if each.p_value is None else replace(each, p_holm=next(adjusted)) for each in differences)


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


def sentence(found: Difference, budget: str, asked: int, comparisons: int) -> str:
    """Return the conclusion that a difference supports, in one sentence.

    Args:
        found: the difference.
        budget: the budget of every run, such as "200,000 tokens".
        asked: number of seeds of the comparison. The sentence says so if fewer were compared.
        comparisons: number of differences that the p values are corrected for.
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
    if found.interval is None or found.p_value is None or found.p_holm is None:
        return f"{what} {size} for each of {seeds}: without a spread there is no interval, and so no claim."
    low, high = found.interval
    if found.finding == "unclear" and found.p_value >= LEVEL:
        most = number(max(abs(low), abs(high)))
        return (
            f"{what}: {seeds} show no clear difference from {found.baseline} (mean {signed(found.mean)}, 95 % "
            f"interval [{signed(low)}, {signed(high)}]); differences as large as {most} cannot be ruled out."
        )
    said = f"{what} {size} at {budget}, {seeds}, 95 % interval [{signed(low)}, {signed(high)}]"
    if found.finding == "unclear":
        return (
            f"{said}: stands out alone, but not after correction for {comparisons} comparisons (p "
            f"{number(found.p_value)}, corrected {number(found.p_holm)}), so it is unclear."
        )
    if found.higher_is_better is None:
        return f"{said}: no claim, because it is unknown whether higher or lower is better."
    return f"{said}: {found.finding}."


def correction_line(comparisons: int) -> str:
    """Return a sentence on the correction for the number of comparisons."""
    made = "1 comparison was" if comparisons == 1 else f"{comparisons} comparisons were"
    return (
        f"{made} made, and findings hold after Holm's correction for this number: if no variant really differed, at "
        f"most {LEVEL * 100:g} % of such tables would have any finding."
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
        "p_value": found.p_value,
        "p_holm": found.p_holm,
        "bootstrap_interval_95": found.bootstrap and list(found.bootstrap),
        "finding": found.finding,
    }
