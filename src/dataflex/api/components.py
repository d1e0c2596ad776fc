"""The components of one run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from dataflex.api.component import Component
from dataflex.api.measurement import UNREGISTERED, Measurement, is_registered
from dataflex.api.mixer import Mixer
from dataflex.api.needs import Needs, RunView
from dataflex.api.order import Order
from dataflex.api.params import EmbeddingParams, ValidationParams
from dataflex.api.reference import ReferenceParams
from dataflex.api.selector import Selector
from dataflex.api.source import label_of
from dataflex.api.weighter import Weighter
from dataflex.data.sampling import exactly
from dataflex.errors import ConfigError, Problem

ComponentT = TypeVar("ComponentT", bound=Component)


@dataclass(frozen=True)
class Entry(Generic[ComponentT]):
    """One component of a chain, and its settings in the chain.

    Attributes:
        component: the component.
        key: its configuration key: ``select`` for the only entry, otherwise ``select.0``, ``select.1`` and so on.
        every: the component acts at every ``every``-th decision (for a weighter, optimizer step).
        keep: the samples that a selector leaves for the next selector: a share of its candidates in (0, 1), or a number
            of samples. None for the last selector, which chooses the samples of the round, and for weighters.
    """

    component: ComponentT
    key: str
    every: int = 1
    keep: float | None = None

    def kept_of(self, candidates: int) -> int:
        """Return how many of ``candidates`` samples are left for the next selector: at least 1, at most all."""
        assert self.keep is not None
        wanted = round(exactly(self.keep) * candidates) if self.keep < 1 else int(self.keep)
        return min(max(wanted, 1), candidates)


@dataclass
class Components:
    """The components of one run: chains of selectors and weighters, at most one mixer and one order."""

    select: tuple[Entry[Selector], ...] = ()
    mix: Mixer | None = None
    order: Order | None = None
    weight: tuple[Entry[Weighter], ...] = ()

    def items(self) -> list[tuple[str, Component]]:
        """Return the components of the run with their configuration keys, in the order in which they act."""
        pairs: list[tuple[str, Component]] = [(entry.key, entry.component) for entry in self.select]
        pairs += [("mix", self.mix)] if self.mix is not None else []
        pairs += [("order", self.order)] if self.order is not None else []
        return pairs + [(entry.key, entry.component) for entry in self.weight]

    def names(self) -> dict[str, str]:
        """Return the methods of each configured family, such as ``{"select": "dsir, less", "mix": "uniform"}``."""
        found: dict[str, list[str]] = {}
        for key, component in self.items():
            found.setdefault(family_key(key), []).append(component.name)
        return {key: ", ".join(names) for key, names in found.items()}

    def needs(self, run: RunView) -> dict[str, Needs]:
        """Return the needs of each component, by configuration key.

        Raises:
            ConfigError: if a component needs something that cannot be provided.
        """
        found, problems = {}, []
        for key, component in self.items():
            found[key] = component.needs(run)
            wrong = _unfit(found[key])
            if wrong is not None:
                problems.append(Problem(f"dataflex.{key}", f"{label_of(component, ('needs',))} {wrong}"))
        if problems:
            raise ConfigError(problems=problems)
        return found

    @property
    def plans_data(self) -> bool:
        """Whether DataFlex loads the data: true unless ``weight`` is the only family."""
        return bool(self.select) or self.mix is not None or self.order is not None


def _unfit(needs: Needs) -> str | None:
    """Return the error in the needs that the code of a component returned, or None."""
    if not isinstance(needs, Needs):
        return f"returned a {type(needs).__name__} from needs(); a dataflex.Needs is needed."
    measured = needs.measurements
    if not isinstance(measured, tuple) or not all(isinstance(each, Measurement) for each in measured):
        return f"asks for measurements {measured!r}; a tuple of measurements is needed, such as (Losses(),)."
    for each in measured:
        if not is_registered(each):
            return f"asks for {type(each).__name__}, {UNREGISTERED}."
    groups: dict[str, tuple[Any, type]] = {
        "validation": (needs.validation, ValidationParams),
        "reference": (needs.reference, ReferenceParams),
        "embeddings": (needs.embeddings, EmbeddingParams),
    }
    for name, (given, group) in groups.items():
        if given is not None and not isinstance(given, group):
            return (
                f"asks for {name}={type(given).__name__}(...), which is no {group.__name__}; its parameters must "
                f"extend dataflex.{group.__name__}, too, and needs() return Needs({name}=self.params)."
            )
    return None


def family_key(key: str) -> str:
    """Return ``select`` for ``select`` and for ``select.0``."""
    return key.partition(".")[0]


def only(key: str, component: ComponentT | None) -> tuple[Entry[ComponentT], ...]:
    """Return a chain of one component, or an empty chain for None."""
    return () if component is None else (Entry(component, key),)
