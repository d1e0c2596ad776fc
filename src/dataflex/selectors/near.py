"""NEAR: the samples nearest to the validation samples, rank by rank.

For every validation sample q, the query, the candidates are listed by falling cosine cos(e(q), e(x)) of their
embeddings. The lists are read column by column: the nearest candidate of every query in the order of the queries, then
the second nearest of every query, and so on. Each candidate is taken once. Every decision continues at the position
that the last one reached, so that a run reads down the lists. At the end of the lists it starts again at the top.

Source: the NEAR selector of DataFlex (arXiv 2603.26164). Reading column by column is the round-robin of RDS+ (arXiv
2503.01807). There a query loses its turn if its next candidate is already taken.
Differs from it: the search is exact. A decision does not return the same samples again. The run names the validation
samples; they are not the first hundred samples of the pool.
Cost: the embeddings, and one product of all queries with them: M N H multiplications for M queries of length H. With an
encoder both are computed once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from dataflex import (
    ComponentError,
    IndexArray,
    InputPath,
    Needs,
    Pool,
    RoundContext,
    RunOutline,
    RunView,
    ScoreArray,
    Selection,
    State,
    register,
)
from dataflex.selectors.base_neighbours import (
    NeighbourParams,
    NeighbourSelector,
    array_file,
    file_problems,
    scanned,
    usable,
    vectors_of,
)


class NearParams(NeighbourParams):
    """Parameters of NEAR."""

    max_k: int = Field(
        1000,
        ge=1,
        description="Length of the list of each validation sample; doubled while the lists hold fewer samples than a "
        "round takes.",
    )
    indices_path: InputPath | None = Field(
        None,
        description="Lists of neighbours from a .npy file: pool indices, one row per validation sample, nearest "
        "first. If null, neighbours are searched.",
    )

    @model_validator(mode="after")
    def _used(self) -> Self:
        idle = self.model_fields_set - {"indices_path"} if self.indices_path is not None else set()
        if idle:
            raise ValueError(f"{', '.join(sorted(idle))}: not used, as indices_path gives the lists; remove them")
        return self


@register("selector", "near")
class NearSelector(NeighbourSelector[NearParams]):
    """Takes the nearest neighbours of every validation sample, rank by rank."""

    state_depends_on: ClassVar[frozenset[str]] = frozenset({"indices_path", "encoder"})

    def __init__(self, params: NearParams) -> None:
        super().__init__(params)
        self._taken: NDArray[np.bool_] | None = None
        """Which samples of the pool were taken since the lists were last begun, shape (N,)."""
        self._depth = params.max_k
        """Length of the lists; doubled while they hold fewer samples than are wanted."""
        self._kept: dict[tuple[int, int], tuple[IndexArray, int, IndexArray, ScoreArray | None]] = {}
        """Cached lists, by the first and last index of their candidates.

        Each value holds the candidates, the length of the lists, the candidates in the order of :func:`scanned`, and
        their cosines. Filled only if the embeddings are those of a fixed encoder.
        """

    def needs(self, run: RunView) -> Needs:
        """Return the embeddings and the validation samples; nothing if the lists come from a file."""
        return super().needs(run) if self.params.indices_path is None else Needs()

    def problems(self, run: RunView) -> Iterator[tuple[str, str]]:
        """Yield problems of the search and of the file of lists."""
        yield from super().problems(run)
        if self.params.indices_path is not None:
            yield from file_problems("indices_path", self.params.indices_path, 2)

    def pool_problems(self, pool: Pool) -> Iterator[tuple[str, str]]:
        """Yield a problem if the file of lists holds indices outside the pool."""
        path = self.params.indices_path
        if path is None:
            return
        table = array_file(path, 2)
        if not np.issubdtype(table.dtype, np.integer):
            yield "indices_path", f"{path!r} holds values of type {table.dtype}; pool indices are integers."
            return
        low, high = int(table.min()), int(table.max())
        if low < 0 or high >= pool.size:
            yield (
                "indices_path",
                f"{path!r} holds indices from {low} to {high}; the {pool.size} samples of this pool have the indices 0 "
                f"to {pool.size - 1}. Write the file for this data. An index of -1 means that no neighbour was found.",
            )

    def unfit(self, run: RunOutline) -> tuple[str, str] | None:
        """Return a problem if the lists from the file hold fewer samples than a round takes."""
        path = self.params.indices_path
        if path is None or any(file_problems("indices_path", path, 2)):
            return None
        table = array_file(path, 2)
        held = np.unique(table[table >= 0]).size
        if held >= run.round_samples:
            return None
        return "indices_path", (
            f"the lists in {path!r} hold {held} different samples, and a round takes {run.round_samples}. Write longer "
            "lists, or lower update_steps."
        )

    def choose(self, ctx: RoundContext, candidates: IndexArray, count: int) -> Selection:
        """Return the next ``count`` candidates down the lists."""
        trained = usable(self, ctx, candidates, count)
        order, cosines = self._lists(ctx, trained)
        while order.size < count and self.params.indices_path is None:
            self._depth *= 2
            order, cosines = self._lists(ctx, trained)
        if order.size < count:
            raise ComponentError(
                f"selector 'near': {count} samples are wanted, and the lists in {self.params.indices_path!r} hold "
                f"{order.size} of the {trained.size} candidates. Write longer lists, or lower update_steps."
            )
        if self._taken is None:
            self._taken = np.zeros(ctx.pool.size, dtype=bool)
        left = np.flatnonzero(~self._taken[order])
        places = left[:count]
        if left.size < count:
            ctx.note(
                f"select near: the lists of neighbours ended after {order.size} samples in round {ctx.round}; they are "
                "read from the top again."
            )
            self._taken[order] = False
            # A round has no sample twice, so the samples that it has taken already are skipped.
            again = np.setdiff1d(np.arange(order.size), places)[: count - places.size]
            self._taken[order[again]] = True
            places = np.concatenate([places, again])
        else:
            self._taken[order[places]] = True
        return Selection(
            order[places],
            None if cosines is None else cosines[places],
            candidates.size - trained.size,
            ranks=places + 1,
            ranked=candidates.size,
        )

    def score(self, ctx: RoundContext, candidates: IndexArray) -> ScoreArray:
        """Return the position of each candidate in the lists as a score, for offline scores.

        The first candidate has 1, later ones have less. A candidate that is not in the lists has NaN.
        """
        scores = np.full(candidates.size, np.nan, dtype=np.float32)
        order, _ = self._lists(ctx, usable(self, ctx, candidates, 1))
        scores[np.searchsorted(candidates, order)] = 1 - np.arange(order.size) / order.size
        return scores

    def _lists(self, ctx: RoundContext, candidates: IndexArray) -> tuple[IndexArray, ScoreArray | None]:
        """Return the candidates in the order of the lists, and the cosine by which each was found.

        The cosines are None if the lists come from a file.
        """
        if self.params.indices_path is not None:
            table = array_file(self.params.indices_path, 2)
            order = scanned(table)[0]
            return order[np.isin(order, candidates)], None
        key = int(candidates[0]), int(candidates[-1])
        known = self._kept.get(key)
        if known is not None and known[1] == self._depth and np.array_equal(known[0], candidates):
            return known[2], known[3]
        found, distances = self.neighbours(ctx, vectors_of(ctx, candidates), self._depth, "cosine")
        order, first = scanned(found)
        cosines = 1 - distances.T.ravel()[first]
        if self.params.encoder is not None:
            self._kept[key] = candidates, self._depth, candidates[order], cosines
        return candidates[order], cosines

    def state_dict(self) -> State:
        """Return which samples were taken, and the length of the lists."""
        taken = None if self._taken is None else np.packbits(self._taken)
        return {"taken": taken, "size": 0 if self._taken is None else self._taken.size, "depth": self._depth}

    def load_state_dict(self, state: State) -> None:
        """Restore which samples were taken, and the length of the lists."""
        taken = state["taken"]
        self._taken = None if taken is None else np.unpackbits(taken, count=int(state["size"])).astype(bool)
        self._depth = max(int(state["depth"]), self.params.max_k)
