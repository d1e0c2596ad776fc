"""Weights from the data: each sample's loss times the value of a column of the raw rows.

    w_i = v_i                        or, with ``normalized: true``, v_i / mean of v over all training samples

A weight of 0 takes a sample out of the loss, 1 leaves it as it is. A packed sample has the mean of its rows' weights
over its tokens.
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
    normalized: bool = Field(False, description="Divide by the mean over all training samples, which makes it 1.")


@register("weighter", "score_column")
class ScoreColumnWeighter(Weighter[ScoreColumnWeighterParams]):
    """Weights samples by a column of the raw data."""

    elementwise = True

    def __init__(self, params: ScoreColumnWeighterParams) -> None:
        super().__init__(params)
        self._weights: Tensor | None = None
        """Of every sample of the pool, on the device of the losses."""

    def needs(self, run: RunView) -> Needs:
        """Return the column."""
        return Needs(columns=(self.params.column,))

    def column_problem(self, column: str, values: ColumnArray) -> Wrong | None:
        """Return the first row whose value is no weight: a finite number that is not negative."""
        wrong = unusable_score(column, values)
        if wrong is not None:
            return wrong
        weights = values.astype(np.float64)
        unusable = np.flatnonzero(~(weights >= 0))
        if unusable.size:
            value = weights[unusable[0]]
            found = "has no value" if np.isnan(value) else f"is {value:g}"
            return int(unusable[0]), f"{column!r} {found}; every row needs a weight of 0 or more"
        return None if weights.any() else (None, f"{column!r} is 0 in every row, so that nothing would be trained on")

    def weigh(self, batch: StepBatch) -> Tensor:
        """Return the weights of the samples."""
        if self._weights is None:
            assert batch.pool is not None  # a stream is refused
            weights = batch.pool.numbers(self.params.column)
            scale = weights.mean() if self.params.normalized else 1.0
            self._weights = batch.losses.new_tensor((weights / scale).tolist())
        assert batch.places is not None
        return self._weights[batch.places]
