"""Curriculum: samples sorted by a score, from easy to hard or the reverse.

The score is the loss under the current model, the token length, the selector's score, a column of the raw rows, or the
distance of embeddings. Equal scores are in a random order by default, so a constant score gives a shuffle. Samples
without a score come last: those without a trained token, and those taken without a choice.
Source: the classic curriculum (Bengio et al. 2009); the "sorting" pattern of arXiv 2605.30334.
Cost: ``by: loss`` costs one forward pass over the arranged samples. Other scores cost none, except embeddings.
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
        "random", description="Order of samples with equal scores: as they arrive, or random."
    )


@register("order", "sort")
class SortOrder(CurriculumOrder[SortParams]):
    """Sorts samples by a score."""

    def pattern(self, size: int, rng: np.random.Generator) -> IndexArray:
        """Return the ranks in ascending order."""
        return np.arange(size, dtype=np.int64)
