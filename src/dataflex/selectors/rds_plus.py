"""RDS+: the samples whose hidden states in the model are nearest to those of the validation samples, in turns.

The embedding of a sample is the mean of the last layer's hidden states over all tokens of prompt and response. Token i
has weight i, and the mean is scaled to length 1. With cos(q, x) of validation sample q and candidate x, a sub-task
lists the candidates by

- ``round_robin``: the validation samples of the sub-task take turns. At its turn, each offers the next candidate of its
  list, by falling cosine. If that candidate is already taken, the turn is lost.
- ``round_robin_repop``: the validation samples take turns, and each offers its best candidate that is not taken yet.
- ``max``: falling max over q of cos(q, x).

Several sub-tasks take turns, too. At its turn, each offers the next candidate of its list. If that candidate is already
taken, the turn is lost.

Source: Ivison et al., Large-Scale Data Selection for Instruction Tuning (arXiv 2503.01807; code
hamishivi/automated-instruction-selection). ``round_robin`` and the turns of sub-tasks are its algorithm. ``max`` is the
rule of its code for large pools. ``round_robin_repop`` is from arXiv 2602.14696.
Differs from it: padding has no weight. Several sub-tasks may use any rule; the code has ``max`` for them.
Cost: one forward pass over pool and validation samples per decision, and a product of all validation samples with all
candidates.
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
"""First length of the lists of neighbours; doubled while they hold too few."""


class RdsPlusParams(TargetParams):
    """Parameters of RDS+."""

    rule: Rule = Field(
        "round_robin",
        description="Order in which a sub-task lists candidates. round_robin: validation samples take turns, and one "
        "whose next candidate is taken loses its turn; round_robin_repop: it offers its best candidate "
        "that is not taken; max: by the largest cosine with any validation sample.",
    )
    pooling: Literal["auto", "mean", "weighted_mean", "first", "last"] = Field(
        "weighted_mean", description="Pooling of token states into one vector; weighted_mean: token i has weight i."
    )


@register("selector", "rds_plus")
class RdsPlusSelector(TargetSelector[RdsPlusParams]):
    """Takes the samples nearest to the validation samples, in turns."""

    def choose(self, ctx: RoundContext, candidates: IndexArray, count: int) -> Selection:
        """Return the first ``count`` candidates that the sub-tasks offer in turns."""
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
        """Return each candidate's cosine with its nearest validation sample, for offline scores.

        A candidate without a token to train on has NaN.
        """
        scores = np.full(candidates.size, np.nan, dtype=np.float32)
        trained = usable(self, ctx, candidates, 1)
        queries, _ = self.queries(ctx)
        scores[np.searchsorted(candidates, trained)] = _nearness(vectors_of(ctx, trained), queries)
        return scores


def _nearness(base: EmbeddingArray, queries: EmbeddingArray) -> ScoreArray:
    """Return the cosine of each row with its nearest query, shape (n,)."""
    return 1 - nearest(base, queries, 1, share=True)[1][:, 0]


def listed(queries: EmbeddingArray, base: EmbeddingArray, count: int, rule: Rule) -> IndexArray:
    """Return the first ``count`` rows of the base in the order of one sub-task's list.

    Args:
        queries: embeddings of the sub-task's validation samples, shape (M, H).
        base: embeddings of the candidates, shape (N, H).
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
    """Return up to ``count`` entries of a table whose rows take turns, each with its first entry not taken yet.

    Fewer are returned if a row has no entry left before ``count`` are taken.

    Args:
        table: one row per query, nearest neighbour first, shape (M, k).
        count: the number of entries wanted.
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
