"""ADAPT: weights by the similarity of a sample to the validation samples (ICLR 2026, arXiv 2605.05227).

With z the embedding of a sample (:mod:`~dataflex.weighters.base_anchors`), pooled with weight t at token t, and the
anchors a, which are validation samples:

    s_i = mean over the anchors of cos(z_i, a)
    w_i = sigmoid(s_i / tau)

The weight of a sample depends on the sample and the anchors alone. The paper's tau = 1 gives almost the same weight to
all samples, because s hardly varies as long as no centre is subtracted. So the default tau is smaller, and the centre
is subtracted. ``defaults: dataflex_1`` has the values of the earlier release.

Cost: no further forward pass over the step's samples. Every ``anchor_every`` steps one forward pass over the anchors
and the samples of the centre.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from dataflex import StepBatch, register
from dataflex.weighters.base_anchors import AnchoredWeighter, AnchorParams

if TYPE_CHECKING:
    from torch import Tensor


class AdaptParams(AnchorParams):
    """Parameters of ADAPT."""

    earlier: ClassVar = {"tau": 1.0, "anchors": None, "center_samples": 0}

    tau: float = Field(
        0.1, gt=0, description="Temperature; a smaller value separates the weights of samples more. The paper has 1."
    )
    clip: float | None = Field(
        None, gt=0, le=1, description="Largest weight. If null, weights are not clipped; all are below 1."
    )


@register("weighter", "adapt")
class AdaptWeighter(AnchoredWeighter[AdaptParams]):
    """Weights samples by their cosine with validation samples."""

    elementwise = True
    reads_losses = False

    def weigh(self, batch: StepBatch) -> Tensor:
        """Return the weights of the samples, in (0, 1), shape (n,)."""
        vectors, mean = self.compared(batch)
        weights = (vectors @ mean / self.params.tau).sigmoid()
        return weights if self.params.clip is None else weights.clamp(max=self.params.clip)
