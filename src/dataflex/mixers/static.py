"""Given proportions, the same in every round. Cost: none."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from dataflex.components import ComponentParams, Mixer, RoundContext, proportions_problem
from dataflex.registry import register


class StaticParams(ComponentParams):
    """Parameters of the static mixer."""

    proportions: list[float] = Field(description="Share of each domain, in data set order; any scale.")


@register("mixer", "static")
class StaticMixer(Mixer):
    """Keeps the given proportions."""

    Params = StaticParams

    def initial(self, ctx: RoundContext) -> NDArray[np.float64]:
        """Return the given proportions."""
        return np.asarray(self.params.proportions, dtype=np.float64)

    def mix(self, ctx: RoundContext) -> NDArray[np.float64]:
        """Return the given proportions."""
        return self.initial(ctx)

    def check_domains(self, names: tuple[str, ...]) -> tuple[str, str] | None:
        """Check length, sign and sum of the proportions."""
        problem = proportions_problem(self.params.proportions, names)
        return None if problem is None else ("proportions", problem)
