"""Curriculum by sorting samples by a score, easy to hard or the reverse.

The score is the loss under the current model (a forward pass over the plan), the token length, what the selector
scored, or a column of the raw rows. Ties keep a random order, so a constant score is a shuffle. Samples without a score
(no token to train on, or taken without a choice) come last.
Source: the classic curriculum (Bengio et al. 2009); the "sorting" pattern of arXiv 2605.30334.
Cost: ``loss``: one forward pass over the samples that are put in order; otherwise none.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from dataflex import IndexArray, register
from dataflex.orders.base_curriculum import CurriculumOrder, CurriculumParams


class SortParams(CurriculumParams):
    """Parameters of the sorted order."""

    ties: Literal["input", "random"] = Field(
        "random", description="Samples of equal score: in the order they come in, or in a random one."
    )


@register("order", "sort")
class SortOrder(CurriculumOrder[SortParams]):
    """Sorts the plan by a score."""

    def pattern(self, size: int, rng: np.random.Generator) -> IndexArray:
        """Return the ranks as they are."""
        return np.arange(size, dtype=np.int64)
