"""Hard pairs left out: the pairs with the lowest held-out loss.

    score(x) = -difficulty(x)

The difficulty of a pair is its loss under models that were not trained on it, as mean over several of them. It is read
from tables that ``dataflex-cli hard-pairs`` or ``dataflex-cli score`` has written, or from a column of the data.
Without both it is the loss under the model in training, measured at every decision.

Source: Gao et al., Principled Data Selection for Alignment: The Hidden Risks of Difficult Examples (ICML 2025, arXiv
2502.09650), Selective DPO: models are trained on one half of the data and measured on the other half, five times in
each of three seeds. The easiest 50 % (60 % for Gemma) are trained on in one pass, from easy to hard.
Cost: none with tables or a column, else one forward pass over both responses of the candidates per decision.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator, model_validator

from dataflex import (
    ColumnArray,
    ConfigError,
    IndexArray,
    InputPath,
    Losses,
    Needs,
    Pool,
    RoundContext,
    RunView,
    ScoreArray,
    Selector,
    SelectorParams,
    Wrong,
    register,
)
from dataflex.selectors.base_difficulties import difficulties_of, read_difficulties, rows_unknown
from dataflex.selectors.base_margins import reference_problem, stage_problem, without_number


class HardPairsParams(SelectorParams):
    """Parameters of the selection of easy pairs."""

    difficulties: list[InputPath] = Field(
        [],
        description="Parquet tables of difficulties, from dataflex-cli hard-pairs or score. A pair in several tables "
        "has their mean.",
    )
    column: str | None = Field(
        None, min_length=1, description="Column of the raw data with the difficulty of each pair, instead of tables."
    )

    @field_validator("difficulties", mode="before", json_schema_input_type=str | list[str])
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @property
    def fixed(self) -> bool:
        """Whether the difficulties are given, and do not change during the run."""
        return bool(self.difficulties) or self.column is not None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.difficulties and self.column is not None:
            raise ValueError("difficulties and column both give the difficulty of a pair; remove one")
        if self.fixed and self.max_overhead is not None:
            raise ValueError("max_overhead: the difficulties are given and cost nothing; remove it")
        return self


@register("selector", "hard_pairs")
class HardPairsSelector(Selector[HardPairsParams]):
    """Prefers pairs with a low held-out loss, so that hard pairs are left out."""

    def __init__(self, params: HardPairsParams) -> None:
        super().__init__(params)
        self._known: NDArray[np.float64] | None = None
        """Difficulty of every sample from the tables, shape (N,)."""

    def wanted_rounds(self, domains: int) -> int:
        """Return 1 for given difficulties, because every decision would choose the same pairs; else 4."""
        return 1 if self.params.fixed else super().wanted_rounds(domains)

    def needs(self, run: RunView) -> Needs:
        """Return the column, or the losses of the candidates if no difficulties are given."""
        if self.params.column is not None:
            return Needs(columns=(self.params.column,))
        return Needs() if self.params.difficulties else Needs(measurements=(Losses(),))

    def problems(self, run: RunView) -> Iterator[tuple[str, str]]:
        """Yield problems of a stage without pairs, of equal losses, and of the tables."""
        yield from stage_problem(run, self.name, "the losses of pairs")
        if not self.params.fixed:
            yield from reference_problem(run, "method", self.name)
        for path in self.params.difficulties:
            try:
                read_difficulties(Path(path))
            except ConfigError as error:
                yield "difficulties", str(error)

    def column_problem(self, column: str, values: ColumnArray) -> Wrong | None:
        """Return the first row whose value is no finite number, and the problem; else None."""
        return without_number(column, values)

    def pool_problems(self, pool: Pool) -> Iterator[tuple[str, str]]:
        """Yield a problem if the tables lack a pair of the pool."""
        if not self.params.difficulties:
            return
        unknown = rows_unknown(pool)
        if unknown is not None:
            yield "difficulties", unknown
            return
        missing = np.flatnonzero(np.isnan(self._from_tables(pool)))
        if missing.size:
            first = missing[:1]
            name, row = pool.domains[int(pool.domain_ids(first)[0])], pool.row_numbers(first)
            assert row is not None
            yield (
                "difficulties",
                f"{missing.size} of the {pool.size} pairs are in no table, the first of them row {int(row[0])} of "
                f"{name!r}. Make the tables from the data of this run.",
            )

    def score(self, ctx: RoundContext, candidates: IndexArray) -> ScoreArray:
        """Return the negative difficulty of every candidate."""
        if self.params.column is not None:
            found = ctx.pool.numbers(self.params.column)[candidates]
        elif self.params.difficulties:
            found = self._from_tables(ctx.pool)[candidates]
        else:
            return -ctx.probe.measure(Losses(), candidates)
        return -found.astype(np.float32)

    def _from_tables(self, pool: Pool) -> NDArray[np.float64]:
        if self._known is None or self._known.size != pool.size:
            self._known = difficulties_of(pool, map(read_difficulties, map(Path, self.params.difficulties)))
        return self._known
