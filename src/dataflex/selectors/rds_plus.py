"""RDS+: the samples whose representations in the model are nearest to those of the validation samples, by turns.

A representation is the mean of the last layer's states over all tokens of prompt and response, that of token i with
weight i, scaled to length 1. With cos(q, x) of validation sample q and candidate x, a sub-task lists the candidates by

- ``round_robin``: its validation samples take turns. Each offers the next candidate of its own list, by falling cosine;
  one that is taken costs it its turn.
- ``round_robin_repop``: the same, but it offers the best candidate that is not taken yet.
- ``max``: falling max over q of cos(q, x).

Of several sub-tasks each offers the next candidate of its list in turn; one that is taken costs it its turn.

Source: Ivison et al., Large-Scale Data Selection for Instruction Tuning (arXiv 2503.01807; code
hamishivi/automated-instruction-selection). ``round_robin`` and the turns of sub-tasks are its algorithm,
``max`` is what its code for large pools does, and ``round_robin_repop`` is that of arXiv 2602.14696.
Differs from it: padding has no weight; several sub-tasks may have any rule, where the code has ``max``.
Cost: one forward of pool and validation set per update, and a product of all validation samples with all candidates.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from dataflex import (
    EmbeddingArray,
    IndexArray,
    RoundContext,
    ScoreArray,
    Selection,
    nearest,
    register,
)
from dataflex.selectors.base_neighbours import TargetParams, TargetSelector, scanned, usable, vectors_of

Rule = Literal["round_robin", "round_robin_repop", "max"]

_LENGTH = 1000
"""Length of the lists of neighbours at first."""


class RdsPlusParams(TargetParams):
    """Parameters of RDS+."""

    rule: Rule = Field(
        "round_robin",
        description="How a sub-task lists candidates: its validation samples take turns (one whose next candidate is "
        "taken loses its turn, or offers its best one that is not), or by the largest cosine with any.",
    )
    pooling: Literal["auto", "mean", "weighted_mean", "first", "last"] = Field(
        "weighted_mean", description="How token states become one vector; weighted_mean: token i has weight i."
    )


@register("selector", "rds_plus")
class RdsPlusSelector(TargetSelector[RdsPlusParams]):
    """Takes the samples nearest to the validation samples, by turns."""

    def choose(self, ctx: RoundContext, candidates: IndexArray, count: int) -> Selection:
        """Return the first candidates of what the sub-tasks offer in turn."""
        trained = usable(self, ctx, candidates, count)
        queries, tasks = self.queries(ctx)
        base = vectors_of(ctx, trained)
        lists = [listed(queries[tasks == task], base, count, self.params.rule) for task in np.unique(tasks)]
        places = scanned(np.stack(lists))[0][:count]
        return Selection(
            trained[places],
            _nearness(vectors_of(ctx, trained[places]), queries),
            candidates.size - trained.size,
            ranks=np.arange(1, count + 1),
            ranked=trained.size,
        )

    def score(self, ctx: RoundContext, candidates: IndexArray) -> ScoreArray:
        """Return, for offline scores, each candidate's cosine with the nearest validation sample; NaN: no token."""
        scores = np.full(candidates.size, np.nan, dtype=np.float32)
        trained = usable(self, ctx, candidates, 1)
        queries, _ = self.queries(ctx)
        scores[np.searchsorted(candidates, trained)] = _nearness(vectors_of(ctx, trained), queries)
        return scores


def _nearness(base: EmbeddingArray, queries: EmbeddingArray) -> ScoreArray:
    """Return the cosine of each row with the nearest query, (n,)."""
    return 1 - nearest(base, queries, 1, share=True)[1][:, 0]


def listed(queries: EmbeddingArray, base: EmbeddingArray, count: int, rule: Rule) -> IndexArray:
    """Return the first ``count`` rows of the base as one sub-task lists them.

    Args:
        queries: shape (M, H).
        base: shape (N, H).
        count: at most N.
        rule: as in the parameters.
    """
    if rule == "max":
        return best(_nearness(base, queries), count)
    length = _LENGTH
    while True:
        table, _ = nearest(queries, base, length, share=True)
        found = scanned(table)[0] if rule == "round_robin" else repopped(table, count)
        if found.size >= count:
            return found[:count]
        length *= 2


def best(scores: NDArray[np.floating], count: int) -> IndexArray:
    """Return the positions of the ``count`` largest scores, the largest first; ties by the lower position."""
    return np.argsort(-scores, kind="stable")[:count].astype(np.int64)


def repopped(table: IndexArray, count: int) -> IndexArray:
    """Return up to ``count`` numbers of a table whose rows in turn take their first number that is not taken yet.

    Fewer are returned if a row has none left before that many are taken.
    """
    taken = np.zeros(int(table.max()) + 1, dtype=bool)
    rows = table.tolist()
    places, found = [0] * len(rows), list[int]()
    while len(found) < count:
        number = len(found) % len(rows)
        row, place = rows[number], places[number]
        while place < len(row) and taken[row[place]]:
            place += 1
        if place == len(row):
            break
        places[number] = place + 1
        taken[row[place]] = True
        found.append(row[place])
    return np.array(found, dtype=np.int64)
