"""The components of one run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from dataflex.api.component import Component
from dataflex.api.mixer import Mixer
from dataflex.api.order import Order
from dataflex.api.selector import Selector
from dataflex.api.weighter import Weighter

ComponentT = TypeVar("ComponentT", bound=Component)


@dataclass(frozen=True)
class Entry(Generic[ComponentT]):
    """One component of a chain and its place in it.

    Attributes:
        component: the component.
        key: its configuration key: ``select`` if it is the only one, else ``select.0``, ``select.1`` and so on.
        every: it decides once in so many decisions (a weighter: optimizer steps).
        keep: what a selector leaves for the next one: a share of its candidates in (0, 1), or a number of samples.
            None of the last selector, which chooses what the round needs, and of weighters.
    """

    component: ComponentT
    key: str
    every: int = 1
    keep: float | None = None

    def kept_of(self, candidates: int) -> int:
        """Return how many of ``candidates`` samples are left for the next selector: at least 1, at most all."""
        assert self.keep is not None
        wanted = round(self.keep * candidates) if self.keep < 1 else int(self.keep)
        return min(max(wanted, 1), candidates)


@dataclass
class Components:
    """The components of one run: chains of selectors and weighters, at most one mixer and one order."""

    select: tuple[Entry[Selector], ...] = ()
    mix: Mixer | None = None
    order: Order | None = None
    weight: tuple[Entry[Weighter], ...] = ()

    def items(self) -> list[tuple[str, Component]]:
        """Return the present components with their configuration keys, in the order they act."""
        pairs: list[tuple[str, Component]] = [(entry.key, entry.component) for entry in self.select]
        pairs += [("mix", self.mix)] if self.mix is not None else []
        pairs += [("order", self.order)] if self.order is not None else []
        return pairs + [(entry.key, entry.component) for entry in self.weight]

    def names(self) -> dict[str, str]:
        """Return the methods of each present family: ``{"select": "dsir, less", "mix": "uniform"}``."""
        found: dict[str, list[str]] = {}
        for key, component in self.items():
            found.setdefault(family_key(key), []).append(component.name)
        return {key: ", ".join(names) for key, names in found.items()}

    @property
    def plans_data(self) -> bool:
        """Whether the data path is ours: anything but ``weight`` alone."""
        return bool(self.select) or self.mix is not None or self.order is not None


def family_key(key: str) -> str:
    """Return ``select`` for ``select`` and for ``select.0``."""
    return key.partition(".")[0]


def only(key: str, component: ComponentT | None) -> tuple[Entry[ComponentT], ...]:
    """Return the chain of one component, or the empty one."""
    return () if component is None else (Entry(component, key),)
