"""Random shares in every round: the control for mixers that decide by measurements.

The shares are drawn from a Dirichlet distribution with equal concentrations. A concentration of 1 is uniform over all
shares of sum 1. Large values stay close to equal shares. Cost: none.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from dataflex import Mixer, MixerParams, RoundContext, register


class RandomMixerParams(MixerParams):
    """Parameters of the random mixer."""

    concentration: float = Field(
        1.0, gt=0, description="Concentration of the Dirichlet distribution, the same for every domain."
    )


@register("mixer", "random")
class RandomMixer(Mixer[RandomMixerParams]):
    """Draws random shares for every round."""

    def mix(self, ctx: RoundContext) -> NDArray[np.float64]:
        """Return one draw from the Dirichlet distribution, shape (K,), sum 1."""
        return ctx.rng.dirichlet(np.full(len(ctx.pool.domains), self.params.concentration))
