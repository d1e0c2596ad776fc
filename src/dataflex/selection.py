"""From scores to a selection: the rules that selectors share. Pure functions on numpy arrays."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dataflex.data.sampling import IndexArray

ScoreArray = NDArray[np.float32]


def top_k(scores: NDArray[np.floating], count: int) -> IndexArray:
    """Return the positions of the ``count`` largest scores, ascending; ties go to the lower position. O(N)."""
    if count >= scores.size:
        return np.arange(scores.size, dtype=np.int64)
    if count == 0:
        return np.empty(0, dtype=np.int64)
    threshold = np.partition(scores, scores.size - count)[scores.size - count]
    above = np.flatnonzero(scores > threshold)
    ties = np.flatnonzero(scores == threshold)[: count - above.size]
    return np.sort(np.concatenate([above, ties])).astype(np.int64)


def sample_without_replacement(
    weights: NDArray[np.floating], count: int, rng: np.random.Generator, temperature: float = 1.0
) -> IndexArray:
    """Draw ``count`` positions one by one, in proportion to ``weights ** (1 / temperature)`` of those left. O(N).

    Args:
        weights: non-negative, shape (N,), any scale; positions of weight zero are never drawn.
        count: at most the number of positive weights.
        rng: the source of the draw.
        temperature: larger is flatter, > 0.

    Returns:
        Distinct positions, ascending, shape (count,).

    Raises:
        ValueError: if fewer than ``count`` weights are positive.
    """
    positive = int(np.count_nonzero(weights > 0))
    if count == 0:
        return np.empty(0, dtype=np.int64)
    if positive < count:
        raise ValueError(f"cannot draw {count} samples without replacement from {positive} of positive weight")
    with np.errstate(divide="ignore"):
        return sample_softmax(np.log(weights) / temperature, count, rng)


def sample_softmax(logits: NDArray[np.floating], count: int, rng: np.random.Generator) -> IndexArray:
    """Draw ``count`` positions one after another in proportion to ``exp(logits)`` of those that are left. O(N).

    Gumbel top-k: the positions of the ``count`` largest ``logit - log E`` with exponential E (Vieira 2014; Kool et al.
    2019).

    Returns:
        Distinct positions, ascending, shape (count,).
    """
    keys = rng.standard_exponential(logits.size, dtype=np.float32)
    np.maximum(keys, np.finfo(np.float32).tiny, out=keys)
    np.log(keys, out=keys)
    # Relative to the largest, so that single precision is enough for the noise.
    np.subtract(logits - logits.max(), keys, out=keys, casting="same_kind")
    return top_k(keys, count)
