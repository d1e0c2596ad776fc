"""Group DRO: weigh the domains in the loss so that the worst one counts most.

Samples are drawn by equal shares. At every optimizer step, with l_i the token-mean loss of domain i in it and n_i the
samples of the domain in the pool,

    q_i <- q_i exp(eta (l_i + C / sqrt(n_i))), then scaled to sum 1; a domain the step has nothing of: factor 1,

and the step is made on sum_i q_i l_i.

Source: Sagawa et al. 2020, arXiv 1911.08731, Algorithm 1 and the adjusted losses of section 3.3.
Differs from it: a step has samples of many groups, and updates each of those, where the algorithm draws one group. The
authors' code does so too, but multiplies groups a batch lacks by exp(eta C / sqrt(n_i)); the algorithm leaves them.
Cost: none without gradient accumulation; with it one more forward over each step's samples, unless
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
        0.0, ge=0, description="C of C / sqrt(samples), added to a domain's loss when weights are decided."
    )


@register("mixer", "group_dro")
class GroupDroMixer(StepWeightMixer[GroupDroParams]):
    """Raises the weight of domains of high loss in the loss."""

    def updated(self, weights: NDArray[np.float64], ctx: StepContext) -> NDArray[np.float64]:
        """Return q after one step, shape (K,), sum 1."""
        adjusted = ctx.losses + self.params.adjustment / np.sqrt(ctx.pool.domain_sizes)
        return exponentiated_update(weights, self.params.eta * np.where(np.isnan(adjusted), 0.0, adjusted))
