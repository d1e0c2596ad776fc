"""Focal loss: less weight for tokens that the model predicts well (Lin et al., ICCV 2017, arXiv 1708.02002).

With l the loss of a token, p = exp(-l) its probability and g = ``gamma``, the focal loss of the token is (1 - p)^g l.
Weights are constants in the gradient of a step. So ``gradient: through`` takes the weight

    w = d[(1 - p)^g l] / dl = (1 - p)^g + g l p (1 - p)^(g - 1),

with which the gradient of w l is exactly that of the focal loss. ``gradient: detached`` has w = (1 - p)^g.
With ``of: sample`` l is the token-mean loss of the sample, and all its tokens have the same weight.
Cost: none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from dataflex import Needs, RunOutline, RunView, StepBatch, Weighter, WeighterParams, register

if TYPE_CHECKING:
    from torch import Tensor


class FocalParams(WeighterParams):
    """Parameters of the focal loss."""

    gamma: float = Field(2.0, ge=0, description="Exponent of 1 - p. With 0 all weights are 1.")
    gradient: Literal["through", "detached"] = Field(
        "through",
        description="through: the weights give the gradient of the focal loss itself; detached: the factor "
        "(1 - p)^gamma is a constant.",
    )
    of: Literal["token", "sample"] = Field(
        "token", description="token: every token has its own weight; sample: a sample's weight by its token-mean loss."
    )


@register("weighter", "focal")
class FocalWeighter(Weighter[FocalParams]):
    """Weights tokens or samples by the probability that the model gives them."""

    elementwise = True

    def needs(self, run: RunView) -> Needs:
        """Return the losses of tokens, if tokens are weighted."""
        return Needs(step_losses="tokens" if self.params.of == "token" else "nothing")

    def cannot_act(self, run: RunOutline) -> str | None:
        """Return a reason if gamma is 0."""
        return "gamma is 0, so all weights are 1; raise gamma" if self.params.gamma == 0 else None

    def weigh(self, batch: StepBatch) -> Tensor:
        """Return the weights of the tokens, shape (n, T), or of the samples, shape (n,)."""
        losses = batch.token_losses if self.params.of == "token" else batch.losses
        return focal_weights(losses, self.params.gamma, through=self.params.gradient == "through")


def focal_weights(losses: Tensor, gamma: float, *, through: bool) -> Tensor:
    """Return w of the module's docstring, with the shape of the losses."""
    import torch

    missed = -torch.expm1(-losses)  # 1 - p, exact for small losses too
    factor = missed**gamma
    if not through:
        return factor
    # l / (1 - p) tends to 1 as l tends to 0, and the quotient 0 / 0 is never formed.
    quotient = torch.where(losses > 0, losses / torch.where(losses > 0, missed, 1.0), 1.0)
    return factor * (1 + gamma * quotient * torch.exp(-losses))
