"""Patterns over sorted samples: the rank at each position. Ranks are 0 to n - 1, in the direction of the sort.

Source: arXiv 2605.30334 (Dai et al., ACL 2026) and microsoft/data-efficacy, ``data_ordering/common.py``. Folding is
from arXiv 2506.21545.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dataflex import IndexArray


def folded(size: int, layers: int) -> IndexArray:
    """Return every ``layers``-th rank from 0 on, then from 1 on, and so on, shape (size,).

    The result has ``layers`` sweeps over the range of ranks, or ``size`` if that is less.
    """
    return np.concatenate([np.arange(layer, size, layers, dtype=np.int64) for layer in range(min(layers, size) or 1)])


def zigzagged(size: int, layers: int) -> IndexArray:
    """Return the ranks of :func:`folded` with every second sweep reversed, so that no sweep begins with a jump."""
    sweeps = [np.arange(layer, size, layers, dtype=np.int64) for layer in range(min(layers, size) or 1)]
    return np.concatenate([sweep[::-1] if layer % 2 else sweep for layer, sweep in enumerate(sweeps)])


def window_radius(size: int, radius: float) -> int:
    """Return half the width of a transition window in samples: ``size`` * ``radius``, with halves rounded to even."""
    return round(size * radius)


def with_transitions(
    size: int, sections: int, radius: float, layers: int, pattern: Callable[[int, int], IndexArray]
) -> IndexArray:
    """Return the ranks from 0 on, with a pattern in the windows around the borders of equal sections, shape (size,).

    If windows overlap, the later window begins at the end of the earlier one, as in the official code.

    Args:
        size: number of samples.
        sections: number of equal parts of the sorted samples. There is a window around each border between two parts.
        radius: half the width of a window, as a share of the samples.
        layers: number of sweeps of the pattern.
        pattern: :func:`folded` or :func:`zigzagged`.
    """
    half, end = window_radius(size, radius), 0
    ranks = np.arange(size, dtype=np.int64)
    for section in range(1, sections):
        border = round(size * section / sections)
        begin, end = max(end, border - half), min(size, border + half)
        if begin < end:
            ranks[begin:end] = begin + pattern(end - begin, layers)
    return ranks


def segment_sizes(size: int, front: float, back: float) -> tuple[int, int]:
    """Return the numbers of samples of the first and the last part.

    If the percentages add up to more than 100, both parts are scaled down to the whole. The last part then gets all
    samples that the first part leaves, as in the official code.

    Args:
        size: number of samples.
        front: percentage of the samples in the first part.
        back: percentage of the samples in the last part.
    """
    first, last = (int(size * share // 100) for share in (front, back))
    if first + last <= size:
        return first, last
    first = int(first * (size / (first + last)))
    return first, size - first


def segmented(
    sizes: tuple[int, int, int], from_high: tuple[bool, bool], shuffle: Callable[[IndexArray], IndexArray]
) -> IndexArray:
    """Return the ranks in three shuffled parts. The first and the last part are from the ends of the sorted samples.

    Args:
        sizes: samples of the three parts.
        from_high: whether the first and the last part are from the high end. If both are from the same end, its ranks
            are divided between them at random.
        shuffle: returns a part in random order. It is called for the first, the middle and the last part in this order.
            If two parts share an end, it is called for the ranks of that end before.
    """
    first, middle, last = sizes
    ranks = np.arange(first + middle + last, dtype=np.int64)
    ends = first + last
    if from_high[0] == from_high[1]:
        chosen, between = (ranks[middle:], ranks[:middle]) if from_high[0] else (ranks[:ends], ranks[ends:])
        chosen = shuffle(chosen)
        parts = chosen[:first], between, chosen[first:]
    elif from_high[0]:
        parts = ranks[last + middle :], ranks[last : last + middle], ranks[:last]
    else:
        parts = ranks[:first], ranks[first : first + middle], ranks[first + middle :]
    return np.concatenate([shuffle(part) for part in parts])


def shuffled_in_windows(ranks: IndexArray, window: int, rng: np.random.Generator) -> IndexArray:
    """Return the ranks with each of the consecutive windows shuffled separately (JIT).

    Args:
        ranks: in order, shape (n,).
        window: samples in each window. The last window may have fewer. 0 or 1 leaves the ranks unchanged.
        rng: draws for one window after another.
    """
    found = ranks.copy()
    if window > 1:
        for begin in range(0, found.size, window):
            rng.shuffle(found[begin : begin + window])
    return found
