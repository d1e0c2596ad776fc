"""Sorting the samples of a plan by a score, shared by the orders that sort."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dataflex import IndexArray, KeyedPermutation


def sorted_positions(scores: NDArray[np.floating], descending: bool, rng: np.random.Generator) -> IndexArray:
    """Return the positions of the scores in sorted order, shape (n,). Samples without a score (NaN) come last.

    Equal scores, and samples without a score, are in a random order.

    Args:
        scores: shape (n,).
        descending: whether to sort from large to small.
        rng: the source of the random order.
    """
    key = int.from_bytes(rng.bytes(16), "little")
    shuffled = KeyedPermutation(scores.size, key)(np.arange(scores.size, dtype=np.int64))
    # A stable sort of shuffled scores orders ties at random. NaN is sorted last, also after the change of sign.
    ranked = -scores if descending else scores
    return shuffled[np.argsort(ranked[shuffled], kind="stable")]
