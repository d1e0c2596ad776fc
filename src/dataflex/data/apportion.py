"""Whole samples from shares, with what rounding leaves over carried from round to round.

Let S_k be the sum over the rounds so far of (share of domain k) x (samples of the round), and C_k the samples planned
of it. Each round gives every domain the whole samples it is owed, floor(S_k - C_k), and one more to as many domains as
samples are left. While the shares stay as they are, S_k - C_k is less than one for every domain after every round,
however short the rounds.

Which domains get the one more: those that are owed the largest fraction, as long as every domain can still get its
whole samples in time. Domain k has to have its next one before S_k reaches the next integer, so a set of unit jobs with
deadlines is to be done, of which each round does a given number. Giving every domain its exact share would do them all
in time; such problems have an integral solution wherever they have a fractional one, and a choice keeps the rest
solvable if, for every number of later rounds, the jobs due by then fit into them (Hall's condition; the choice by
deadlines alone is the quota method of Balinski and Young 1975, and Tijdeman's for the chairman assignment problem,
1980). That condition is checked for the next rounds (``later``); domains whose deadline lies beyond them come last, by
their deadlines, which is always safe.

Where the shares change from round to round nobody knows the deadlines. Then the largest fraction comes first, which
keeps the largest difference small; that no difference ever reaches one cannot be promised by any rule that does not
know the shares to come (by an adversary that always gives its shares to the domains not served yet).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

LATER_ROUNDS = 64
"""Rounds that are looked ahead."""

_EXACT = 1e-9
"""A number of samples this near to an integer is that integer."""
_RELATIVE = 2.0**-50


@dataclass(frozen=True)
class Apportioned:
    """How many samples of each domain a round has, all arrays of shape (K,)."""

    counts: IntArray
    """They add up to the round's samples."""
    shares: FloatArray
    """The shares in force, which sum to 1: the wanted ones, but for domains at their limits."""
    owed: FloatArray
    """Shares times samples minus counts, summed over the rounds so far, this one included."""
    cut: NDArray[np.bool_]
    """Domains that would have had more without their limit."""


def apportion(
    owed: FloatArray,
    wanted: FloatArray,
    total: int,
    later: IntArray,
    limits: IntArray | None = None,
) -> Apportioned:
    """Return the counts of a round.

    A domain that would exceed its limit gets the limit, and what it cannot take goes to the others in proportion to
    their shares, until nothing exceeds (water-filling). A share of 0 gets nothing. Time and memory are K x (1 + later).

    Args:
        owed: what earlier rounds left over, shape (K,); zeros at the beginning of a run.
        wanted: non-negative shares with a positive sum, any scale, shape (K,).
        total: what the counts add up to, >= 0.
        later: samples up to the end of each of the next rounds, counted from the end of this one, ascending, as far as
            the shares are expected to stay the same; empty: nothing is known of them.
        limits: the most each domain may get, >= 0, shape (K,); none: as many as its share gives.

    Raises:
        ValueError: if the domains of a positive share cannot take the total.
    """
    given = np.asarray(wanted, dtype=np.float64) / np.sum(wanted)
    counts, in_force = np.zeros(given.size, dtype=np.int64), given.copy()
    open_, cut, rest = given > 0, None, total
    limits = np.full(given.size, total) if limits is None else limits
    if int(limits[open_].sum()) < total:
        raise ValueError(f"{total} do not fit into {int(limits[open_].sum())}")
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
    """Return non-negative counts that add up to ``total``, each the floor or the ceiling of its target if possible.

    Args:
        targets: samples owed at the end of the round, at least -1, shape (K,).
        rates: samples of each domain for each further sample of the run, positive, shape (K,).
        total: what the counts add up to.
        later: as for :func:`apportion`.
    """
    nearest = np.rint(targets)
    targets = np.where(np.abs(targets - nearest) < _EXACT + total * _RELATIVE, nearest, targets)
    counts = np.maximum(np.floor(targets), 0.0)
    left = targets - counts  # below 0 for domains that are ahead
    extra = total - int(counts.sum())
    while extra < 0:  # more is due than the round has: some have to wait, those first that are owed least
        due = np.flatnonzero(counts > 0)
        waiting = due[np.argsort(left[due], kind="stable")[:-extra]]
        counts[waiting] -= 1
        left[waiting] += 1
        extra += waiting.size
    chosen = _chosen(left, rates, extra, later)
    counts[chosen] += 1
    left[chosen] -= 1
    while (extra := total - int(counts.sum())) > 0:  # fewer are owed anything than the round has room for
        counts[np.argsort(-left, kind="stable")[:extra]] += 1
        left = targets - counts
    return counts.astype(np.int64)


def _chosen(left: FloatArray, rates: FloatArray, extra: int, later: IntArray) -> NDArray[np.intp]:
    """Return which ``extra`` of the domains with something left over get one sample more; fewer where there are not."""
    eligible = np.flatnonzero(left > 0)
    if eligible.size <= extra:
        return eligible
    fractions = left[eligible]
    if not later.size:
        return eligible[np.argsort(-fractions, kind="stable")[:extra]]
    slack = _EXACT + later * _RELATIVE
    deadlines = (1 - fractions) / rates[eligible]  # further samples of the run
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
