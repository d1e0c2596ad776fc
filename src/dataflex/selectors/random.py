"""Uniform selection: the control that every other selector has to beat.

Each round draws its samples from the whole pool, without replacement and independently of earlier rounds. So it differs
from a selector with scores only in the scores. For passes over the data use ``full``.
Cost: none.
"""

from __future__ import annotations

import numpy as np

from dataflex import (
    ComponentParams,
    IndexArray,
    KeyedPermutation,
    RoundContext,
    RunOutline,
    Selection,
    Selector,
    register,
)


@register("selector", "random")
class RandomSelector(Selector[ComponentParams]):
    """Draws every round uniformly, without replacement."""

    may_exceed_pool = True
    scores_samples = False

    def cannot_act(self, run: RunOutline) -> str | None:
        """Return a reason if a round takes the whole pool."""
        if run.pool_size is None or run.round_samples < run.pool_size:
            return None
        return (
            f"a round takes {run.round_samples} samples and the pool has {run.pool_size}, so every sample is taken and "
            "nothing is drawn at random; lower dataflex.update_steps, or use the method full"
        )

    def choose(self, ctx: RoundContext, candidates: IndexArray, count: int) -> Selection:
        """Return ``count`` distinct candidates, ascending."""
        key = int.from_bytes(ctx.rng.bytes(16), "little")
        # Evaluates the permutation at ``count`` positions alone instead of shuffling all candidates.
        chosen = KeyedPermutation(candidates.size, key)(np.arange(count, dtype=np.int64))
        return Selection(candidates[np.sort(chosen)])
