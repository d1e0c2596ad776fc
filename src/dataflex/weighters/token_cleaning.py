"""Token cleaning: trains on the tokens that a reference predicts better than the base (Pang et al., arXiv 2502.01968).

    s_t = l_base(t) - l_ref(t)              base: the model at the start of the run; both are frozen
    w_t = M / K   for the K tokens of the largest s_t among M trained tokens, else 0

K is the share ``share`` of M, rounded down. Of equal scores the first in the data are kept. ``scope: global`` compares
the tokens of all samples, ``scope: sample`` those of each sample. The factor M / K is the same for all samples, so the
coefficient of a token is known before its forward pass.

``mode: fixed`` scores all samples once before training, with a given reference. ``mode: self_evolving`` divides the
samples into ``parts`` that follow each other, and trains them in turn. All tokens of the first part have weight 1. When
the first step with samples of a further part begins, the model in training becomes the reference of this part. M and K
then count the tokens of the part.

Cost: fixed: one forward pass of the model and one of the reference over the pool. self_evolving with P parts: 2
(P - 1) / P forward passes over the pool.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from dataflex import (
    ComponentError,
    IndexArray,
    LossesByToken,
    Measurement,
    Needs,
    Pool,
    Probe,
    ReferenceParams,
    RunOutline,
    RunView,
    State,
    StepBatch,
    StepStart,
    Weighter,
    WeighterParams,
    exactly,
    register,
)

if TYPE_CHECKING:
    from torch import Tensor

Losses = list[NDArray[np.float32]]
"""Losses of the trained tokens of each sample."""

_BLOCK = 4096
"""Number of samples whose token losses are measured at a time."""


class TokenCleaningParams(WeighterParams, ReferenceParams):
    """Parameters of token cleaning."""

    reference_is_optional: ClassVar[bool] = True

    mode: Literal["fixed", "self_evolving"] = Field(
        "fixed",
        description="fixed: a given reference scores all samples before training; self_evolving: the model in training "
        "scores each part of the samples when the part begins.",
    )
    share: float = Field(0.6, gt=0, le=1, description="Share of the trained tokens that are kept.")
    scope: Literal["global", "sample"] = Field(
        "global",
        description="Tokens that are compared with each other: global, those of all samples, or of the part; sample, "
        "those of each sample.",
    )
    parts: int = Field(5, ge=2, description="Number of parts of the samples in mode self_evolving.")

    @model_validator(mode="after")
    def _reference_of_the_mode(self) -> Self:
        if self.mode == "fixed" and not self.names_reference:
            raise ValueError("mode: fixed needs reference_model, reference_losses or both")
        if self.mode == "self_evolving" and self.names_reference:
            raise ValueError(
                "mode: self_evolving takes no reference, because the model in training is the reference; remove "
                "reference_model and reference_losses, or set mode: fixed"
            )
        if self.mode == "fixed" and "parts" in self.model_fields_set:
            raise ValueError("parts is used in mode: self_evolving; remove it, or set mode: self_evolving")
        return self


@register("weighter", "token_cleaning")
class TokenCleaningWeighter(Weighter[TokenCleaningParams]):
    """Trains on the tokens that a reference predicts better than the model at the start of the run."""

    elementwise = True
    reads_losses = False
    step_reference = False
    state_depends_on = frozenset({"mode", "share", "scope", "parts"})

    def __init__(self, params: TokenCleaningParams) -> None:
        super().__init__(params)
        self._kept: NDArray[np.bool_] | None = None
        """Whether each trained token of the scored parts is kept, sample after sample. None before the first step."""
        self._factors: list[float] = []
        """M / K of each scored part."""
        self._base: NDArray[np.float32] = np.empty(0, np.float32)
        """Losses of the base at the trained tokens of the parts that are not scored yet, sample after sample."""
        self._begins: NDArray[np.int64] | None = None
        """Number of trained tokens before each sample of the pool, and then of all samples, shape (N + 1,)."""

    @property
    def _parts(self) -> int:
        return self.params.parts if self.params.mode == "self_evolving" else 1

    def needs(self, run: RunView) -> Needs:
        """Return the losses of tokens in measurements and steps, and the reference if one is given."""
        reference = self.params if self.params.names_reference else None
        return Needs(measurements=(LossesByToken(),), reference=reference, step_losses="tokens")

    def measured_samples(self, measurement: Measurement[Any], run: RunOutline) -> float:
        """Return the samples that the base, and in mode self_evolving the model in training, run over."""
        pool = sum((run.sizes or {}).values())
        return float(pool if self._parts == 1 else 2 * (pool - pool // self._parts))

    def problems(self, run: RunView) -> Iterator[tuple[str, str]]:
        """Yield why the samples cannot be scored before they are trained on."""
        if _is_on(run, "streaming"):
            yield (
                "mode",
                "the samples are scored before they are trained on, and streamed samples are not known; set "
                "streaming: false.",
            )
        if run.warmup_steps:
            yield (
                "mode",
                "the scores need the losses of the model before it trains, and no step of a warm-up is weighted; set "
                "dataflex.warmup_steps: 0.",
            )
        sequential = run.llamafactory.get("train_sampling_strategy") == "sequential"
        if self.params.mode == "self_evolving" and not (sequential or _is_on(run, "disable_shuffling")):
            yield (
                "mode",
                "self_evolving trains the parts of the data in turn, but LLaMA-Factory shuffles all samples; set "
                "disable_shuffling: true.",
            )

    def unfit(self, run: RunOutline) -> tuple[str, str] | None:
        """Return the mode if the order of the samples is not that of the data, or parts if a part is below a step."""
        if self.params.mode != "self_evolving":
            return None
        if run.pool_size is not None:
            return (
                "mode",
                "self_evolving trains the parts of the data in turn, but select, mix or order arrange the samples; "
                "remove these keys, or set mode: fixed.",
            )
        pool = sum((run.sizes or {}).values())
        if 0 < pool // self._parts < run.global_batch_size:
            return (
                "parts",
                f"{self._parts} parts of {pool} samples have fewer samples than a step ({run.global_batch_size}); use "
                f"{'mode: fixed' if pool < 2 * run.global_batch_size else f'at most {pool // run.global_batch_size}'}.",
            )
        return None

    def cannot_act(self, run: RunOutline) -> str | None:
        """Return a reason if every token is kept, or if the run ends within the first part."""
        if self.params.share == 1:
            return "share is 1, so every token has weight 1; lower share"
        pool, trained = sum((run.sizes or {}).values()), run.total_steps * run.global_batch_size
        if self.params.mode == "self_evolving" and pool and trained <= pool // self._parts:
            return (
                f"the run trains on {trained:,} samples, all in the first of {self._parts} parts, whose tokens are all "
                "kept; train longer, or raise parts"
            )
        return None

    def begin_step(self, start: StepStart) -> None:
        """Measure the base before the first step, and score the parts that begin in this step."""
        pool, probe = start.pool, start.probe
        assert pool is not None  # streaming data is refused before the run
        assert probe is not None
        bounds = self._bounds(pool)
        if self._kept is None:
            self._begin(start, pool, probe)
        if len(self._factors) < self._parts:
            last = int(np.searchsorted(bounds, start.indices.max(), side="right")) - 1
            for part in range(len(self._factors), last + 1):
                samples = np.arange(bounds[part], bounds[part + 1])
                self._score(pool, samples, partial(probe.measure, LossesByToken()))

    def _bounds(self, pool: Pool) -> IndexArray:
        """Return the first sample of each part, and then the number of samples, shape (parts + 1,)."""
        return np.arange(self._parts + 1) * pool.size // self._parts

    def _begin(self, start: StepStart, pool: Pool, probe: Probe) -> None:
        """Measure the base; score all samples in mode fixed, and keep all tokens of the first part otherwise.

        Raises:
            ComponentError: if steps were trained without the base's losses, or the samples are not in their order.
        """
        if start.step:
            raise ComponentError(
                f"token_cleaning: the run has trained {start.step} steps, and the checkpoint has no scores for these "
                "values of mode, share, scope and parts. Scores need the model before training: restore the values, or "
                "start a new run."
            )
        measure = partial(probe.measure, LossesByToken())
        if self.params.mode == "fixed":
            samples = np.arange(pool.size)
            self._kept, self._base = np.empty(0, dtype=bool), _joined(measure, pool, samples)
            self._score(pool, samples, start.reference.token_losses)
            return
        if not np.array_equal(np.sort(start.indices), np.arange(start.indices.size)):
            raise ComponentError(
                "token_cleaning: mode: self_evolving trains the parts of the data in turn, but the first step does not "
                "have the first samples; set disable_shuffling: true."
            )
        first = int(self._bounds(pool)[1])
        self._kept = np.ones(int(pool.trained_tokens[:first].sum()), dtype=bool)
        self._factors, self._base = [1.0], _joined(measure, pool, np.arange(first, pool.size))

    def _score(self, pool: Pool, samples: IndexArray, reference: Callable[[IndexArray], Losses]) -> None:
        """Decide which tokens of the next part are kept.

        Args:
            pool: the training samples.
            samples: indices of the samples of the part.
            reference: returns the token losses of the reference.
        """
        assert self._kept is not None
        counts = pool.trained_tokens[samples].astype(np.int64)
        total = int(counts.sum())
        base, self._base = self._base[:total], self._base[total:].copy()
        scores = base - _joined(reference, pool, samples)
        groups = np.arange(samples.size) if self.params.scope == "sample" else np.zeros(samples.size, np.int64)
        kept = top_tokens(scores, np.repeat(groups, counts), self.params.share)
        self._kept = np.concatenate([self._kept, kept])
        self._factors.append(total / max(1, int(kept.sum())))

    def weigh(self, batch: StepBatch) -> Tensor:
        """Return the weights of the tokens, shape (n, T)."""
        import torch

        pool = batch.pool
        assert pool is not None
        assert self._kept is not None  # begin_step() is called before weigh()
        if self._begins is None:
            self._begins = np.concatenate([[0], np.cumsum(pool.trained_tokens, dtype=np.int64)])
        parts = np.searchsorted(self._bounds(pool), batch.indices, side="right") - 1
        found = [
            self._kept[self._begins[index] : self._begins[index + 1]] * np.float32(self._factors[part])
            for index, part in zip(batch.indices.tolist(), parts.tolist(), strict=True)
        ]
        values = torch.from_numpy(np.concatenate(found))
        trained = batch.trained
        _check_count(values.numel(), int(trained.sum()))
        weights = torch.zeros_like(batch.token_losses)
        weights[trained] = values.to(weights)
        return weights

    def state_dict(self) -> State:
        """Return one bit for each scored token, and the base's losses of the tokens that are not scored yet."""
        if self._kept is None:
            return {}
        bits = np.packbits(self._kept)
        return {"kept": bits, "tokens": self._kept.size, "factors": list(self._factors), "base": self._base}

    def load_state_dict(self, state: State) -> None:
        """Restore the kept tokens and the base's losses."""
        if state:
            self._kept = np.unpackbits(state["kept"], count=state["tokens"]).astype(bool)
            self._factors, self._base = list(state["factors"]), state["base"]


def top_tokens(scores: NDArray[np.float32], owners: NDArray[np.int64], share: float) -> NDArray[np.bool_]:
    """Return whether each token has one of the largest scores of its group, (n,). Of equal scores the first are kept.

    Args:
        scores: scores of the tokens, (n,).
        owners: group of each token, (n,), ascending from 0.
        share: share of the tokens of each group that are kept.
    """
    counts = np.bincount(owners)
    part = exactly(share)
    most = np.array([max(1, int(part * count)) for count in counts.tolist()], dtype=np.int64)
    order = np.lexsort((-scores, owners))
    ranks = np.arange(scores.size) - (np.cumsum(counts) - counts)[owners]  # owners are ascending, also after the sort
    kept = np.zeros(scores.size, dtype=bool)
    kept[order] = ranks < most[owners]
    return kept


def _joined(measure: Callable[[IndexArray], Losses], pool: Pool, samples: IndexArray) -> NDArray[np.float32]:
    """Return the token losses of samples, one sample after the other. They are measured in blocks.

    Raises:
        ComponentError: if the number of losses is not that of the samples' trained tokens.
    """
    found = [np.empty(0, np.float32)]
    for begin in range(0, samples.size, _BLOCK):
        found += measure(samples[begin : begin + _BLOCK])
    losses = np.concatenate(found)
    _check_count(losses.size, int(pool.trained_tokens[samples].sum()))
    return losses


def _check_count(scored: int, trained: int) -> None:
    """Check that as many tokens have a score as are trained on.

    Raises:
        ComponentError: if the numbers differ.
    """
    if scored != trained:
        raise ComponentError(
            f"token_cleaning: {scored} tokens of a list of samples are scored, and {trained} are trained on: the "
            "collator changes the labels of the samples, so a token cannot be assigned to its score."
        )


def _is_on(run: RunView, key: str) -> bool:
    """Return whether a key of LLaMA-Factory is set and is not false, written as a value or as text."""
    value = run.llamafactory.get(key)
    return bool(value) and str(value).lower() not in ("false", "0", "none", "no")
