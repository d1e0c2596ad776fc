"""A weighter of tokens, written from the documentation: trains on the tokens with the largest excess loss.

Of the trained tokens of a step, those whose loss exceeds the reference's most share the weight of all; the others have
weight 0.
"""

from __future__ import annotations

import torch

from dataflex import Needs, ReferenceParams, RunView, StepBatch, Weighter, WeighterParams, register


class ExcessTokensParams(WeighterParams, ReferenceParams):
    """Parameters: the share of the tokens to train on."""

    share: float = 0.6


@register("weighter", "excess_tokens")
class ExcessTokens(Weighter[ExcessTokensParams]):
    """Trains on the tokens that the reference finds easier than the model."""

    def needs(self, run: RunView) -> Needs:
        return Needs(reference=self.params)

    def weigh(self, batch: StepBatch) -> torch.Tensor:
        excess = batch.token_losses - batch.reference_losses
        least = torch.quantile(excess[batch.trained], 1 - self.params.share)
        chosen = (excess >= least) & batch.trained
        return chosen * (batch.trained.sum() / chosen.sum())
