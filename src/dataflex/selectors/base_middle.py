"""Scores that prefer the middle of a quantity."""

from __future__ import annotations

import numpy as np

from dataflex import ScoreArray


def nearness_to_middle(values: ScoreArray) -> ScoreArray:
    """Return a score for each value such that the best k scores are the middle k ranks.

    Equal values rank by position. A value of NaN has the score NaN.
    """
    scores = np.full(values.size, np.nan, dtype=np.float32)
    scored = np.flatnonzero(~np.isnan(values))
    ranks = np.empty(scored.size, dtype=np.float64)
    ranks[np.argsort(values[scored], kind="stable")] = np.arange(scored.size)
    scores[scored] = -2 * np.abs(ranks - (scored.size - 1) / 2 + 0.25) / max(scored.size, 1)
    return scores
