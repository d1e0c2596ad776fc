"""A weighter of samples: small weights for samples that the model predicts well, with mean 1."""

from __future__ import annotations

import torch
from pydantic import Field

from dataflex import StepBatch, Weighter, WeighterParams, register


class WeakSamplesParams(WeighterParams):
    """Parameters of `weak_samples`."""

    gamma: float = Field(2.0, ge=0, description="Exponent; 0 gives every sample the weight 1.")


@register("weighter", "weak_samples")
class WeakSamplesWeighter(Weighter[WeakSamplesParams]):
    """Gives sample i the weight (1 - exp(-loss_i)) ** gamma, scaled so that the mean over the step is 1."""

    def weigh(self, batch: StepBatch) -> torch.Tensor:
        weights = (1 - torch.exp(-batch.losses)) ** self.params.gamma
        return weights / weights.mean()
