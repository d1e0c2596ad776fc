"""The form of a result file of the leaderboard: ``benchmarks/results/leaderboard/TIER.json``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from dataflex.errors import ConfigError
from dataflex.files import RepeatedKeyError, distinct

Tier = Literal["small", "large", "second_family"]
Finding = Literal["better", "worse", "unclear", "no claim", "no data"]
Interval = tuple[float, float]

_ERRORS = 5
"""Most problems of a file that an error lists."""


class Form(BaseModel):
    """A mapping with at least the keys of its class. Other keys are not shown on the page."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class Difference(Form):
    """A variant minus the baseline in one metric. ``p_holm`` is corrected over the comparisons of the table."""

    variant: str
    metric: str
    higher_is_better: bool | None
    seeds: list[int]
    mean: float | None
    t_interval_95: Interval | None
    p_holm: float | None
    finding: Finding


class Variant(Form):
    """Figures of the runs of a variant.

    Attributes:
        means: metric -> mean over the seeds. None without a compared run.
        stderr: metric -> standard error over the evaluated samples, for the metrics that have one.
        costs: cost -> mean over the complete runs. Empty without a complete run.
    """

    means: dict[str, float | None]
    stderr: dict[str, float]
    costs: dict[str, float]


class Run(Form):
    """One training.

    Attributes:
        problem: the reason why it is not compared.
        folder: its folder, TABLE/runs/VARIANT/NAME.
        runs_at_once: the trainings at a time.
        taken_over_from: folder of the table that made it. None if this table did.
    """

    variant: str
    seed: int
    status: str
    problem: str | None
    folder: str
    runs_at_once: int | None
    taken_over_from: str | None
    metrics: dict[str, float]


class Comparison(Form):
    """``comparison.json`` of ``dataflex-cli compare``."""

    baseline: str
    equal: dict[str, float]
    seeds: list[int]
    claims: list[str]
    differences: list[Difference]
    notes: list[str]
    variants: dict[str, Variant]
    runs: list[Run]


class TableResult(Form):
    """One comparison of the leaderboard.

    Attributes:
        setting: plain sentences.
        pool_samples: samples of the pool. None for packed texts.
        step_samples: samples of an optimizer step. None for packed texts.
    """

    name: str
    track: Literal["A", "B"]
    title: str
    setting: list[str]
    seconds: float
    pool_samples: int | None
    step_samples: int | None
    comparison: Comparison

    @property
    def subject(self) -> str:
        """The name without the baseline. Tables of one subject have the same data, methods and runs."""
        return self.name.partition("-vs-")[0]

    def steps(self, variant: str) -> float | None:
        """Return the mean number of steps of a variant's runs, or None without a complete run."""
        return self.comparison.variants[variant].costs.get("steps")

    def samples(self, variant: str) -> float | None:
        """Return the mean number of samples in the steps of a variant's runs, if it is known."""
        steps = self.steps(variant)
        return None if steps is None or self.step_samples is None else steps * self.step_samples


class AboveChance(Form):
    """The accuracy of a model in a task before any training, beside the accuracy of guessing."""

    task: str
    model: str
    accuracy: float
    stderr: float
    chance: float
    questions: int


class SharedCost(Form):
    """Work that was done once for all runs of some variants in some tables. None stands for all tables."""

    what: str
    seconds: float
    used_by: list[str]
    tables: list[str] | None = None


class Claim(Form):
    """A claim about findings (``table``, ``metric``, ``variants``) or about ratios of costs (``costs``)."""

    text: str
    source: str | None = None
    table: str | None = None
    metric: str | None = None
    variants: list[str] | None = None
    costs: list[str] | None = None


class CostVariant(Form):
    """Seconds of each repeat, whether they are reckoned, and the peak memory of the process."""

    seconds: list[float]
    reckoned: bool
    peak_bytes: float | None
    samples: int


class CostRatio(Form):
    """The seconds of another implementation divided by those of DataFlex, over the pairs that were timed in turn."""

    median: float
    low: float
    high: float
    reckoned: bool


class CostPart(Form):
    """One comparison of costs. ``about`` says which work the seconds are of."""

    about: str
    variants: dict[str, CostVariant]
    ratios: dict[str, CostRatio]
    agreement: dict[str, Any]


class CostRun(Form):
    """A command that measured parts of the costs."""

    command: str
    machine: dict[str, Any]
    seconds: float


class Costs(Form):
    """The file of ``cost.py``: the measured parts, the commands, and the reasons why parts were skipped."""

    parts: dict[str, CostPart]
    measured: dict[str, CostRun]
    skipped: dict[str, str]


class TierResult(Form):
    """A result file."""

    tier: Tier
    command: str
    date: str
    seconds: float
    machine: dict[str, Any]
    versions: dict[str, str]
    methods: dict[str, dict[str, Any]]
    """Method -> its section in the board."""
    tables: list[TableResult]
    missing: list[str]
    """Names of the tables and of the parts of the costs that are not complete yet."""
    chosen: dict[str, dict[str, dict[str, float]]]
    above_chance: list[AboveChance]
    shared_costs: list[SharedCost]
    claims: list[Claim]
    costs: Costs | None
    """None if the costs have not been measured."""

    def table(self, name: str) -> TableResult:
        """Return the table of a name, which must exist."""
        return next(each for each in self.tables if each.name == name)


def read(path: Path) -> TierResult:
    """Read a result file.

    Raises:
        ConfigError: if the file is not JSON of this form. The error names the file and the key.
    """
    try:
        found = TierResult.model_validate(json.loads(path.read_text(), object_pairs_hook=distinct))
    except ValidationError as error:
        said = [_said(each) for each in error.errors()]
        more = f" and {len(said) - _ERRORS} more problems" if len(said) > _ERRORS else ""
        raise ConfigError(f"{path}: {'; '.join(said[:_ERRORS])}{more}.") from error
    except (json.JSONDecodeError, RepeatedKeyError) as error:
        raise ConfigError(f"{path} is not JSON ({error}).") from error
    problems = list(_unknown_names(found))
    if problems:
        raise ConfigError(f"{path}: {'; '.join(problems[:_ERRORS])}.")
    return found


def lost(new: TierResult, old: TierResult) -> list[str]:
    """Return the parts of an old result that a new one lacks, in words: tables, compared runs, costs, accuracies."""
    tables = {table.name: table for table in new.tables}
    found = [f"the table {table.name}" for table in old.tables if table.name not in tables]
    for table in old.tables:
        if table.name in tables:
            gone = _compared(table) - _compared(tables[table.name])
            found += [f"{len(gone)} run{'s' if len(gone) > 1 else ''} of {table.name}"] if gone else []
    parts = set(new.costs.parts) if new.costs else set()
    found += [f"the costs of {part}" for part in (old.costs.parts if old.costs else {}) if part not in parts]
    known = {(each.task, each.model) for each in new.above_chance}
    found += [f"the accuracy in {each.task}" for each in old.above_chance if (each.task, each.model) not in known]
    return found


def _compared(table: TableResult) -> set[tuple[str, int]]:
    return {(run.variant, run.seed) for run in table.comparison.runs if run.problem is None}


def _said(error: Any) -> str:
    *place, key = error["loc"]
    inside = _place(place) or "the file"
    if error["type"] == "missing":
        return f"{inside} has no key {key!r}"
    return f"{_place(error['loc'])} is {error['input']!r}: {error['msg']}"


def _place(keys: Any) -> str:
    """Return a path of keys, such as ``tables[0].comparison``."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys).removeprefix(".")


def _unknown_names(found: TierResult) -> Iterator[str]:
    """Yield a problem for each name that stands for nothing in the file."""
    tables = {each.name: each.comparison for each in found.tables}
    if len(tables) < len(found.tables):
        yield "tables: two tables have the same name"
    for name, table in tables.items():
        named = [each.variant for each in table.differences] + [each.variant for each in table.runs]
        yield from _unknown(f"the comparison of {name}", [table.baseline, *named], table.variants)
    known = {variant for table in tables.values() for variant in table.variants}
    for cost in found.shared_costs:
        yield from _unknown(f"shared_costs ({cost.what}), used_by", cost.used_by, known)
        yield from _unknown(f"shared_costs ({cost.what}), tables", cost.tables or [], tables)
    yield from _unknown("chosen", found.chosen, tables)
    for name in found.chosen.keys() & tables.keys():
        yield from _unknown(f"chosen.{name}", found.chosen[name], tables[name].variants)
    for i, claim in enumerate(found.claims):
        yield from _problems_of_claim(f"claims[{i}]", claim, tables, found.costs, found.missing)


def _problems_of_claim(
    place: str, claim: Claim, tables: dict[str, Comparison], costs: Costs | None, missing: list[str]
) -> Iterator[str]:
    given = [key for key in ("table", "metric", "variants", "costs") if getattr(claim, key) is not None]
    if given not in (["table", "metric", "variants"], ["costs"]):
        yield f"{place} has {', '.join(given) or 'nothing'}; expected table, metric and variants, or costs"
    elif claim.costs is not None:
        # A claim may name parts that are to be measured later.
        known = [*costs.parts, *costs.skipped, *missing] if costs else claim.costs
        yield from _unknown(f"{place}.costs", claim.costs, known)
        yield from [] if claim.costs else [f"{place}.costs is empty"]
    elif claim.table not in tables:
        yield from _unknown(f"{place}.table", [str(claim.table)], tables)
    else:
        table, variants = tables[claim.table], claim.variants or []
        yield from _unknown(f"{place}.metric", [str(claim.metric)], table.claims)
        yield from _unknown(f"{place}.variants", variants, [each for each in table.variants if each != table.baseline])
        yield from [] if variants else [f"{place}.variants is empty"]


def _unknown(place: str, names: Any, known: Any) -> Iterator[str]:
    for name in dict.fromkeys(names):
        if name not in known:
            yield f"{place}: {name!r} is unknown; expected one of {', '.join(known) or 'none'}"
