"""Zigzag: folding in which every second sweep goes down, so that no sweep begins with a jump.

With L layers, sweep l has the ranks l, l + L, l + 2 L and so on, in reverse if l is odd. L = 2 goes up and comes down.
L = 1 is sorting.
Source: ZIG of arXiv 2605.30334 (Dai et al., ACL 2026); microsoft/data-efficacy,
``data_ordering/common.py:zigzag_order``.
Cost: the cost of the score. ``by: loss`` costs one forward pass over the arranged samples.
"""

from __future__ import annotations

import numpy as np
from pydantic import Field

from dataflex import IndexArray, register
from dataflex.orders.base_curriculum import CurriculumOrder, CurriculumParams
from dataflex.orders.base_patterns import zigzagged


class ZigzagParams(CurriculumParams):
    """Parameters of the zigzag."""

    layers: int = Field(5, ge=1, description="Number of sweeps through the range of scores, up and down in turn.")


@register("order", "zigzag")
class ZigzagOrder(CurriculumOrder[ZigzagParams]):
    """Sweeps through the sorted samples several times, up and down in turn."""

    def moves_nothing(self, samples: int) -> str | None:
        """Return that each sweep has one sample, so that the order is the sorted one."""
        if self.params.layers < samples:
            return None
        return f"layers: {self.params.layers} of {samples} samples is the sorted order; lower layers"

    def pattern(self, size: int, rng: np.random.Generator) -> IndexArray:
        """Return the ranks of one sweep after another."""
        return zigzagged(size, self.params.layers)
