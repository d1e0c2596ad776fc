"""Folding: the sorted samples are gone through in several sweeps, each over the whole range of scores.

With L layers sweep l takes the ranks l, l + L, l + 2 L and so on; each sweep goes from one end to the other, so that
easy samples come back after hard ones. L = 1 is sorting.
Source: FO of arXiv 2605.30334 (Dai et al., ACL 2026), folding of arXiv 2506.21545; microsoft/data-efficacy,
``data_ordering/common.py:folding_order``.
Cost: that of the score; ``loss``: one forward pass over the samples that are put in order.
"""

from __future__ import annotations

import numpy as np
from pydantic import Field

from dataflex import IndexArray, register
from dataflex.orders.base_curriculum import CurriculumOrder, CurriculumParams
from dataflex.orders.base_patterns import folded


class FoldParams(CurriculumParams):
    """Parameters of folding."""

    layers: int = Field(5, ge=1, description="Sweeps through the range of scores.")


@register("order", "fold")
class FoldOrder(CurriculumOrder[FoldParams]):
    """Sweeps through the sorted samples several times, always in one direction."""

    def moves_nothing(self, samples: int) -> str | None:
        """Return that each sweep is one sample."""
        if self.params.layers < samples:
            return None
        return f"layers: {self.params.layers} of {samples} samples is the sorted order; lower layers"

    def pattern(self, size: int, rng: np.random.Generator) -> IndexArray:
        """Return the sweeps one after another."""
        return folded(size, self.params.layers)
