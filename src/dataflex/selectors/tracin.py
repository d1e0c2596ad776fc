"""TracIn: the influence of training samples, summed over stored checkpoints of a run.

    score(z) = max over sub-tasks j of  mean over v in V_j of  sum_i eta_i <g_i(z), g_i(v)>,

with g_i the gradient at checkpoint i and eta_i its learning rate (scaled to sum 1). The inner products are not cosines,
so large gradients, which short samples have, count more. The scores do not depend on the model in training, so they are
computed once, at the first decision.

Source: Pruthi et al., Estimating Training Data Influence by Tracing Gradient Descent (NeurIPS 2020, arXiv 2002.08484),
equation 1 (TracInCP), with projected gradients (its appendix on random projections).
Cost: one forward and backward pass over the pool and the validation samples for every checkpoint, once.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field

from dataflex import IndexArray, InputPath, RoundContext, ScoreArray, State, register
from dataflex.selectors.base_gradients import CheckpointedParams, CheckpointSelector


class TracinParams(CheckpointedParams):
    """Parameters of TracIn."""

    checkpoints: list[InputPath] = Field(
        description="Checkpoint folders of an earlier run of the same model, in order.", min_length=1
    )


@register("selector", "tracin")
class TracinSelector(CheckpointSelector[TracinParams]):
    """Prefers samples whose training steps would have reduced the validation loss during an earlier run."""

    state_depends_on: ClassVar[frozenset[str]] = frozenset(
        {
            "checkpoints",
            "checkpoint_weights",
            "preconditioner",
            "projection",
            "proj_dim",
            "projection_seed",
            "unsupported_parameters",
        }
    )

    def __init__(self, params: TracinParams) -> None:
        super().__init__(params)
        self._scores: ScoreArray | None = None
        """Scores of the pool, shape (N,); -inf if not computed yet, NaN without a trained token."""

    def expected_passes(self, decisions: int) -> int:
        """Return the number of checkpoints, as the scores are computed once."""
        return len(self.params.checkpoints)

    def score(self, ctx: RoundContext, candidates: IndexArray) -> ScoreArray:
        """Return the influence of every candidate; NaN if no token is trained on."""
        # score() must not change the state. A cache is allowed: the scores do not depend on the order of the calls.
        if self._scores is None:
            self._scores = np.full(ctx.pool.size, -np.inf, dtype=np.float32)
        missing = candidates[np.isneginf(self._scores[candidates])]
        if missing.size:
            settings = self.params.settings(normalize=False)
            self._scores[missing] = self.over_checkpoints(ctx, missing, settings).max(axis=1)
        return self._scores[candidates]

    def state_dict(self) -> State:
        """Return the scores computed so far."""
        return {} if self._scores is None else {"scores": self._scores}

    def load_state_dict(self, state: State) -> None:
        """Restore the scores."""
        self._scores = state.get("scores")
