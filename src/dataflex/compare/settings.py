"""The settings of an experiment file: the variants, the seeds and the equal budget."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from dataflex.config.loading import needed
from dataflex.config.yaml_file import read_yaml
from dataflex.errors import ConfigError, Problem, unknown

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,59}")
_LARGEST_SEED = 2**32 - 1


def _form_of_base(value: Any) -> Any:
    if isinstance(value, str | dict):
        return value
    raise ValueError(f"must be the name of a file, or a mapping of keys, got {value!r}")


Base = Annotated[str | dict[str, Any], BeforeValidator(_form_of_base)]
"""The configuration that the variants change: a file, or its keys."""


class Equal(BaseModel):
    """The budget of every run. Exactly one of the keys is given."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tokens: int | None = Field(None, ge=1, description="Tokens trained on, padding not counted.")
    steps: int | None = Field(None, ge=1, description="Optimizer steps.")
    wall_clock: float | None = Field(None, gt=0, description="Seconds of training and decisions together.")

    @model_validator(mode="after")
    def _exactly_one(self) -> Equal:
        if len([value for value in (self.tokens, self.steps, self.wall_clock) if value is not None]) != 1:
            raise ValueError("needs exactly one of tokens, steps, wall_clock")
        return self

    @property
    def name(self) -> str:
        """The key that is given."""
        return next(name for name in ("tokens", "steps", "wall_clock") if getattr(self, name) is not None)

    @property
    def amount(self) -> float:
        """The value of that key: tokens, steps or seconds."""
        return float(getattr(self, self.name))

    def __str__(self) -> str:
        return f"{self.amount:,.0f} {'seconds of training and decisions' if self.name == 'wall_clock' else self.name}"


class Evaluate(BaseModel):
    """Measurements of every trained model, besides those on its evaluation data."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tasks: list[dict[str, Any] | str] = Field(
        min_length=1, description="Downstream tasks: settings, files, or names of tasks of lm-evaluation-harness."
    )


class ExperimentSettings(BaseModel):
    """The keys of an experiment file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    base: Base = Field(description="A LLaMA-Factory YAML (path from the experiment file), or its keys.")
    output_dir: str = Field(min_length=1, description="Folder of everything the comparison writes.")
    baseline: str = Field(description="Name of the variant that the others are compared with.")
    variants: dict[str, dict[str, Any]] = Field(
        description="A mapping of variant names to the keys that each variant changes in the base.",
        examples=[{"random": {"dataflex.select.method": "random"}, "loss": {"dataflex.select.method": "loss"}}],
    )
    seeds: list[int] = Field(
        description="List of seeds. Every variant is trained with each of them.", examples=[[1, 2, 3]]
    )
    equal: Equal = Field(description="The budget of every run: tokens, steps or wall_clock.", examples=[{"steps": 200}])
    evaluate: Evaluate | None = Field(None, description="Downstream tasks of every trained model.")
    metrics: list[str] | None = Field(None, description="The metrics whose differences get a finding.")
    processes: int = Field(1, ge=1, description="Processes of each training, one for each device.")

    @field_validator("variants", mode="before")
    @classmethod
    def _empty_is_the_base(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        other = next((name for name in value if not isinstance(name, str)), None)
        if other is not None:
            raise ValueError(f"the name {other!r} is read as {type(other).__name__}; put it in quotes")
        return {name: {} if change is None else change for name, change in value.items()}

    @field_validator("variants")
    @classmethod
    def _fit_for_folders(cls, value: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        if len(value) < 2:
            raise ValueError("needs at least two variants, the baseline among them")
        bad = [name for name in value if not _NAME.fullmatch(name)]
        if bad:
            raise ValueError(
                f"{', '.join(map(repr, bad))}: a name becomes a folder; use at most 60 letters, digits, '.', '_' and "
                "'-', with a letter or digit first"
            )
        lower: dict[str, str] = {}
        for name in value:
            if (other := lower.setdefault(name.lower(), name)) != name:
                raise ValueError(
                    f"{other!r} and {name!r} would share a folder on a file system that ignores case; rename one"
                )
        return value

    @field_validator("seeds", mode="before")
    @classmethod
    def _seeds_are_numbers(cls, value: Any) -> Any:
        if isinstance(value, list) and any(isinstance(seed, bool) for seed in value):
            raise ValueError(f"must be whole numbers, got {value!r}")
        return value

    @field_validator("seeds")
    @classmethod
    def _seeds_distinct(cls, value: list[int]) -> list[int]:
        if not value:
            raise ValueError("needs at least one seed, and three or more to support a claim")
        twice = sorted({seed for seed in value if value.count(seed) > 1})
        if twice:
            raise ValueError(f"{', '.join(map(str, twice))} is given more than once; use each seed once")
        outside = [seed for seed in value if not 0 <= seed <= _LARGEST_SEED]
        if outside:
            raise ValueError(f"{outside[0]} is not between 0 and {_LARGEST_SEED}")
        return value


_MODELS: dict[tuple[str, ...], type[BaseModel]] = {(): ExperimentSettings, ("equal",): Equal, ("evaluate",): Evaluate}


def read_settings(path: Path) -> ExperimentSettings:
    """Read and validate an experiment file.

    Raises:
        ConfigError: with every problem found in its keys.
    """
    try:
        settings = ExperimentSettings.model_validate(read_yaml(path, []))
    except ValidationError as error:
        problems = [problem_of(item, (), _MODELS) for item in error.errors()]
        raise ConfigError(problems=problems, source=str(path)) from error
    if settings.baseline not in settings.variants:
        message = unknown("variant", settings.baseline, settings.variants)
        raise ConfigError(problems=[Problem("baseline", message)], source=str(path))
    return settings


def problem_of(item: Any, prefix: tuple[str, ...], models: Mapping[tuple[str, ...], type[BaseModel]]) -> Problem:
    """Return a pydantic error as a problem in the words of this project.

    Args:
        item: an item of ``ValidationError.errors()``.
        prefix: key of the value that was validated.
        models: key inside that value -> the model that validates it.
    """
    where = tuple(str(part) for part in item["loc"])
    key = ".".join((*prefix, *where))
    fields = models[where[:-1]].model_fields if where and where[:-1] in models else {}
    if item["type"] == "extra_forbidden":
        return Problem(key, unknown("key", where[-1], fields))
    if item["type"] == "missing":
        return Problem(key, needed(fields.get(where[-1])))
    message = str(item["msg"]).removeprefix("Value error, ")
    return Problem(key, f"{message}." if item["type"] == "value_error" else f"{message}, got {item['input']!r}.")
