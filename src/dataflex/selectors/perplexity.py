"""Perplexity filtering: the samples in the middle, at the low or at the high end of the losses.

l(x) is the mean cross entropy of all trained tokens of x, the logarithm of its perplexity. The N candidates with a loss
are ranked from 0 to N - 1, and k of them are chosen:

    middle:  ranks (N - k) // 2  to  (N - k) // 2 + k - 1,      score(x) = -2 |rank(x) - (N - 1) / 2 + 1/4| / N
    low:     the k smallest,                                    score(x) = -l(x)
    high:    the k largest,                                     score(x) =  l(x)

Of two ranks that are equally far from the middle, the quarter prefers the lower one. So the best k scores are exactly
the ranks above, for every k.

Source: Marion et al., When Less is More: Investigating Data Pruning for Pretraining LLMs at Scale (2023, arXiv
2309.04564), who keep the middle half by the perplexity of a reference model. Ankner et al., Perplexed by Perplexity
(2024, arXiv 2405.20541), for whom the best part depends on the data.
Cost: one forward pass over the candidates per decision. With a reference, one forward pass of the reference over the
pool per run.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from dataflex import (
    IndexArray,
    Losses,
    Needs,
    ReferenceParams,
    RoundContext,
    RunView,
    ScoreArray,
    Selector,
    SelectorParams,
    register,
)
from dataflex.selectors.base_middle import nearness_to_middle


class PerplexityParams(SelectorParams, ReferenceParams):
    """Parameters of perplexity filtering."""

    reference_is_optional: ClassVar[bool] = True

    focus: Literal["middle", "low", "high"] = Field("middle", description="Part of the perplexities that is preferred.")


@register("selector", "perplexity")
class PerplexitySelector(Selector[PerplexityParams]):
    """Prefers samples of medium, low or high perplexity under the model in training or a reference."""

    def needs(self, run: RunView) -> Needs:
        """Return the reference if one is named, else the losses of the candidates."""
        if self.params.names_reference:
            return Needs(reference=self.params)
        return Needs(measurements=(Losses(),), token_losses=True)

    def score(self, ctx: RoundContext, candidates: IndexArray) -> ScoreArray:
        """Return the score of every candidate by the formulas of the module's docstring; NaN without a loss."""
        if self.params.names_reference:
            losses = ctx.reference.losses(candidates)
        else:
            losses = ctx.probe.measure(Losses(), candidates)
        if self.params.focus == "middle":
            return nearness_to_middle(losses)
        return losses if self.params.focus == "high" else -losses
