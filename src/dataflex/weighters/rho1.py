"""Selective language modelling: trains on the tokens of high excess loss (Rho-1, Lin et al. 2024, arXiv 2404.07965).

    e_t = l_t - r_t                     l: loss of the model in training, r: loss of the reference
    w_t = N / K   for the K tokens of the largest e_t among N trained tokens, else 0

K is the share ``share`` of N, rounded down, and at least 1. Tokens of equal excess are kept in the order of the plan.
``scope: batch`` compares all tokens of the optimizer step (all micro-batches, all ranks), so that the loss is the mean
over the kept tokens. ``scope: sample`` compares the tokens of each sample, with N and K of this sample.

Cost: one forward pass of the reference over the step's samples, or a table of its losses. ``scope: batch`` gathers the
token losses and, with gradient accumulation, has a forward pass over the step's samples.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from dataflex import (
    ComponentError,
    Needs,
    ReferenceParams,
    RunOutline,
    RunView,
    StepBatch,
    Weighter,
    WeighterParams,
    register,
)
from dataflex.weighters.base_top_tokens import top_weights

if TYPE_CHECKING:
    from torch import Tensor


class Rho1Params(WeighterParams, ReferenceParams):
    """Parameters of selective language modelling."""

    share: float = Field(0.6, gt=0, le=1, description="Share of the trained tokens that are kept.")
    scope: Literal["batch", "sample"] = Field(
        "batch",
        description="Tokens that are compared with each other: batch, those of the optimizer step; sample, those of "
        "each sample.",
    )


@register("weighter", "rho1")
class Rho1Weighter(Weighter[Rho1Params]):
    """Trains on the tokens whose loss exceeds the reference's loss most."""

    def __init__(self, params: Rho1Params) -> None:
        super().__init__(params)
        self.elementwise = params.scope == "sample"

    def needs(self, run: RunView) -> Needs:
        """Return the reference."""
        return Needs(reference=self.params)

    def cannot_act(self, run: RunOutline) -> str | None:
        """Return a reason if every token is kept."""
        return "share is 1, so every token has weight 1; lower share" if self.params.share == 1 else None

    def weigh(self, batch: StepBatch) -> Tensor:
        """Return the weights of the tokens, shape (n, T)."""
        trained = batch.trained
        excess = batch.token_losses - batch.reference_losses
        if not bool(excess.isfinite().all()):  # the model's own losses are finite
            raise ComponentError(
                f"rho1: the reference's loss of a token of step {batch.step + 1} is not finite: the reference model "
                "overflows in this precision, or the table of its losses is damaged."
            )
        if self.params.scope == "sample":
            return top_weights(excess, trained, self.params.share)
        weights = top_weights(excess.reshape(1, -1), trained.reshape(1, -1), self.params.share)
        return weights.reshape(trained.shape)
