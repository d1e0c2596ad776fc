"""External margins: pairs by reward margins in the data, alone or combined with the implicit margin.

A source of margins is a column of margins, a pair of columns with the rewards of the chosen and of the rejected
response, or the implicit margin of the model in training (:mod:`~dataflex.selectors.dpo_gap`). With one source a pair
is scored by its margin m. With several sources each margin becomes a probability that the chosen response is better,
and the probabilities are combined as if the sources were independent:

    P_s = (clip(m_s, lo_s, hi_s) - lo_s) / (hi_s - lo_s)
    P   = prod_s P_s / (prod_s P_s + prod_s (1 - P_s))          1/2 for 0 / 0, if two sources are certain and disagree

Source: Deng et al., Less is More: Improving LLM Alignment via Preference Data Selection (NeurIPS 2025, arXiv
2502.14560), who keep the pairs with the largest P.
Cost: none; with ``implicit`` that of ``dpo_gap``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator, model_validator

from dataflex import (
    ColumnArray,
    IndexArray,
    Margins,
    Needs,
    RoundContext,
    RunView,
    ScoreArray,
    Selector,
    SelectorParams,
    Wrong,
    register,
)
from dataflex.selectors.base_margins import Preference, preferred, reference_problem, stage_problem, without_number

Doubles = NDArray[np.float64]


class ExternalMarginParams(SelectorParams):
    """Parameters of the selection by margins in the data."""

    margin: list[str] = Field(
        [], description="Columns of the raw data with the reward margin of each pair; each column is a source."
    )
    chosen: list[str] = Field([], description="Columns with the reward of the chosen response; one for each source.")
    rejected: list[str] = Field(
        [], description="Columns with the reward of the rejected response, in the order of chosen."
    )
    implicit: bool = Field(False, description="Whether the implicit margin of the model in training is a source, too.")
    bounds: list[tuple[float, float]] | None = Field(
        None,
        description="[lo, hi] of each source: margin columns, then pairs of reward columns, then the implicit margin. "
        "Needed for several sources.",
    )
    prefer: Preference = Field(
        "large",
        description="Margins that are preferred. small: the smallest signed margins; small_absolute: those nearest to "
        "0 (P nearest to 1/2); middle: the middle ranks; large: the largest.",
    )

    @field_validator("margin", "chosen", "rejected", mode="before", json_schema_input_type=str | list[str])
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @property
    def sources(self) -> int:
        """Number of sources of margins."""
        return len(self.margin) + len(self.chosen) + self.implicit

    @model_validator(mode="after")
    def _sources_fit(self) -> Self:
        if len(self.chosen) != len(self.rejected):
            raise ValueError(
                f"chosen names {len(self.chosen)} columns and rejected {len(self.rejected)}; a margin is a reward of "
                "the chosen minus a reward of the rejected response, so name as many of each"
            )
        if not self.margin and not self.chosen:
            more = "; for the implicit margin alone use the method dpo_gap" if self.implicit else ""
            raise ValueError(f"needs margin (a column of margins), or chosen and rejected (columns of rewards){more}")
        if self.max_overhead is not None and not self.implicit:
            raise ValueError("max_overhead: the margins are in the data and cost nothing; remove it")
        return self

    @model_validator(mode="after")
    def _bounds_fit(self) -> Self:
        if self.sources == 1:
            if self.bounds is not None:
                raise ValueError("bounds: not used with a single source, whose margins are compared directly; remove")
            return self
        if self.bounds is None or len(self.bounds) != self.sources:
            given = "none" if self.bounds is None else str(len(self.bounds))
            raise ValueError(f"bounds: {self.sources} sources need one [lo, hi] each, got {given}")
        for low, high in self.bounds:
            if not low < high:
                raise ValueError(f"bounds: lo must be below hi, got [{low:g}, {high:g}]")
        return self


@register("selector", "external_margin")
class ExternalMarginSelector(Selector[ExternalMarginParams]):
    """Prefers pairs with large, middle or small reward margins, from columns of the data and the model."""

    def needs(self, run: RunView) -> Needs:
        """Return the columns, and the margins of the model if they are a source."""
        params = self.params
        columns = tuple(dict.fromkeys([*params.margin, *params.chosen, *params.rejected]))
        return Needs(columns=columns, measurements=(Margins(),) if params.implicit else ())

    def problems(self, run: RunView) -> Iterator[tuple[str, str]]:
        """Yield problems of a stage without pairs, and of an implicit margin that is 0 for every pair."""
        if self.params.implicit:  # the measurement of margins refuses the stage
            yield from reference_problem(run, "implicit", self.name)
        else:
            yield from stage_problem(run, self.name, "the rewards of a pair's two responses")

    def column_problem(self, column: str, values: ColumnArray) -> Wrong | None:
        """Return the first row whose value is no finite number, and the problem; else None."""
        return without_number(column, values)

    def score(self, ctx: RoundContext, candidates: IndexArray) -> ScoreArray:
        """Return the score of every candidate by the parameter ``prefer``."""
        margins = self._margins(ctx, candidates)
        if self.params.bounds is None:
            return preferred(margins[0], self.params.prefer)
        found = [probability(each, *bounds) for each, bounds in zip(margins, self.params.bounds, strict=True)]
        return preferred(combined(found), self.params.prefer, neutral=0.5)

    def _margins(self, ctx: RoundContext, candidates: IndexArray) -> list[Doubles]:
        """Return the margins of the candidates from each source, shape (n,) each."""
        params, column = self.params, ctx.pool.numbers
        found = [column(name)[candidates] for name in params.margin]
        pairs = zip(params.chosen, params.rejected, strict=True)
        found += [column(chosen)[candidates] - column(rejected)[candidates] for chosen, rejected in pairs]
        if params.implicit:
            found.append(ctx.probe.measure(Margins(), candidates).astype(np.float64))
        return found


def probability(margins: Doubles, low: float, high: float) -> Doubles:
    """Return margins clipped to [low, high] and mapped linearly to [0, 1], shape (n,)."""
    return (np.clip(margins, low, high) - low) / (high - low)


def combined(sources: list[Doubles]) -> Doubles:
    """Return the probability that several independent sources give together, shape (n,).

    It is 1/2 if one source gives 1 and another gives 0.
    """
    for_it, against = np.prod(sources, axis=0), np.prod([1 - each for each in sources], axis=0)
    total = for_it + against
    return np.where(total > 0, for_it / np.where(total > 0, total, 1), 0.5)
