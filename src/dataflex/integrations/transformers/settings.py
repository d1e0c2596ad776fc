"""The configuration of a run from a Trainer's arguments and a ``dataflex`` section, and its checks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from dataflex.config.arguments import is_on
from dataflex.config.checks.section import problems_of_section
from dataflex.config.loading import SECTION, TRAINER_CLASS, RunConfig, parse_config
from dataflex.config.yaml_file import read_yaml
from dataflex.errors import ConfigError, Problem

_SET_BY_DATAFLEX = ("do_train", "resume_from_checkpoint", "ignore_data_skip")
"""Arguments that are not taken from the Trainer's arguments."""


@dataclass(frozen=True)
class Facts:
    """The facts about a Trainer that a configuration needs and that its arguments do not tell.

    Attributes:
        trainer: name of the Trainer's class.
        stage: stage of LLaMA-Factory with the same samples and losses.
        model: name of the model; empty if it has none.
        adapter: whether an adapter is trained.
        domains: names of the training data sets.
        evaluation: names of the evaluation data sets.
        validation: names of the validation data sets.
    """

    trainer: str
    stage: str
    model: str
    adapter: bool
    domains: tuple[str, ...]
    evaluation: tuple[str, ...]
    validation: tuple[str, ...]


def read_section(given: Mapping[str, Any] | str | Path) -> tuple[Any, str, Path | None]:
    """Return the section, the name of its file for messages, and the folder of the file.

    Args:
        given: the section; or a YAML or JSON file that holds it, under ``dataflex`` or as the whole file.

    Raises:
        ConfigError: if the file cannot be read, or if the value is neither a mapping nor a path.
    """
    if isinstance(given, Mapping):
        return given, "", None
    if not isinstance(given, str | Path):
        raise ConfigError(f"dataflex: must be a mapping, or the path of a YAML file, got {given!r}.")
    path = Path(given)
    content = read_yaml(path, [])
    return content.get(SECTION, content), str(path), path.resolve().parent


def run_config(
    args: TrainingArguments, given: Mapping[str, Any] | str | Path, facts: Facts, resume: str | bool
) -> RunConfig:
    """Return the checked configuration of a run.

    Args:
        args: arguments of the Trainer.
        given: the section, see :func:`read_section`.
        facts: facts about the Trainer.
        resume: the checkpoint to resume from: a path, true for the last one, or false for none.

    Raises:
        ConfigError: with all problems of the section, also those with the Trainer's arguments.
    """
    section, source, base = read_section(given)
    keys = {
        "stage": facts.stage,
        "model_name_or_path": facts.model,
        "finetuning_type": "lora" if facts.adapter else "full",
        "dataset": list(facts.domains),
        **({"eval_dataset": list(facts.evaluation)} if facts.evaluation else {}),
        **given_arguments(args),
        "output_dir": str(args.output_dir),
        "do_train": True,
        "resume_from_checkpoint": resume,
        TRAINER_CLASS: facts.trainer,
    }
    config, problems = parse_config({**keys, SECTION: section}, source, base)
    if not problems:
        config = _with_validation(config, facts.validation)
        problems = problems_of(config)
    if problems:
        raise ConfigError(problems=problems, source=source)
    return config


def given_arguments(args: TrainingArguments) -> dict[str, Any]:
    """Return the arguments whose values differ from the defaults of ``TrainingArguments``, as plain data."""
    defaults = {each.name: _default(each) for each in dataclasses.fields(TrainingArguments)}
    plain, found = args.to_dict(), {}  # `to_dict` masks the values of tokens, also if they are not set
    for each in dataclasses.fields(args):
        value = getattr(args, each.name)
        if not each.init or each.name in _SET_BY_DATAFLEX or value is None:
            continue
        default = defaults.get(each.name, _default(each))
        if value == default or not (is_on(value) or is_on(default)):
            continue
        found[each.name] = value.value if isinstance(value, Enum) else plain.get(each.name, value)
    if not found.get("fsdp"):
        found.pop("fsdp_config", None)
    if isinstance(found.get("accelerator_config"), dict):
        plain_config = dataclasses.asdict(type(args.accelerator_config)())
        changed = {key: value for key, value in found["accelerator_config"].items() if value != plain_config.get(key)}
        found["accelerator_config"] = changed
        if not changed:
            del found["accelerator_config"]
    return found


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return None if field.default_factory is dataclasses.MISSING else field.default_factory()


def _with_validation(config: RunConfig, names: tuple[str, ...]) -> RunConfig:
    """Return the configuration in which a component that names no validation samples gets all given sets."""
    if not names:
        return config
    params = dict(config.params)
    for key, component in config.build_components().items():
        cls, given = params[key]
        asked = component.needs(config).validation
        if asked is not None and asked.validation is None and getattr(given, "validation", names) is None:
            params[key] = cls, given.model_copy(update={"validation": list(names)})
    return replace(config, params=params)


def problems_of(config: RunConfig) -> list[Problem]:
    """Return the problems of a section with the Trainer's arguments."""
    try:
        config.build_components().needs(config)
    except ConfigError as error:
        return list(error.problems)
    return list(dict.fromkeys([*problems_of_section(config), *_problems_here(config)]))


def _problems_here(config: RunConfig) -> Iterator[Problem]:
    """Yield the settings that need LLaMA-Factory."""
    if config.dataflex is not None and config.dataflex.ptx is not None:
        yield Problem(f"{SECTION}.ptx", "LLaMA-Factory loads the text, so it needs dataflex-cli; remove it.")
    for key, component in config.build_components().items():
        if component.needs(config).given_weights is not None:
            yield Problem(
                f"{SECTION}.{key}.method",
                f"{component.name!r} reads weights from rows in LLaMA-Factory's formats, and a Trainer's data sets "
                "have none; train with dataflex-cli, or use another method.",
            )


def unread_validation(config: RunConfig, names: tuple[str, ...]) -> str | None:
    """Return a note about the validation data sets that no component reads, or None."""
    read: set[str] = set()
    for key, component in config.build_components().items():
        if component.needs(config).validation is not None:
            read.update(getattr(config.params[key][1], "validation", None) or names)
    unread = [repr(name) for name in names if name not in read]
    return f"validation: no component of {SECTION}= reads {', '.join(unread)}." if unread else None


def token_loss_users(config: RunConfig) -> list[str]:
    """Return the settings that need the loss of each token in training."""
    components = config.build_components()
    found = [f"{SECTION}.weight"] if components.weight else []
    if components.mix is not None and components.mix.weighs_loss:
        found.append(f"{SECTION}.mix.method: {components.mix.name}")
    for key, needs in components.needs(config).items():
        if needs.step_losses != "nothing":
            found.append(f"{SECTION}.{key}.method")
    return [*found, *([f"{SECTION}.fused_loss"] if config.fused_loss else [])]


def model_users(config: RunConfig) -> list[str]:
    """Return the settings that need a causal language model: those of losses, and those that measure samples."""
    found = token_loss_users(config)
    for key, needs in config.build_components().needs(config).items():
        embeds = needs.embeddings is not None and needs.embeddings.encoder is None
        if needs.measurements or needs.reference is not None or embeds:
            found.append(f"{SECTION}.{key}.method")
    return list(dict.fromkeys(found))
