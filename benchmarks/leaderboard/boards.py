"""The board: ``board.yaml`` as objects, and the experiments of ``dataflex-cli compare`` that it stands for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dataflex import assets
from dataflex.errors import did_you_mean

Keys = dict[str, Any]

RANDOM = "random"
"""Method that chooses at random. It is never the best method, whose samples are put in several orders."""


METHOD_WORDS = ("validation", "embeddings", "reference", "model", "answer")
"""Words in braces that a method may have."""

MIXER_WORDS = ("doremi", "doge", "regmix_mixtures", "regmix_losses")
"""Words in braces that a mixer may have. Each is a file that is made before the models are trained."""


class _Part(BaseModel):
    """A part of the board. Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Model(_Part):
    """A model and how it is trained."""

    about: str
    settings: Keys


class Pool(_Part):
    """A file of training samples."""

    about: str
    file: str
    spoilt: Annotated[float, Field(ge=0, lt=1)] = 0.0


class Target(_Part):
    """The task that a model is trained for.

    ``answer`` is the pattern of the answer in a response, and ``task`` has settings of ``dataflex-cli eval``.
    """

    about: str
    validation: str
    held_out: str
    sources: list[str]
    answer: str
    task: Keys

    @property
    def has_choices(self) -> bool:
        """Whether the questions have choices."""
        return "choices" in self.task

    @property
    def files(self) -> list[str]:
        """The files that the target reads."""
        return [self.validation, self.held_out, *([self.task["fewshot_file"]] if "fewshot_file" in self.task else [])]


class TableSettings(_Part):
    """The model, the pool and the targets of some tables."""

    model: str
    pool: str
    targets: list[str] = Field(min_length=1)


class Selection(_Part):
    """Track A of a tier: instruction tuning towards a target."""

    methods: list[str] = Field(min_length=1)
    tables: list[TableSettings] = Field(min_length=1)
    baselines: list[str] = Field(min_length=1)
    seeds: list[int]
    tokens: int
    rounds: Keys
    rows: int | None
    sample_tokens: tuple[int, int]
    validation_rows: int
    held_out_rows: int
    other_rows: int
    training: Keys
    reference_rows: int = 0
    task_questions: int = 0
    orders: bool = False
    chance_questions: int = Field(0, description="Questions of the check that the model as it is beats guessing.")


class Mixtures(_Part):
    """Track B of a tier: pre-training on a mixture of domains. ``mixers`` are groups of mixers."""

    size: Literal["small", "large"]
    mixers: list[str] = Field(min_length=1)
    baseline: str
    seeds: list[int]


class Costs(_Part):
    """Track C of a tier. ``samples`` is the size of the pool that LESS selects from; the other parts scale with it."""

    device: Literal["cpu", "cuda"]
    samples: int


class Tier(_Part):
    """The work of one command."""

    about: str
    selection: Selection | None = None
    mixtures: Mixtures | None = None
    costs: Costs | None = None


class Claim(_Part):
    """A claim that tables test: all tables of a track with a baseline. ``variants`` are its methods (None: all)."""

    text: str
    source: str | None = None
    track: Literal["A", "B", "C"]
    baseline: str | None = None
    variants: list[str] | None = None


class Board(_Part):
    """The whole file."""

    models: dict[str, Model]
    pools: dict[str, Pool]
    targets: dict[str, Target]
    methods: dict[str, dict[str, Keys]]
    mixers: dict[str, dict[str, Keys]] = {}
    orders: dict[str, Keys]
    tiers: dict[str, Tier]
    claims: list[Claim]

    @model_validator(mode="after")
    def _names_exist(self) -> Board:
        for name, tier in self.tiers.items():
            if tier.selection is not None:
                self._check_selection(f"tier {name}", tier.selection)
            if tier.mixtures is not None:
                for group in tier.mixtures.mixers:
                    _known(f"tier {name}", "group of mixers", group, self.mixers)
                _known(f"tier {name}", "mixer", tier.mixtures.baseline, self.mixers_of(tier.mixtures))
        for i, claim in enumerate(self.claims):
            groups = self.methods if claim.track == "A" else self.mixers
            known = {name: None for group in groups.values() for name in group}
            for name in [*(claim.variants or []), *([claim.baseline] if claim.baseline else [])]:
                _known(f"claims.{i}", f"method of track {claim.track}", name, known)
        return self

    @model_validator(mode="after")
    def _words_exist(self) -> Board:
        for kind, groups, words in (("methods", self.methods, METHOD_WORDS), ("mixers", self.mixers, MIXER_WORDS)):
            for group, sections in groups.items():
                for name, section in sections.items():
                    for word in words_in(section):
                        _known(f"{kind}.{group}.{name}", "word in braces", word, words)
        return self

    def _check_selection(self, place: str, selection: Selection) -> None:
        for group in selection.methods:
            _known(place, "group of methods", group, self.methods)
        for table in selection.tables:
            _known(place, "model", table.model, self.models)
            _known(place, "pool", table.pool, self.pools)
            for target in table.targets:
                _known(place, "target", target, self.targets)
        loaded = {self.models[table.model].settings["model_name_or_path"] for table in selection.tables}
        if len(loaded) > 1:
            raise ValueError(f"{place}: its tables share data, so they need one tokenizer, not {sorted(loaded)}")
        for baseline in selection.baselines:
            _known(place, "method", baseline, self.methods_of(selection))

    def place_of(self, variant: str) -> str | None:
        """Return the place in the board of a variant of a table, or None if no method or mixer has the name."""
        for kind, groups in (("methods", self.methods), ("mixers", self.mixers)):
            for group, sections in groups.items():
                if variant in sections:
                    return f"{kind}.{group}.{variant}"
        order = next((name for name in self.orders if variant.endswith(f"-{name}")), None)
        return None if order is None else f"orders.{order}"

    def mixers_of(self, mixtures: Mixtures) -> dict[str, Keys]:
        """Return name -> section of every mixer of a tier."""
        return {name: keys for group in mixtures.mixers for name, keys in self.mixers[group].items()}

    def methods_of(self, selection: Selection) -> dict[str, Keys]:
        """Return name -> section of every method of a tier."""
        return {name: keys for group in selection.methods for name, keys in self.methods[group].items()}


def read(path: Path) -> Board:
    """Read a board.

    Raises:
        SystemExit: with every problem of the file.
    """
    try:
        return Board.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise SystemExit(f"--board: {path} cannot be read ({error.strerror}).") from error
    except yaml.YAMLError as error:
        raise SystemExit(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        # A problem of the whole board names its place in its message.
        said = [(".".join(map(str, item["loc"])), item["msg"].removeprefix("Value error, ")) for item in error.errors()]
        raise SystemExit("\n".join(f"{path}: {place}{': ' if place else ''}{text}" for place, text in said)) from error


@dataclass(frozen=True)
class Table:
    """A table of the results: one experiment of ``dataflex-cli compare``.

    Attributes:
        name: name of the table and of its folder.
        track: A or B.
        title: heading.
        setting: sentences about model, data and budget.
        experiment: the experiment file.
        group: tables of the same group have runs in common.
        best_of: name of the table whose best method this one arranges in several orders. None for other tables.
        pool_samples: samples of the pool. None for packed texts.
        step_samples: samples of an optimizer step. None for packed texts.
    """

    name: str
    track: str
    title: str
    setting: tuple[str, ...]
    experiment: Keys
    group: str
    best_of: str | None = None
    pool_samples: int | None = None
    step_samples: int | None = None

    @property
    def metric(self) -> str:
        """The metric that decides."""
        return str(self.experiment["metrics"][0])


@dataclass(frozen=True)
class Places:
    """Paths that the methods of a table name, all relative to the working directory."""

    data: Path
    embeddings: Path
    reference: Path
    output: Path


def filled(value: Any, words: Mapping[str, Any]) -> Any:
    """Return a value in which every text ``{word}`` is replaced by the value of the word."""
    if isinstance(value, Mapping):
        return {key: filled(item, words) for key, item in value.items()}
    if isinstance(value, list):
        return [filled(item, words) for item in value]
    if isinstance(value, str) and value.startswith("{") and value[1:-1] in words:
        return words[value[1:-1]]
    return value


def words_in(value: Any) -> set[str]:
    """Return the words in braces that a section has anywhere."""
    if isinstance(value, Mapping):
        return {word for item in value.values() for word in words_in(item)}
    if isinstance(value, list):
        return {word for item in value for word in words_in(item)}
    found = re.fullmatch(r"\{(\w+)\}", value) if isinstance(value, str) else None
    return {found[1]} if found else set()


def _known(place: str, kind: str, name: str, known: Iterable[str]) -> None:
    """Refuse a name that stands for nothing."""
    if name not in known:
        raise ValueError(
            f"{place}: there is no {kind} {name!r}; it must be one of {', '.join(known)}{did_you_mean(name, known)}"
        )


def selection_base(
    model: Model, domains: Sequence[str], evaluated: Sequence[str], settings: Selection, places: Places
) -> Keys:
    """Return the configuration that all variants of the tables of one model and pool change."""
    given = {key: value for key, value in model.settings.items() if value is not None}
    return {
        "stage": "sft",
        "do_train": True,
        "do_eval": True,
        "dataset": ",".join(domains),
        "eval_dataset": ",".join(evaluated),
        "dataset_dir": str(places.data),
        "cutoff_len": settings.sample_tokens[1],
        "save_strategy": "no",
        "report_to": "none",
        **given,
        **settings.training,
    }


def selection_tables(
    board: Board, tier: Tier, table: TableSettings, base: Keys, places: Places, tasks: list[Keys], pool_samples: int
) -> Iterator[Table]:
    """Yield the tables of one model and pool: one for each target and baseline, and those of the orders."""
    assert tier.selection is not None
    settings = tier.selection
    group = f"{table.model}-{table.pool}"
    step_samples = int(base["per_device_train_batch_size"]) * int(base.get("gradient_accumulation_steps", 1))
    samples = {"pool_samples": pool_samples, "step_samples": step_samples}
    methods = board.methods_of(settings)
    start = str(base["model_name_or_path"])
    # An asset is made if it is missing, so its folder is asked for only if a method names it.
    if any("model" in words_in(keys) for keys in methods.values()):
        start = assets.resolve(start)
    for target in table.targets:
        words = {
            "validation": [f"{target}_validation"],
            "embeddings": str(places.embeddings),
            "reference": str(places.reference),
            "model": start,
            "answer": board.targets[target].answer,
        }
        variants = {name: {"dataflex": filled(_with_rounds(keys, settings), words)} for name, keys in methods.items()}
        # Accuracies are shown without findings: a further metric would cost power, because p values are corrected.
        metrics = [f"{target}_held_out_loss"]
        for baseline in settings.baselines:
            name = f"{group}-{target}-vs-{baseline}"
            experiment = {
                "base": base,
                "output_dir": str(places.output / name),
                "baseline": baseline,
                "variants": variants,
                "seeds": settings.seeds,
                "equal": {"tokens": settings.tokens},
                "metrics": metrics,
                **({"evaluate": {"tasks": tasks}} if tasks else {}),
            }
            title = f"{board.targets[target].about}: against `{baseline}`"
            yield Table(
                name,
                "A",
                title,
                tuple(_sentences(board, table, target, settings, pool_samples)),
                experiment,
                group,
                **samples,
            )
        if settings.orders:
            name = f"{group}-{target}-orders"
            title = f"{board.targets[target].about}: orders of the best method's samples"
            experiment = {**experiment, "output_dir": str(places.output / name)}
            first = f"{group}-{target}-vs-{settings.baselines[0]}"
            setting = (
                *_sentences(board, table, target, settings, pool_samples),
                "The method was chosen by its mean on these held-out samples and seeds. So its mean, the baseline, is "
                "lower than that of new seeds would be.",
            )
            yield Table(name, "A", title, setting, experiment, group, best_of=first, **samples)


def of_orders(table: Table, best: str, orders: Mapping[str, Keys]) -> Table:
    """Return a table of orders with its variants, which are known when the best method is known."""
    section = table.experiment["variants"][best]["dataflex"]
    variants = {best: {"dataflex": section}}
    variants |= {f"{best}-{name}": {"dataflex": {**section, "order": keys}} for name, keys in orders.items()}
    experiment = {**table.experiment, "baseline": best, "variants": variants}
    return replace(table, experiment=experiment)


def best_method(comparison: Mapping[str, Any], metric: str, section_of: Mapping[str, Any]) -> str | None:
    """Return the selector with the lowest mean of a metric, or None if no selector has a value."""
    means = {
        name: found["means"][metric]
        for name, found in comparison["variants"].items()
        if found["means"].get(metric) is not None and "select" in section_of[name]["dataflex"] and name != RANDOM
    }
    return min(means, key=lambda name: means[name]) if means else None


def _with_rounds(section: Keys, settings: Selection) -> Keys:
    """Return a method's section with the rounds of the tier. Weights alone have no rounds, only a warm-up."""
    rounds = {key: value for key, value in settings.rounds.items() if key == "warmup_steps" or "select" in section}
    return {**rounds, **section} if section else {}


def _sentences(
    board: Board, table: TableSettings, target: str, settings: Selection, pool_samples: int
) -> Iterator[str]:
    yield f"Model: {board.models[table.model].about}."
    yield (
        f"Pool: {pool_samples:,} samples of {settings.sample_tokens[0]} to {settings.sample_tokens[1]} tokens, "
        f"{board.pools[table.pool].about}."
    )
    yield (
        f"Target: {board.targets[target].about}; {settings.validation_rows} validation samples for the methods that "
        f"read them, {settings.held_out_rows} other samples for the held-out loss."
    )
    if settings.reference_rows:
        yield (
            "Methods with a reference model, such as `rho_loss`, share one that was trained once on "
            f"{settings.reference_rows:,} further samples, which no other method has."
        )
    yield f"`{OTHER_LOSS}` is the loss on {settings.other_rows} held-out samples of the other sources of the pool."
    yield (
        f"Budget: {settings.tokens:,} trained tokens in each run, seeds {', '.join(map(str, settings.seeds))}. "
        f"{settings.rounds['warmup_steps']} steps on a random draw come before the first decision, and a decision "
        f"holds for {settings.rounds['update_steps']} steps. Methods that choose short samples take more steps."
    )


OTHER_LOSS = "others_held_out_loss"
"""Metric of the held-out samples of the other sources."""
