"""Saw: sorted samples in sections, with upward and downward sweeps through the samples around each border.

The windows are the same as in ``stair``. Inside a window every second of the L sweeps goes down.
Source: SAW of arXiv 2605.30334 (Dai et al., ACL 2026); microsoft/data-efficacy,
``data_ordering/common.py:cross_guidance_order``.
Cost: the cost of the score. ``by: loss`` costs one forward pass over the arranged samples.
"""

from __future__ import annotations

import numpy as np
from pydantic import Field

from dataflex import IndexArray, register
from dataflex.orders.base_patterns import with_transitions, zigzagged
from dataflex.orders.base_transitions import TransitionOrder, TransitionParams


class SawParams(TransitionParams):
    """Parameters of the saw, with the official defaults."""

    sections: int = Field(3, ge=2, description="Equal parts of the sorted samples, with a window around each border.")
    radius: float = Field(0.075, gt=0, le=0.5, description="Half the width of a window, as a share of the samples.")
    layers: int = Field(2, ge=1, description="Number of sweeps through the samples of a window, up and down in turn.")


@register("order", "saw")
class SawOrder(TransitionOrder[SawParams]):
    """Sorts, and sweeps up and down through the samples around the borders of sections."""

    def pattern(self, size: int, rng: np.random.Generator) -> IndexArray:
        """Return the sorted ranks, with a zigzag inside the windows."""
        params = self.params
        return with_transitions(size, params.sections, params.radius, params.layers, zigzagged)
