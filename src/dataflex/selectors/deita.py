"""DEITA: the best by complexity times quality, without those that are like a better one.

    s(x) = complexity(x) * quality(x)

with both numbers from columns of the raw data. Samples are looked at by falling s; one is kept if the cosine of its
embedding with that of every sample kept before is at most ``threshold``, until as many are kept as are wanted. If the
filter leaves too few, the best of the others follow.

Source: Liu et al., What Makes Good Data for Alignment? A Comprehensive Study of Automatic Data Selection in Instruction
Tuning (ICLR 2024, arXiv 2312.15685), and its code ``combined_filter.py``. There two models score complexity and quality
(the expected rating of 1 to 6 over the six tokens' probabilities); here any tool may have written them. The s of a
conversation is a sum of products over its turns there: write that into one column and name it as ``quality`` alone.
Cost: the embeddings, and N x kept x H operations at a decision.
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
"""Samples that are compared with all kept ones at a time."""
_KEPT = 8192
"""Kept samples that a block is multiplied with at a time."""

logger = logging.getLogger(__name__)


class DeitaParams(SelectorParams, EmbeddingParams):
    """Parameters of DEITA."""

    quality: str = Field(min_length=1, description="Column of the raw data with the quality of each row.")
    complexity: str | None = Field(
        None, min_length=1, description="Column with the complexity of each row; none: quality holds the product."
    )
    threshold: float = Field(0.9, ge=-1, le=1, description="Largest cosine of a sample with one that is kept.")


@register("selector", "deita")
class DeitaSelector(Selector[DeitaParams]):
    """Prefers complex samples of good quality that are not alike."""

    def needs(self, run: RunView) -> Needs:
        """Return the columns and the embeddings."""
        columns = [self.params.quality, self.params.complexity]
        return Needs(columns=tuple(name for name in columns if name is not None), embeddings=self.params)

    def column_problem(self, column: str, values: ColumnArray) -> Wrong | None:
        """Return what keeps the values from being scores."""
        return unusable_score(column, values)

    def score(self, ctx: RoundContext, candidates: IndexArray) -> ScoreArray:
        """Return how early every candidate of a pool that is scored is taken, in (0, 1]; below 0 if it is rejected."""
        values = self.values(ctx, candidates)
        kept, rejected = self._filtered(ctx, candidates, values, candidates.size)
        scores = np.full(candidates.size, np.nan, dtype=np.float32)
        scores[kept] = np.arange(kept.size, 0, -1) / max(kept.size, 1)
        scores[rejected] = -np.arange(1, rejected.size + 1) / max(rejected.size, 1)
        return scores

    def choose(self, ctx: RoundContext, candidates: IndexArray, count: int) -> Selection:
        """Return the first ``count`` candidates the filter leaves; if they are too few, the best of the others too."""
        values = self.values(ctx, candidates)
        scored = int(np.count_nonzero(~np.isnan(values)))
        if scored < count:
            raise ComponentError(
                f"select deita: {count} samples are wanted but only {scored} of {candidates.size} have a number in the "
                "columns and a token to train on. Shorten update_steps or check the data."
            )
        kept, rejected = self._filtered(ctx, candidates, values, count)
        if kept.size < count:
            _tell(count, kept.size, self.params.threshold)
        chosen = np.sort(np.concatenate([kept, rejected])[:count])
        ranks = ranks_among_scored(values, chosen)
        return Selection(candidates[chosen], values[chosen], candidates.size - scored, ranks=ranks, ranked=scored)

    def values(self, ctx: RoundContext, candidates: IndexArray) -> ScoreArray:
        """Return the product of every candidate; NaN where it has none."""
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


def _tell(count: int, kept: int, threshold: float) -> None:
    logger.warning(
        "select deita: of %d samples wanted, %d are unlike all better ones (cosine at most %g); the others are the "
        "best of the rest.",
        count,
        kept,
        threshold,
    )


def unlike(vectors: NDArray[np.floating], falling: IndexArray, threshold: float, count: int) -> IndexArray:
    """Return the positions in ``falling`` of the first ``count`` rows whose cosine with all earlier ones is no larger.

    Args:
        vectors: of all samples, of length 1 (or 0), shape (N, H).
        falling: rows of it, the best first, shape (n,).
        threshold: the largest cosine with a row that was returned before.
        count: how many are wanted; fewer are returned if no more are unlike.
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
