"""GraNd: samples with large gradient norms under the model in training.

    score(x) = || grad of l(x) ||_2,   exact, over all trainable parameters.

Source: Paul et al., Deep Learning on a Data Diet (NeurIPS 2021, arXiv 2107.07075), definition 2.1.
Differs from it: the paper averages over about ten initialisations of a classifier, this selector uses one pre-trained
model. ``focus: low`` reverses the order.
Cost: one forward and backward pass over the pool per decision.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from dataflex import GradientNorms, IndexArray, Needs, RoundContext, RunView, ScoreArray, SelectorParams, register
from dataflex.selectors.base_gradients import GradientParams, GradientSelector


class GrandParams(SelectorParams, GradientParams):
    """Parameters of GraNd."""

    focus: Literal["high", "low"] = Field("high", description="Prefer large gradient norms or small ones.")


@register("selector", "grand")
class GrandSelector(GradientSelector[GrandParams]):
    """Prefers samples with large gradient norms."""

    def needs(self, run: RunView) -> Needs:
        """Return the gradient norms of the candidates."""
        return Needs(measurements=(GradientNorms(self.params.settings()),))

    def score(self, ctx: RoundContext, candidates: IndexArray) -> ScoreArray:
        """Return the gradient norm of every candidate, negative with ``focus: low``; NaN if no token is trained on."""
        lengths = ctx.probe.measure(GradientNorms(self.params.settings()), candidates)
        return lengths if self.params.focus == "high" else -lengths
