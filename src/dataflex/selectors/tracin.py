"""TracIn: the influence of training samples summed over stored checkpoints of a run.

    score(z) = max over sub-tasks j of  mean over v in V_j of  sum_i eta_i <g_i(z), g_i(v)>,

with g_i the gradient at checkpoint i and eta_i its learning rate (scaled to sum 1). Inner products, not cosines: long
gradients, which short samples have, count more. The scores depend on the checkpoints alone, so they are made once, at
the first decision.

Source: Pruthi et al., Estimating Training Data Influence by Tracing Gradient Descent (NeurIPS 2020, arXiv 2002.08484),
equation 1 (TracInCP), with sketched gradients (its appendix on random projections).
Cost: one forward and backward of the pool and the validation samples for every checkpoint, once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field

from dataflex.components import ComponentParams, RoundContext, State
from dataflex.data.sampling import IndexArray
from dataflex.influence import CheckpointParams, InfluenceParams, InfluenceSelector
from dataflex.registry import register
from dataflex.selection import ScoreArray

if TYPE_CHECKING:
    from dataflex.config import RunConfig


class TracinParams(InfluenceParams, CheckpointParams):
    """Parameters of TracIn."""

    checkpoints: list[str] = Field(
        description="Checkpoint folders of an earlier run of the same model, in order.", min_length=1
    )


@register("selector", "tracin")
class TracinSelector(InfluenceSelector):
    """Prefers samples whose steps would have helped the validation set during an earlier run."""

    Params: ClassVar[type[ComponentParams]] = TracinParams

    def __init__(self, params: TracinParams) -> None:
        super().__init__(params)
        self._scores: ScoreArray | None = None
        """Scores of the pool, shape (N,); NaN where not made yet."""

    def problems(self, run: RunConfig) -> Iterator[tuple[str, str]]:
        """Yield what shows before a model is loaded."""
        yield from super().problems(run)
        yield from self.params.checkpoint_problems()

    def score(self, ctx: RoundContext, candidates: IndexArray) -> ScoreArray:
        """Return the influence of every candidate; NaN where no token is trained on."""
        if self._scores is None:
            self._scores = np.full(ctx.pool.size, np.nan, dtype=np.float32)
        if np.isnan(self._scores[candidates]).all():
            settings = self.params.settings(normalize=False)
            self._scores[candidates] = self.over_checkpoints(ctx, candidates, settings).max(axis=1)
        return self._scores[candidates]

    def state_dict(self) -> State:
        """Return the scores made so far."""
        return {} if self._scores is None else {"scores": self._scores}

    def load_state_dict(self, state: State) -> None:
        """Take back the scores."""
        self._scores = state.get("scores")
