"""Read a run folder back: what was decided in each round, what it cost, and how the losses went.

A run folder is LLaMA-Factory's ``output_dir``; ours is the ``dataflex`` folder in it. Small files are read at
once and checked; plans are read only when asked for, one round and one column at a time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import yaml
from numpy.typing import NDArray
from pydantic import NonNegativeFloat, NonNegativeInt, TypeAdapter, ValidationError

from dataflex.errors import ConfigError
from dataflex.record.files import json_lines, one_line, read_column, read_object
from dataflex.record.trainer_log import Curve, curves, eval_curves, read_log, train_curve

FAMILIES = ("select", "mix", "order", "weight")
"""The kinds of decision, in the order in which a round makes them."""

T = TypeVar("T")


@dataclass(frozen=True)
class Cost:
    """What the decision of a round cost."""

    seconds: NonNegativeFloat = 0.0
    samples: NonNegativeInt = 0
    tokens: NonNegativeInt = 0


@dataclass(frozen=True)
class Round:
    """One line of ``rounds.jsonl``."""

    round: NonNegativeInt
    start_step: NonNegativeInt
    steps: NonNegativeInt
    size: NonNegativeInt
    """Samples in the plan."""
    domains: dict[str, NonNegativeInt]
    """Samples of each domain in the plan."""
    plan_sha256: str = ""
    proportions: dict[str, float] = field(default_factory=dict)
    components: dict[str, str | None] = field(default_factory=dict)
    cost: Cost = field(default_factory=Cost)
    warmup: bool = False

    @property
    def shares(self) -> dict[str, float]:
        """Share of each domain in the plan, by count."""
        total = sum(self.domains.values())
        return {name: count / total for name, count in self.domains.items()} if total else {}


@dataclass(frozen=True)
class Summary:
    """``summary.json``, written when training ends."""

    train_seconds: NonNegativeFloat
    decision_seconds: NonNegativeFloat
    overhead_fraction: NonNegativeFloat
    rounds: NonNegativeInt
    tokens: NonNegativeInt


@dataclass(frozen=True)
class Coverage:
    """Which samples the plans of a run name."""

    samples: int
    """Rows of all plans."""
    distinct: int
    """Different pool indices among them."""
    overlap: Curve
    """(round, Jaccard similarity of its set of samples with that of the round before)."""

    @property
    def mean_overlap(self) -> float | None:
        """Mean over consecutive rounds; None where there is only one."""
        return sum(value for _, value in self.overlap) / len(self.overlap) if self.overlap else None


@dataclass(frozen=True)
class RunRecord:
    """What a run folder says. Plans stay on disk until one of the methods is called."""

    path: Path
    name: str
    config: Mapping[str, Any]
    """``config.yaml``: the keys ``llamafactory``, ``dataflex`` and ``versions``."""
    rounds: list[Round]
    summary: Summary | None
    """None while the run is unfinished."""
    steps: int
    """Optimizer steps done, as far as the folder shows."""
    train_loss: Curve
    eval_loss: dict[str, Curve]
    """Evaluation set (``eval`` where it has no name) to its loss."""
    domain_loss: dict[str, Curve]
    weights: dict[str, Curve]
    """``min`` and ``max`` of the sample weights, where a weighter logged them."""

    @property
    def components(self) -> dict[str, str]:
        """Method of each kind of decision the run makes, in the order of :data:`FAMILIES`."""
        found: dict[str, str] = {}
        for each in self.rounds:
            found |= {family: name for family, name in each.components.items() if name}
        for family in FAMILIES:
            section = self.config["dataflex"].get(family)
            if isinstance(section, dict) and isinstance(section.get("method"), str):
                found[family] = section["method"]
        return {family: found[family] for family in FAMILIES if family in found}

    @property
    def decision_seconds(self) -> float:
        """Seconds spent on decisions: the summary's figure, or the sum over the rounds so far."""
        if self.summary:
            return self.summary.decision_seconds
        return sum(each.cost.seconds for each in self.rounds)

    @property
    def has_plans(self) -> bool:
        """Whether the plans are kept in the folder."""
        return bool(self.rounds) and any(self._plans.glob("round-*.parquet"))

    @property
    def _plans(self) -> Path:
        return self.path / "dataflex" / "plans"

    def plan_indices(self, number: int) -> NDArray[np.int64]:
        """Return the pool indices of round ``number`` in training order, shape (size,)."""
        path = self._plan(number)
        indices = read_column(path, "index")
        if indices is None:
            raise ConfigError(f"{path} has no column 'index'; expected a plan written by a DataFlex run.")
        if indices.size and indices.min() < 0:
            raise ConfigError(f"{path}: column 'index' has {indices.min()}; expected pool indices from 0.")
        return indices.astype(np.int64, copy=False)

    def plan_scores(self, number: int) -> NDArray[np.float32] | None:
        """Return the scores of round ``number`` that are finite numbers, or None where there is none."""
        scores = read_column(self._plan(number), "score")
        if scores is None:
            return None
        finite = scores[np.isfinite(scores)].astype(np.float32, copy=False)
        return finite if finite.size else None

    def coverage(self) -> Coverage | None:
        """Count the distinct samples and the overlap of consecutive rounds, one plan in memory at a time.

        Returns:
            None where the folder has no plans.
        """
        if not self.has_plans:
            return None
        seen = np.zeros(0, dtype=bool)
        before: NDArray[np.int64] | None = None
        overlap: Curve = []
        samples = 0
        for each in self.rounds:
            indices = self.plan_indices(each.round)
            samples += indices.size
            current = np.unique(indices)
            seen = _mark(seen, current)
            if before is not None:
                overlap.append((each.round, _jaccard(before, current)))
            before = current
        return Coverage(samples, int(np.count_nonzero(seen)), overlap)

    def _plan(self, number: int) -> Path:
        path = self._plans / f"round-{number:05d}.parquet"
        if not path.is_file():
            raise ConfigError(f"{path} is missing; expected the plan of round {number} of rounds.jsonl.")
        return path


_ROUND = TypeAdapter(Round)
_SUMMARY = TypeAdapter(Summary)


def read_run(path: Path) -> RunRecord:
    """Read the small files of a run folder.

    Args:
        path: LLaMA-Factory's ``output_dir`` of a run that DataFlex made, finished or not.

    Raises:
        ConfigError: if ``path`` is not such a folder, or a file in it is not what it should be.
    """
    config = _read_config(path)
    summary = _read_summary(path / "dataflex" / "summary.json")
    log, steps = read_log(path, finished=summary is not None)
    results = (read_object(path / "all_results.json") if summary else None) or {}
    return RunRecord(
        path=path,
        name=path.resolve().name,
        config=config,
        rounds=_read_rounds(path / "dataflex" / "rounds.jsonl"),
        summary=summary,
        steps=steps,
        train_loss=train_curve(log),
        eval_loss=eval_curves(log, results, steps),
        domain_loss=curves(log, r"dataflex/loss/(.+)"),
        weights=curves(log, r"dataflex/weight_(min|max)"),
    )


def _read_config(path: Path) -> dict[str, Any]:
    file = path / "dataflex" / "config.yaml"
    if not path.is_dir():
        raise ConfigError(f"{path} is not a folder; expected the output_dir of a DataFlex run.")
    if not file.is_file():
        raise ConfigError(f"{file} is missing; expected {path} to be the output_dir of a DataFlex run.")
    try:
        config = yaml.safe_load(file.read_bytes())
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} is not readable YAML ({one_line(error)}).") from error
    sections = ("llamafactory", "dataflex")
    if not isinstance(config, dict) or not all(isinstance(config.get(name), dict) for name in sections):
        raise ConfigError(f"{file}: expected a run's configuration with the sections {' and '.join(sections)}.")
    return config


def _read_summary(path: Path) -> Summary | None:
    value = read_object(path)
    return None if value is None else _build(_SUMMARY, value, path)


def _read_rounds(path: Path) -> list[Round]:
    """Return the rounds by number; a round that was planned again after a resume counts as planned last."""
    rounds: dict[int, Round] = {}
    for where, value in json_lines(path):
        each = _build(_ROUND, value, where)
        rounds[each.round] = each
    return [rounds[number] for number in sorted(rounds)]


def _build(kind: TypeAdapter[T], value: dict[str, Any], where: Path | str) -> T:
    try:
        return kind.validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{where}: {key!r}: {first['msg']}.") from error


def _mark(seen: NDArray[np.bool_], indices: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Set the flags of ``indices`` (ascending), making the array longer where needed."""
    if indices.size and indices[-1] >= seen.size:
        longer = np.zeros(max(int(indices[-1]) + 1, seen.size * 5 // 4), dtype=bool)
        longer[: seen.size] = seen
        seen = longer
    seen[indices] = True
    return seen


def _jaccard(first: NDArray[np.int64], second: NDArray[np.int64]) -> float:
    """Size of the intersection over size of the union, of two arrays without repetitions."""
    common = np.intersect1d(first, second, assume_unique=True).size
    union = first.size + second.size - common
    return common / union if union else math.nan
