"""DoReMi: domain weights that minimise the worst-case excess loss over a reference model.

Xie et al., "DoReMi: Optimizing Data Mixtures Speeds Up Language Model Pretraining", NeurIPS 2023, arXiv 2305.10429.
This mixer is step 2 of the three steps: it trains a proxy model with domains drawn uniformly. In every optimizer step,
over the whole global batch (all micro-batches, all processes),

    lambda_i = (1 / tokens of domain i) * sum over its tokens of max(loss - reference loss, 0)
    alpha    <- normalised(alpha * exp(eta * lambda)),  alpha <- (1 - c) * alpha + c / K
    loss     =  sum_i alpha_i * (token-mean loss of domain i)

The result is the average of alpha over the steps, by which the domains of the final model are drawn. A domain without a
token in the step keeps its last lambda, or 0 if it had no token so far. max(., 0) acts on lambda only: the reference
loss is constant, so subtracting it from the loss would change no gradient.

Differences from the authors' code: there the first lambda is the logarithm of the vocabulary size, and the average
counts the weights before the first step as one step.

Cost: the reference's forward pass over every batch, or nothing with a table of its losses. With gradient accumulation
and ``weights: current`` there is also a second forward pass of the proxy.
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
        1e-3, ge=0, le=1, description="c, the share of equal weights mixed in: every weight is at least c / K."
    )


@register("mixer", "doremi")
class DoReMiMixer(StepWeightMixer[DoReMiParams]):
    """Weighs the domains in the loss by their excess loss over the reference."""

    def __init__(self, params: DoReMiParams) -> None:
        super().__init__(params)
        self._excess: NDArray[np.float64] = np.empty(0)
        """Last excess loss of each domain, shape (K,). A domain that is absent from a step keeps it."""

    def needs(self, run: RunView) -> Needs:
        """Ask for the losses of each step by domain, and for the reference."""
        return Needs(step_losses="domains", reference=self.params)

    def problems(self, run: RunView) -> Iterator[tuple[str, str]]:
        """Yield that ``max_epochs_per_domain`` cannot be used with this mixer, if it is set."""
        if self.params.max_epochs_per_domain is not None:
            yield (
                "max_epochs_per_domain",
                "cannot be used with doremi: a domain that reaches the limit would keep its last excess loss, which "
                "raises its weight in every later step. Remove it.",
            )

    def updated(self, weights: NDArray[np.float64], ctx: StepContext) -> NDArray[np.float64]:
        """Return alpha after one exponentiated update with the excess losses, shape (K,), sum 1."""
        last = self._excess if self._excess.size else np.zeros_like(weights)
        self._excess = np.where(np.isnan(ctx.excess), last, ctx.excess)
        return exponentiated_update(weights, self.params.reweight_eta * self._excess, self.params.reweight_eps)

    def state_dict(self) -> State:
        """Return the weights and the last excess loss of every domain."""
        return {**super().state_dict(), "excess": self._excess}

    def load_state_dict(self, state: State) -> None:
        """Restore the state that :meth:`state_dict` returned."""
        super().load_state_dict(state)
        self._excess = state["excess"]
