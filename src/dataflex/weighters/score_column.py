"""Weights from the data: the loss of each sample is multiplied by the value of a column of the raw rows.

    w_i = v_i                        or, with ``normalized: true``, v_i / mean of v over all training samples

A weight of 0 removes a sample from the loss, 1 leaves its loss unchanged. A packed sample has the mean of its rows'
weights over its tokens.
Cost: none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from dataflex import ColumnArray, Needs, RunView, StepBatch, Weighter, WeighterParams, Wrong, register, unusable_score

if TYPE_CHECKING:
    from torch import Tensor


class ScoreColumnWeighterParams(WeighterParams):
    """Parameters of the weights from a column."""

    column: str = Field(min_length=1, description="Column of the raw data with a weight for each row, 0 or more.")
    normalized: bool = Field(
        False, description="Divide the weights by their mean over all training samples, so that their mean is 1."
    )


@register("weighter", "score_column")
class ScoreColumnWeighter(Weighter[ScoreColumnWeighterParams]):
    """Weights samples by a column of the raw data."""

    elementwise = True
    reads_losses = False

    def __init__(self, params: ScoreColumnWeighterParams) -> None:
        super().__init__(params)
        self._weights: Tensor | None = None
        """Weights of all samples of the pool, on the device of the losses, shape (N,)."""

    def needs(self, run: RunView) -> Needs:
        """Return the column."""
        return Needs(columns=(self.params.column,))

    def column_problem(self, column: str, values: ColumnArray) -> Wrong | None:
        """Return the first row whose value is not a weight, that is, a finite number of 0 or more; else None."""
        wrong = unusable_score(column, values)
        if wrong is not None:
            return wrong
        weights = values.astype(np.float64)
        unusable = np.flatnonzero(~(weights >= 0))
        if unusable.size:
            value = weights[unusable[0]]
            found = "has no value" if np.isnan(value) else f"is {value:g}"
            return int(unusable[0]), f"{column!r} {found}; every row needs a weight of 0 or more"
        return None if weights.any() else (None, f"{column!r} is 0 in every row, so no sample would be trained on")

    def weigh(self, batch: StepBatch) -> Tensor:
        """Return the weights of the samples of a step, shape (n,)."""
        if self._weights is None:
            assert batch.pool is not None  # streaming data is refused before the run
            weights = batch.pool.numbers(self.params.column)
            scale = weights.mean() if self.params.normalized else 1.0
            self._weights = batch.losses.new_tensor(weights / scale)
        assert batch.places is not None
        return self._weights[batch.places]
