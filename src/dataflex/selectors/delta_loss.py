"""Delta-loss selection: a window that slides from the samples learned fastest to those learned slowest.

The first decision stores the loss l0 of every sample and draws uniformly. Decision number u (from 1, of U in all) ranks
the pool by the fall delta = l0 - l, largest first, and prefers the window [s, s + w N) with

    s = sigmoid(10 ((u - 1) / (U - 1) - 0.5)) (1 - w) N.

Both ends are rounded down, and the window ends early at the first negative delta. Samples are drawn without
replacement, with weight 1 inside the window and ``outside_weight`` outside.

Source: the delta-loss selector of DataFlex (arXiv 2603.26164), which has the same defaults.
Differs from it: a run with a single decision causes no division by zero, and the stored losses are part of the
checkpoint. ``relative`` ranks by delta / l0 instead, which does not favour samples of high entropy.
Cost: one forward pass over the pool per decision.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from dataflex import (
    ComponentParams,
    IndexArray,
    Losses,
    Needs,
    RoundContext,
    RunOutline,
    RunView,
    ScoreArray,
    Selector,
    State,
    ranks_among_scored,
    register,
    sample_without_replacement,
)


class DeltaLossParams(ComponentParams):
    """Parameters of the delta-loss selector."""

    window_size: float = Field(0.2, gt=0, le=1, description="Share of the pool inside the window.")
    outside_weight: float = Field(0.025, gt=0, le=1, description="Draw weight outside the window; inside it is 1.")
    relative: bool = Field(False, description="Rank by the fall divided by the first loss.")


@register("selector", "delta_loss")
class DeltaLossSelector(Selector[DeltaLossParams]):
    """Prefers a sliding window of samples, ranked by the fall of their loss."""

    def __init__(self, params: DeltaLossParams) -> None:
        super().__init__(params)
        self._baseline: ScoreArray | None = None
        """First losses of the whole pool, shape (N,); NaN if not measured yet, or without a trained token."""
        self._noted = np.zeros(0, dtype=bool)
        """Whether each sample had no first loss before this decision, shape (N,)."""
        self._decision = 1, 1
        """Number of this decision, from 1, and the number of decisions of the run."""

    def needs(self, run: RunView) -> Needs:
        """Return the losses of the candidates."""
        return Needs(measurements=(Losses(),))

    def cannot_act(self, run: RunOutline) -> str | None:
        """Return a reason if the run has a single decision, which has no earlier losses to compare with."""
        if run.decisions > 1:
            return None
        return (
            "the first decision only stores the losses and draws uniformly, and the run has no second one; lower "
            "dataflex.update_steps"
        )

    def begin(self, ctx: RoundContext) -> None:
        """Store the losses of the candidates that have no stored loss yet."""
        self._decision = ctx.update + 1, ctx.num_updates
        if self._baseline is None:
            self._baseline = np.full(ctx.pool.size, np.nan, dtype=np.float32)
        self._noted = np.isnan(self._baseline)
        new = ctx.candidates
        if not self._noted[new].all():
            # Samples without a trained token never get a first loss, so measuring them again has no use.
            new = new[self._noted[new] & ctx.pool.trained[new]]
        else:
            ctx.not_decided("the first losses are only noted, the draw is uniform")
        if new.size:
            self._baseline[new] = ctx.probe.measure(Losses(), new)

    def score(self, ctx: RoundContext, candidates: IndexArray) -> ScoreArray:
        """Return the fall of every candidate's loss; 0 if its first loss is from this decision, NaN without a loss."""
        assert self._baseline is not None
        first, noted = self._baseline[candidates], self._noted[candidates]
        if noted.all():
            return first - first  # 0, and NaN without a loss
        delta = np.where(noted, first - first, first - ctx.probe.measure(Losses(), candidates))
        if self.params.relative:
            delta = delta / np.where(first == 0, 1, first)  # from a first loss of 0 no loss can fall
        return delta

    def pick(self, scores: ScoreArray, count: int, rng: np.random.Generator) -> IndexArray:
        """Return ``count`` positions, drawn by the window of this decision, or uniformly if no loss has changed."""
        if _nothing_fell(scores):
            return sample_without_replacement((~np.isnan(scores)).astype(np.float64), count, rng)
        update, num_updates = self._decision
        return sample_without_replacement(window_weights(scores, update, num_updates, self.params), count, rng)

    def rank(self, scores: ScoreArray, picked: IndexArray) -> IndexArray | None:
        """Return the ranks by the fall, the largest first; None if no loss has changed."""
        return None if _nothing_fell(scores) else ranks_among_scored(scores, picked)

    def state_dict(self) -> State:
        """Return the first losses."""
        return {} if self._baseline is None else {"baseline": self._baseline}

    def load_state_dict(self, state: State) -> None:
        """Restore the first losses."""
        self._baseline = state.get("baseline")


def _nothing_fell(falls: ScoreArray) -> bool:
    """Return whether no loss has changed, for example because all first losses are from this decision."""
    return not np.any(falls[~np.isnan(falls)])


def window_start(update: int, num_updates: int, size: int, window_size: float) -> float:
    """Return s, the rank at which the window begins.

    Args:
        update: number of the decision, from 1.
        num_updates: number of decisions of the run.
        size: number of ranked samples.
        window_size: w, the share of the samples inside the window.
    """
    progress = (update - 1) / (num_updates - 1) if num_updates > 1 else 0.0
    return (1.0 - window_size) * size / (1.0 + math.exp(-10.0 * (progress - 0.5)))


def window_weights(
    delta: NDArray[np.floating], update: int, num_updates: int, params: DeltaLossParams
) -> NDArray[np.float64]:
    """Return the draw weight of every sample, shape (N,); 0 if ``delta`` is NaN.

    Samples are ranked by ``delta``, largest first, ties by position. The window has the ranks from floor(s) to floor(s
    + w N) - 1, at least one rank. It ends before the first negative ``delta``.
    """
    scored = np.flatnonzero(~np.isnan(delta))
    ranked = scored[np.argsort(-delta[scored], kind="stable")]
    start = window_start(update, num_updates, ranked.size, params.window_size)
    first = _whole(start)
    last = max(first + 1, _whole(start + params.window_size * ranked.size))
    weights = np.zeros(delta.shape, dtype=np.float64)
    weights[ranked] = params.outside_weight
    weights[ranked[first : min(last, np.count_nonzero(delta[scored] >= 0))]] = 1.0
    return weights


def _whole(rank: float) -> int:
    """Return the rank rounded down. A rank that is below an integer by a rounding error alone becomes that integer."""
    return math.floor(rank * (1.0 + 1e-12))
