"""Rules that turn scores into a selection and that selectors share. Pure functions on numpy arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataflex.data.sampling import IndexArray

ScoreArray = NDArray[np.float32]

_BLOCK = 1 << 20
"""Number of scores in a block for counting ranks."""
_CACHED = 1 << 15
"""Number of scores per operation, so that intermediate results stay in the processor's cache."""
_LOOKED_AT = 1 << 16
"""Number of scores to estimate the position of an order statistic from."""
_SPREAD = 5.0
"""The search range of the order statistic, in standard deviations of the estimate."""


def order_statistics(values: NDArray[Any], first: int, count: int = 1) -> NDArray[Any]:
    """Return the values at positions ``first`` to ``first + count - 1`` of the sorted array, shape (count,). O(N).

    A sample of evenly spaced values gives two bounds that very likely enclose the result, and only the values between
    the bounds are sorted. This takes two comparisons of each value, while a partition moves each value several times.
    If the bounds are wrong, the whole array is partitioned.

    Args:
        values: not NaN, shape (N,).
        first: at least 0.
        count: ``first + count`` is at most N.
    """
    last = first + count - 1
    if values.size > _BLOCK:
        some = np.sort(values[:: -(-values.size // _LOOKED_AT)])
        share = np.array([first, last]) / values.size
        spread = _SPREAD * np.sqrt(some.size * share * (1 - share)) + 2
        places = np.rint(share * some.size + np.array([-1, 1]) * spread).astype(np.int64)
        low, high = some[np.clip(places, 0, some.size - 1)]
        below, between = 0, []
        for part in _parts(values):
            from_low = part >= low
            below += part.size - int(np.count_nonzero(from_low))
            between.append(part[from_low & (part <= high)])
        inside = np.concatenate(between)
        if below <= first and last < below + inside.size:
            return np.sort(inside)[first - below : last - below + 1]
    return np.partition(values, (first, last))[first : last + 1]


def quantiles(values: NDArray[np.floating], shares: Sequence[float]) -> NDArray[np.float64]:
    """Return the quantiles of values that are not NaN, bitwise equal to ``numpy.quantile`` with linear interpolation.

    Example:
        >>> import numpy as np
        >>> from dataflex import quantiles
        >>> quantiles(np.array([1.0, 2.0, 3.0, 4.0]), [0.25, 0.5])
        array([1.75, 2.5 ])
    """
    found = np.empty(len(shares))
    for number, share in enumerate(shares):
        place = (values.size - 1) * np.float64(share)
        first = int(place)
        low, *more = order_statistics(values, first, min(2, values.size - first))
        high, part = more[0] if more else low, place - first
        found[number] = low + (high - low) * part if part < 0.5 else high - (high - low) * (1 - part)
    return found


def top_k(scores: NDArray[np.floating | np.integer], count: int) -> IndexArray:
    """Return the positions of the ``count`` largest scores, ascending. Ties go to the lower position. O(N)."""
    if count >= scores.size:
        return np.arange(scores.size, dtype=np.int64)
    if count == 0:
        return np.empty(0, dtype=np.int64)
    threshold = order_statistics(scores, scores.size - count)[0]
    above = np.flatnonzero(scores > threshold)
    ties = np.flatnonzero(scores == threshold)[: count - above.size]
    return np.sort(np.concatenate([above, ties])).astype(np.int64)


def ranks_of_best(scores: NDArray[np.floating]) -> IndexArray:
    """Return the rank of each score that :func:`top_k` chose, shape (k,). Rank 1 is the best.

    Ties go to the lower position. These scores are the best of all, so their ranks among the candidates equal the ranks
    among themselves.
    """
    ranks = np.empty(scores.size, dtype=np.int64)
    ranks[np.argsort(-scores, kind="stable")] = np.arange(1, scores.size + 1)
    return ranks


def ranks_among(scores: NDArray[np.floating], chosen: IndexArray) -> IndexArray:
    """Return the rank of each chosen position among all scores, shape (k,).

    Rank 1 is the best. Ties go to the lower position. O(N log k), in blocks: scores that were not chosen are counted
    and not sorted.

    Args:
        scores: scores of all candidates, not NaN, shape (N,).
        chosen: distinct positions, ascending, shape (k,).

    Example:
        >>> import numpy as np
        >>> from dataflex import ranks_among
        >>> ranks_among(np.array([0.1, 0.9, 0.5, 0.7]), np.array([1, 2]))
        array([1, 3])
    """
    values, number = np.unique(scores[chosen], return_inverse=True)
    between = np.zeros(values.size + 1, dtype=np.int64)
    """Number of scores above ``values[i - 1]`` and up to ``values[i]``."""
    equal = np.zeros(values.size, dtype=np.int64)
    """Number of scores equal to each value, in the blocks so far."""
    ranks = np.ones(chosen.size, dtype=np.int64)
    for begin in range(0, scores.size, _BLOCK):
        block = scores[begin : begin + _BLOCK]
        place = np.searchsorted(values, block)
        between += np.bincount(place, minlength=between.size)
        tied = np.flatnonzero(values[np.minimum(place, values.size - 1)] == block) if values.size else place[:0]
        order = tied[np.argsort(place[tied], kind="stable")]
        counts = np.bincount(place[order], minlength=values.size)
        before = np.empty(block.size, dtype=np.int64)
        starts = np.cumsum(counts) - counts
        before[order] = np.arange(order.size) + (equal - starts)[place[order]]
        first, last = np.searchsorted(chosen, [begin, begin + block.size])
        ranks[first:last] += before[chosen[first:last] - begin]
        equal += counts
    above = between[::-1].cumsum()[::-1]
    return ranks + above[number + 1]


def ranks_of(scores: NDArray[np.floating], picked: IndexArray, keep_order: bool = True) -> IndexArray:
    """Return the rank of each picked position among the scores that are not NaN, in the order of ``picked``.

    Rank 1 is the best. Ties go to the lower position.

    Args:
        scores: scores of all candidates, NaN for a candidate without a score, shape (N,).
        picked: distinct positions of candidates with a score, at least one, shape (k,).
        keep_order: if the picked scores are the best scores, rank equal scores in the order of ``picked``.
    """
    values = scores[picked]
    lowest = values.min()
    if keep_order and np.count_nonzero(scores > lowest) == np.count_nonzero(values > lowest):
        return ranks_of_best(values)
    order = np.argsort(picked, kind="stable")
    ranks = np.empty(picked.size, dtype=np.int64)
    ranks[order] = ranks_among_scored(scores, picked[order])
    return ranks


def ranks_among_scored(scores: NDArray[np.floating], chosen: IndexArray) -> IndexArray:
    """Return the rank of each chosen position among the scores that are not NaN, as :func:`ranks_among`.

    Args:
        scores: scores of all candidates, NaN for a candidate without a score, shape (N,).
        chosen: distinct positions of candidates with a score, ascending, shape (k,).

    Example:
        >>> import numpy as np
        >>> from dataflex import ranks_among_scored
        >>> ranks_among_scored(np.array([0.1, np.nan, 0.5, 0.7]), np.array([0, 2]))
        array([3, 2])
    """
    scored = np.flatnonzero(~np.isnan(scores))
    return ranks_among(scores[scored], np.searchsorted(scored, chosen))


def sample_without_replacement(
    weights: NDArray[np.floating], count: int, rng: np.random.Generator, temperature: float = 1.0
) -> IndexArray:
    """Draw ``count`` positions one by one, in proportion to ``weights ** (1 / temperature)`` of the remaining. O(N).

    Args:
        weights: non-negative, shape (N,), any scale. Positions of weight zero are never drawn.
        count: at most the number of positive weights.
        rng: the random generator of the draw.
        temperature: > 0. Larger values make the draw more uniform.

    Returns:
        Distinct positions, ascending, shape (count,).

    Raises:
        ValueError: if fewer than ``count`` weights are positive.

    Example:
        >>> import numpy as np
        >>> from dataflex import sample_without_replacement
        >>> sample_without_replacement(np.array([0.0, 2.0, 5.0, 0.0]), 2, np.random.default_rng(0))
        array([1, 2])
    """
    positive = sum(int(np.count_nonzero(part > 0)) for part in _parts(weights))
    if count == 0:
        return np.empty(0, dtype=np.int64)
    if positive < count:
        raise ValueError(f"cannot draw {count} samples without replacement from {positive} of positive weight")
    with np.errstate(divide="ignore"):
        return _drawn(weights, lambda part: np.log(part) / temperature, count, rng)


def sample_softmax(logits: NDArray[np.floating], count: int, rng: np.random.Generator) -> IndexArray:
    """Draw ``count`` positions one by one, in proportion to ``exp(logits)`` of the remaining ones. O(N).

    Gumbel top-k: the positions of the ``count`` largest ``logit - log E`` with exponential E (Vieira 2014; Kool et al.
    2019).

    Returns:
        Distinct positions, ascending, shape (count,).

    Example:
        >>> import numpy as np
        >>> from dataflex import sample_softmax
        >>> sample_softmax(np.array([0.0, 100.0, 100.0]), 2, np.random.default_rng(0))
        array([1, 2])
    """
    return _drawn(logits, lambda part: part, count, rng)


def _drawn(
    values: NDArray[np.floating],
    logits_of: Callable[[NDArray[np.floating]], NDArray[np.floating]],
    count: int,
    rng: np.random.Generator,
) -> IndexArray:
    """Return :func:`sample_softmax` of the logits that ``logits_of`` computes from the values, part by part.

    The array of all logits is never allocated, because touching fresh memory costs more than the arithmetic.
    """
    largest = max(logits_of(part).max() for part in _parts(values))
    keys = np.empty(values.size, dtype=np.float32)
    for part, key in zip(_parts(values), _parts(keys), strict=True):
        key[:] = rng.standard_exponential(key.size, dtype=np.float32)
        np.maximum(key, np.finfo(np.float32).tiny, out=key)  # a draw can be 0, and log(0) is infinite
        np.log(key, out=key)
        # Subtract the largest logit so that single precision is enough for the noise.
        np.subtract(logits_of(part) - largest, key, out=key, casting="same_kind")
    return top_k(keys, count)


def count_nan(values: NDArray[np.floating]) -> int:
    """Return how many values are NaN."""
    return sum(int(np.count_nonzero(np.isnan(part))) for part in _parts(values))


def _parts(values: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """Return an iterator over views of an array, each small enough for the processor's cache."""
    return (values[begin : begin + _CACHED] for begin in range(0, values.size, _CACHED))
