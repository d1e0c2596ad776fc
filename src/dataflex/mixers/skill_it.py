"""Skill-it: larger shares for domains that help validation domains with a high loss, by a graph of domains.

Chen et al., "Skill-it! A Data-Driven Skills Framework for Understanding and Training Language Models", NeurIPS 2023,
arXiv 2307.14430, Algorithm 1. With A_ij how much training on domain i helps validation domain j, and L_j(t) the loss of
validation domain j before round t:

    first decision   p_i ~ exp(eta * sum_j A_ij)
    then             p_i ~ exp(eta * sum of the last ``window`` rounds t, this one included, of sum_j A_ij * L_j(t))

The authors' code evaluates inside the first step of a round, after the round's mixture is drawn, so its window ends one
round earlier. Here the losses of the model at the decision are included. The graph is given. Learning the graph would
take separate runs that all start from the same model. A single run cannot replace them, because its model changes.

Cost: one forward pass over the validation samples for each decision.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from dataflex import (
    ConfigError,
    InputPath,
    Losses,
    Mixer,
    MixerParams,
    Needs,
    RoundContext,
    RunOutline,
    RunView,
    State,
    ValidationParams,
    by_domain,
    distinct,
    register,
    unknown,
)
from dataflex.mixers.base_loss_weights import exponentiated_update
from dataflex.mixers.base_validation_loss import validation_losses

if TYPE_CHECKING:
    from collections.abc import Iterable

_KEY = "dataflex.mix.graph"
_BETWEEN = 0.5
"""Entry of the default graph for two different domains."""


class SkillItParams(MixerParams, ValidationParams):
    """Parameters of Skill-it."""

    graph: list[list[float]] | InputPath | None = Field(
        None,
        description="A: one row for each domain with one number >= 0 for each validation domain, or a JSON or CSV file "
        "with names. Default: 1 for a domain's own validation domain, 0.5 for the others.",
    )
    eta: float = Field(0.2, gt=0, description="Step size of the proportions.")
    window: int = Field(3, ge=1, description="Number of latest decisions whose losses count.")


@register("mixer", "skill_it")
class SkillItMixer(Mixer[SkillItParams]):
    """Shares by the validation losses and a graph of which domain helps which."""

    state_depends_on: ClassVar[frozenset[str]] = frozenset({"graph"})

    def __init__(self, params: SkillItParams) -> None:
        super().__init__(params)
        self._losses: NDArray[np.float64] = np.empty((0, 0))
        """Validation losses of the latest decisions, shape (decisions in the window, M)."""
        self._graph: NDArray[np.float64] = np.empty((0, 0))
        """A, shape (K, M). Stored because a file may change during the run."""

    def needs(self, run: RunView) -> Needs:
        """Ask for the losses of validation samples."""
        return Needs(measurements=(Losses(),), validation=self.params)

    def check_domains(self, names: tuple[str, ...]) -> tuple[str, str] | None:
        """Check the initial proportions, and the graph as far as the domains are known."""
        named = self.params.validation if self.params.subtask_column is None else None
        try:
            if self.params.graph is not None or named is not None:
                read_graph(self.params.graph, names, None if named is None else tuple(dict.fromkeys(named)))
        except ConfigError as error:
            return "graph", str(error).removeprefix(f"{_KEY}: ")
        return super().check_domains(names)

    def cannot_learn(self, run: RunOutline) -> str | None:
        """Return that the run's only decision uses the graph alone."""
        if run.decisions > 1:
            return None
        return (
            "the first decision goes by the graph alone, and the run has no second decision, in which validation "
            "losses would count; lower dataflex.update_steps"
        )

    def initial(self, ctx: RoundContext) -> NDArray[np.float64]:
        """Return the configured initial proportions, or the proportions of the first decision."""
        return self._first(ctx) if self.params.initial_proportions is None else super().initial(ctx)

    def mix(self, ctx: RoundContext) -> NDArray[np.float64]:
        """Measure the validation losses and return p, shape (K,), sum 1."""
        graph, now = self._read(ctx), validation_losses(ctx)[None]
        if not self._losses.size:
            self._losses = now
            return self._first(ctx)
        self._losses = np.concatenate([self._losses, now])[-self.params.window :]
        gains = self.params.eta * (graph @ self._losses.sum(axis=0))
        return exponentiated_update(np.ones(len(gains)), gains)

    def _first(self, ctx: RoundContext) -> NDArray[np.float64]:
        gains = self.params.eta * self._read(ctx).sum(axis=1)
        return exponentiated_update(np.ones(len(gains)), gains)

    def _read(self, ctx: RoundContext) -> NDArray[np.float64]:
        if not self._graph.size:
            self._graph = read_graph(self.params.graph, ctx.pool.domains, ctx.validation.domains)
        return self._graph

    def state_dict(self) -> State:
        """Return the graph, and the validation losses in the window."""
        return {"graph": self._graph, "losses": self._losses}

    def load_state_dict(self, state: State) -> None:
        """Restore the state that :meth:`state_dict` returned."""
        self._graph, self._losses = state["graph"], state["losses"]


def read_graph(
    given: list[list[float]] | str | None, names: tuple[str, ...], targets: tuple[str, ...] | None
) -> NDArray[np.float64]:
    """Return the graph with a row for each training domain and a column for each validation domain, shape (K, M).

    Args:
        given: rows in domain order, a file, or None for the default graph.
        names: the training domains.
        targets: the validation domains. None means that they are not known yet, and the columns are used as given.

    Raises:
        ConfigError: if the graph does not fit the names, or has values that are negative or not finite.
    """
    if given is None:
        return _default_graph(names, targets or names)
    if isinstance(given, str):
        rows = by_domain(_read_file(Path(given)), names)
        _check_names("rows", "domain", rows, names)
        columns = targets if targets is not None else tuple(next(iter(rows.values())))
        for name in names:
            rows[name] = by_domain(rows[name], columns)
            _check_names(f"row {name!r}", "validation domain", rows[name], columns)
        numbers = [[rows[name][column] for column in columns] for name in names]
    else:
        numbers = given
        width = len(targets) if targets is not None else len(numbers[0]) if numbers else 0
        if len(numbers) != len(names):
            raise ConfigError(
                f"{_KEY}: has {len(numbers)} rows for {len(names)} domains ({', '.join(names)}). Every domain needs "
                "one row."
            )
        for name, row in zip(names, numbers, strict=True):
            if len(row) != width or not width:
                wanted = f"validation domains ({', '.join(targets)})" if targets else "columns in the first row"
                raise ConfigError(f"{_KEY}: the row of {name!r} has {len(row)} numbers for {width} {wanted}.")
    graph = np.asarray(numbers, dtype=np.float64)
    bad = np.argwhere(~np.isfinite(graph) | (graph < 0))
    if bad.size:
        row, column = bad[0]
        raise ConfigError(
            f"{_KEY}: numbers must be finite and not negative, got {graph[row, column]} in the row of {names[row]!r}, "
            f"column {column + 1}."
        )
    return graph


def _default_graph(names: tuple[str, ...], targets: tuple[str, ...]) -> NDArray[np.float64]:
    """Return the graph with 1 for a domain and its own validation domain, and 0.5 for all other pairs.

    If both have the same names, domains are matched by name, otherwise by position.
    """
    if len(names) != len(targets):
        raise ConfigError(
            f"{_KEY}: must be given, because the {len(targets)} validation domains ({', '.join(targets)}) cannot be "
            f"matched one to one with the {len(names)} domains ({', '.join(names)})."
        )
    same = targets if set(targets) == set(names) else names
    return np.where(np.asarray(names)[:, None] == np.asarray(same), 1.0, _BETWEEN)


def _check_names(where: str, kind: str, found: Iterable[str], known: tuple[str, ...]) -> None:
    given, wanted = set(found), set(known)
    strange = sorted(given - wanted)
    if strange:
        raise ConfigError(f"{_KEY}: {where}: {unknown(kind, strange[0], known)}")
    missing = [name for name in known if name not in given]
    if missing:
        raise ConfigError(f"{_KEY}: {where}: no value for {kind} {', '.join(map(repr, missing))}.")


def _read_file(path: Path) -> dict[str, dict[str, float]]:
    """Return the graph in a JSON or CSV file, row by row."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        rows = _read_csv(text) if path.suffix.lower() == ".csv" else json.loads(text, object_pairs_hook=distinct)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{_KEY}: {str(path)!r} cannot be read: {error}") from error
    if not _is_table(rows):
        raise ConfigError(
            f"{_KEY}: {str(path)!r} must hold a mapping from domain names to mappings from validation domain names to "
            "numbers."
        )
    return {name: {column: float(value) for column, value in row.items()} for name, row in rows.items()}


def _is_table(rows: Any) -> bool:
    """Return whether rows are a mapping from domains to mappings from validation domains to numbers."""
    return (
        isinstance(rows, dict)
        and len(rows) > 0
        and all(isinstance(row, dict) and row for row in rows.values())
        and all(
            isinstance(value, int | float) and not isinstance(value, bool)
            for row in rows.values()
            for value in row.values()
        )
    )


def _read_csv(text: str) -> dict[str, dict[str, float]]:
    """Return the rows of a table. Its header names the validation domains, and each row starts with a domain."""
    lines = [line for line in csv.reader(text.splitlines()) if line]
    if not lines:
        raise ValueError("the file is empty")
    columns = lines[0][1:]
    for line in lines[1:]:
        if len(line) != len(columns) + 1:
            raise ValueError(f"the row of {line[0]!r} has {len(line) - 1} numbers for {len(columns)} columns")
    return distinct([(line[0], distinct(list(zip(columns, map(float, line[1:]), strict=True)))) for line in lines[1:]])
