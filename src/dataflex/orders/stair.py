"""Stairs: sorted samples in sections, with the samples around each border folded.

Of n samples in Z sections, the window around border z holds the ranks from round(n z / Z) - R to round(n z / Z) + R -
1. R is round(rho n), with halves rounded to even. Inside a window there are L sweeps in the same direction.
Source: STR of arXiv 2605.30334 (Dai et al., ACL 2026); microsoft/data-efficacy,
``data_ordering/common.py:cross_guidance_order``.
Cost: the cost of the score. ``by: loss`` costs one forward pass over the arranged samples.
"""

from __future__ import annotations

import numpy as np

from dataflex import IndexArray, register
from dataflex.orders.base_patterns import folded, with_transitions
from dataflex.orders.base_transitions import TransitionOrder, TransitionParams


@register("order", "stair")
class StairOrder(TransitionOrder[TransitionParams]):
    """Sorts, and folds the samples around the borders of sections."""

    def pattern(self, size: int, rng: np.random.Generator) -> IndexArray:
        """Return the sorted ranks, folded inside the windows."""
        params = self.params
        return with_transitions(size, params.sections, params.radius, params.layers, folded)
