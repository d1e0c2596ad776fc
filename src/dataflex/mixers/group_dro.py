"""Group DRO: domain weights in the loss that grow for the domains with the highest loss.

Samples are drawn by equal shares. In every optimizer step, with l_i the token-mean loss of domain i in the step and n_i
the number of the domain's samples in the pool,

    q_i <- q_i exp(eta (l_i + C / sqrt(n_i))), then scaled to sum 1; the factor is 1 for a domain without a token,

and the loss of the step is sum_i q_i l_i.

Source: Sagawa et al. 2020, arXiv 1911.08731, Algorithm 1 and the adjusted losses of section 3.3.
Differs from the algorithm, which draws the samples of a step from one group: here a step has samples of many groups and
updates the weights of all of them, as the authors' code does. The code also multiplies groups without a sample in the
batch by exp(eta C / sqrt(n_i)). Here they are left unchanged, as in the algorithm.
Cost: none without gradient accumulation. With it, one more forward pass over the samples of each step, unless
``weights: previous``.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from dataflex import StepContext, register
from dataflex.mixers.base_loss_weights import StepWeightMixer, StepWeightParams, exponentiated_update


class GroupDroParams(StepWeightParams):
    """Parameters of the group_dro mixer."""

    eta: float = Field(0.01, gt=0, description="Step size of the weights.")
    adjustment: float = Field(
        0.0, ge=0, description="C: adds C / sqrt(samples of the domain) to its loss when weights are decided."
    )


@register("mixer", "group_dro")
class GroupDroMixer(StepWeightMixer[GroupDroParams]):
    """Raises the weight in the loss of domains with a high loss."""

    def updated(self, weights: NDArray[np.float64], ctx: StepContext) -> NDArray[np.float64]:
        """Return q after one step, shape (K,), sum 1."""
        adjusted = ctx.losses + self.params.adjustment / np.sqrt(ctx.pool.domain_sizes)
        return exponentiated_update(weights, self.params.eta * np.where(np.isnan(adjusted), 0.0, adjusted))
