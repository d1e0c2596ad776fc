"""The components of one run."""

from __future__ import annotations

from dataclasses import dataclass

from dataflex.api.component import Component
from dataflex.api.mixer import Mixer
from dataflex.api.order import Order
from dataflex.api.selector import Selector
from dataflex.api.weighter import Weighter


@dataclass
class Components:
    """The components of one run, at most one of each family."""

    select: Selector | None = None
    mix: Mixer | None = None
    order: Order | None = None
    weight: Weighter | None = None

    def items(self) -> list[tuple[str, Component]]:
        """Return the present components with their configuration keys, in the order they act."""
        pairs = [("select", self.select), ("mix", self.mix), ("order", self.order), ("weight", self.weight)]
        return [(key, component) for key, component in pairs if component is not None]

    @property
    def plans_data(self) -> bool:
        """Whether the data path is ours: anything but ``weight`` alone."""
        return any((self.select, self.mix, self.order))
