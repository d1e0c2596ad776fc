"""A measurement, and a selector that uses it."""

from __future__ import annotations

import dataclasses

import torch

from dataflex import (
    IndexArray,
    Measurement,
    Needs,
    RoundContext,
    RunView,
    ScoreArray,
    Selector,
    SelectorParams,
    register,
    register_measurement,
)


@register_measurement("prompt_share")
@dataclasses.dataclass(frozen=True)
class PromptShare(Measurement):
    """Share of a sample's tokens that are not trained on, shape (n,)."""

    def measure(self, batch) -> torch.Tensor:
        trained = (batch.labels >= 0).sum(1)
        return 1 - trained / batch.mask.sum(1)


@register("selector", "short_prompt")
class ShortPromptSelector(Selector[SelectorParams]):
    """Prefers samples with few prompt tokens relative to their length."""

    def needs(self, run: RunView) -> Needs:
        return Needs(measurements=(PromptShare(),))

    def score(self, ctx: RoundContext, candidates: IndexArray) -> ScoreArray:
        return -ctx.probe.measure(PromptShare(), candidates)
