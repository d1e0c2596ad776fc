"""DoReMi: domain weights that minimise the worst-case excess loss over a reference model.

Xie et al., "DoReMi: Optimizing Data Mixtures Speeds Up Language Model Pretraining", NeurIPS 2023, arXiv 2305.10429.
This is step 2 of three: a proxy is trained with domains drawn uniformly; in every optimizer step, over its whole
global batch (all micro-batches, all processes),

    lambda_i = (1 / tokens of domain i) * sum over its tokens of max(loss - reference loss, 0)
    alpha    <- normalised(alpha * exp(eta * lambda)),  alpha <- (1 - c) * alpha + c / K
    loss     =  sum_i alpha_i * (token-mean loss of domain i)

and the average of alpha over the steps is what the final model's domains are drawn by. A domain that a step has
nothing of keeps its last lambda, 0 before its first. In the authors' code it keeps it too, but begins at the logarithm
of the vocabulary's size; and the average there counts the weights before the first step as one step. The clip acts on
lambda alone: the reference is constant, so subtracting it changes no gradient.

Cost: the reference's forward of every batch, or nothing with a table of its losses; with gradient accumulation and
``weights: current`` a second forward of the proxy.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from dataflex import Needs, ReferenceParams, RunView, State, StepContext, register
from dataflex.mixers.base_loss_weights import StepWeightMixer, StepWeightParams, exponentiated_update


class DoReMiParams(StepWeightParams, ReferenceParams):
    """Parameters of DoReMi's proxy run."""

    reweight_eta: float = Field(1.0, gt=0, description="eta, the step size of the weights.")
    reweight_eps: float = Field(
        1e-3, ge=0, le=1, description="c, the share of the uniform distribution mixed in; every weight is at least c/K."
    )


@register("mixer", "doremi")
class DoReMiMixer(StepWeightMixer[DoReMiParams]):
    """Weighs the domains by their excess loss over the reference."""

    def __init__(self, params: DoReMiParams) -> None:
        super().__init__(params)
        self._excess: NDArray[np.float64] = np.empty(0)

    def needs(self, run: RunView) -> Needs:
        """Return the step's losses by domain, and the reference."""
        return Needs(step_losses="domains", reference=self.params)

    def problems(self, run: RunView) -> Iterator[tuple[str, str]]:
        """Yield a cap on the passes over a domain."""
        if self.params.max_epochs_per_domain is not None:
            yield (
                "max_epochs_per_domain",
                "doremi cannot have it: a domain that is used up keeps its last excess loss, which raises its weight "
                "in every later step. Leave it out.",
            )

    def updated(self, weights: NDArray[np.float64], ctx: StepContext) -> NDArray[np.float64]:
        """Return alpha after one exponentiated step along the excess losses."""
        last = self._excess if self._excess.size else np.zeros_like(weights)
        self._excess = np.where(np.isnan(ctx.excess), last, ctx.excess)
        return exponentiated_update(weights, self.params.reweight_eta * self._excess, self.params.reweight_eps)

    def state_dict(self) -> State:
        """Return the weights and the last excess loss of every domain."""
        return {**super().state_dict(), "excess": self._excess}

    def load_state_dict(self, state: State) -> None:
        """Take back what :meth:`state_dict` returned."""
        super().load_state_dict(state)
        self._excess = state["excess"]
