"""Loss-based reweighting (Sow et al., ICLR 2025, arXiv 2502.06733).

Over the n samples of an optimizer step (all micro-batches, all ranks), with losses l_i:

    h_i = delta (2 l_i - l_max - l_min) / (l_max - l_min)          in [-delta, delta]
    f_i = min(h_i + delta, delta)  linupper;  1 - h_i^2 / delta^2  quadratic;  |h_i|  extremes;  constant  uniform
    w_i = n exp(f_i / r) / sum_j exp(f_j / r)                       mean 1

``linupper`` turns down samples of low loss and gives no extra weight to outliers above the middle; ``quadratic``
prefers the middle, ``extremes`` both ends. r is large early in the paper's schedule; steps before ``warmup_steps`` are
unweighted (its burn-in), and ``temperature_end`` moves r linearly from ``temperature`` over ``temperature_steps``.

Differs from the paper: weights have mean 1, so that the learning rate keeps its meaning, and multiply the Trainer's
token mean, which on one process is the length factor of the authors' GPT-2 trainer; ``normalization: sample`` is the
paper's mean of per-sample means, without it.
Cost: one gather of n numbers per step; with gradient accumulation also a forward pass over the step's samples, because
the first micro-batch's weights depend on the losses of the last.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from dataflex import RunOutline, StepBatch, Weighter, WeighterParams, register

if TYPE_CHECKING:
    from torch import Tensor

_SPREAD_FLOOR = 1e-6


class LossWeighterParams(WeighterParams):
    """Parameters of loss-based reweighting."""

    strategy: Literal["linupper", "quadratic", "extremes", "uniform"] = Field(
        "linupper", description="Which losses get more weight."
    )
    delta: float = Field(1.0, gt=0, description="Half the range that losses are mapped to.")
    temperature: float = Field(1.0, gt=0, description="r: larger is nearer to uniform; the paper's GPT-2 runs use 0.4.")
    temperature_end: float | None = Field(None, gt=0, description="r after temperature_steps; none: constant.")
    temperature_steps: int = Field(1000, ge=1, description="Optimizer steps over which r moves.")


@register("weighter", "loss")
class LossWeighter(Weighter[LossWeighterParams]):
    """Weights samples by where their loss lies in the batch."""

    def cannot_act(self, run: RunOutline) -> str | None:
        """Return that a step has one sample, or that the temperature never comes near its end."""
        if run.global_batch_size == 1:
            return (
                "a step trains on one sample, whose weight among its like is always 1; raise "
                "per_device_train_batch_size or gradient_accumulation_steps"
            )
        if self.params.temperature_end is not None and self.params.temperature_steps > run.total_steps:
            reached = self.temperature_at(run.total_steps)
            return (
                f"temperature_end ({self.params.temperature_end:g}) is for step {self.params.temperature_steps} and "
                f"the run has {run.total_steps}: it ends at {reached:.3g}. Lower temperature_steps"
            )
        return None

    def weigh(self, batch: StepBatch) -> Tensor:
        """Return the weights of the samples, mean 1."""
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
    """Return f of the module's text for losses of shape (n,); equal losses give equal values."""
    low, high = losses.min(), losses.max()
    h = delta * (2 * losses - high - low) / (high - low).clamp(min=_SPREAD_FLOOR)
    if strategy == "linupper":
        return (h + delta).clamp(max=delta)
    if strategy == "quadratic":
        return 1 - (h / delta) ** 2
    return h.abs()
