"""Patterns over sorted samples: the rank at each place. Ranks are 0 to n - 1, in the direction of the sort.

Source: arXiv 2605.30334 (Dai et al., ACL 2026) and microsoft/data-efficacy, ``data_ordering/common.py``; folding is
from arXiv 2506.21545.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dataflex import IndexArray


def folded(size: int, layers: int) -> IndexArray:
    """Return every ``layers``-th rank from 0 on, then from 1 on, and so on: as many sweeps as layers, shape (size,)."""
    return np.concatenate([np.arange(layer, size, layers, dtype=np.int64) for layer in range(min(layers, size) or 1)])


def zigzagged(size: int, layers: int) -> IndexArray:
    """Return what :func:`folded` does with every second sweep downwards, so that no sweep begins with a jump."""
    sweeps = [np.arange(layer, size, layers, dtype=np.int64) for layer in range(min(layers, size) or 1)]
    return np.concatenate([sweep[::-1] if layer % 2 else sweep for layer, sweep in enumerate(sweeps)])


def window_radius(size: int, radius: float) -> int:
    """Return half the width of a transition window in samples: the share of the samples, halves to the even number."""
    return round(size * radius)


def with_transitions(
    size: int, sections: int, radius: float, layers: int, pattern: Callable[[int, int], IndexArray]
) -> IndexArray:
    """Return the ranks from 0 on, with a pattern inside windows around the borders of equal sections, shape (size,).

    A window begins where the one before it ends at the earliest, as in the official code.

    Args:
        size: number of samples.
        sections: equal parts of the sorted samples; a window is around each border between two.
        radius: half the width of a window, as a share of the samples.
        layers: of the pattern.
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
    """Return how many samples the first and the last part have.

    Percentages above 100 together are scaled down to the whole, the last part taking what is left, as in the official
    code.

    Args:
        size: number of samples.
        front: per cent of them in the first part.
        back: per cent of them in the last part.
    """
    first, last = (int(size * share // 100) for share in (front, back))
    if first + last <= size:
        return first, last
    first = int(first * (size / (first + last)))
    return first, size - first


def segmented(
    sizes: tuple[int, int, int], from_high: tuple[bool, bool], shuffle: Callable[[IndexArray], IndexArray]
) -> IndexArray:
    """Return ranks in three parts, each shuffled: the first and the last from the ends of the sorted samples.

    Args:
        sizes: samples of the three parts.
        from_high: whether the first, and the last part, is from the high end; if both are from one end, they share
            its ranks at random.
        shuffle: returns a part in random order; called for the first, the middle and the last part in this order, and
            before them for what two parts share.
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
    """Return the ranks with each of the consecutive windows shuffled by itself (JIT); 0 or 1: as they are.

    Args:
        ranks: in order, shape (n,).
        window: samples in each window; the last one may have fewer.
        rng: draws for one window after another.
    """
    found = ranks.copy()
    if window > 1:
        for begin in range(0, found.size, window):
            rng.shuffle(found[begin : begin + window])
    return found
