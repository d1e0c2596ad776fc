"""Shares by the sizes of the domains, flattened by a temperature: p_i ~ n_i ** (1 / T).

T = 1 gives the pool's own mixture, and T -> infinity the uniform one. Multilingual pre-training uses exponents of 0.3
to 0.7 (XLM, Conneau and Lample 2019; mT5, Xue et al. 2021), which are T = 3.3 to 1.4. Cost: none.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from dataflex import Mixer, MixerParams, RoundContext, register


class ProportionalParams(MixerParams):
    """Parameters of the proportional mixer."""

    temperature: float = Field(
        1.0, gt=0, description="T in n_i ** (1 / T). 1: by size, large: nearly uniform, below 1: sharper than by size."
    )
    size: Literal["samples", "tokens"] = Field("samples", description="Unit of the domain size n_i.")


@register("mixer", "proportional")
class ProportionalMixer(Mixer[ProportionalParams]):
    """Shares by size, flattened by a temperature."""

    constant_shares: ClassVar[bool] = True

    def initial(self, ctx: RoundContext) -> NDArray[np.float64]:
        """Return the configured initial proportions, or the mixer's own."""
        return super().initial(ctx) if self.params.initial_proportions is not None else self.mix(ctx)

    def mix(self, ctx: RoundContext) -> NDArray[np.float64]:
        """Return n_i ** (1 / T), scaled to sum 1, shape (K,)."""
        sizes = ctx.pool.domain_tokens if self.params.size == "tokens" else ctx.pool.domain_sizes
        # Divide by the largest size first, so that the power cannot overflow for a small T.
        flattened = (sizes / sizes.max()) ** (1.0 / self.params.temperature)
        return flattened / flattened.sum()
