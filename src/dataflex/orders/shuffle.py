"""A new random order in every round, as in a run without ``order:``. Cost: none."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from dataflex import ComponentParams, IndexArray, KeyedPermutation, Order, RoundContext, Selection, register


@register("order", "shuffle")
class ShuffleOrder(Order[ComponentParams]):
    """Shuffles the samples of each round."""

    keeps_passes: ClassVar[bool] = True

    def arrange(self, ctx: RoundContext, selection: Selection) -> IndexArray:
        """Return a random permutation."""
        key = int.from_bytes(ctx.rng.bytes(16), "little")
        size = selection.indices.size
        return KeyedPermutation(size, key)(np.arange(size, dtype=np.int64))
