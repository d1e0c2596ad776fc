"""One half of the data for training, and the losses of the other half as difficulties.

The pool is divided into two halves at random. The run trains in passes over one half. At every decision after the first
step the losses of the other half are measured, and their mean so far is written to a table. So two runs, one on each
half, give every sample a loss under a model that was not trained on it.

Source: the estimation of difficulties in Selective DPO (Gao et al., ICML 2025, arXiv 2502.09650), which
``dataflex-cli hard-pairs`` runs with this selector. It works in every stage.
Cost: one forward pass over half of the pool per decision.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from dataflex import (
    ComponentError,
    ComponentParams,
    Group,
    IndexArray,
    KeyedPermutation,
    Losses,
    Measurement,
    Needs,
    OutputPath,
    Pool,
    RoundContext,
    RunOutline,
    RunView,
    Selection,
    Selector,
    State,
    derive_rng,
    key_of,
    on_main,
    register,
)
from dataflex.selectors.base_difficulties import rows_unknown, write_difficulties

TABLE = "difficulties.parquet"
"""Name of the table in the folder."""


class HalfParams(ComponentParams):
    """Parameters of a training on one half of the pool."""

    half: Literal["first", "second"] = Field("first", description="Half of the pool that is trained on.")
    split_seed: int = Field(41, ge=0, description="Seed of the division of the pool.")
    measurements: int = Field(
        5, ge=1, description="Times that the losses are measured at least, if update_steps does not say when."
    )
    folder: OutputPath = Field(min_length=1, description=f"Folder to which {TABLE} with the losses is written.")


@register("selector", "half")
class HalfSelector(Selector[HalfParams]):
    """Trains on one half of the pool, and measures the losses of the other half."""

    may_exceed_pool = True
    scores_samples = False
    state_depends_on: ClassVar[frozenset[str]] = frozenset({"half", "split_seed"})

    def __init__(self, params: HalfParams) -> None:
        super().__init__(params)
        self._drawn: dict[str, int] = {}
        """Samples drawn so far from the own half of each group."""
        self._sums = np.empty(0)
        """Sum of the measured losses of each sample of the other half, ascending by index."""
        self._measured = 0
        """Number of measurements."""

    def wanted_rounds(self, domains: int) -> int:
        """Return one more than the number of measurements, because the first round begins before any training."""
        return self.params.measurements + 1

    def needs(self, run: RunView) -> Needs:
        """Return the losses."""
        return Needs(measurements=(Losses(),))

    def problems(self, run: RunView) -> Iterator[tuple[str, str]]:
        """Yield a problem if a pool is only scored, as nothing is trained then."""
        if run.offline:
            yield "method", "half measures losses while it trains, and scoring a pool trains nothing."

    def pool_problems(self, pool: Pool) -> Iterator[tuple[str, str]]:
        """Yield a problem if the pool cannot be divided, or the raw rows of its samples are not known."""
        if pool.size < 2:
            yield "method", f"half divides the pool, which has {pool.size} sample."
        unknown = rows_unknown(pool)
        if unknown is not None:
            yield "folder", f"{TABLE} {unknown}"

    def cannot_act(self, run: RunOutline) -> str | None:
        """Return a reason if the only decision comes before the first step."""
        if self._measuring_decisions(run):
            return None
        return "the only decision comes before the first step, so no loss is measured; lower dataflex.update_steps"

    def measured_samples(self, measurement: Measurement[Any], run: RunOutline) -> float:
        """Return half of the pool for each decision after the first step."""
        return self._measuring_decisions(run) * (run.pool_size or 0) / 2

    def _measuring_decisions(self, run: RunOutline) -> int:
        return run.decisions if run.schedule.warmup_steps else max(0, run.decisions - 1)

    def begin(self, ctx: RoundContext) -> None:
        """Measure the losses of the other half, and write their mean so far."""
        if not ctx.start_step:
            return
        other = halves(ctx.pool.size, self.params.split_seed)[0 if self.params.half == "second" else 1]
        other = other[ctx.pool.trained[other]]
        losses = ctx.probe.measure(Losses(), other).astype(np.float64)
        self._sums = losses if not self._measured else self._sums + losses
        self._measured += 1
        path = Path(self.params.folder) / TABLE
        on_main(partial(write_difficulties, path, ctx.pool, other, self._sums / self._measured))

    def select(self, ctx: RoundContext, group: Group) -> Selection:
        """Return the next ``group.budget`` samples of the running pass over the own half of the group."""
        own = halves(ctx.pool.size, self.params.split_seed)[0 if self.params.half == "first" else 1]
        own = own[(own >= group.start) & (own < group.stop)]
        if not own.size:
            raise ComponentError(
                f"select half: the {self.params.half} half has no sample of {group.name!r}. Change split_seed, or "
                "remove the mixer."
            )
        begin = self._drawn.get(group.name, 0)
        self._drawn[group.name] = begin + group.budget
        numbers, offsets = np.divmod(np.arange(begin, begin + group.budget, dtype=np.int64), own.size)
        chosen = np.empty(group.budget, dtype=np.int64)
        for number in np.unique(numbers).tolist():
            order = KeyedPermutation(own.size, key_of(self.params.split_seed, "half", group.name, number))
            chosen[numbers == number] = own[order(offsets[numbers == number])]
        return Selection(chosen, shuffled=True, passes=numbers)

    def state_dict(self) -> State:
        """Return the position in the passes and the losses."""
        return {"drawn": dict(self._drawn), "sums": self._sums.copy(), "measured": self._measured}

    def load_state_dict(self, state: State) -> None:
        """Restore the position in the passes and the losses."""
        self._drawn = {name: int(drawn) for name, drawn in state["drawn"].items()}
        self._sums, self._measured = state["sums"], int(state["measured"])


def halves(size: int, seed: int) -> tuple[IndexArray, IndexArray]:
    """Return the indices of the two halves of a pool, ascending each; the first has the odd sample."""
    order = derive_rng(seed, "half").permutation(size)
    middle = (size + 1) // 2
    return np.sort(order[:middle]), np.sort(order[middle:])
