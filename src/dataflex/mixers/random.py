"""Fresh random proportions every round: the control for mixers that decide.

Drawn from a Dirichlet distribution with equal concentrations; 1 is uniform over the simplex, large values stay near
equal shares. Cost: none.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from dataflex import Mixer, MixerParams, RoundContext, register


class RandomMixerParams(MixerParams):
    """Parameters of the random mixer."""

    concentration: float = Field(1.0, gt=0, description="Of the Dirichlet distribution, the same for every domain.")


@register("mixer", "random")
class RandomMixer(Mixer[RandomMixerParams]):
    """Draws the proportions of every round."""

    def mix(self, ctx: RoundContext) -> NDArray[np.float64]:
        """Return one draw from the simplex."""
        return ctx.rng.dirichlet(np.full(len(ctx.pool.domains), self.params.concentration))
