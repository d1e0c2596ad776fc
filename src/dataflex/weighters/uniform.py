"""Weight 1 for every sample: plain training, the control for all other weighters. Cost: none."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dataflex import StepBatch, Weighter, WeighterParams, register

if TYPE_CHECKING:
    from torch import Tensor


@register("weighter", "uniform")
class UniformWeighter(Weighter[WeighterParams]):
    """Gives every sample the weight 1."""

    elementwise = True
    reads_losses = False

    def weigh(self, batch: StepBatch) -> Tensor:
        """Return ones, shape (n,)."""
        return batch.losses.new_ones(batch.losses.shape)
