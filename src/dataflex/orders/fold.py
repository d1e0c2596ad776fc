"""Folding: several sweeps through the sorted samples, each over the whole range of scores.

With L layers, sweep l has the ranks l, l + L, l + 2 L and so on. Each sweep goes from one end to the other, so easy
samples come back after hard ones. L = 1 is sorting.
Source: FO of arXiv 2605.30334 (Dai et al., ACL 2026), folding of arXiv 2506.21545; microsoft/data-efficacy,
``data_ordering/common.py:folding_order``.
Cost: the cost of the score. ``by: loss`` costs one forward pass over the arranged samples.
"""

from __future__ import annotations

import numpy as np
from pydantic import Field

from dataflex import IndexArray, register
from dataflex.orders.base_curriculum import CurriculumOrder, CurriculumParams
from dataflex.orders.base_patterns import folded


class FoldParams(CurriculumParams):
    """Parameters of folding."""

    layers: int = Field(5, ge=1, description="Number of sweeps through the range of scores.")


@register("order", "fold")
class FoldOrder(CurriculumOrder[FoldParams]):
    """Sweeps through the sorted samples several times, always in the same direction."""

    def moves_nothing(self, samples: int) -> str | None:
        """Return that each sweep has one sample, so that the order is the sorted one."""
        if self.params.layers < samples:
            return None
        return f"layers: {self.params.layers} of {samples} samples is the sorted order; lower layers"

    def pattern(self, size: int, rng: np.random.Generator) -> IndexArray:
        """Return the ranks of one sweep after another."""
        return folded(size, self.params.layers)
