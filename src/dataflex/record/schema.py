"""Contents of the files of a run record: one class per file, shared by the writer and the reader.

Each field is declared only here. The writer creates these objects and :func:`to_json` writes them. The reader gets the
same objects from :func:`from_json`. A field with its default value is not written.
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
"""Version of the record's files. A record without :data:`HEADER` has version 1."""

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
TOKEN_WEIGHTS = "token_weights.jsonl"
TOKEN_SAMPLES = "token_samples.jsonl"

WEIGHT_EDGES = (0.0, *(2.0 ** (power - 0.5) for power in range(-5, 7)))
"""Upper ends of all bins of token weights but the last, which is open.

The first bin has the weight 0 alone. The others are centred on the powers of 2 from 1/64 to 64 on a logarithmic scale,
so that the weight 1 is in the middle of a bin.
"""

T = TypeVar("T")

BY_DOMAIN = "by domain"
"""Marks a field with a value for each domain. Lines hold the values alone, in the order of the header."""
IN_HEADER = "in the header"
"""Marks a field that lines leave out, because it follows from the header."""


@dataclass(frozen=True)
class Methods:
    """Method of each part of the section, from a round on."""

    from_round: NonNegativeInt
    methods: dict[str, str]


@dataclass(frozen=True)
class Header:
    """``record.json``: the version of the files, and the values that hold for every round."""

    version: NonNegativeInt
    domains: dict[str, NonNegativeInt] = field(default_factory=dict)
    """Number of samples of each domain in the pool, in the pool's order; empty if the run plans no rounds."""
    methods: list[Methods] = field(default_factory=list)
    """Methods, ascending by round. A resume may change them."""

    def methods_at(self, number: int) -> dict[str, str]:
        """Return the methods that hold in a round."""
        found: dict[str, str] = {}
        for each in self.methods:
            if each.from_round <= number:
                found = each.methods
        return found

    def with_methods(self, number: int, methods: dict[str, str]) -> list[Methods]:
        """Return the list of methods after adding those that hold from round ``number`` on."""
        earlier = [each for each in self.methods if each.from_round < number]
        if earlier and earlier[-1].methods == methods:
            return earlier
        return [*earlier, Methods(number, methods)]


@dataclass(frozen=True)
class Cost:
    """Cost of the decision of a round."""

    seconds: NonNegativeFloat = 0.0
    samples: NonNegativeInt = 0
    tokens: NonNegativeInt = 0


@dataclass(frozen=True)
class Place:
    """Byte range of one round's plan in a file of ``plans``."""

    file: str
    begin: NonNegativeInt
    end: NonNegativeInt


@dataclass(frozen=True)
class Filtering:
    """Result of one filter, a selector before the last one of a list, in a round."""

    key: str
    """Configuration key of the filter, ``select.0`` for the first."""
    method: str
    candidates: dict[str, NonNegativeInt] = field(default_factory=dict)
    """Number of samples in each group before the filter.

    There is one group, ``pool``, unless a mixer decides or the filter compares within domains. Then each domain is a
    group.
    """
    kept: dict[str, NonNegativeInt] = field(default_factory=dict)
    """Number of samples in each group that passed the filter to the next selector."""
    of_update: dict[str, NonNegativeInt] = field(default_factory=dict)
    """Number of the decision, from 0, whose result holds for each group."""
    unscored: NonNegativeInt = 0
    """Number of candidates without a score."""
    size: NonNegativeInt = 0
    """Number of samples that the filter decided on in this round; 0 if an earlier result holds."""
    number_kept: NonNegativeInt = 0
    """Number of these samples that passed. They come first in the table."""
    table: Place | None = None
    """Byte range of these samples in :data:`FILTERS`, with their scores and ranks."""


@dataclass(frozen=True)
class Round:
    """One line of ``rounds.jsonl``."""

    round: NonNegativeInt
    start_step: NonNegativeInt
    steps: NonNegativeInt
    size: NonNegativeInt
    """Number of samples in the plan."""
    domains: Annotated[dict[str, NonNegativeInt], BY_DOMAIN]
    """Number of samples of each domain in the plan."""
    plan_sha256: str = ""
    plan: Place | None = None
    """Byte range of the plan; None in records of version 1, which have a file for each round."""
    proportions: Annotated[dict[str, float], BY_DOMAIN] = field(default_factory=dict)
    """Share of each domain in force. For a domain in :attr:`clipped_shares` it is lower than the requested share."""
    components: Annotated[dict[str, str | None], IN_HEADER] = field(default_factory=dict)
    """Method of each family that acted."""
    undecided: dict[str, str] = field(default_factory=dict)
    """Reason why the method of a family decided nothing."""
    not_chosen: dict[str, str] = field(default_factory=dict)
    """Reason why the selector chose nothing from a group. The groups are those of :attr:`candidates`."""
    cost: Cost = field(default_factory=Cost)
    warmup: bool = False
    pool: Annotated[dict[str, NonNegativeInt], IN_HEADER] = field(default_factory=dict)
    """Number of samples of each domain in the pool; empty in older records without it."""
    unscored: NonNegativeInt = 0
    """Number of candidates that were left out because they have no score."""
    candidates: Annotated[dict[str, NonNegativeInt], BY_DOMAIN] = field(default_factory=dict)
    """Number of ranked samples in each group.

    There is one group, ``pool``, unless a mixer decides or the selector compares within domains. Then each domain is a
    group.
    """
    epochs: Annotated[dict[str, float], BY_DOMAIN] = field(default_factory=dict)
    """Passes over each domain up to and including this round; empty in older records, and with one domain."""
    clipped_shares: Annotated[dict[str, float], Field(validation_alias=AliasChoices("clipped_shares", "capped"))] = (
        field(default_factory=dict)
    )
    """Requested share of each domain that ``max_epochs_per_domain`` reduced."""
    filters: list[Filtering] = field(default_factory=list)
    """Results of the selectors before the last one."""
    standing: list[str] = field(default_factory=list)
    """Keys of the selectors whose earlier result holds in this round, because they decide once in several."""
    budget: LimitedDecision | None = None
    """Number of samples scored under ``max_overhead``, and the reason for this number."""

    @cached_property
    def shares(self) -> dict[str, float]:
        """Share of each domain in the plan, by number of samples."""
        total = sum(self.domains.values())
        return {name: count / total for name, count in self.domains.items()} if total else {}

    def group_of(self, domain: str, counts: Mapping[str, Any]) -> str:
        """Return the group that the samples of a domain were in: the domain itself, or ``pool``.

        Args:
            domain: name of the domain.
            counts: dictionary with the groups as keys.
        """
        by_domain = "mix" in self.components or "mix" in self.undecided or counts.keys() - {"pool"}
        return domain if by_domain else "pool"


def _nan_of_null(value: Any) -> Any:
    """Return NaN for null, other values unchanged."""
    return math.nan if value is None else value


Measured = Annotated[float, BeforeValidator(_nan_of_null)]
"""A number that is NaN here, and null in a file, if it is not finite."""


@dataclass(frozen=True)
class Measures:
    """Prediction quality of a text, or of the samples of a preference stage, which have one loss each."""

    loss: Measured
    """Mean loss in nats per token, or per sample in a preference stage. NaN if no token counts in the loss."""
    perplexity: Measured
    """NaN if no token counts in the loss, and in a preference stage."""
    bits_per_byte: float | None
    """None if the text has no bytes, and in a preference stage."""
    loss_stderr: NonNegativeFloat | None = field(default=None, kw_only=True)
    """Standard error of the loss over the samples. None for a set of one sample, and in older records."""
    accuracy: NonNegativeFloat | None = field(default=None, kw_only=True)
    """Share of the pairs whose reward margin is above 0. None if samples are not pairs with rewards."""
    margin: float | None = field(default=None, kw_only=True)
    """Mean reward of the chosen response minus that of the rejected one. None if there is no accuracy."""


@dataclass(frozen=True)
class DomainMeasures(Measures):
    """Prediction quality of one evaluation set, and the size of the set."""

    tokens: NonNegativeInt | None
    """Tokens that count in the loss. None in a preference stage, in which a sample has one loss."""
    bytes: NonNegativeInt | None
    """Bytes of these tokens' text. None in a preference stage."""
    samples: NonNegativeInt


@dataclass(frozen=True)
class Evaluation:
    """One line of ``evaluations.jsonl``. Tokens and seconds are those of the run up to the evaluation."""

    step: NonNegativeInt
    tokens: NonNegativeInt
    train_seconds: NonNegativeFloat
    decision_seconds: NonNegativeFloat
    evaluate_seconds: NonNegativeFloat
    fingerprint: str
    """Digest of the evaluation data."""
    domains: dict[str, DomainMeasures]
    token_weighted: Measures
    """Over all tokens of all sets together. In a preference stage a sample counts as one token."""
    unweighted: Measures
    """Means over the sets."""

    @property
    def seconds(self) -> float:
        """Seconds of training, decisions and evaluation together."""
        return self.train_seconds + self.decision_seconds + self.evaluate_seconds


@dataclass(frozen=True)
class OverheadLimit:
    """Result of a run's ``max_overhead``."""

    max_overhead: float
    decisions: NonNegativeInt
    decisions_that_scored: NonNegativeInt
    scores: NonNegativeInt
    """Number of scores computed in the whole run."""
    kept: bool
    text: str
    """Rest of a sentence that begins with "decisions are": the result, and the reason if the limit was missed."""


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
    """Names of the results that LLaMA-Factory has written since training ended, in order."""
    evaluation: Evaluation | None = None
    """The last evaluation; None if there was none, and in older records."""
    notes: list[str] = field(default_factory=list)
    """Notes on configured actions that did not happen in the run."""
    overhead_limit: Annotated[OverheadLimit | None, Field(validation_alias=AliasChoices("overhead_limit", "cap"))] = (
        None
    )
    """Result of ``max_overhead``; None without it, and in older records."""


@dataclass(frozen=True)
class DomainWeights:
    """``domain_weights.json``: the result of a mixer that weights the domains in the loss, by domain."""

    method: str
    steps: NonNegativeInt
    """Number of steps whose loss was weighted."""
    proportions: dict[str, NonNegativeFloat]
    """Mean weights over these steps."""
    last: dict[str, NonNegativeFloat]


@dataclass(frozen=True)
class TokenWeights:
    """One line of :data:`TOKEN_WEIGHTS`: weights of the trained tokens in the loss, in the steps since the line before.

    Only steps in which a weighter acts are counted. A weight is the product of the weighters' weights, of the sample
    and of the token. Factors of domains and of the mean over samples are not part of it.
    """

    step: NonNegativeInt
    """Number of optimizer steps done, up to which the line counts."""
    steps: NonNegativeInt
    """Number of steps that are counted."""
    effective_tokens: Measured
    """Sum over these steps of (sum of weights)^2 / (sum of squared weights) over all tokens of the step."""
    tokens: Annotated[dict[str, NonNegativeInt], BY_DOMAIN]
    """Number of trained tokens."""
    counting: Annotated[dict[str, NonNegativeInt], BY_DOMAIN]
    """Number of trained tokens with a weight above 0."""
    sums: Annotated[dict[str, Measured], BY_DOMAIN]
    """Sum of the weights."""
    squares: Annotated[dict[str, Measured], BY_DOMAIN]
    """Sum of the squared weights."""
    effective: Annotated[dict[str, Measured], BY_DOMAIN]
    """The same as :attr:`effective_tokens`, over the tokens of a domain."""
    bins: Annotated[dict[str, list[NonNegativeInt]], BY_DOMAIN]
    """Number of trained tokens in each bin of :data:`WEIGHT_EDGES`."""

    @property
    def counting_share(self) -> float:
        """Share of the trained tokens with a weight above 0; NaN without a token."""
        tokens = sum(self.tokens.values())
        return sum(self.counting.values()) / tokens if tokens else math.nan

    @property
    def mean(self) -> float:
        """Mean weight of the trained tokens; NaN without a token."""
        tokens = sum(self.tokens.values())
        return sum(self.sums.values()) / tokens if tokens else math.nan


@dataclass(frozen=True)
class TokensOfSample:
    """Losses and weights of the trained tokens of a sample, in the order of its tokens."""

    index: NonNegativeInt
    """Pool index of the sample."""
    tokens: NonNegativeInt
    """Number of trained tokens. Those behind the end of :attr:`losses` are not on record."""
    losses: list[float]
    """Token losses, four significant digits."""
    weights: list[float]
    """Weights, four significant digits. A single number is the weight of every token."""

    @property
    def token_weights(self) -> list[float]:
        """Weight of each token of :attr:`losses`."""
        return self.weights * len(self.losses) if len(self.weights) == 1 else self.weights


@dataclass(frozen=True)
class TokensOfStep:
    """One line of :data:`TOKEN_SAMPLES`: token losses and weights of some samples of a step."""

    step: NonNegativeInt
    """Number of optimizer steps done, including this one."""
    samples: list[TokensOfSample]


@dataclass(frozen=True)
class Change:
    """One line of ``changes.jsonl``: a setting that was changed at a resume."""

    resumed_at: NonNegativeInt
    """Number of optimizer steps done at the resume."""
    step: int
    """Number of optimizer steps done when the change takes effect."""
    key: str
    before: Annotated[Any, Field(validation_alias=AliasChoices("before", "from"))]
    now: Annotated[Any, Field(validation_alias=AliasChoices("now", "to"))]
    effect: str
    """:data:`FROM_HERE`, or :data:`NO_EFFECT`."""

    @property
    def holds(self) -> bool:
        """Whether the change has an effect."""
        return self.effect == FROM_HERE


FROM_HERE = "from this step on"
NO_EFFECT = "none, the earlier value stays"


@dataclass(frozen=True)
class Metric:
    """A metric of a downstream task."""

    value: float | None
    """None if the metric is not a number."""
    stderr: NonNegativeFloat | None = None


@dataclass(frozen=True)
class Task:
    """One file of ``tasks``: the results of the trained model on a downstream task."""

    task: str
    form: str
    samples: NonNegativeInt
    num_fewshot: NonNegativeInt
    metrics: dict[str, Metric]
    chance: float | None = None
    """Expected value of guessing, for a task with choices."""
    notes: list[str] = field(default_factory=list)
    """Notes that a reader of the metrics needs."""


@dataclass(frozen=True)
class Start:
    """One start of a run, the first or a resume: an entry of :data:`ENVIRONMENT`."""

    step: NonNegativeInt
    """Number of optimizer steps done before this start."""
    started: str = ""
    """Time in UTC, as ISO 8601."""
    finished: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    """Versions of Python and of the installed packages that results may depend on."""
    platform: str = ""
    processes: NonNegativeInt | None = None
    devices: list[str] | None = None
    """Names of the accelerators of the main process; empty on a CPU. None means that they are not on record."""
    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables that change a run and were set."""
    working_directory: str = ""
    command: list[str] = field(default_factory=list)
    configuration: str = ""
    """The file that the configuration was read from."""
    plugins: list[dict[str, str]] = field(default_factory=list)
    """Files with their digests, and entry points with their packages."""
    model: dict[str, Any] = field(default_factory=dict)
    """``name``, and ``files`` or ``commit`` of the base model."""
    datasets: dict[str, dict[str, Any]] = field(default_factory=dict)
    """``entry`` and ``files`` of each data set that consists of local files."""
    files: dict[str, Any] = field(default_factory=dict)
    """Files that the section names, with their digests."""
    fingerprints: dict[str, str] = field(default_factory=dict)
    """Fingerprints of the tokenized samples, by the configuration key that names the data."""


@dataclass(frozen=True)
class Environment:
    """:data:`ENVIRONMENT`: every start of a run, first start first."""

    starts: list[Start] = field(default_factory=list)


@dataclass(frozen=True)
class Origin:
    """The run, and the checkpoint of it, from which another run resumed."""

    run: str | None
    step: NonNegativeInt
    checkpoint: str


@dataclass(frozen=True)
class Identity:
    """:data:`RUN`: identity of the run in a folder."""

    id: str | None = None
    began: str = ""
    """Time in UTC, as ISO 8601."""
    continues: Origin | None = None


def to_json(value: Any, header: Header | None = None) -> dict[str, Any]:
    """Return an object of this module in its written form.

    Args:
        value: an instance of one of the classes.
        header: header of the record, for fields that are written by domain.
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
        kind: class of the object.
        value: the value read from the file.
        where: file and line of the value, for messages.
        header: header of the record; None for version 1, whose lines name the domains.

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
    """Return the values by domain name. A domain with null is left out."""
    names = [] if header is None else list(header.domains)
    if len(values) != len(names):
        raise ConfigError(f"{where} has {len(values)} values, {HEADER} names {len(names)} domains.")
    return {name: value for name, value in zip(names, values, strict=True) if value is not None}


def _any(kind: type[T]) -> Any:
    """Return the class with a type that mypy accepts as hashable."""
    return kind  # mypy does not know that the class of a type variable is hashable


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    """Return pydantic's validator of a class."""
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
    """Return a value made of dictionaries, lists and plain values."""
    if is_dataclass(value):
        return to_json(value)
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
