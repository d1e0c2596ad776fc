"""The configuration: one LLaMA-Factory YAML with a ``dataflex:`` section, and ``key=value`` overrides.

Loading splits the file: LLaMA-Factory's keys stay as they are, ours become a validated :class:`DataFlexConfig`. Nothing
here imports torch or LLaMA-Factory.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from dataflex import legacy, registry
from dataflex.components import Component, ComponentParams, Components
from dataflex.errors import ConfigError, Problem, did_you_mean, unknown
from dataflex.masking import masks
from dataflex.yaml_file import read_yaml

SECTION = "dataflex"
ASSET_KEYS = ("model_name_or_path", "dataset_dir")
"""LLaMA-Factory keys whose value may be ``asset:NAME``."""


class DataFlexConfig(BaseModel):
    """The ``dataflex:`` section."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    warmup_steps: int = Field(0, ge=0, description="Optimizer steps on a uniform draw before the first decision.")
    update_steps: int | None = Field(
        None, ge=1, description="Length of a round in optimizer steps; none: a part of a pass, by what decides."
    )
    updates: int = Field(-1, description="Decisions in a cycle; -1: until training ends.")
    train_steps: int | None = Field(None, ge=1, description="Total optimizer steps; wins over num_train_epochs.")
    train_tokens: int | None = Field(
        None, ge=1, description="Training ends when so many tokens are trained on, in the place of a number of steps."
    )
    train_seconds: float | None = Field(
        None, gt=0, description="Training ends after so many seconds of training and decisions together."
    )
    seed: int = Field(42, ge=0, description="Seed of every decision.")
    domain_column: str | None = Field(
        None, min_length=1, description="Column of the raw data whose values are the domains; none: the data sets are."
    )
    probe_batch_tokens: int | None = Field(
        None,
        ge=1,
        description="Tokens in one forward of a probe; none: four training micro-batches of the longest sample.",
    )
    plugins: list[str] = Field(default_factory=list, description="Python files that register components.")
    select: dict[str, Any] | None = Field(None, description="The selector: {method: name, ...parameters}.")
    mix: dict[str, Any] | None = Field(None, description="The mixer: {method: name, ...parameters}.")
    order: dict[str, Any] | None = Field(None, description="The order: {method: name, ...parameters}.")
    weight: dict[str, Any] | None = Field(None, description="The weighter: {method: name, ...parameters}.")

    @field_validator("updates")
    @classmethod
    def _updates_positive_or_open(cls, value: int) -> int:
        if value == 0 or value < -1:
            raise ValueError("must be at least 1, or -1 for 'until training ends'")
        return value


@dataclass(frozen=True)
class RunConfig:
    """A loaded configuration.

    Attributes:
        llamafactory: LLaMA-Factory's own keys, untouched.
        dataflex: our section, or None where nothing of LLaMA-Factory is to be replaced.
        params: parameters of each present family, by configuration key.
        source: the file it came from, for messages.
        base: folder of that file, the second place where relative paths are looked for.
        assets: LLaMA-Factory keys whose value was ``asset:NAME``, and that name.
        notes: what the user should be told before the run starts.
        offline: whether the pool is only to be scored, not trained on.
    """

    llamafactory: dict[str, Any]
    dataflex: DataFlexConfig | None
    params: dict[str, tuple[type[Component], ComponentParams]] = field(default_factory=dict)
    source: str = ""
    base: Path | None = None
    assets: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    offline: bool = False

    def with_assets(self) -> RunConfig:
        """Return the configuration with ``asset:NAME`` values replaced by paths, fetching what is not there yet.

        Raises:
            ConfigError: if an asset is unknown or cannot be fetched.
        """
        from dataflex import assets

        given = {key: str(self.llamafactory[key]) for key in ASSET_KEYS if self.llamafactory.get(key)}
        named = {key: name for key, name in given.items() if name.startswith(assets.PREFIX)}
        found = {key: assets.resolve(name) for key, name in named.items()}
        return replace(self, llamafactory={**self.llamafactory, **found}, assets=named)

    def build_components(self) -> Components:
        """Return fresh components of this configuration."""
        built = Components()
        for key, (cls, params) in self.params.items():
            setattr(built, key, cls(params))
        return built

    def resolved(self) -> dict[str, Any]:
        """Return the whole configuration with every default filled in, as plain data."""
        ours: dict[str, Any] | None = None
        if self.dataflex is not None:
            ours = self.dataflex.model_dump(exclude={"select", "mix", "order", "weight"})
            for key, (cls, params) in self.params.items():
                ours[key] = {"method": cls.name, **params.model_dump(mode="json")}
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


def parse_config(raw: dict[str, Any], source: str = "", base: Path | None = None) -> tuple[RunConfig, list[Problem]]:
    """Do what :func:`split_config` does, but return the problems; with any, the section is left out."""
    problems = [
        Problem(key, f"was not recorded, as it is a secret; give it ({key}=...), or leave it out ({key}=null).")
        for key in masks(raw)
    ]
    rest, section, notes = legacy.translate(raw, base, problems)
    plain = RunConfig(rest, None, source=source, base=base, notes=tuple(notes))
    if section is None or problems:
        return plain, problems
    if not isinstance(section, dict):
        return plain, [Problem(SECTION, f"must be a mapping, got {section!r}.")]
    config = validate(DataFlexConfig, section, SECTION, problems)
    params = _validate_components(section, base, problems)
    if problems:
        return plain, problems
    if not params:
        note = f"{SECTION}: has none of select, mix, order, weight; the run trains as LLaMA-Factory does, on record."
        notes.append(note)
    return RunConfig(rest, config, params, source, base, notes=tuple(notes)), []


def _validate_components(
    section: dict[str, Any], base: Path | None, problems: list[Problem]
) -> dict[str, tuple[type[Component], ComponentParams]]:
    plugins = section.get("plugins") or []
    try:
        registry.load_components(plugins if isinstance(plugins, list) else [], base)
    except ConfigError as error:
        problems.append(Problem(SECTION, str(error)))
        return {}
    found = {}
    for key, family in registry.CONFIG_KEYS.items():
        given = section.get(key)
        if given is None:
            continue
        prefix = f"{SECTION}.{key}"
        if not isinstance(given, dict) or not isinstance(given.get("method"), str):
            names = ", ".join(registry.available(family))
            problems.append(Problem(f"{prefix}.method", f"needed, the name of a {family}. Known: {names}."))
            continue
        try:
            cls = registry.get(family, given["method"])
        except ConfigError as error:
            problems.append(Problem(f"{prefix}.method", str(error)))
            continue
        params = validate(cls.Params, {k: v for k, v in given.items() if k != "method"}, prefix, problems, base)
        if params is not None:
            found[key] = (cls, params)
    return found


def validate(
    model: type[BaseModel], data: dict[str, Any], prefix: str, problems: list[Problem], base: Path | None = None
) -> Any:
    """Return ``model`` built from ``data``, or None after adding one problem per bad key."""
    try:
        return model.model_validate(data, context={"base": base})
    except ValidationError as error:
        for item in error.errors():
            key = ".".join([prefix, *(str(part) for part in item["loc"])])
            if item["type"] == "extra_forbidden" and len(item["loc"]) == 1:
                message = unknown("key", str(item["loc"][-1]), list(model.model_fields))
            elif item["type"] == "extra_forbidden":
                message = f"unknown key {item['loc'][-1]!r}."
            elif item["type"] == "missing":
                message = "needed."
            else:
                message = f"{item['msg'].removeprefix('Value error, ')}, got {item['input']!r}"
                known = re.findall(r"'([^']*)'", item["ctx"]["expected"]) if item["type"] == "literal_error" else []
                message += did_you_mean(str(item["input"]), known) or "."
            problems.append(Problem(key, message))
        return None
