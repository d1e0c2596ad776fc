"""Sorting the samples of a plan by a score; what orders that sort share."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dataflex import IndexArray, KeyedPermutation


def sorted_positions(scores: NDArray[np.floating], descending: bool, rng: np.random.Generator) -> IndexArray:
    """Return the positions of the scores from small to large, those without a score (NaN) last.

    Equal scores, and samples without one, are in a random order.

    Args:
        scores: shape (n,).
        descending: from large to small.
        rng: the source of the random order.
    """
    key = int.from_bytes(rng.bytes(16), "little")
    shuffled = KeyedPermutation(scores.size, key)(np.arange(scores.size, dtype=np.int64))
    ranked = -scores if descending else scores
    return shuffled[np.argsort(ranked[shuffled], kind="stable")]
