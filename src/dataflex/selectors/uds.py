"""UDS: samples with rich predictions that are unlike those trained last.

With L(x) the logits of sample x (its T tokens by the V words of the vocabulary) and z(x) a random projection of them,

    score(x) = || L(x) ||_*  +  alpha * mean over m in memory of || z(x) - z(m) ||_2,

the nuclear norm (the sum of the singular values) for what is to be learned from the sample, the distance to the
``memory`` samples trained last for diversity. Without such samples the second part is 0.

Source: Utility-Diversity Aware Online Batch Selection for LLM Supervised Fine-tuning (2025, arXiv 2510.16882) and its
code ``UDSamplingTrainer.py``, whose defaults these are. There a step is chosen from a larger batch, the scoring forward
is in training mode, padding counts, and the memory keeps projections as they were when a sample was chosen; here it is
the samples that are remembered, and their projections are made anew at each decision.
Cost: one forward over the candidates and ``memory`` samples per decision, and T^2 V operations for each norm.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import Field

from dataflex import (
    IndexArray,
    LogitNorms,
    LogitProjections,
    Measurement,
    Needs,
    RoundContext,
    RunOutline,
    RunView,
    ScoreArray,
    Selector,
    SelectorParams,
    State,
    StepStatistics,
    register,
)


class UdsParams(SelectorParams):
    """Parameters of UDS."""

    alpha: float = Field(2.5e-3, ge=0, description="Weight of the distance to the samples trained last.")
    memory: int = Field(1024, ge=0, description="How many of the samples trained last are compared with.")
    projection_rows: int = Field(8, ge=1, description="Rows of the projected logits, of all tokens.")
    projection_columns: int = Field(128, ge=1, description="Columns of the projected logits, of the whole vocabulary.")
    projection_seed: int = Field(0, ge=0, description="Seed of the projection.")


@register("selector", "uds")
class UdsSelector(Selector[UdsParams]):
    """Prefers samples with rich predictions that are far from those trained last."""

    def __init__(self, params: UdsParams) -> None:
        super().__init__(params)
        self._recent = np.empty(0, dtype=np.int64)
        """The samples trained last, the latest at the end, shape (memory or less,)."""
        self._others: ScoreArray | None = None
        """Their projections in this decision."""

    @property
    def projection(self) -> LogitProjections:
        """How logits are projected."""
        params = self.params
        return LogitProjections(params.projection_rows, params.projection_columns, params.projection_seed)

    def needs(self, run: RunView) -> Needs:
        """Return norms and projections of logits, and the samples of every step."""
        if not (self.params.memory and self.params.alpha):
            return Needs(measurements=(LogitNorms(self.projection),))
        return Needs(measurements=(LogitNorms(self.projection), self.projection), step_losses="samples")

    def measured_samples(self, measurement: Measurement[Any], run: RunOutline) -> float:
        """Return the candidates of every decision; of projections alone, the samples that are remembered."""
        if isinstance(measurement, LogitProjections):
            warmup = run.total_steps - run.decided_steps
            steps = warmup + np.arange(run.decisions) * run.decided_steps / max(run.decisions, 1)
            return float(np.minimum(steps * run.global_batch_size, self.params.memory).sum())
        return super().measured_samples(measurement, run)

    def on_step(self, statistics: StepStatistics) -> None:
        """Remember the samples of a step."""
        if self.params.memory and self.params.alpha:
            self._recent = np.concatenate([self._recent, statistics.indices])[-self.params.memory :]

    def begin(self, ctx: RoundContext) -> None:
        """Project the logits of the samples trained last."""
        self._others = ctx.probe.measure(self.projection, self._recent) if self._recent.size else None

    def score(self, ctx: RoundContext, candidates: IndexArray) -> ScoreArray:
        """Return the score of every candidate; NaN where no token is trained on."""
        found = ctx.probe.measure(LogitNorms(self.projection, self._others), candidates)
        return utility(found[:, 0], found[:, 1], self.params.alpha)

    def state_dict(self) -> State:
        """Return the samples trained last."""
        return {"recent": self._recent.copy()}

    def load_state_dict(self, state: State) -> None:
        """Take back the samples trained last; no more than are remembered now."""
        kept = np.array(state["recent"], dtype=np.int64)
        self._recent = kept[max(0, kept.size - self.params.memory) :]


def utility(norms: ScoreArray, distances: ScoreArray, alpha: float) -> ScoreArray:
    """Return nuclear norm plus alpha times mean distance of each sample, shape (n,)."""
    return (norms.astype(np.float64) + alpha * distances.astype(np.float64)).astype(np.float32)
