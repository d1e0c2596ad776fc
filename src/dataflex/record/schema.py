"""What the files of a run record hold: one class for each, which the writer and the reader share.

A field is named here and nowhere else: the writer makes these objects and :func:`to_json` writes them, and
:func:`from_json` makes the same objects of what it reads. A field that has its default is not written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

from pydantic import (
    AliasChoices,
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    TypeAdapter,
    ValidationError,
)

from dataflex.errors import ConfigError
from dataflex.planning.budget import LimitedDecision

VERSION = 2
"""Of the record's files. A record without :data:`HEADER` is of version 1."""

HEADER = "record.json"
ROUNDS = "rounds.jsonl"
PLANS = "plans"
FILTERS = "filters"
EVALUATIONS = "evaluations.jsonl"
CHANGES = "changes.jsonl"
SUMMARY = "summary.json"
ENVIRONMENT = "environment.json"
RUN = "run.json"
LOSS_WEIGHTS = "loss_weights.csv"
DOMAIN_WEIGHTS = "domain_weights.json"
TASKS = "tasks"

T = TypeVar("T")

BY_DOMAIN = "by domain"
"""Marks a field that has a value for each domain: lines have the values alone, in the order of the header."""
IN_HEADER = "in the header"
"""Marks a field that lines leave out, because it follows from the header."""


@dataclass(frozen=True)
class Methods:
    """The method of each part of the section, from a round on."""

    from_round: NonNegativeInt
    methods: dict[str, str]


@dataclass(frozen=True)
class Header:
    """``record.json``: the version of the files, and what holds for every round."""

    version: NonNegativeInt
    domains: dict[str, NonNegativeInt] = field(default_factory=dict)
    """Samples of each domain in the pool, in its order; empty if the run plans no rounds."""
    methods: list[Methods] = field(default_factory=list)
    """Ascending by round; a resume may change them."""

    def methods_at(self, number: int) -> dict[str, str]:
        """Return the methods that hold in a round."""
        found: dict[str, str] = {}
        for each in self.methods:
            if each.from_round <= number:
                found = each.methods
        return found

    def with_methods(self, number: int, methods: dict[str, str]) -> list[Methods]:
        """Return the methods as they are if from round ``number`` on others hold."""
        earlier = [each for each in self.methods if each.from_round < number]
        if earlier and earlier[-1].methods == methods:
            return earlier
        return [*earlier, Methods(number, methods)]


@dataclass(frozen=True)
class Cost:
    """What the decision of a round cost."""

    seconds: NonNegativeFloat = 0.0
    samples: NonNegativeInt = 0
    tokens: NonNegativeInt = 0


@dataclass(frozen=True)
class Place:
    """The bytes of a file in ``plans`` that hold the plan of one round."""

    file: str
    begin: NonNegativeInt
    end: NonNegativeInt


@dataclass(frozen=True)
class Filtering:
    """What a filter of a list of selectors did in a round."""

    key: str
    """Its configuration key, ``select.0`` for the first."""
    method: str
    candidates: dict[str, NonNegativeInt] = field(default_factory=dict)
    """How many samples came to it, of each group: ``pool``, or the domains if a mixer decides or it compares within
    them."""
    kept: dict[str, NonNegativeInt] = field(default_factory=dict)
    """How many of them it left for the next selector."""
    of_update: dict[str, NonNegativeInt] = field(default_factory=dict)
    """The decision, from 0, whose result stands for each group."""
    unscored: NonNegativeInt = 0
    """Candidates without a score."""
    size: NonNegativeInt = 0
    """How many samples it decided about in this round; 0 if what it left earlier stands."""
    number_kept: NonNegativeInt = 0
    """How many of those it left; they are the first in the table."""
    table: Place | None = None
    """Where these samples are, in :data:`FILTERS`, with their scores and ranks."""


@dataclass(frozen=True)
class Round:
    """One line of ``rounds.jsonl``."""

    round: NonNegativeInt
    start_step: NonNegativeInt
    steps: NonNegativeInt
    size: NonNegativeInt
    """Samples in the plan."""
    domains: Annotated[dict[str, NonNegativeInt], BY_DOMAIN]
    """Samples of each domain in the plan."""
    plan_sha256: str = ""
    plan: Place | None = None
    """Where the plan is; None in records of version 1, which have a file for each round."""
    proportions: Annotated[dict[str, float], BY_DOMAIN] = field(default_factory=dict)
    """Share of each domain in force; of domains with :attr:`clipped_shares`, no longer the wanted one."""
    components: Annotated[dict[str, str | None], IN_HEADER] = field(default_factory=dict)
    """Method of each family that acted."""
    undecided: dict[str, str] = field(default_factory=dict)
    """Why the method of a family decided nothing."""
    not_chosen: dict[str, str] = field(default_factory=dict)
    """Why the selector chose nothing from a group, as in :attr:`candidates`."""
    cost: Cost = field(default_factory=Cost)
    warmup: bool = False
    pool: Annotated[dict[str, NonNegativeInt], IN_HEADER] = field(default_factory=dict)
    """Samples of each domain in the pool; empty if an older record does not say."""
    unscored: NonNegativeInt = 0
    """Candidates left out because they have no score."""
    candidates: Annotated[dict[str, NonNegativeInt], BY_DOMAIN] = field(default_factory=dict)
    """How many samples were ranked in each group: ``pool``, or the domains if a mixer decides or the selector compares
    within them."""
    epochs: Annotated[dict[str, float], BY_DOMAIN] = field(default_factory=dict)
    """Passes over each domain up to and including this round; empty in older records, and with one domain."""
    clipped_shares: Annotated[dict[str, float], Field(validation_alias=AliasChoices("clipped_shares", "capped"))] = (
        field(default_factory=dict)
    )
    """The share wanted of each domain that ``max_epochs_per_domain`` gave less."""
    filters: list[Filtering] = field(default_factory=list)
    """What the selectors before the last one did."""
    standing: list[str] = field(default_factory=list)
    """Keys of the selectors whose earlier result stands in this round, because they decide once in several."""
    budget: LimitedDecision | None = None
    """What was scored under ``max_overhead``, and why so much."""

    @cached_property
    def shares(self) -> dict[str, float]:
        """Share of each domain in the plan, by count."""
        total = sum(self.domains.values())
        return {name: count / total for name, count in self.domains.items()} if total else {}

    def group_of(self, domain: str, counts: Mapping[str, Any]) -> str:
        """Return the group that the samples of a domain were in: itself, or ``pool``.

        Args:
            domain: its name.
            counts: something that is told of each group.
        """
        by_domain = "mix" in self.components or "mix" in self.undecided or counts.keys() - {"pool"}
        return domain if by_domain else "pool"


def _nan_of_null(value: Any) -> Any:
    return math.nan if value is None else value


Measured = Annotated[float, BeforeValidator(_nan_of_null)]
"""A number that is null in a file if it is not finite, and NaN here."""


@dataclass(frozen=True)
class Measures:
    """How well a text is predicted; NaN if none of its tokens counts."""

    loss: Measured
    """Nats per token."""
    perplexity: Measured
    bits_per_byte: float | None
    """None if the text has no bytes."""


@dataclass(frozen=True)
class DomainMeasures(Measures):
    """The same for one evaluation set, and how large it is."""

    tokens: NonNegativeInt
    bytes: NonNegativeInt
    samples: NonNegativeInt


@dataclass(frozen=True)
class Evaluation:
    """One line of ``evaluations.jsonl``; tokens and seconds are those of the run up to then."""

    step: NonNegativeInt
    tokens: NonNegativeInt
    train_seconds: NonNegativeFloat
    decision_seconds: NonNegativeFloat
    evaluate_seconds: NonNegativeFloat
    fingerprint: str
    """Digest of the evaluation data."""
    domains: dict[str, DomainMeasures]
    token_weighted: Measures
    """Over all tokens of all sets together."""
    unweighted: Measures
    """Means over the sets."""

    @property
    def seconds(self) -> float:
        """Seconds of training, decisions and evaluation together."""
        return self.train_seconds + self.decision_seconds + self.evaluate_seconds


@dataclass(frozen=True)
class OverheadLimit:
    """How a run kept to its ``max_overhead``."""

    max_overhead: float
    decisions: NonNegativeInt
    decisions_that_scored: NonNegativeInt
    scores: NonNegativeInt
    """Made in all."""
    kept: bool
    text: str
    """The same as a sentence that goes on from "decisions are", and why the limit was missed."""


@dataclass(frozen=True)
class Summary:
    """``summary.json``, written when training ends."""

    train_seconds: NonNegativeFloat
    decision_seconds: NonNegativeFloat
    overhead_fraction: NonNegativeFloat
    rounds: NonNegativeInt
    tokens: NonNegativeInt
    steps: NonNegativeInt | None = None
    """None in older records."""
    evaluate_seconds: NonNegativeFloat | None = None
    """None in older records."""
    saved: list[str] = field(default_factory=list)
    """What LLaMA-Factory has written since training ended, in order."""
    evaluation: Evaluation | None = None
    """The last one; None if none was made, and in older records."""
    notes: list[str] = field(default_factory=list)
    """What did not happen in the run although it was asked for."""
    overhead_limit: Annotated[OverheadLimit | None, Field(validation_alias=AliasChoices("overhead_limit", "cap"))] = (
        None
    )
    """How the run kept to ``max_overhead``; None without one, and in older records."""


@dataclass(frozen=True)
class DomainWeights:
    """``domain_weights.json``: what a mixer that weighs the domains in the loss found, by domain."""

    method: str
    steps: NonNegativeInt
    """Steps whose loss was weighted."""
    proportions: dict[str, NonNegativeFloat]
    """Mean weights over these steps."""
    last: dict[str, NonNegativeFloat]


@dataclass(frozen=True)
class Change:
    """One line of ``changes.jsonl``: a setting that was changed at a resume."""

    resumed_at: NonNegativeInt
    """Optimizer steps done when the run went on."""
    step: int
    """From which optimizer step on it holds."""
    key: str
    before: Annotated[Any, Field(validation_alias=AliasChoices("before", "from"))]
    now: Annotated[Any, Field(validation_alias=AliasChoices("now", "to"))]
    effect: str
    """:data:`FROM_HERE`, or that it has none."""

    @property
    def holds(self) -> bool:
        """Whether the change has an effect."""
        return self.effect == FROM_HERE


FROM_HERE = "from this step on"
NO_EFFECT = "none, the earlier value stays"


@dataclass(frozen=True)
class Metric:
    """A number of a downstream task."""

    value: float | None
    """None if it is not a number."""
    stderr: NonNegativeFloat | None = None


@dataclass(frozen=True)
class Task:
    """One file of ``tasks``: how the trained model did at a downstream task."""

    task: str
    form: str
    samples: NonNegativeInt
    num_fewshot: NonNegativeInt
    metrics: dict[str, Metric]
    chance: float | None = None
    """What guessing gives, of tasks with choices."""
    notes: list[str] = field(default_factory=list)
    """What a reader of the numbers should know."""


@dataclass(frozen=True)
class Start:
    """One start of a run, the first or a resume: an entry of :data:`ENVIRONMENT`."""

    step: NonNegativeInt
    """Optimizer steps done before."""
    started: str = ""
    """Time in UTC, as ISO 8601."""
    finished: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    """Of Python and of the installed packages that numbers may depend on."""
    platform: str = ""
    processes: NonNegativeInt | None = None
    devices: list[str] | None = None
    """Names of the accelerators of the main process; none on a CPU. None: not on record."""
    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables that were set, of those that change a run."""
    working_directory: str = ""
    command: list[str] = field(default_factory=list)
    configuration: str = ""
    """The file the configuration came from."""
    plugins: list[dict[str, str]] = field(default_factory=list)
    """Files with their digests, and entry points with their packages."""
    model: dict[str, Any] = field(default_factory=dict)
    """``name``, and ``files`` or ``commit`` of the base model."""
    datasets: dict[str, dict[str, Any]] = field(default_factory=dict)
    """``entry`` and ``files`` of each data set that lies in files."""
    files: dict[str, Any] = field(default_factory=dict)
    """Files that the section names, with their digests."""
    fingerprints: dict[str, str] = field(default_factory=dict)
    """Of the tokenized samples, by the key of the configuration that names the data."""


@dataclass(frozen=True)
class Environment:
    """:data:`ENVIRONMENT`: every start of a run, the first one first."""

    starts: list[Start] = field(default_factory=list)


@dataclass(frozen=True)
class Origin:
    """The run, and the place in it, that another one goes on from."""

    run: str | None
    step: NonNegativeInt
    checkpoint: str


@dataclass(frozen=True)
class Identity:
    """:data:`RUN`: which run a folder is."""

    id: str | None = None
    began: str = ""
    """Time in UTC, as ISO 8601."""
    continues: Origin | None = None


def to_json(value: Any, header: Header | None = None) -> dict[str, Any]:
    """Return an object of this module as it is written.

    Args:
        value: an instance of one of the classes.
        header: of the record, for fields that are written by domain.
    """
    found: dict[str, Any] = {}
    kind: Any = type(value)
    for name, default, marks in _fields(kind):
        content = getattr(value, name)
        if IN_HEADER in marks or content == default:
            continue
        if BY_DOMAIN in marks and header is not None and content.keys() <= header.domains.keys():
            content = [content.get(domain) for domain in header.domains]
        found[name] = _plain(content)
    return found


def from_json(kind: type[T], value: Mapping[str, Any], where: Path | str, header: Header | None = None) -> T:
    """Return the object that :func:`to_json` wrote.

    Args:
        kind: its class.
        value: what was read.
        where: of it, for messages.
        header: of the record; None for version 1, whose lines name the domains.

    Raises:
        ConfigError: naming the file, the key and the fault.
    """
    found, model = dict(value), _any(kind)
    for name, _, marks in _fields(model) if header is not None else ():
        if BY_DOMAIN in marks and isinstance(found.get(name), list):
            found[name] = _of_domains(found[name], header, f"{where}: {name!r}")
    try:
        built: T = _adapter(model).validate_python(found)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{where}: {key!r}: {first['msg']}.") from error
    return built


def _of_domains(values: list[Any], header: Header | None, where: str) -> dict[str, Any]:
    """Return the values by the names of the domains; null is no value."""
    names = [] if header is None else list(header.domains)
    if len(values) != len(names):
        raise ConfigError(f"{where} has {len(values)} values, {HEADER} names {len(names)} domains.")
    return {name: value for name, value in zip(names, values, strict=True) if value is not None}


def _any(kind: type[T]) -> Any:
    return kind  # a type is hashable, which mypy does not know of a type variable's


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


@cache
def _fields(kind: Any) -> list[tuple[str, Any, tuple[Any, ...]]]:
    """Return name, default and marks of each field of a class."""
    hints = get_type_hints(kind, include_extras=True)
    found = []
    for each in fields(kind):
        default = each.default_factory() if each.default_factory is not MISSING else each.default
        found.append((each.name, default, get_args(hints[each.name])[1:]))
    return found


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return to_json(value)
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
