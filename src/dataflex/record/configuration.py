"""Configuration on record: a file that ``dataflex-cli train`` can run as it is, from any working directory."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from dataflex.api import registry
from dataflex.api.params import path_fields
from dataflex.config.loading import SECTION, TRAINER_CLASS, RunConfig
from dataflex.config.masking import masked
from dataflex.data.fingerprints import is_file
from dataflex.errors import ConfigError
from dataflex.record.files import one_line

FILE = "config.yaml"
PLUGINS = "plugins"
"""Folder of the record with copies of the plug-in files."""

_INPUTS = (
    "model_name_or_path",
    "adapter_name_or_path",
    "adapter_folder",
    "new_special_tokens_config",
    "media_dir",
    "ref_model",
    "ref_model_adapters",
    "reward_model",
    "reward_model_adapters",
    "deepspeed",
    "fsdp_config",
    "accelerator_config",
    "vllm_config",
    "sglang_config",
    "kt_weight_path",
    "kt_expert_checkpoint_path",
    "export_quantization_dataset",
    "resume_from_checkpoint",
)
"""LLaMA-Factory's keys that may name an existing file or folder."""

_LISTS = ("adapter_name_or_path", "ref_model_adapters", "reward_model_adapters")
"""The keys among them that may name several paths, separated by commas."""

_OUTPUTS = (
    "output_dir",
    "tokenized_path",
    "cache_dir",
    "offload_folder",
    "export_dir",
    "logging_dir",
    "profiler_output_dir",
    "swanlab_logdir",
)
"""LLaMA-Factory's keys that name folders which need not exist yet."""

_OF_THE_FOLDER = ("overwrite_output_dir", "resume_from_checkpoint")
"""Keys about the contents of the output folder. They are no settings of the run itself."""


@dataclass(frozen=True)
class Recorded:
    """The recorded form of a configuration.

    Attributes:
        configuration: LLaMA-Factory's keys and the ``dataflex:`` section with every default filled in. Paths are
            absolute, secrets masked.
        plugins: source code of each plug-in file, by its name in the record.
        sources: original path of each plug-in file, by its name in the record.
    """

    configuration: dict[str, Any]
    plugins: dict[str, bytes] = field(default_factory=dict)
    sources: dict[str, Path] = field(default_factory=dict)


def recorded(config: RunConfig) -> Recorded:
    """Return the recorded form of a configuration.

    The keys about the output folder are left out: ``overwrite_output_dir``, and ``resume_from_checkpoint`` if it names
    a checkpoint in the output folder. A repeated run starts from the beginning, and in a separate folder.
    """
    found = config.resolved()
    found |= {key: name for key, name in config.assets.items() if key in found}
    for key in _INPUTS:
        if isinstance(found.get(key), str):
            parts = found[key].split(",") if key in _LISTS else [found[key]]
            found[key] = ",".join(_absolute_if_there(part.strip()) for part in parts)
    for key in _OUTPUTS:
        if isinstance(found.get(key), str) and found[key]:
            found[key] = _absolute(found[key])
    if TRAINER_CLASS not in found:  # otherwise a script has given the data
        found["dataset_dir"] = _absolute_data(found.get("dataset_dir", "data"))
    for key in _OF_THE_FOLDER:
        if key in found and not _is_elsewhere(found[key], found.get("output_dir")):
            del found[key]
    ours = found.pop(SECTION)
    if ours is None:
        return Recorded(masked(found))
    for key, (_, params) in config.params.items():
        family, _, number = key.partition(".")
        _make_absolute(params, ours[family][int(number)] if number else ours[family])
    plugins, sources = _plugins(config)
    ours["plugins"] = [f"{PLUGINS}/{name}" for name in plugins]
    return Recorded(masked({**found, SECTION: ours}), plugins, sources)


def _plugins(config: RunConfig) -> tuple[dict[str, bytes], dict[str, Path]]:
    """Return the sources and the paths of the plug-in files, by names that include a digest of the contents.

    With such a name, no other file of the same name is loaded instead, whatever the working directory contains.
    """
    texts, sources = dict[str, bytes](), dict[str, Path]()
    assert config.dataflex is not None
    for given in config.dataflex.plugins:
        path = registry.find_plugin(given, config.base)
        text = path.read_bytes()
        digest = hashlib.sha256(text).hexdigest()[:12]
        name = f"{path.stem.removesuffix(f'-{digest}')}-{digest}{path.suffix}"
        texts[name], sources[name] = text, path
    return texts, sources


def _absolute(name: str) -> str:
    """Return an absolute path.

    A leading ``~`` stays, because the reader of the configuration decides whether to expand it.
    """
    return name if name.startswith("~") or Path(name).is_absolute() else os.path.abspath(name)  # noqa: PTH100


def _absolute_if_there(name: str) -> str:
    """Return an absolute path if the file or folder exists, otherwise the name unchanged."""
    return _absolute(name) if name and (is_file(Path(name)) or os.path.isdir(name)) else name  # noqa: PTH112


def _absolute_each(value: Any, is_written: bool) -> Any:
    """Make a path, or each path in nested lists, absolute. A path that is only read is changed only if it exists."""
    if isinstance(value, list):
        return [_absolute_each(item, is_written) for item in value]
    if not isinstance(value, str):
        return value
    return _absolute(value) if is_written else _absolute_if_there(value)


def _make_absolute(params: BaseModel, dumped: dict[str, Any]) -> None:
    """Make the paths among the parameters, and among nested parameters, absolute in ``dumped``."""
    for name, mark in path_fields(type(params)).items():
        dumped[name] = _absolute_each(dumped[name], mark.is_written)
    for name in type(params).model_fields:
        value = getattr(params, name)
        if isinstance(value, BaseModel):
            _make_absolute(value, dumped[name])
        elif isinstance(value, list | tuple):
            for item, inside in zip(value, dumped[name], strict=True):
                if isinstance(item, BaseModel):
                    _make_absolute(item, inside)


def _absolute_data(name: Any) -> Any:
    """Return ``dataset_dir`` as an absolute path, unless it names online data or an asset."""
    if not isinstance(name, str) or name == "ONLINE" or name.startswith(("asset:", "REMOTE:")):
        return name
    return _absolute(name)


def _is_elsewhere(value: Any, output_dir: Any) -> bool:
    """Return whether a value is a path outside the output folder."""
    if not isinstance(value, str) or value.lower() in ("true", "false") or not isinstance(output_dir, str):
        return False
    return not Path(value).resolve().is_relative_to(Path(output_dir).resolve())


def read_configuration(run: Path) -> dict[str, Any]:
    """Return the recorded configuration of a run: LLaMA-Factory's keys, and ``dataflex``.

    Args:
        run: the run's ``output_dir``.

    Raises:
        ConfigError: if the folder is not an output folder of a run, or the file is malformed.
    """
    file = run / SECTION / FILE
    if not run.is_dir():
        raise ConfigError(f"{run} is not a folder; expected the output_dir of a DataFlex run.")
    if not file.is_file():
        raise ConfigError(f"{file} is missing; expected {run} to be the output_dir of a DataFlex run.")
    try:
        found = yaml.safe_load(file.read_bytes())
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} is not readable YAML ({one_line(error)}).") from error
    if isinstance(found, Mapping) and isinstance(found.get("llamafactory"), Mapping):  # of the first release
        found = {**found["llamafactory"], SECTION: found.get(SECTION)}
    if not isinstance(found, dict) or not isinstance(found.get(SECTION), dict):
        raise ConfigError(f"{file}: expected a run's configuration, with a section {SECTION}.")
    return dict(masked(found))
