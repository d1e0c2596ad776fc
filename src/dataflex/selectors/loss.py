"""Loss selection: samples of high, medium or low loss under the model in training.

Every round scores the pool with the token-mean loss l(x) and splits it at two quantiles into low, medium and high.
Samples are drawn without replacement, with weight ``focus_weight`` in the focused part and 1 elsewhere. With the
default weight 5 and thirds, 71 % of the draws are from the focused part.

Source: the loss selector of DataFlex (arXiv 2603.26164), which has the same defaults.
Differs from it: no sample is drawn again with replacement, and samples without a token to train on are left out and
counted.
Cost: one forward pass over the pool per decision.
"""

from __future__ import annotations

from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from dataflex import (
    ComponentParams,
    IndexArray,
    Losses,
    Needs,
    RoundContext,
    RunView,
    ScoreArray,
    Selector,
    quantiles,
    ranks_among_scored,
    register,
    sample_without_replacement,
)

_BLOCK = 1 << 15
"""Losses that are processed at a time, so that they stay in the processor's cache."""


class LossParams(ComponentParams):
    """Parameters of the loss selector."""

    focus: Literal["high", "medium", "low"] = Field("medium", description="Part of the losses that is preferred.")
    focus_weight: float = Field(
        5.0, gt=0, description="Draw weight of a sample in the focused part; elsewhere it is 1."
    )
    quantiles: tuple[float, float] = Field(
        (0.33, 0.66), description="Quantiles at which low ends and high begins, in (0, 1)."
    )
    temperature: float = Field(1.0, gt=0, description="Draw in proportion to weight ** (1 / temperature).")

    @model_validator(mode="after")
    def _quantiles_ascend(self) -> Self:
        low, high = self.quantiles
        if not 0 < low < high < 1:
            raise ValueError(f"quantiles must satisfy 0 < low < high < 1, got {self.quantiles}")
        return self


@register("selector", "loss")
class LossSelector(Selector[LossParams]):
    """Draws samples by the quantile of their loss."""

    def needs(self, run: RunView) -> Needs:
        """Return the losses of the candidates."""
        return Needs(measurements=(Losses(),))

    def score(self, ctx: RoundContext, candidates: IndexArray) -> ScoreArray:
        """Return the loss of every candidate; NaN if no token is trained on."""
        return ctx.probe.measure(Losses(), candidates)

    def pick(self, scores: ScoreArray, count: int, rng: np.random.Generator) -> IndexArray:
        """Return ``count`` positions, drawn by the weight of their part."""
        return sample_without_replacement(focus_weights(scores, self.params), count, rng, self.params.temperature)

    def rank(self, scores: ScoreArray, picked: IndexArray) -> IndexArray | None:
        """Return the ranks from the preferred end; None for ``medium``, which prefers neither end."""
        if self.params.focus == "medium":
            return None
        return ranks_among_scored(scores if self.params.focus == "high" else -scores, picked)


def focus_weights(losses: ScoreArray, params: LossParams) -> NDArray[np.float32]:
    """Return the draw weight of every sample, shape (N,); 0 if the loss is NaN."""
    weights = np.zeros(losses.size, dtype=np.float32)
    # The maximum is NaN if any loss is. Without a NaN no copy is needed.
    scored = losses[~np.isnan(losses)] if np.isnan(losses.max(initial=-np.inf)) else losses
    if not scored.size:
        return weights
    low, high = quantiles(scored, params.quantiles)
    for begin in range(0, losses.size, _BLOCK):
        block = losses[begin : begin + _BLOCK]
        if params.focus == "medium":
            focused = (block > low) & (block <= high)
        else:
            focused = block <= low if params.focus == "low" else block > high
        found = np.where(focused, np.float32(params.focus_weight), np.float32(1))
        found[np.isnan(block)] = 0.0
        weights[begin : begin + _BLOCK] = found
    return weights
