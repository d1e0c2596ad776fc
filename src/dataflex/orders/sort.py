"""Curriculum by sorting each round's samples by a score, easy to hard or the reverse.

The score is the loss under the current model (a forward pass over the plan), the token length, or what the selector
scored. Ties keep a random order, so a constant score is a shuffle. Samples without a score (no token to train on, or
taken without a choice) come last.
Source: the classic curriculum (Bengio et al. 2009); the "sorting" pattern of arXiv 2605.30334.
Cost: ``loss``: one forward pass over the plan per update; otherwise none.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from dataflex import (
    ComponentError,
    ComponentParams,
    IndexArray,
    Losses,
    Needs,
    Order,
    RoundContext,
    RunView,
    ScoreArray,
    Selection,
    check_scores,
    register,
)
from dataflex.orders.base_sorting import sorted_positions


class SortParams(ComponentParams):
    """Parameters of the sorted order."""

    by: Literal["loss", "length", "selection"] = Field("loss", description="The score that is sorted by.")
    descending: bool = Field(False, description="Largest score first.")


@register("order", "sort")
class SortOrder(Order[SortParams]):
    """Sorts the plan by a score."""

    @property
    def reads_scores(self) -> bool:
        """Whether it sorts by what the selector scored."""
        return self.params.by == "selection"

    def needs(self, run: RunView) -> Needs:
        """Return the losses of the plan's samples, if it is sorted by them."""
        return Needs(measurements=(Losses(),) if self.params.by == "loss" else ())

    def arrange(self, ctx: RoundContext, selection: Selection) -> IndexArray:
        """Return the sorting permutation."""
        scores = check_scores(self, self._scores(ctx, selection), selection.indices)
        return sorted_positions(scores, self.params.descending, ctx.rng)

    def _scores(self, ctx: RoundContext, selection: Selection) -> ScoreArray:
        if self.params.by == "length":
            return ctx.pool.lengths[selection.indices].astype(np.float32)
        if self.params.by == "loss":
            distinct, inverse = np.unique(selection.indices, return_inverse=True)
            return ctx.probe.measure(Losses(), distinct)[inverse]
        if selection.scores is None:
            raise ComponentError("order.by: selection needs a selector that scores; this one gave no scores.")
        return selection.scores
