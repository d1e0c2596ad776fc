"""Given shares, the same in every round. Cost: none."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from dataflex import DomainParams, Mixer, RoundContext, Shares, State, register, shares_of, shares_problem


class StaticParams(DomainParams):
    """Parameters of the static mixer."""

    proportions: Shares = Field(
        description="Share of each domain, any scale: list in domain order, mapping by name, or JSON file.",
        examples=[{"code": 0.7, "docs": 0.3}],
    )
    unit: Literal["samples", "tokens"] = Field(
        "samples",
        description="Unit of the shares. tokens: divided by the domains' mean lengths to get shares of samples.",
    )


@register("mixer", "static")
class StaticMixer(Mixer[StaticParams]):
    """Uses the given shares in every round."""

    constant_shares: ClassVar[bool] = True
    state_depends_on: ClassVar[frozenset[str]] = frozenset({"proportions"})

    def __init__(self, params: StaticParams) -> None:
        super().__init__(params)
        self._shares: NDArray[np.float64] | None = None
        """The shares read from a file, stored because the file may change during the run."""

    def initial(self, ctx: RoundContext) -> NDArray[np.float64]:
        """Return the given shares as shares of samples, shape (K,)."""
        given = self.params.proportions
        shares = shares_of(given, ctx.pool.domains) if self._shares is None else self._shares
        if isinstance(given, str):
            self._shares = shares
        if self.params.unit == "tokens":
            shares = shares / (ctx.pool.domain_tokens / ctx.pool.domain_sizes)
        return shares

    def mix(self, ctx: RoundContext) -> NDArray[np.float64]:
        """Return the given shares."""
        return self.initial(ctx)

    def state_dict(self) -> State:
        """Return the shares, if they have been used."""
        return {} if self._shares is None else {"shares": self._shares}

    def load_state_dict(self, state: State) -> None:
        """Restore the state that :meth:`state_dict` returned."""
        self._shares = state.get("shares") if isinstance(self.params.proportions, str) else None

    def check_domains(self, names: tuple[str, ...]) -> tuple[str, str] | None:
        """Check the names, number, sign and sum of the shares."""
        problem = shares_problem(self.params.proportions, names)
        return None if problem is None else ("proportions", problem)
