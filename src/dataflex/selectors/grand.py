"""GraNd: samples with long gradients under the current model.

    score(x) = || grad of l(x) ||_2,   exact, over all trainable parameters.

Source: Paul et al., Deep Learning on a Data Diet (NeurIPS 2021, arXiv 2107.07075), definition 2.1, which averages over
about ten initialisations of a classifier; here one pre-trained model is looked at.
``focus: low`` turns the order round.
Cost: one forward and backward over the pool per update.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from dataflex import GradientNorms, IndexArray, Needs, RoundContext, RunView, ScoreArray, SelectorParams, register
from dataflex.selectors.base_gradients import GradientParams, GradientSelector


class GrandParams(SelectorParams, GradientParams):
    """Parameters of GraNd."""

    focus: Literal["high", "low"] = Field("high", description="Prefer long gradients or short ones.")


@register("selector", "grand")
class GrandSelector(GradientSelector[GrandParams]):
    """Prefers long gradients."""

    def needs(self, run: RunView) -> Needs:
        """Return the lengths of the candidates' gradients."""
        return Needs(measurements=(GradientNorms(self.params.settings()),))

    def score(self, ctx: RoundContext, candidates: IndexArray) -> ScoreArray:
        """Return the gradient's length of every candidate, negative with ``focus: low``; NaN without a loss."""
        lengths = ctx.probe.measure(GradientNorms(self.params.settings()), candidates)
        return lengths if self.params.focus == "high" else -lengths
