"""Loss-based reweighting (Sow et al., ICLR 2025, arXiv 2502.06733).

For the n samples of an optimizer step (all micro-batches, all ranks) with losses l_i:

    h_i = delta (2 l_i - l_max - l_min) / (l_max - l_min)          in [-delta, delta]
    f_i = min(h_i + delta, delta)  linupper;  1 - h_i^2 / delta^2  quadratic;  |h_i|  extremes;  constant  uniform
    w_i = n exp(f_i / r) / sum_j exp(f_j / r)                       mean 1

``linupper`` lowers the weight of samples of low loss and gives no extra weight to outliers above the middle.
``quadratic`` prefers the middle, ``extremes`` both ends. In the paper's schedule r is large early in training. Steps
before ``warmup_steps`` are unweighted (the paper's burn-in). ``temperature_end`` moves r linearly from ``temperature``
over ``temperature_steps``.

Differs from the paper: weights have mean 1, so that the learning rate keeps its meaning. They multiply the Trainer's
token mean, which on one process is the length factor of the authors' GPT-2 trainer. ``normalization: sample`` is the
paper's mean of per-sample means, without that factor.
Cost: one gather of n numbers per step. With gradient accumulation also a forward pass over the step's samples, because
the weights of the first micro-batch depend on the losses of the last one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from dataflex import RunOutline, StepBatch, Weighter, WeighterParams, register

if TYPE_CHECKING:
    from torch import Tensor

_SPREAD_FLOOR = 1e-6
"""Smallest divisor for l_max - l_min, so that equal losses cause no division by 0."""


class LossWeighterParams(WeighterParams):
    """Parameters of loss-based reweighting."""

    strategy: Literal["linupper", "quadratic", "extremes", "uniform"] = Field(
        "linupper",
        description="Losses that get more weight: linupper, the upper half; quadratic, the middle; extremes, both "
        "ends; uniform, none.",
    )
    delta: float = Field(1.0, gt=0, description="Half the width of the range that losses are mapped to.")
    temperature: float = Field(
        1.0, gt=0, description="r: larger values make the weights more uniform; the paper's GPT-2 runs use 0.4."
    )
    temperature_end: float | None = Field(None, gt=0, description="r after temperature_steps. If null, r is constant.")
    temperature_steps: int = Field(
        1000, ge=1, description="Number of optimizer steps over which r moves to temperature_end."
    )


@register("weighter", "loss")
class LossWeighter(Weighter[LossWeighterParams]):
    """Weights samples by the position of their loss between the smallest and the largest loss of the step."""

    def cannot_act(self, run: RunOutline) -> str | None:
        """Return a reason if a step has a single sample, or the run ends before r reaches ``temperature_end``."""
        if run.global_batch_size == 1:
            return (
                "a step trains on one sample, whose weight in the step is always 1; raise "
                "per_device_train_batch_size or gradient_accumulation_steps"
            )
        if self.params.temperature_end is not None and self.params.temperature_steps > run.total_steps:
            reached = self.temperature_at(run.total_steps)
            return (
                f"temperature_end ({self.params.temperature_end:g}) is reached at step "
                f"{self.params.temperature_steps}, and the run has {run.total_steps} steps: the temperature ends at "
                f"{reached:.3g}. Lower temperature_steps"
            )
        return None

    def weigh(self, batch: StepBatch) -> Tensor:
        """Return the weights of the samples, mean 1, shape (n,)."""
        losses = batch.losses
        if self.params.strategy == "uniform":
            return losses.new_ones(losses.shape)
        values = emphasis(losses, self.params.strategy, self.params.delta)
        return (values / self.temperature_at(batch.step)).softmax(0) * losses.numel()

    def temperature_at(self, step: int) -> float:
        """Return r at an optimizer step."""
        start, end = self.params.temperature, self.params.temperature_end
        if end is None:
            return start
        return start + (end - start) * min(1.0, step / self.params.temperature_steps)


def emphasis(losses: Tensor, strategy: str, delta: float) -> Tensor:
    """Return f of the module's docstring for losses of shape (n,); equal losses have equal values."""
    low, high = losses.min(), losses.max()
    h = delta * (2 * losses - high - low) / (high - low).clamp(min=_SPREAD_FLOOR)
    if strategy == "linupper":
        return (h + delta).clamp(max=delta)
    if strategy == "quadratic":
        return 1 - (h / delta) ** 2
    return h.abs()
