"""Shared parts of the orders that sort samples by a score and arrange the sorted samples in a pattern."""

from __future__ import annotations

from typing import Literal, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from dataflex import (
    ColumnArray,
    ComponentError,
    EmbeddingArray,
    EmbeddingParams,
    IndexArray,
    Losses,
    Needs,
    Order,
    RoundContext,
    RunOutline,
    RunView,
    Selection,
    ValidationParams,
    Wrong,
    check_scores,
    unusable_score,
)
from dataflex.orders.base_patterns import shuffled_in_windows
from dataflex.orders.base_sorting import sorted_positions

_BLOCK = 1 << 14
"""Embeddings read at a time, which bounds the memory."""


class DistanceParams(EmbeddingParams, ValidationParams):
    """Parameters of embedding distances: the center of the distances, and how embeddings are computed."""

    distance_to: Literal["validation", "pool"] = Field(
        "validation", description="With by: embedding, the samples whose mean embedding distances are measured to."
    )


class ScoreParams(DistanceParams):
    """Parameters of the score, of the samples that are sorted together, and of the random order in ties and windows."""

    by: Literal["loss", "length", "selection", "column", "embedding"] = Field(
        "loss", description="Score that samples are sorted by."
    )
    column: str | None = Field(
        None, min_length=1, description="With by: column, the column of the raw data that holds a number for each row."
    )
    ties: Literal["input", "random"] = Field(
        "input", description="Order of samples with equal scores: as they arrive, or random."
    )
    jit: int = Field(
        0, ge=0, description="Size in samples of the windows that are shuffled after the pattern. 0 or 1: no shuffle."
    )

    scope: Literal["round", "run"] = Field(
        "round",
        description="round: arrange the samples of each round. run: arrange whole passes, which the rounds follow.",
    )
    passes: Literal["same", "new", "rest"] = Field(
        "same",
        description="With scope: run. same: every pass has the order of the first. new: each pass is arranged when it "
        "begins. rest: the rest of the pass is arranged again at every decision.",
    )

    @model_validator(mode="after")
    def _scope_fits(self) -> Self:
        """Refuse combinations of ``scope``, ``by`` and ``passes`` that cannot be carried out."""
        if self.scope == "run" and self.by == "selection":
            raise ValueError(
                "scope: run arranges the pool before anything is selected, so by: selection has no scores; use "
                "another score, or scope: round"
            )
        if self.scope == "round" and self.passes != "same":
            raise ValueError(
                f"passes: {self.passes} needs scope: run, and scope is round, which arranges every round; set scope: "
                "run or remove passes"
            )
        return self

    @model_validator(mode="after")
    def _column_is_there(self) -> Self:
        if self.by == "column" and self.column is None:
            raise ValueError("by: column needs the parameter column, the name of a column of the raw data")
        if self.by != "column" and self.column is not None:
            raise ValueError(
                f"column: {self.column} is used with by: column only, and by is {self.by}; set by: column or remove "
                "column"
            )
        return self

    @model_validator(mode="after")
    def _embeddings_are_used(self) -> Self:
        """Refuse parameters of embeddings that another parameter makes unused."""
        fields = DistanceParams.model_fields
        unused = [name for name, field in fields.items() if getattr(self, name) != field.default]
        if self.by != "embedding" and unused:
            raise ValueError(
                f"{', '.join(unused)}: used with by: embedding only, and by is {self.by}; set by: embedding or remove "
                "them"
            )
        if self.distance_to == "pool" and (self.validation is not None or self.subtask_column is not None):
            raise ValueError("validation and subtask_column are not used with distance_to: pool; remove them")
        return self


class CurriculumParams(ScoreParams):
    """Parameters of a pattern over sorted samples."""

    descending: bool = Field(False, description="Largest score first.")


ScoreParamsT = TypeVar("ScoreParamsT", bound=ScoreParams, covariant=True)
CurriculumParamsT = TypeVar("CurriculumParamsT", bound=CurriculumParams, covariant=True)


class ScoredOrder(Order[ScoreParamsT]):
    """Sorts samples by a score and arranges them in a pattern. Samples without a score come last."""

    @property
    def descending(self) -> bool:
        """Whether rank 0 is the largest score."""
        return False

    def pattern(self, size: int, rng: np.random.Generator) -> IndexArray:
        """Return the ranks 0 to ``size`` - 1 of the sorted samples in training order, shape (size,)."""
        raise NotImplementedError(f"order {self.name!r} does not define pattern()")

    def moves_nothing(self, samples: int) -> str | None:
        """Return why a number of samples is too small for the pattern, without a full stop, or None if it is not.

        Args:
            samples: samples that are arranged at a time.
        """
        return None

    @property
    def walks(self) -> bool:
        """Whether whole passes are arranged, instead of the samples of each round."""
        return self.params.scope == "run"

    @property
    def repeats(self) -> bool:
        """Whether every pass has the order of the first pass."""
        return self.params.passes == "same"

    @property
    def renews(self) -> bool:
        """Whether the rest of a pass is arranged again at every decision."""
        return self.params.passes == "rest"

    def outline(self, run: RunOutline, is_mixed: bool) -> list[str]:
        """Return lines of the run plan that say which samples are arranged, and when."""
        if not self.walks:
            return []
        what = "each domain is" if is_mixed else "the pool is"
        when = {
            "same": "once, at the first decision",
            "new": "when a pass over it begins",
            "rest": "for the rest of the pass, at every decision",
        }
        said = f"{what} put in order by {self._score_in_words} {when[self.params.passes]}; the rounds walk along it"
        small = [name for name, size in (run.sizes or {}).items() if is_mixed and 1 < size <= self.params.jit]
        whole = (
            f"jit: a window of {self.params.jit} samples holds all of {', '.join(small)}, so the order there is random"
        )
        return [said, whole] if small else [said]

    @property
    def _score_in_words(self) -> str:
        if self.params.by == "embedding":
            return f"the distance to the mean of the {self.params.distance_to}"
        return self.params.column or self.params.by

    @property
    def reads_scores(self) -> bool:
        """Whether the samples are sorted by the selector's scores."""
        return self.params.by == "selection"

    def needs(self, run: RunView) -> Needs:
        """Ask for the losses, the column or the embeddings that samples are sorted by."""
        embeds = self.params.by == "embedding"
        return Needs(
            measurements=(Losses(),) if self.params.by == "loss" else (),
            columns=() if self.params.column is None else (self.params.column,),
            embeddings=self.params if embeds else None,
            validation=self.params if embeds and self.params.distance_to == "validation" else None,
        )

    def column_problem(self, column: str, values: ColumnArray) -> Wrong | None:
        """Return why the values of a column cannot be scores, or None."""
        return unusable_score(column, values)

    def cannot_act(self, run: RunOutline) -> str | None:
        """Return that there is nothing to arrange, or that there are too few samples for the pattern."""
        samples = self._arranged_samples(run)
        return super().cannot_act(run) or (None if samples is None else self.moves_nothing(samples))

    def _arranged_samples(self, run: RunOutline) -> int | None:
        """Return the largest number of samples that are arranged at a time. None means unknown."""
        return run.pool_size if self.walks else run.round_samples

    def unfit(self, run: RunOutline) -> tuple[str, str] | None:
        """Return that a window of ``jit`` would hold all samples, so that nothing of the pattern would be left."""
        samples = self._arranged_samples(run)
        if samples is None or self.params.jit < max(samples, 2):
            return None
        return "jit", (
            f"a window of {self.params.jit} samples is too large: {samples} samples are arranged at a time, so the "
            "window would hold them all, and shuffling it would leave nothing of the order. Lower jit, or use method: "
            "shuffle."
        )

    def arrange(self, ctx: RoundContext, selection: Selection) -> IndexArray:
        """Return the permutation that puts the selection into the pattern."""
        scores = self._scores(ctx, selection)
        if self.params.ties == "random":
            ranked = sorted_positions(scores, self.descending, ctx.rng)
        else:
            ranked = np.argsort(-scores if self.descending else scores, kind="stable")
        scored = scores.size - int(np.isnan(scores).sum())
        ranks = shuffled_in_windows(self.pattern(scored, ctx.rng), self.params.jit, ctx.rng)
        return np.concatenate([ranked[:scored][ranks], ranked[scored:]])

    def _scores(self, ctx: RoundContext, selection: Selection) -> NDArray[np.floating]:
        """Return the score of each sample of the selection, shape (n,), by the parameter ``by``."""
        indices = selection.indices
        if self.params.by == "column":
            assert self.params.column is not None
            return ctx.pool.numbers(self.params.column)[indices]
        if self.params.by == "length":
            return ctx.pool.lengths[indices].astype(np.float64)
        if self.params.by == "loss":
            # A plan can hold a sample several times, and its loss is measured once.
            distinct, inverse = np.unique(indices, return_inverse=True)
            return check_scores(self, ctx.probe.measure(Losses(), distinct), distinct)[inverse]
        if self.params.by == "embedding":
            vectors = ctx.embeddings()
            others = ctx.embeddings(ctx.validation) if self.params.distance_to == "validation" else vectors
            return distances_to(_mean(others), vectors, indices)
        if selection.scores is None:
            raise ComponentError(
                "order.by: selection needs a selector that scores, but this selector returned no scores. Use another "
                "by."
            )
        return check_scores(self, selection.scores, indices)


def distances_to(center: NDArray[np.float64], vectors: EmbeddingArray, indices: IndexArray) -> NDArray[np.float64]:
    """Return the distances of some embeddings to a center, shape (n,).

    The distance of a sample without text, whose embedding is all zeros, is NaN.

    Args:
        center: shape (H,).
        vectors: embeddings of all samples, shape (N, H), read block by block.
        indices: the samples to return, shape (n,).
    """
    found = np.full(indices.size, np.nan)
    for begin in range(0, indices.size, _BLOCK):
        rows = np.asarray(vectors[indices[begin : begin + _BLOCK]], dtype=np.float64)
        has_text = rows.any(axis=1)
        found[begin : begin + _BLOCK][has_text] = np.linalg.norm(rows[has_text] - center, axis=1)
    return found


def _mean(vectors: EmbeddingArray) -> NDArray[np.float64]:
    """Return the mean of the embeddings, without those that are all zeros."""
    total, count = np.zeros(vectors.shape[1]), 0
    for begin in range(0, len(vectors), _BLOCK):
        rows = np.asarray(vectors[begin : begin + _BLOCK], dtype=np.float64)
        total += rows.sum(axis=0)
        count += int(rows.any(axis=1).sum())
    return total / max(count, 1)


class CurriculumOrder(ScoredOrder[CurriculumParamsT]):
    """A pattern that begins at the smallest score, or at the largest if ``descending``."""

    @property
    def descending(self) -> bool:
        """Whether rank 0 is the largest score."""
        return self.params.descending
