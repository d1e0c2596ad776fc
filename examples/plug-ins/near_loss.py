"""A selector with a parameter and a state."""

from __future__ import annotations

import numpy as np
from pydantic import Field

from dataflex import (
    IndexArray,
    Losses,
    Needs,
    RoundContext,
    RunView,
    ScoreArray,
    Selector,
    SelectorParams,
    State,
    register,
)


class NearLossParams(SelectorParams):
    """Parameters of `near_loss`."""

    quantile: float = Field(0.5, gt=0, lt=1, description="Quantile of the losses that is the first target.")
    decay: float = Field(0.9, gt=0, le=1, description="Factor on the target after every decision.")


@register("selector", "near_loss")
class NearLossSelector(Selector[NearLossParams]):
    """Prefers samples whose loss is near a target that falls from decision to decision."""

    def __init__(self, params: NearLossParams) -> None:
        super().__init__(params)
        self.target: float | None = None

    def needs(self, run: RunView) -> Needs:
        return Needs(measurements=(Losses(),))

    def begin(self, ctx: RoundContext) -> None:
        if self.target is None:
            some = ctx.candidates[:: max(1, ctx.candidates.size // 64)]
            self.target = float(np.nanquantile(ctx.probe.measure(Losses(), some), self.params.quantile))
        else:
            self.target *= self.params.decay

    def score(self, ctx: RoundContext, candidates: IndexArray) -> ScoreArray:
        return -np.abs(ctx.probe.measure(Losses(), candidates) - self.target)

    def state_dict(self) -> State:
        return {"target": self.target}

    def load_state_dict(self, state: State) -> None:
        self.target = state["target"]
