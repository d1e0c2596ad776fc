"""Segments: three shuffled parts, of which the first and the last are from the ends of the score range.

Of n samples the first int(n x / 100) are from the low or the high end, and so are the last int(n y / 100). The rest is
between them. If both parts are from the same end, its samples are divided between them at random.
Source: SEG of arXiv 2605.30334 (Dai et al., ACL 2026); microsoft/data-efficacy, ``data_ordering/segment.py``.
Cost: the cost of the score. ``by: loss`` costs one forward pass over the arranged samples.
"""

from __future__ import annotations

from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator

from dataflex import IndexArray, register
from dataflex.orders.base_curriculum import ScoredOrder, ScoreParams
from dataflex.orders.base_patterns import segment_sizes, segmented


class SegmentParams(ScoreParams):
    """Parameters of segments."""

    jit: int = Field(
        0,
        ge=0,
        description="Size in samples of the windows that are shuffled after the pattern. The official code has no such "
        "windows for segments. 0 or 1: no shuffle.",
    )
    front: float = Field(10.0, ge=0, le=100, description="Percentage of the samples in the first part.")
    back: float = Field(10.0, ge=0, le=100, description="Percentage of the samples in the last part.")
    front_from: Literal["low", "high"] = Field("low", description="End of the score range that the first part is from.")
    back_from: Literal["low", "high"] = Field("high", description="End of the score range that the last part is from.")
    overlap: Literal["refuse", "rescale"] = Field(
        "refuse",
        description="If both parts exceed 100 per cent together: raise an error, or scale both down to the whole.",
    )

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        """Refuse parts that are empty or, unless they may be rescaled, exceed the whole."""
        total = self.front + self.back
        if total == 0:
            raise ValueError("front and back are both 0, which is a shuffle; set one of them, or use method: shuffle")
        if total > 100 and self.overlap == "refuse":
            raise ValueError(
                f"front and back are {self.front:g} and {self.back:g} per cent, {total:g} together; use at most 100, "
                "or overlap: rescale, as the official code does"
            )
        return self


@register("order", "segment")
class SegmentOrder(ScoredOrder[SegmentParams]):
    """Starts and ends with samples from the ends of the scores, with all others between."""

    def moves_nothing(self, samples: int) -> str | None:
        """Return that the first and the last part have no sample."""
        if any(segment_sizes(samples, self.params.front, self.params.back)):
            return None
        return (
            f"front: {self.params.front:g} and back: {self.params.back:g} per cent of {samples} samples are none, so "
            "the order is a shuffle; raise them, or arrange more samples at a time"
        )

    def pattern(self, size: int, rng: np.random.Generator) -> IndexArray:
        """Return the ranks of the three parts one after another."""
        first, last = segment_sizes(size, self.params.front, self.params.back)
        high = self.params.front_from == "high", self.params.back_from == "high"
        return segmented((first, size - first - last, last), high, rng.permutation)
