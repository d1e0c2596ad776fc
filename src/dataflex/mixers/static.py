"""Given proportions, the same in every round. Cost: none."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from dataflex.components import DomainParams, Mixer, RoundContext, Shares, shares_of, shares_problem
from dataflex.registry import register


class StaticParams(DomainParams):
    """Parameters of the static mixer."""

    proportions: Shares = Field(
        description="Share of each domain, any scale: list in domain order, mapping by name, or a JSON file of one."
    )
    unit: Literal["samples", "tokens"] = Field(
        "samples", description="What the shares are of; of tokens, they are divided by the domains' mean lengths."
    )


@register("mixer", "static")
class StaticMixer(Mixer):
    """Keeps the given proportions."""

    Params = StaticParams

    def initial(self, ctx: RoundContext) -> NDArray[np.float64]:
        """Return the given proportions, as shares of samples."""
        shares = shares_of(self.params.proportions, ctx.pool.domains)
        if self.params.unit == "tokens":
            shares = shares / (ctx.pool.domain_tokens / ctx.pool.domain_sizes)
        return shares

    def mix(self, ctx: RoundContext) -> NDArray[np.float64]:
        """Return the given proportions."""
        return self.initial(ctx)

    def check_domains(self, names: tuple[str, ...]) -> tuple[str, str] | None:
        """Check names or length, sign and sum of the proportions."""
        problem = shares_problem(self.params.proportions, names)
        return None if problem is None else ("proportions", problem)
