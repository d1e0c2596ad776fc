"""DEITA: the best samples by complexity times quality, without those similar to a better one.

    s(x) = complexity(x) * quality(x)

Both factors are columns of the raw data. Samples are visited by falling s. A sample is accepted if the cosine of its
embedding with every accepted sample is at most ``threshold``, until enough samples are accepted. If the filter accepts
too few, the best rejected samples follow.

Source: Liu et al., What Makes Good Data for Alignment? A Comprehensive Study of Automatic Data Selection in Instruction
Tuning (ICLR 2024, arXiv 2312.15685), and its code ``combined_filter.py``. There two models score complexity and quality
(the expected rating of 1 to 6 over the probabilities of the six rating tokens). Here any tool may have written the
columns. There the s of a conversation is a sum of products over its turns. For that, write the sum into one column and
name it as ``quality``, without ``complexity``.
Cost: the embeddings, and N x accepted x H operations per decision.
"""

from __future__ import annotations

import logging
from functools import partial

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from dataflex import (
    ColumnArray,
    ComponentError,
    EmbeddingParams,
    IndexArray,
    Needs,
    RoundContext,
    RunView,
    ScoreArray,
    Selection,
    Selector,
    SelectorParams,
    Wrong,
    on_main,
    ranks_among_scored,
    register,
    unusable_score,
)

_BLOCK = 512
"""Samples that are compared with all accepted ones at a time."""
_KEPT = 8192
"""Accepted samples that a block is multiplied with at a time."""

logger = logging.getLogger(__name__)


class DeitaParams(SelectorParams, EmbeddingParams):
    """Parameters of DEITA."""

    quality: str = Field(min_length=1, description="Column of the raw data with the quality of each row.")
    complexity: str | None = Field(
        None,
        min_length=1,
        description="Column of the raw data with the complexity of each row. If null, quality holds the product.",
    )
    threshold: float = Field(
        0.9, ge=-1, le=1, description="Largest cosine of an accepted sample with a better accepted one."
    )


@register("selector", "deita")
class DeitaSelector(Selector[DeitaParams]):
    """Prefers complex samples of good quality that are not similar to each other."""

    def needs(self, run: RunView) -> Needs:
        """Return the columns and the embeddings."""
        columns = [self.params.quality, self.params.complexity]
        return Needs(columns=tuple(name for name in columns if name is not None), embeddings=self.params)

    def column_problem(self, column: str, values: ColumnArray) -> Wrong | None:
        """Return the reason why the values of a column cannot be scores, or None."""
        return unusable_score(column, values)

    def score(self, ctx: RoundContext, candidates: IndexArray) -> ScoreArray:
        """Return a score for every candidate by the order in which candidates are chosen, for offline scores.

        Accepted candidates have scores in (0, 1], rejected ones in [-1, 0).
        """
        values = self.values(ctx, candidates)
        kept, rejected = self._filtered(ctx, candidates, values, candidates.size)
        scores = np.full(candidates.size, np.nan, dtype=np.float32)
        scores[kept] = np.arange(kept.size, 0, -1) / max(kept.size, 1)
        scores[rejected] = -np.arange(1, rejected.size + 1) / max(rejected.size, 1)
        return scores

    def choose(self, ctx: RoundContext, candidates: IndexArray, count: int) -> Selection:
        """Return the first ``count`` accepted candidates; if the filter accepts fewer, also the best rejected ones."""
        values = self.values(ctx, candidates)
        scored = int(np.count_nonzero(~np.isnan(values)))
        if scored < count:
            raise ComponentError(
                f"select deita: {count} samples are wanted but only {scored} of {candidates.size} have a number in the "
                "columns and a token to train on. Lower update_steps or check the data."
            )
        kept, rejected = self._filtered(ctx, candidates, values, count)
        if kept.size < count:
            _warn_of_rejected(count, kept.size, self.params.threshold)
        chosen = np.sort(np.concatenate([kept, rejected])[:count])
        ranks = ranks_among_scored(values, chosen)
        return Selection(candidates[chosen], values[chosen], candidates.size - scored, ranks=ranks, ranked=scored)

    def values(self, ctx: RoundContext, candidates: IndexArray) -> ScoreArray:
        """Return s of every candidate; NaN if the candidate has no value or no token to train on."""
        found = ctx.pool.numbers(self.params.quality)[candidates]
        if self.params.complexity is not None:
            found = found * ctx.pool.numbers(self.params.complexity)[candidates]
        found[~ctx.pool.trained[candidates]] = np.nan
        return found.astype(np.float32)

    def _filtered(
        self, ctx: RoundContext, candidates: IndexArray, values: ScoreArray, count: int
    ) -> tuple[IndexArray, IndexArray]:
        scored = np.flatnonzero(~np.isnan(values))
        falling = scored[np.argsort(-values[scored], kind="stable")]
        vectors, threshold = ctx.embeddings(), self.params.threshold
        kept = on_main(partial(unlike, vectors, candidates[falling], threshold, count))
        return falling[kept], np.delete(falling, kept)


def _warn_of_rejected(count: int, kept: int, threshold: float) -> None:
    """Warn that the filter accepts fewer samples than wanted, so that rejected samples are chosen, too."""
    logger.warning(
        "select deita: %d samples are wanted, but the filter accepts only %d (cosine of at most %g with every better "
        "accepted sample). The others are the best rejected samples.",
        count,
        kept,
        threshold,
    )


def unlike(vectors: NDArray[np.floating], falling: IndexArray, threshold: float, count: int) -> IndexArray:
    """Return the positions in ``falling`` of the first accepted rows, at most ``count`` of them.

    A row is accepted if its cosine with every row accepted before is at most ``threshold``.

    Args:
        vectors: embeddings of all samples, of length 1 (or 0), shape (N, H).
        falling: rows of ``vectors``, the best first, shape (n,).
        threshold: the largest cosine with a row accepted before.
        count: the number of rows wanted; fewer are returned if the filter accepts fewer.
    """
    kept = np.empty((min(count, falling.size), vectors.shape[1]), dtype=np.float32)
    positions: list[int] = []
    for begin in range(0, falling.size, _BLOCK):
        if len(positions) >= count:
            break
        block = np.asarray(vectors[falling[begin : begin + _BLOCK]], dtype=np.float32)
        is_free = np.ones(len(block), dtype=bool)
        for first in range(0, len(positions), _KEPT):
            part = kept[first : min(first + _KEPT, len(positions))]
            is_free &= (block @ part.T <= threshold).all(axis=1)
        free = np.flatnonzero(is_free)
        alike = block[free] @ block[free].T > threshold
        is_open = np.ones(free.size, dtype=bool)
        for number, row in enumerate(free.tolist()):
            if is_open[number] and len(positions) < count:
                kept[len(positions)] = block[row]
                positions.append(begin + row)
                is_open &= ~alike[number]
    return np.array(positions, dtype=np.int64)
