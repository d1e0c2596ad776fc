"""Selection by a score from the data: the samples with the highest or lowest values in a column of the raw rows.

Any score that another tool has written into the data is possible: from a quality classifier, a reward model, a
perplexity. Samples without a score are not chosen. The scores are the same at every decision, so ``top_k`` chooses the
same samples again. ``rule: sample`` draws other samples each time, and ``keep`` in a list of selectors makes this
selector a filter.
Cost: none.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from dataflex import (
    ColumnArray,
    IndexArray,
    Needs,
    RoundContext,
    RunView,
    ScoreArray,
    Selector,
    SelectorParams,
    Wrong,
    register,
    unusable_score,
)


class ScoreColumnParams(SelectorParams):
    """Parameters of the selection by a column."""

    column: str = Field(min_length=1, description="Column of the raw data with a number for each row.")
    direction: Literal["high", "low"] = Field("high", description="Prefer large values or small ones.")


@register("selector", "score_column")
class ScoreColumnSelector(Selector[ScoreColumnParams]):
    """Prefers samples with large, or small, values of a column."""

    partial_scores: ClassVar[str | None] = "the scores are in the data and cost nothing; remove it"
    without_score: ClassVar[str | None] = "the others have no number in the column; check the data"

    def needs(self, run: RunView) -> Needs:
        """Return the column."""
        return Needs(columns=(self.params.column,))

    def column_problem(self, column: str, values: ColumnArray) -> Wrong | None:
        """Return the reason why the values of the column cannot be scores, or None."""
        return unusable_score(column, values)

    def score(self, ctx: RoundContext, candidates: IndexArray) -> ScoreArray:
        """Return the value of every candidate, negative with ``direction: low``; NaN without a value."""
        values = ctx.pool.numbers(self.params.column)[candidates].astype("float32")
        return values if self.params.direction == "high" else -values
