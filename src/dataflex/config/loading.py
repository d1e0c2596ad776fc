"""The configuration of a run: a LLaMA-Factory YAML with a ``dataflex:`` section, and ``key=value`` overrides.

Loading splits the file. LLaMA-Factory's keys stay unchanged, and the section becomes a validated
:class:`DataFlexConfig`. This module imports neither torch nor LLaMA-Factory.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic.fields import FieldInfo

from dataflex.api import registry
from dataflex.api.component import Component
from dataflex.api.components import Components, Entry, family_key
from dataflex.api.given_weights import GivenWeightParams
from dataflex.api.params import ComponentParams
from dataflex.config import legacy
from dataflex.config.arguments import is_on, with_words
from dataflex.config.masking import masks
from dataflex.config.misplaced import SECTION as SECTION
from dataflex.config.misplaced import belongs, nested, unknown_in
from dataflex.config.ptx import PtxSettings
from dataflex.config.renames import with_names_of_now
from dataflex.config.yaml_file import BESIDE_METHOD, read_yaml
from dataflex.data.columns import WantedColumn
from dataflex.data.stages import loss_per_sample
from dataflex.errors import ConfigError, DataFlexError, Problem, did_you_mean, unknown

ASSET_KEYS = ("model_name_or_path", "dataset_dir")
"""Keys of LLaMA-Factory whose value may be ``asset:NAME``."""

TRAINER_CLASS = "trainer_class"
"""Key of a run whose Trainer a Python script makes: the name of the Trainer's class."""

LIGER = ("enable_liger_kernel", "use_liger_kernel")
"""Keys that switch on the kernels of Liger: LLaMA-Factory's own, and the Trainer's."""


class DataFlexConfig(BaseModel):
    """The ``dataflex:`` section."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    warmup_steps: int = Field(
        0, ge=0, description="Optimizer steps on a uniform draw before the first decision of a cycle."
    )
    update_steps: int | None = Field(
        None,
        ge=1,
        description="Length of a round in optimizer steps. If null, the length follows from the methods that decide.",
    )
    updates: int = Field(
        -1,
        description="Number of decisions in a cycle. With -1, decisions are made until training ends.",
        json_schema_extra={"anyOf": [{"const": -1}, {"minimum": 1}]},
    )
    train_steps: int | None = Field(
        None, ge=1, description="Total optimizer steps of the run. Overrides num_train_epochs."
    )
    train_tokens: int | None = Field(
        None, ge=1, description="Number of trained tokens at which training ends, instead of a number of steps."
    )
    train_seconds: float | None = Field(
        None, gt=0, description="Seconds of training and decisions together after which training ends."
    )
    seed: int = Field(42, ge=0, description="Seed of every decision. LLaMA-Factory's seed is for the rest of the run.")
    domain_column: str | None = Field(
        None,
        min_length=1,
        description="Column of the raw data whose values are the domains. If null, each data set is a domain.",
    )
    columns: list[str] = Field(
        default_factory=list, description="Columns of the raw data that are kept with the samples."
    )
    probe_batch_tokens: int | None = Field(
        None,
        ge=1,
        description="Tokens in one forward pass of a measurement, padding included. If null: as many as four training "
        "micro-batches of the pool's longest sample, or as one micro-batch if gradients are computed.",
    )
    fused_loss: bool | None = Field(
        None,
        description="Compute the training loss from hidden states in chunks of tokens, without the logits of the whole "
        "micro-batch. If null: as enable_liger_kernel or use_liger_kernel.",
    )
    precompute_ref_log_probs: bool = Field(
        False,
        description="In stages dpo and kto: compute the log probabilities of the reference model once for all training "
        "samples, before the first step, instead of in every step.",
    )
    ptx: PtxSettings | None = Field(
        None,
        description="Plain text or instructions on which a preference run also trains: {dataset: [names], coefficient: "
        "0.1}.",
    )
    plugins: list[str] = Field(
        default_factory=list, description="Python files that register components or measurements."
    )
    select: dict[str, Any] | list[dict[str, Any]] | None = Field(
        None,
        description="The selector, which chooses the samples of a round: {method: name, ...parameters}. In a "
        "list, every selector but the last filters the samples for the next.",
    )
    mix: dict[str, Any] | None = Field(
        None, description="The mixer, which decides the share of each domain: {method: name, ...parameters}."
    )
    order: dict[str, Any] | None = Field(
        None, description="The order of a round's samples: {method: name, ...parameters}."
    )
    weight: dict[str, Any] | list[dict[str, Any]] | None = Field(
        None,
        description="The weighter, which weighs each sample or token in the loss: {method: name, ...parameters}. The "
        "weights of a list of weighters multiply.",
    )

    @field_validator("updates")
    @classmethod
    def _updates_positive_or_open(cls, value: int) -> int:
        if value == 0 or value < -1:
            raise ValueError("must be at least 1, or -1 to make decisions until training ends")
        return value


_Keep = Annotated[float, Field(gt=0, lt=1)] | Annotated[int, Field(ge=1)]


class EntryOptions(BaseModel):
    """Keys that every selector and weighter accepts beside its own parameters."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    every: int = Field(1, ge=1, description="A selector decides at every n-th decision, a weighter at every n-th step.")
    keep: int | float | None = Field(
        None,
        description="Samples that a selector leaves for the next one: a share between 0 and 1, or a number of samples.",
    )

    @field_validator("keep", mode="before", json_schema_input_type=_Keep | None)
    @classmethod
    def _share_or_number(cls, value: Any) -> Any:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is None or (number and (0 < value < 1 or (isinstance(value, int) and value >= 1))):
            return value
        raise ValueError("must be a share above 0 and below 1, or a whole number of samples, at least 1")


CHAINS = ("select", "weight")
"""Configuration keys that accept a list of methods."""


@dataclass(frozen=True)
class RunConfig:
    """A loaded configuration.

    Attributes:
        llamafactory: LLaMA-Factory's own keys, unchanged.
        dataflex: the ``dataflex:`` section. None means that the run is LLaMA-Factory's own.
        params: class and parameters of each component, by configuration key (``select``, or ``select.0`` in a chain).
        options: ``every`` and ``keep`` of the selectors and weighters, by the same keys.
        source: name of the file, for messages.
        base: folder of the file. A relative path is searched in the working directory, then in this folder.
        assets: keys of LLaMA-Factory whose value was ``asset:NAME`` -> that value.
        notes: texts that the user sees before the run starts.
        offline: whether the pool is only scored, not trained on.
        processes: number of processes that train, if the caller launches them. None: the environment decides.
    """

    llamafactory: dict[str, Any]
    dataflex: DataFlexConfig | None
    params: dict[str, tuple[type[Component], ComponentParams]] = field(default_factory=dict)
    options: dict[str, EntryOptions] = field(default_factory=dict)
    source: str = ""
    base: Path | None = None
    assets: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    offline: bool = False
    processes: int | None = None

    @property
    def warmup_steps(self) -> int:
        """Number of optimizer steps before the first decision; 0 without a section."""
        return 0 if self.dataflex is None else self.dataflex.warmup_steps

    @property
    def deepspeed(self) -> dict[str, Any] | None:
        """DeepSpeed's configuration.

        None means that the run has no DeepSpeed. The mapping is empty if the file cannot be read, which a check
        reports.
        """
        given = self.llamafactory.get("deepspeed")
        if not given:
            return None
        if isinstance(given, str):
            try:
                text = given if given.lstrip().startswith("{") else Path(given).read_text(encoding="utf-8")
                given = json.loads(text)
            except (OSError, ValueError):
                return {}
        return given if isinstance(given, dict) else {}

    @property
    def zero_stage(self) -> int:
        """ZeRO stage in DeepSpeed's configuration, 0 to 3; 0 if none is set."""
        block = (self.deepspeed or {}).get("zero_optimization")
        stage = block.get("stage", 0) if isinstance(block, dict) else 0
        return stage if isinstance(stage, int) else 0

    @property
    def sharded_by(self) -> Literal["fsdp", "ZeRO-3"] | None:
        """The method that shards the model's weights over the processes; None if each process holds all weights."""
        if self.llamafactory.get("fsdp"):
            return "fsdp"
        return "ZeRO-3" if self.zero_stage == 3 else None

    @property
    def fused_loss(self) -> bool:
        """Whether DataFlex computes the training loss in chunks.

        This is false without a section, and in stages in which a sample has one loss.
        """
        if self.dataflex is None or loss_per_sample(str(self.llamafactory.get("stage"))):
            return False
        given = self.dataflex.fused_loss
        if given is not None or loss_per_sample(str(self.llamafactory.get("stage", "sft"))):
            return bool(given)
        return any(is_on(self.llamafactory.get(key)) for key in LIGER)

    def with_assets(self) -> RunConfig:
        """Return the configuration with ``asset:NAME`` replaced by paths; builds each asset that is not cached.

        Raises:
            ConfigError: if an asset is unknown or cannot be built.
        """
        from dataflex import assets

        given = {key: str(self.llamafactory[key]) for key in ASSET_KEYS if self.llamafactory.get(key)}
        named = {key: name for key, name in given.items() if name.startswith(assets.PREFIX)}
        found = {key: assets.resolve(name) for key, name in named.items()}
        return replace(self, llamafactory={**self.llamafactory, **found}, assets=named)

    def build_components(self) -> Components:
        """Return fresh components of this configuration.

        Raises:
            ConfigError: with a problem for each component that cannot be built.
        """
        found: dict[str, Any] = {family: () for family in CHAINS}
        problems = []
        for key, (cls, params) in self.params.items():
            try:
                component, family = registry.instantiate(cls, params), family_key(key)
            except DataFlexError as error:
                problems.append(Problem(f"{SECTION}.{key}", str(error)))
                continue
            if family in CHAINS:
                options = self.options.get(key, EntryOptions())
                found[family] += (Entry(component, key, options.every, options.keep),)
            else:
                found[family] = component
        if problems:
            raise ConfigError(problems=problems, source=self.source)
        return Components(**found)

    def wanted_columns(self) -> dict[str, WantedColumn]:
        """Return the raw columns that are kept with the samples, by name."""
        found = {
            name: WantedColumn(f"{SECTION}.columns")
            for name in (() if self.dataflex is None else self.dataflex.columns)
        }
        for key, component in self.build_components().items():
            for name in component.needs(self).columns:
                before = found.get(name, WantedColumn(f"{SECTION}.{key}"))
                found[name] = replace(before, checks=(*before.checks, (f"{SECTION}.{key}", component.column_problem)))
        return found

    def wanted_weights(self) -> dict[str, GivenWeightParams]:
        """Return the parameters of token weights that are kept with the samples, by configuration key."""
        needs = self.build_components().needs(self)
        return {key: each.given_weights for key, each in needs.items() if each.given_weights is not None}

    @property
    def families(self) -> set[str]:
        """Configuration keys of the families that have a component in this run."""
        return {family_key(key) for key in self.params}

    def resolved(self) -> dict[str, Any]:
        """Return the whole configuration with every default filled in, as plain data."""
        ours: dict[str, Any] | None = None
        if self.dataflex is not None:
            ours = self.dataflex.model_dump(exclude=set(registry.CONFIG_KEYS))
            for key, (cls, params) in self.params.items():
                options = self.options.get(key, EntryOptions()).model_dump(exclude_defaults=True)
                entry = {"method": cls.name, **options, **params.model_dump(mode="json")}
                family = family_key(key)
                ours[family] = entry if family == key else [*ours.get(family, []), entry]
        return {**self.llamafactory, SECTION: ours}


def load_config(path: Path, overrides: list[str] | None = None) -> RunConfig:
    """Load, translate, split and validate a configuration file.

    Raises:
        ConfigError: with every problem of the ``dataflex:`` section together.
    """
    return split_config(read_yaml(path, overrides or []), source=str(path), base=path.resolve().parent)


def split_config(raw: dict[str, Any], source: str = "", base: Path | None = None) -> RunConfig:
    """Split a merged mapping into LLaMA-Factory's keys and ours, and validate ours.

    Args:
        raw: the whole mapping; not changed.
        source: file name for messages.
        base: folder for relative plugin and component files.

    Raises:
        ConfigError: with every problem found.
    """
    config, problems = parse_config(raw, source, base)
    if problems:
        raise ConfigError(problems=problems, source=source)
    return config


def problems_of_masks(raw: Mapping[str, Any]) -> list[Problem]:
    """Return a problem for each value that is the mask of a secret, as the record of a run has it."""
    return [
        Problem(
            key, f"the value is a secret, so it was not recorded; set it ({key}=...), or run without it ({key}=null)."
        )
        for key in masks(raw)
    ]


def parse_config(raw: dict[str, Any], source: str = "", base: Path | None = None) -> tuple[RunConfig, list[Problem]]:
    """Split and validate like :func:`split_config`, but return the problems instead of raising them.

    Args:
        raw: the whole mapping; not changed.
        source: file name for messages.
        base: folder for relative plugin and component files.

    Returns:
        The configuration and the problems. If there are problems, the configuration has no section.
    """
    problems = problems_of_masks(raw)
    rest, section, notes = legacy.translate(raw, base, problems)
    rest = with_words(rest)
    plain = RunConfig(rest, None, source=source, base=base, notes=tuple(notes))
    if section is None and SECTION in raw:
        notes.append(
            f"{SECTION}: has no value, so the run is LLaMA-Factory's own and writes no record; {SECTION}: "
            f"{{}} writes one."
        )
        plain = replace(plain, notes=tuple(notes))
    if section is None or problems:
        return plain, problems
    if not isinstance(section, dict):
        # The message can name the right form only if the names of the methods are known.
        registry.load_components([], base)
        return plain, [Problem(SECTION, _no_section(section))]
    loaded = _load_plugins(section, base, problems)
    section = with_names_of_now(section, SECTION, notes, problems)
    # The families are validated by the parameter models of their methods, which give better messages than this model.
    settings = {key: value for key, value in section.items() if value is None or key not in registry.CONFIG_KEYS}
    hint = partial(_belongs, section)
    config = validate(DataFlexConfig, settings, SECTION, problems, hint=hint)
    params, options = _validate_components(section, base, problems) if loaded else ({}, {})
    if problems:
        return plain, problems
    if params and rest.get("warmup_steps") and "warmup_steps" not in section:
        notes.append(
            f"warmup_steps at the top of the file warms up the learning rate. {SECTION}.warmup_steps, the number of "
            "steps before the first decision, is 0."
        )
    given = {key: section[key] for key in registry.CONFIG_KEYS if section.get(key) is not None}
    config = config.model_copy(update=given)
    if not params and config.ptx is None:
        note = (
            f"{SECTION}: has none of select, mix, order and weight; the run trains like LLaMA-Factory and "
            "writes a record."
        )
        notes.append(note)
    return RunConfig(rest, config, params, options, source, base, notes=tuple(notes)), []


def _no_section(section: Any) -> str:
    """Return the message that the section must be a mapping, with the right form if the value names a method."""
    for family, kind in registry.CONFIG_KEYS.items():
        if isinstance(section, str) and section in registry.available(kind):
            return f"must be a mapping, got {section!r}; write {nested(f'{SECTION}.{family}.method', section)}."
    return f"must be a mapping, got {section!r}."


def _belongs(section: Mapping[str, Any], place: str, key: str) -> str | None:
    """Return a sentence that says where a key belongs; None if no part of the file has such a key."""
    return belongs(key, place, DataFlexConfig.model_fields, section)


def _belongs_to_component(section: Mapping[str, Any], place: str, key: str) -> str | None:
    """Return a sentence as :func:`_belongs` does, also for a key that is nearly ``method``."""
    near = did_you_mean(key, ["method"])
    return f"unknown key {key!r}{near}" if near else _belongs(section, place, key)


def _load_plugins(section: Mapping[str, Any], base: Path | None, problems: list[Problem]) -> bool:
    """Load the plug-ins and the installed methods; return whether their names can be checked now.

    After a plug-in that fails, a method it would have registered would be reported as unknown. So methods are then not
    checked.
    """
    plugins = section.get("plugins") or []
    named = isinstance(plugins, list) and all(isinstance(plugin, str) for plugin in plugins)
    try:
        registry.load_components(plugins if named else [], base)
    except ConfigError as error:
        problems += [replace(each, key=each.key and f"{SECTION}.{each.key}") for each in error.problems]
        return False
    return named


def _validate_components(
    section: dict[str, Any], base: Path | None, problems: list[Problem]
) -> tuple[dict[str, tuple[type[Component], ComponentParams]], dict[str, EntryOptions]]:
    """Return class and parameters of each component, and its :class:`EntryOptions`, by configuration key."""
    found: dict[str, tuple[type[Component], ComponentParams]] = {}
    options: dict[str, EntryOptions] = {}
    for family in registry.CONFIG_KEYS:
        given = section.get(family)
        if given is None:
            continue
        entries = given if isinstance(given, list) and family in CHAINS and _is_chain(given) else [given]
        for number, entry in enumerate(entries):
            key = family if len(entries) == 1 else f"{family}.{number}"
            one = _validate_component(key, entry, {**section, family: entry}, base, problems)
            if one is not None:
                found[key] = one
            if family in CHAINS and isinstance(entry, dict):
                beside = {name: entry[name] for name in BESIDE_METHOD if name in entry}
                checked = validate(EntryOptions, beside, f"{SECTION}.{key}", problems)
                options[key] = checked or EntryOptions()
                if checked is not None:
                    problems += _problems_of_keep(key, checked, family == "select", number == len(entries) - 1)
    return found, options


def _is_chain(given: list[Any]) -> bool:
    """Return whether a list has one or more entries, all of them mappings."""
    return bool(given) and all(isinstance(entry, dict) for entry in given)


def _problems_of_keep(key: str, options: EntryOptions, selects: bool, is_last: bool) -> list[Problem]:
    """Return a problem if a selector before the last one lacks ``keep``, or if another component has ``keep``."""
    if selects and not is_last and options.keep is None:
        needed = (
            "needed: the samples that this selector leaves for the next one, as a share above 0 and below "
            "1 or as a number."
        )
        return [Problem(f"{SECTION}.{key}.keep", needed)]
    if options.keep is not None and not selects:
        return [
            Problem(
                f"{SECTION}.{key}.keep", "is only for selectors, because a weighter leaves no sample out; remove it."
            )
        ]
    if options.keep is not None and is_last:
        taken = "the last selector chooses as many samples as the round needs; only the selectors before it have keep"
        return [Problem(f"{SECTION}.{key}.keep", f"{taken}. Remove it.")]
    return []


def _validate_component(
    key: str, given: Any, section: dict[str, Any], base: Path | None, problems: list[Problem]
) -> tuple[type[Component], ComponentParams] | None:
    """Return the class and parameters of one component, or None after adding problems.

    Args:
        key: configuration key of the component.
        given: value of that key.
        section: the whole section, with ``given`` as the value of its family. Hints say where in it a key belongs.
        base: folder of the configuration.
        problems: list to which problems are appended.
    """
    family = family_key(key)
    kind, prefix = registry.CONFIG_KEYS[family], f"{SECTION}.{key}"
    if not isinstance(given, dict) or not isinstance(given.get("method"), str):
        problems.append(Problem(*_without_method(prefix, kind, given)))
        return None
    try:
        cls = registry.get(kind, given["method"])
    except ConfigError as error:
        problems.append(Problem(f"{prefix}.method", str(error)))
        return None
    beside = ("method", *BESIDE_METHOD) if family in CHAINS else ("method",)
    data = {name: value for name, value in given.items() if name not in beside}
    params = validate(cls.Params, data, prefix, problems, base, partial(_belongs_to_component, section))
    return None if params is None else (cls, params)


def _without_method(prefix: str, family: str, given: Any) -> tuple[str, str]:
    """Return key and message for a family whose value names no method."""
    known = registry.available(family)
    names = ", ".join(known)
    words = given if isinstance(given, list) else [given]
    if not isinstance(given, dict):
        meant = f" {{method: {words[0]}}}" if len(words) == 1 and isinstance(words[0], str) else " {method: name}"
        hint = did_you_mean(words[0], known) if words and isinstance(words[0], str) and words[0] not in known else ""
        form = "a mapping"
        if isinstance(given, list) and prefix.removeprefix(f"{SECTION}.") in CHAINS:
            form, meant = "a mapping or a list of mappings", f" [{meant.strip()}]"
        return prefix, f"must be {form}, got {given!r}; write{meant}{hint or '.'} Known: {names}."
    if "method" in given:
        return f"{prefix}.method", f"must be the name of a {family}, got {given['method']!r}. Known: {names}."
    for key in given:
        if did_you_mean(str(key), ["method"]):
            return f"{prefix}.{key}", "unknown key; did you mean 'method'?"
    having = [name for name, cls in known.items() if given and set(given) <= set(cls.Params.model_fields)]
    only = f" {', '.join(having)} has {', '.join(given)}." if having else ""
    return f"{prefix}.method", f"needed: the name of a {family}.{only} Known: {names}."


def validate(
    model: type[BaseModel],
    data: dict[str, Any],
    prefix: str,
    problems: list[Problem],
    base: Path | None = None,
    hint: Callable[[str, str], str | None] = lambda place, key: None,
) -> Any:
    """Return ``model`` built from ``data``, or None after adding one problem for each wrong key.

    Args:
        model: the pydantic class.
        data: values of its fields.
        prefix: dotted key of ``data``, for messages.
        problems: list to which problems are appended.
        base: folder of the configuration; the validators receive it as context.
        hint: function of the prefix and an unknown key; returns a sentence that says where the key belongs, or None.
    """
    found: dict[str, list[str]] = {}
    # Pydantic accepts true and false as the numbers 1 and 0, so truth values are refused before it sees them.
    for name, value in data.items():
        info = model.model_fields.get(name)
        if isinstance(value, bool) and info is not None and _is_number(info.annotation):
            found[name] = [f"must be a number, got {str(value).lower()}"]
    try:
        built = model.model_validate(
            {key: value for key, value in data.items() if key not in found}, context={"base": base}
        )
    except ValidationError as error:
        for item in error.errors():
            if item["type"] == "missing" and item["loc"][0] in found:
                continue
            key, message = _explained(model, item, prefix, hint)
            found.setdefault(key, [])
            if message not in found[key]:
                found[key].append(message)
        built = None
    for key, messages in found.items():
        text = "; or: ".join(message.rstrip(".") if len(messages) > 1 else message for message in messages)
        end = "" if text.endswith((".", "?")) else "."
        problems.append(Problem(f"{prefix}.{key}" if key else prefix, f"{text}{end}"))
    return None if found else built


_PLAIN = {
    **dict.fromkeys(("tuple_type", "list_type"), "must be a list"),
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type"), "must be a mapping"),
    **dict.fromkeys(("int_parsing", "int_type", "int_from_float"), "must be a whole number"),
    **dict.fromkeys(("float_parsing", "float_type"), "must be a number"),
    **dict.fromkeys(("bool_parsing", "bool_type"), "must be true or false"),
    "string_type": "must be text",
}
"""Type of a pydantic error -> message."""


def _is_number(annotation: Any) -> bool:
    """Return whether a field accepts numbers but no truth values; None may be allowed besides."""
    kinds = {annotation, *get_args(annotation)} - {type(None)}
    return bool(kinds & {int, float}) and bool not in kinds


def _is_key(part: int | str | None = None) -> bool:
    """Return whether a part of an error's location is a key of a mapping, and not the name of a type in a union."""
    return isinstance(part, str) and part.isidentifier() and part not in ("str", "int", "float", "bool")


def needed(field: FieldInfo | None) -> str:
    """Return the message for a missing required key: the key's description, and an example if the field has one."""
    if field is None or not field.description:
        return "needed."
    words = field.description
    if words[1:2].islower() or words[1:2] == " ":  # An abbreviation such as CSV stays as it is.
        words = words[:1].lower() + words[1:]
    if field.examples:
        example = yaml.safe_dump(field.examples[0], default_flow_style=True, sort_keys=False, width=1000)
        example = example.removesuffix("...\n").strip()  # YAML ends a single scalar with dots.
        words += f" For example: {example}."
    return f"needed: {words}"


def _field(model: type[BaseModel], names: Sequence[str]) -> FieldInfo | None:
    """Return the field of a dotted key such as ``points.0.proportions``; None if the model does not have it.

    The parts of the key that are no field, such as the index of a list, are skipped.
    """
    models, field = [model], None
    for name in names:
        field = next((each.model_fields[name] for each in models if name in each.model_fields), None)
        if field is not None:
            models = list(_models_in(field.annotation))
    return field


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the pydantic classes in a type, also those in lists and unions."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models_in(part)


def _explained(
    model: type[BaseModel], item: Any, prefix: str, hint: Callable[[str, str], str | None]
) -> tuple[str, str]:
    """Return the key of a validation error, without the prefix, and the message.

    An error in an item of a list, or in an alternative of a union, is reported at the key that holds the list or union.
    If the item is a mapping, its key is reported with the item's index: ``points.0.step``.
    """
    location = item["loc"]
    names = [str(part) for part in location]
    if item["type"] == "extra_forbidden":
        if len(location) > 1:
            return ".".join(names), f"unknown key {names[-1]!r}."
        return names[0], hint(prefix, names[0]) or unknown_in(prefix, names[0], list(model.model_fields))
    position = next((number for number, part in enumerate(location) if isinstance(part, int)), None)
    if position is not None and _is_key(*location[position + 1 : position + 2]):
        names, position = names[: position + 2], None
    key = ".".join(names if position is None else names[:position])
    if item["type"] == "missing":
        return key, needed(_field(model, names)) if position is None else f"item {location[position] + 1} is missing"
    message = re.sub("^Input should be ", "must be ", item["msg"].removeprefix("Value error, "))
    message = _PLAIN.get(item["type"], message)
    if item["type"] == "union_tag_invalid":
        return key, unknown(
            item["ctx"]["discriminator"].strip("'"),
            item["ctx"]["tag"],
            re.findall("'([^']*)'", item["ctx"]["expected_tags"]),
        )
    if position is not None:
        message = f"item {location[position] + 1}: {message}"
    if ", got " not in message or item["type"] != "value_error":
        message += f", got {item['input']!r}"
    if item["type"] == "literal_error":
        message += did_you_mean(str(item["input"]), re.findall(r"'([^']*)'", item["ctx"]["expected"]))
    return key, message
