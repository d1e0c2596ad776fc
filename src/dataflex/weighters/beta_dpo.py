"""Batch filter of beta-DPO: leaves out pairs whose reward gap is far from the running mean (arXiv 2407.08639).

With A_i the gap of pair i, its reward margin, for the n pairs of an optimizer step (all micro-batches, all processes):

    M <- m M + (1 - m) mean(A),    s <- m s + (1 - m) std(A)         M = s = 0 at the start; std with n - 1
    v_i = exp(-((A_i - M) / s)^2 / 2)
    w_i = n / k   for k = floor(n (1 - ratio)) pairs, drawn without replacement in proportion to v; else 0

M and s are updated before they are used. The draw is by log v_i with Gumbel noise. So it does not fail if every v is 0
in floating point, as in early steps, when s is too small. The scale of the gaps has no effect: rewards, which are beta
times the log ratios, give the same v as the log ratios themselves.

Source: Wu et al., beta-DPO: Direct Preference Optimization with Dynamic beta (NeurIPS 2024), and its code
``trainers.py``. The adaptive beta of the paper is a part of the loss and is not made here.
Cost: with gradient accumulation a forward pass over the step's pairs, because the weights of the first micro-batch
depend on the gaps of the last one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from dataflex import (
    IndexArray,
    Needs,
    RunOutline,
    RunView,
    State,
    StepBatch,
    StepStart,
    Weighter,
    WeighterParams,
    exactly,
    register,
    sample_softmax,
)

if TYPE_CHECKING:
    from torch import Tensor

Doubles = NDArray[np.float64]


class BetaDpoParams(WeighterParams):
    """Parameters of the batch filter of beta-DPO."""

    ratio: float = Field(0.2, ge=0, lt=1, description="Share of the pairs of a step that are left out.")
    momentum: float = Field(0.9, ge=0, lt=1, description="m, the momentum of the running mean and deviation.")


@register("weighter", "beta_dpo")
class BetaDpoWeighter(Weighter[BetaDpoParams]):
    """Leaves out pairs of a step by the distance of their reward gap from the running mean."""

    def __init__(self, params: BetaDpoParams) -> None:
        super().__init__(params)
        self.mean = 0.0
        """M, the running mean of the gaps."""
        self.deviation = 0.0
        """s, the running standard deviation of the gaps."""
        self._rng: np.random.Generator | None = None
        """Random numbers of the present step."""

    def needs(self, run: RunView) -> Needs:
        """Return the margins of the step's pairs."""
        return Needs(step_margins=True)

    def cannot_act(self, run: RunOutline) -> str | None:
        """Return a reason if no pair is ever left out."""
        size = run.global_batch_size
        if kept_of(size, self.params.ratio) < size:
            return None
        return f"of {size} pairs in a step none is left out with ratio {self.params.ratio:g}; raise one of both"

    def begin_step(self, start: StepStart) -> None:
        """Take the random numbers of the step."""
        self._rng = start.rng

    def weigh(self, batch: StepBatch) -> Tensor:
        """Return n / k for the pairs that are kept and 0 for the others, shape (n,)."""
        assert batch.margins is not None  # needs() name them
        assert self._rng is not None  # begin_step() is called before weigh()
        gaps = batch.margins.double().cpu().numpy()
        self.update(gaps)
        kept = sample_softmax(self.log_weights(gaps), kept_of(gaps.size, self.params.ratio), self._rng)
        return batch.losses.new_tensor(filter_weights(gaps.size, kept))

    def update(self, gaps: Doubles) -> None:
        """Move the running mean and deviation to those of a step's gaps, shape (n,).

        The deviation of a single gap is not defined, so it leaves the running one as it is.
        """
        m = self.params.momentum
        self.mean = m * self.mean + (1 - m) * float(gaps.mean())
        if gaps.size > 1:
            self.deviation = m * self.deviation + (1 - m) * float(gaps.std(ddof=1))

    def log_weights(self, gaps: Doubles) -> Doubles:
        """Return log v of each gap, shape (n,); 0 for all as long as the running deviation is 0."""
        if self.deviation == 0:
            return np.zeros(gaps.size)
        return -0.5 * ((gaps - self.mean) / self.deviation) ** 2

    def state_dict(self) -> State:
        """Return the running mean and deviation."""
        return {"mean": self.mean, "deviation": self.deviation}

    def load_state_dict(self, state: State) -> None:
        """Restore the running mean and deviation."""
        self.mean, self.deviation = float(state["mean"]), float(state["deviation"])


def kept_of(size: int, ratio: float) -> int:
    """Return how many of ``size`` pairs are kept, at least 1."""
    return max(1, int(size * (1 - exactly(ratio))))


def filter_weights(size: int, kept: IndexArray) -> Doubles:
    """Return the weights of ``size`` pairs, mean 1: equal weights for the kept ones and 0 for the others."""
    weights = np.zeros(size)
    weights[kept] = size / kept.size
    return weights
