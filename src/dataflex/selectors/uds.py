"""UDS: samples with rich predictions that are unlike the samples trained last.

With L(x) the logits of sample x (its T tokens by the V words of the vocabulary) and z(x) a random projection of L(x),

    score(x) = || L(x) ||_*  +  alpha * mean over m in memory of || z(x) - z(m) ||_2.

The nuclear norm (the sum of the singular values) stands for the utility of the sample. The distance to the last
``memory`` trained samples stands for diversity. As long as nothing was trained the second part is 0.

Source: Utility-Diversity Aware Online Batch Selection for LLM Supervised Fine-tuning (2025, arXiv 2510.16882) and its
code ``UDSamplingTrainer.py``, which has the same defaults.
Differs from it: the source chooses a step from a larger batch, its scoring forward is in training mode, and padding
counts. Its memory stores projections from the time a sample was chosen. Here the memory stores the samples, and each
decision computes their projections again.
Cost: one forward pass over the candidates and the ``memory`` samples per decision, and T^2 V operations for each norm.
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
    memory: int = Field(1024, ge=0, description="Number of samples trained last that candidates are compared with.")
    projection_rows: int = Field(8, ge=1, description="Number of rows that the logits of all tokens are projected to.")
    projection_columns: int = Field(
        128, ge=1, description="Number of columns that the logits of the whole vocabulary are projected to."
    )
    projection_seed: int = Field(0, ge=0, description="Seed of the projection.")


@register("selector", "uds")
class UdsSelector(Selector[UdsParams]):
    """Prefers samples with rich predictions that are far from the samples trained last."""

    def __init__(self, params: UdsParams) -> None:
        super().__init__(params)
        self._recent = np.empty(0, dtype=np.int64)
        """The samples trained last, the latest at the end, shape (memory or less,)."""
        self._others: ScoreArray | None = None
        """Projections of the samples trained last, in this decision."""

    @property
    def projection(self) -> LogitProjections:
        """The measurement that projects logits."""
        params = self.params
        return LogitProjections(params.projection_rows, params.projection_columns, params.projection_seed)

    def needs(self, run: RunView) -> Needs:
        """Return norms and projections of logits, and the samples of every step.

        Without ``memory`` or ``alpha`` only the norms are needed.
        """
        if not (self.params.memory and self.params.alpha):
            return Needs(measurements=(LogitNorms(self.projection),))
        return Needs(measurements=(LogitNorms(self.projection), self.projection), step_losses="samples")

    def measured_samples(self, measurement: Measurement[Any], run: RunOutline) -> float:
        """Return the candidates of all decisions; for projections, the samples in memory at every decision."""
        if isinstance(measurement, LogitProjections):
            warmup = run.total_steps - run.decided_steps
            steps = warmup + np.arange(run.decisions) * run.decided_steps / max(run.decisions, 1)
            return float(np.minimum(steps * run.global_batch_size, self.params.memory).sum())
        return super().measured_samples(measurement, run)

    def on_step(self, statistics: StepStatistics) -> None:
        """Store the samples of a step in the memory."""
        if self.params.memory and self.params.alpha:
            self._recent = np.concatenate([self._recent, statistics.indices])[-self.params.memory :]

    def begin(self, ctx: RoundContext) -> None:
        """Project the logits of the samples trained last."""
        self._others = ctx.probe.measure(self.projection, self._recent) if self._recent.size else None

    def score(self, ctx: RoundContext, candidates: IndexArray) -> ScoreArray:
        """Return the score of every candidate; NaN if no token is trained on."""
        found = ctx.probe.measure(LogitNorms(self.projection, self._others), candidates)
        return utility(found[:, 0], found[:, 1], self.params.alpha)

    def state_dict(self) -> State:
        """Return the samples trained last."""
        return {"recent": self._recent.copy()}

    def load_state_dict(self, state: State) -> None:
        """Restore the samples trained last, at most ``memory`` of them."""
        kept = np.array(state["recent"], dtype=np.int64)
        self._recent = kept[max(0, kept.size - self.params.memory) :]


def utility(norms: ScoreArray, distances: ScoreArray, alpha: float) -> ScoreArray:
    """Return the nuclear norm plus alpha times the mean distance of each sample, shape (n,), float32."""
    return (norms.astype(np.float64) + alpha * distances.astype(np.float64)).astype(np.float32)
