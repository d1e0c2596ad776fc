"""LESS: the samples whose next optimizer step would most decrease the loss on a validation set.

With Gamma(z) the direction Adam's next step would take for training sample z alone, g(v) the gradient of validation
sample v, and both projected to ``proj_dim`` numbers of length 1,

    score(z) = max over sub-tasks j of  mean over v in V_j of  cos(g(v), Gamma(z)).

Source: Xia et al., LESS: Selecting Influential Data for Targeted Instruction Tuning (ICML 2024, arXiv 2402.04333),
equation 3 and section 4. The paper scores once, summing the cosines of four warm-up ``checkpoints`` weighted by their
learning rates; without them every decision scores with the model as it is. ``dataflex-cli features`` and ``score`` are
the paper's pipeline.
Cost: one forward and backward of every candidate and validation sample per update; ``max_overhead`` bounds it.
"""

from __future__ import annotations

from dataflex import IndexArray, RoundContext, ScoreArray, register
from dataflex.selectors.base_gradients import CheckpointSelector, LessParams


@register("selector", "less")
class LessSelector(CheckpointSelector[LessParams]):
    """Prefers samples that would help the validation set most."""

    def score(self, ctx: RoundContext, candidates: IndexArray) -> ScoreArray:
        """Return the influence of every candidate, in [-1, 1]; NaN where no token is trained on."""
        cosines = self.measured(ctx, candidates, self.params.settings())
        return cosines.max(axis=1) if self.params.aggregation == "max" else cosines.mean(axis=1)
