"""LESS: the samples whose next optimizer step would reduce the validation loss most.

With Gamma(z) the direction of Adam's next step on training sample z alone and g(v) the gradient of validation sample v,
both projected to ``proj_dim`` elements and scaled to length 1,

    score(z) = max over sub-tasks j of  mean over v in V_j of  cos(g(v), Gamma(z)).

Source: Xia et al., LESS: Selecting Influential Data for Targeted Instruction Tuning (ICML 2024, arXiv 2402.04333),
equation 3 and section 4. The paper scores once and sums the cosines of four warm-up ``checkpoints``, weighted by their
learning rates. Without ``checkpoints`` every decision scores with the model in training. ``dataflex-cli features`` and
``score`` run the paper's pipeline.
Cost: one forward and backward pass over all candidates and validation samples per decision; ``max_overhead`` bounds it.
"""

from __future__ import annotations

from dataflex import IndexArray, RoundContext, ScoreArray, register
from dataflex.selectors.base_gradients import CheckpointSelector, LessParams


@register("selector", "less")
class LessSelector(CheckpointSelector[LessParams]):
    """Prefers samples whose training step would reduce the validation loss most."""

    def score(self, ctx: RoundContext, candidates: IndexArray) -> ScoreArray:
        """Return the influence of every candidate, in [-1, 1]; NaN if no token is trained on."""
        cosines = self.measured(ctx, candidates, self.params.settings())
        return cosines.max(axis=1) if self.params.aggregation == "max" else cosines.mean(axis=1)
