"""Reading one YAML or JSON file with ``key=value`` overrides, merged as LLaMA-Factory merges them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from dataflex.errors import ConfigError
from dataflex.registry import CONFIG_KEYS

_SECTION = "dataflex"


def read_yaml(path: Path, overrides: list[str]) -> dict[str, Any]:
    """Return the file (.yaml, .yml or .json) merged with ``key=value`` overrides, as LLaMA-Factory merges them.

    Where an override gives a family another method, the file's parameters of that family go.

    Raises:
        ConfigError: if the file is missing, is not a mapping, or an override has no ``=``.
    """
    if path.suffix not in (".yaml", ".yml", ".json"):
        raise ConfigError(f"expected a .yaml, .yml or .json file, got {str(path)!r}.")
    if not path.is_file():
        raise ConfigError(f"no such file: {path}")
    for override in overrides:
        if "=" not in override.lstrip("-"):
            raise ConfigError(f"override {override!r} is not of the form key=value (dataflex.select.method=loss).")
    try:
        text = path.read_text(encoding="utf-8")
        loaded = OmegaConf.create(json.loads(text)) if path.suffix == ".json" else OmegaConf.create(text)
        if not isinstance(loaded, DictConfig):
            raise ConfigError(f"{path}: the top level must be a mapping of keys to values.")
        change = OmegaConf.from_cli(overrides)
        kept = without_other_methods(OmegaConf.to_container(loaded), OmegaConf.to_container(change))
        merged = OmegaConf.to_container(OmegaConf.merge(kept, change), resolve=True)
    except (YAMLError, OmegaConfBaseException, json.JSONDecodeError, UnicodeDecodeError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    assert isinstance(merged, dict)
    return {str(key): value for key, value in merged.items()}


def without_other_methods(base: Mapping[str, Any], change: Any) -> dict[str, Any]:
    """Return the base without the families of which the change names another method.

    The parameters there belong to the method the base had.
    """
    section = base.get(_SECTION)
    if not isinstance(section, Mapping):
        return dict(base)
    others = [
        family
        for family in CONFIG_KEYS
        if (old := _method(section, family)) and (new := _method(change.get(_SECTION), family)) and new != old
    ]
    return {**base, _SECTION: {key: value for key, value in section.items() if key not in others}}


def _method(section: Any, family: str) -> Any:
    given = section.get(family) if isinstance(section, Mapping) else None
    return given.get("method") if isinstance(given, Mapping) else None
