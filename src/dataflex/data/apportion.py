"""Integer sample counts from domain shares, with rounding errors carried from round to round.

Let S_k be the sum over all rounds so far of (share of domain k) x (samples of the round). Let C_k be the number of
samples of domain k that are planned so far. Each round gives every domain its owed whole samples, floor(S_k - C_k). The
remaining samples of the round go to different domains, one each. While the shares stay the same, S_k - C_k is less than
one for every domain after every round, however short the rounds are.

The remaining samples go to the domains with the largest owed fractions, as long as every domain can still receive its
whole samples in time. Domain k must receive its next sample before S_k reaches the next integer. The problem is
therefore a set of unit jobs with deadlines, of which each round executes a given number. Exact fractional shares would
finish all jobs in time, and such problems have an integral solution if they have a fractional one. A choice keeps the
rest solvable if, for every number of later rounds, the jobs due by then fit into these rounds (Hall's condition). The
choice by deadlines alone is the quota method of Balinski and Young 1975, and Tijdeman's for the chairman assignment
problem, 1980. Hall's condition is checked for the next rounds (``later``). Domains with a later deadline come last, in
the order of their deadlines, which is always safe.

If the shares change from round to round, the deadlines are unknown. The largest fraction then comes first, which keeps
the largest difference small. No rule that does not know the future shares can keep every difference below one: an
adversary can always give its shares to the domains that have not been served yet.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

LATER_ROUNDS = 64
"""Number of rounds to look ahead."""

_EXACT = 1e-9
"""A number of samples within this distance of an integer counts as the integer."""
_RELATIVE = 2.0**-50


@dataclass(frozen=True)
class Apportioned:
    """The number of samples of each domain in a round. All arrays have shape (K,)."""

    counts: IntArray
    """Samples of each domain. The sum is the number of samples of the round."""
    shares: FloatArray
    """The shares in force, with sum 1. They equal the wanted shares except for domains at their limits."""
    owed: FloatArray
    """Shares times samples minus counts, summed over all rounds up to and including this round."""
    cut: NDArray[np.bool_]
    """Domains whose count is reduced by their limit."""


def apportion(
    owed: FloatArray,
    wanted: FloatArray,
    total: int,
    later: IntArray,
    limits: IntArray | None = None,
) -> Apportioned:
    """Return the counts of a round.

    A domain that would exceed its limit gets the limit. Its remaining samples go to the other domains in proportion to
    their shares, until no domain exceeds its limit (water-filling). A share of 0 gets no samples. Time and memory are K
    x (1 + later).

    Args:
        owed: rounding errors of earlier rounds, shape (K,); zeros at the beginning of a run.
        wanted: non-negative shares with a positive sum, any scale, shape (K,).
        total: the sum of the counts, >= 0.
        later: number of samples from the end of this round to the end of each of the next rounds, ascending, for the
            rounds in which the shares are expected to stay the same. Empty means that no later round is known.
        limits: maximum count of each domain, >= 0, shape (K,). None means no limit.

    Raises:
        ValueError: if the limits of the domains with a positive share add up to less than ``total``.
    """
    given = np.asarray(wanted, dtype=np.float64) / np.sum(wanted)
    counts, in_force = np.zeros(given.size, dtype=np.int64), given.copy()
    open_, cut, rest = given > 0, None, total
    limits = np.full(given.size, total) if limits is None else limits
    if int(limits[open_].sum()) < total:
        raise ValueError(f"{total} samples do not fit into the limits of {int(limits[open_].sum())}")
    while open_.any():
        in_force[open_] = given[open_] / given[open_].sum() * (rest / total if total else 1.0)
        counts[open_] = _rounded(owed[open_] + in_force[open_] * total, in_force[open_], rest, later)
        full = open_ & (counts > limits)
        cut = full if cut is None else cut
        if not full.any():
            break
        counts[full] = limits[full]
        in_force[full] = counts[full] / total
        rest -= int(limits[full].sum())
        open_ &= ~full
    assert cut is not None
    return Apportioned(counts, in_force, owed + in_force * total - counts, cut)


def _rounded(targets: FloatArray, rates: FloatArray, total: int, later: IntArray) -> IntArray:
    """Return non-negative counts with sum ``total``, each the floor or the ceiling of its target if possible.

    Args:
        targets: samples owed at the end of the round, at least -1, shape (K,).
        rates: samples of each domain for each further sample of the run, positive, shape (K,).
        total: the sum of the counts.
        later: as for :func:`apportion`.
    """
    nearest = np.rint(targets)
    targets = np.where(np.abs(targets - nearest) < _EXACT + total * _RELATIVE, nearest, targets)
    counts = np.maximum(np.floor(targets), 0.0)
    left = targets - counts  # below 0 for domains that have received too many samples
    extra = total - int(counts.sum())
    while extra < 0:  # more is due than the round has, so the domains with the least owed wait
        due = np.flatnonzero(counts > 0)
        waiting = due[np.argsort(left[due], kind="stable")[:-extra]]
        counts[waiting] -= 1
        left[waiting] += 1
        extra += waiting.size
    chosen = _chosen(left, rates, extra, later)
    counts[chosen] += 1
    left[chosen] -= 1
    while (extra := total - int(counts.sum())) > 0:  # fewer samples are owed than the round has
        counts[np.argsort(-left, kind="stable")[:extra]] += 1
        left = targets - counts
    return counts.astype(np.int64)


def _chosen(left: FloatArray, rates: FloatArray, extra: int, later: IntArray) -> NDArray[np.intp]:
    """Return the ``extra`` domains that get one sample more; fewer if fewer domains have an owed fraction."""
    eligible = np.flatnonzero(left > 0)
    if eligible.size <= extra:
        return eligible
    fractions = left[eligible]
    if not later.size:
        return eligible[np.argsort(-fractions, kind="stable")[:extra]]
    slack = _EXACT + later * _RELATIVE
    deadlines = (1 - fractions) / rates[eligible]  # in further samples of the run
    due = np.maximum(np.floor(left + np.multiply.outer(later, rates) + slack[:, None]), 0).sum(axis=1)
    needed = np.maximum(due - later, 0).astype(np.int64)
    largest_first = np.argsort(-fractions, kind="stable")
    taken = np.zeros(eligible.size, dtype=bool)
    for end, need in zip((later + slack)[needed > 0], needed[needed > 0], strict=True):
        in_time = deadlines <= end
        missing = min(int(need) - int((taken & in_time).sum()), extra - int(taken.sum()))
        if missing > 0:
            candidates = largest_first[(in_time & ~taken)[largest_first]]
            taken[candidates[:missing]] = True
    beyond = np.where(deadlines <= later[-1] + slack[-1], 0.0, deadlines)
    others = np.lexsort((-fractions, beyond))
    others = others[~taken[others]]
    taken[others[: extra - int(taken.sum())]] = True
    return eligible[taken]
