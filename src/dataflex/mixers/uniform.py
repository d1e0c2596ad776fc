"""The same share for every domain, whatever its size. Cost: none."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from dataflex import Mixer, MixerParams, RoundContext, register


@register("mixer", "uniform")
class UniformMixer(Mixer[MixerParams]):
    """Equal shares."""

    constant_shares: ClassVar[bool] = True

    def initial(self, ctx: RoundContext) -> NDArray[np.float64]:
        """Return the configured initial proportions, or equal ones."""
        return super().initial(ctx) if self.params.initial_proportions is not None else self.mix(ctx)

    def mix(self, ctx: RoundContext) -> NDArray[np.float64]:
        """Return 1 / K for each of K domains."""
        count = len(ctx.pool.domains)
        return np.full(count, 1.0 / count)
