"""A weighter of samples with the weights of the focal loss (Lin et al. 2017), per sample instead of per token."""

from __future__ import annotations

import torch
from pydantic import Field

from dataflex import StepBatch, Weighter, WeighterParams, register


class FocalParams(WeighterParams):
    """Parameters of `focal`."""

    gamma: float = Field(2.0, ge=0, description="Exponent; 0 gives every sample the weight 1.")


@register("weighter", "focal")
class FocalWeighter(Weighter[FocalParams]):
    """Gives sample i the weight (1 - exp(-loss_i)) ** gamma, scaled so that the mean over the step is 1."""

    def weigh(self, batch: StepBatch) -> torch.Tensor:
        weights = (1 - torch.exp(-batch.losses)) ** self.params.gamma
        return weights / weights.mean()
