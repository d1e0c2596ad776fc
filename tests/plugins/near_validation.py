"""A selector written from the documentation: prefers samples that end as the validation samples do.

A sample's vector is a mean of its hidden states in which a token counts half as much as one ``half_life`` tokens nearer
to the end. A sub-task's vector is the mean of those of its validation samples, averaged over the decisions so far. The
score of a sample is its cosine with the nearest sub-task.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import torch

from dataflex import (
    HiddenStates,
    IndexArray,
    Needs,
    RoundContext,
    RunView,
    ScoreArray,
    Selector,
    SelectorParams,
    State,
    ValidationParams,
    register,
    register_measurement,
)


@register_measurement("ends")
@dataclasses.dataclass(frozen=True)
class Ends(HiddenStates):
    """One vector of length 1 for each sample, (n, H); NaN for a sample without a trained token."""

    half_life: float = 4.0

    untrained: ClassVar[float | None] = math.nan

    def reduce(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        places = mask.cumsum(1)
        weights = 0.5 ** ((places[:, -1:] - places) / self.half_life) * mask
        pooled = (weights.unsqueeze(-1) * hidden.masked_fill(~mask.unsqueeze(-1), 0)).sum(1)
        return torch.nn.functional.normalize(pooled, dim=1)


class NearValidationParams(SelectorParams, ValidationParams):
    """Parameters: how a sample's vector is made, and how fast the sub-tasks' vectors follow the model."""

    layer: int = -1
    half_life: float = 4.0
    momentum: float = 0.5


@register("selector", "near_validation")
class NearValidation(Selector[NearValidationParams]):
    """Prefers samples that end as the validation samples do."""

    state_depends_on = frozenset({"layer", "half_life"})

    def __init__(self, params: NearValidationParams) -> None:
        super().__init__(params)
        self.centres: np.ndarray | None = None

    def problems(self, run: RunView) -> Iterator[tuple[str, str]]:
        if self.params.half_life <= 0:
            yield "half_life", f"must be above 0, got {self.params.half_life}."
        if not 0 <= self.params.momentum < 1:
            yield "momentum", f"must be at least 0 and below 1, got {self.params.momentum}."

    def measurement(self) -> Ends:
        return Ends(layer=self.params.layer, half_life=self.params.half_life)

    def needs(self, run: RunView) -> Needs:
        return Needs(measurements=(self.measurement(),), validation=self.params)

    def begin(self, ctx: RoundContext) -> None:
        samples = np.arange(ctx.validation.size)
        vectors = ctx.probe.measure(self.measurement(), samples, ctx.validation)
        tasks = ctx.validation.domain_ids(samples)
        now = np.stack([np.nanmean(vectors[tasks == task], axis=0) for task in range(len(ctx.validation.domains))])
        if self.centres is None:
            self.centres = now
        else:
            self.centres = self.params.momentum * self.centres + (1 - self.params.momentum) * now

    def score(self, ctx: RoundContext, candidates: IndexArray) -> ScoreArray:
        vectors = ctx.probe.measure(self.measurement(), candidates)
        lengths = np.linalg.norm(self.centres, axis=1)
        return (vectors @ self.centres.T / lengths).max(axis=1)

    def state_dict(self) -> State:
        return {"centres": self.centres}

    def load_state_dict(self, state: State) -> None:
        self.centres = state["centres"]
