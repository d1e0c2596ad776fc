"""Curriculum by a score in the data: the samples of each round are sorted by a column of the raw rows.

Equal scores are in a random order. Samples without a score come last. The order is ``sort`` with a score that needs no
measurement. Cost: none.
"""

from __future__ import annotations

from pydantic import Field

from dataflex import (
    ColumnArray,
    ComponentParams,
    IndexArray,
    Needs,
    Order,
    RoundContext,
    RunView,
    Selection,
    Wrong,
    register,
    unusable_score,
)
from dataflex.orders.base_sorting import sorted_positions


class ScoreColumnOrderParams(ComponentParams):
    """Parameters of the order by a column."""

    column: str = Field(min_length=1, description="Column of the raw data that holds a number for each row.")
    descending: bool = Field(False, description="Largest score first.")


@register("order", "score_column")
class ScoreColumnOrder(Order[ScoreColumnOrderParams]):
    """Sorts the samples of each round by a column of the raw data."""

    def needs(self, run: RunView) -> Needs:
        """Ask for the column."""
        return Needs(columns=(self.params.column,))

    def column_problem(self, column: str, values: ColumnArray) -> Wrong | None:
        """Return why the values of the column cannot be scores, or None."""
        return unusable_score(column, values)

    def arrange(self, ctx: RoundContext, selection: Selection) -> IndexArray:
        """Return the sorting permutation."""
        scores = ctx.pool.numbers(self.params.column)[selection.indices]
        return sorted_positions(scores, self.params.descending, ctx.rng)
