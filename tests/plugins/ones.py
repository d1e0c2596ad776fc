"""A weighter that gives every sample the weight 1."""

import torch

from dataflex import StepBatch, Weighter, WeighterParams, register


@register("weighter", "ones")
class Ones(Weighter[WeighterParams]):
    """Gives the weight 1."""

    def weigh(self, batch: StepBatch) -> torch.Tensor:
        return torch.ones_like(batch.losses)
