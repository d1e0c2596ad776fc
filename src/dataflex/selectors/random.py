"""Uniform selection: the control every other selector has to beat.

Each round draws its samples from the whole pool, without replacement and independently of the rounds before, so it
differs from a scored selector only in the scores. For passes over the data use ``full``.
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
        """Return that a round takes the whole pool."""
        if run.pool_size is None or run.round_samples < run.pool_size:
            return None
        return (
            f"a round takes {run.round_samples} samples and the pool has {run.pool_size}, so every sample is taken and "
            "nothing is drawn from them; lower dataflex.update_steps, or name it full"
        )

    def choose(self, ctx: RoundContext, candidates: IndexArray, count: int) -> Selection:
        """Return ``count`` distinct candidates, ascending."""
        key = int.from_bytes(ctx.rng.bytes(16), "little")
        chosen = KeyedPermutation(candidates.size, key)(np.arange(count, dtype=np.int64))
        return Selection(candidates[np.sort(chosen)])
