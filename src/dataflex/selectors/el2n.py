"""EL2N: samples on which the model's predictions are far from the answer.

    score(x) = mean over trained tokens of || softmax(f(x)_t) - onehot(y_t) ||_2,   in [0, sqrt(2)].

Source: Paul et al., Deep Learning on a Data Diet (NeurIPS 2021, arXiv 2107.07075), definition 2.3, for one prediction.
The mean over a sample's tokens is that of Marion et al. (2023, arXiv 2309.04564) for language models.
Differs from it: the paper averages over about ten training runs, this selector uses the model in training alone.
``focus: low`` reverses the order.
Cost: one forward pass over the pool per decision.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from dataflex import (
    ErrorNorms,
    IndexArray,
    Needs,
    RoundContext,
    RunView,
    ScoreArray,
    Selector,
    SelectorParams,
    register,
)


class El2nParams(SelectorParams):
    """Parameters of EL2N."""

    focus: Literal["high", "low"] = Field("high", description="Prefer large errors or small ones.")


@register("selector", "el2n")
class El2nSelector(Selector[El2nParams]):
    """Prefers samples with large prediction errors."""

    def needs(self, run: RunView) -> Needs:
        """Return the error norms of the candidates."""
        return Needs(measurements=(ErrorNorms(),))

    def score(self, ctx: RoundContext, candidates: IndexArray) -> ScoreArray:
        """Return the error of every candidate, negative with ``focus: low``; NaN if no token is trained on."""
        errors = ctx.probe.measure(ErrorNorms(), candidates)
        return errors if self.params.focus == "high" else -errors
