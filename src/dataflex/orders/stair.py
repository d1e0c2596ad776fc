"""Stairs: sorted samples in sections, with the samples around the border of two sections folded.

Of n samples the window around border z of Z sections holds the ranks from round(n z / Z) - R to round(n z / Z) + R,
without the last, with R = round(rho n), halves to the even number; inside, they are swept L times in one direction.
Source: STR of arXiv 2605.30334 (Dai et al., ACL 2026); microsoft/data-efficacy,
``data_ordering/common.py:cross_guidance_order``.
Cost: that of the score; ``loss``: one forward pass over the samples that are put in order.
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
