"""Reading one YAML or JSON file with ``key=value`` overrides, merged as LLaMA-Factory merges them."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError
from yaml.reader import ReaderError

from dataflex.api.registry import CONFIG_KEYS
from dataflex.config.masking import HANDED_ON, filled
from dataflex.errors import ConfigError, did_you_mean
from dataflex.files import RepeatedKeyError, distinct

_SECTION = "dataflex"
_SUFFIXES = (".yaml", ".yml", ".json")


def read_yaml(path: Path, overrides: list[str]) -> dict[str, Any]:
    """Return the file (.yaml, .yml or .json) merged with ``key=value`` overrides, as LLaMA-Factory merges them.

    Where an override gives a family another method, the file's parameters of that family go.

    Raises:
        ConfigError: if the file is missing, is not a mapping, or an override cannot be merged into it.
    """
    loaded = _read(path)
    for override in overrides:
        _check_override(override, loaded)
    _check_twice(overrides)
    try:
        change = OmegaConf.to_container(OmegaConf.from_cli(overrides))
        merged = OmegaConf.merge(without_other_methods(loaded, change), change)
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        raise ConfigError(f"{' '.join(overrides)}: cannot be merged into {path}: {_first_line(error)}") from error
    try:
        resolved = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        kind = "Its ${...} refers" if isinstance(error, InterpolationResolutionError) else "${...} would refer"
        raise ConfigError(
            f"{path}: {error.full_key or 'a value'}: {_first_line(error)}. {kind} to another key or, as "
            "${oc.env:NAME}, to an environment variable; \\${ is the two characters themselves."
        ) from error
    assert isinstance(resolved, dict)
    given: dict[str, Any] = filled(resolved, os.environ.get(HANDED_ON))
    return {str(key): value for key, value in given.items()}


def _read(path: Path) -> dict[Any, Any]:
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; name a .yaml, .yml or .json file.")
    if path.suffix not in _SUFFIXES:
        raise ConfigError(f"expected a .yaml, .yml or .json file, got {str(path)!r}.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        others = [file.name for file in path.parent.glob("*") if file.suffix in _SUFFIXES]
        raise ConfigError(f"no such file: {path}{did_you_mean(path.name, others)}") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigError(
            f"{path}, line {line}: not UTF-8 text (byte 0x{error.object[error.start]:02x}); save the file as UTF-8."
        ) from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    try:
        loaded = json.loads(text, object_pairs_hook=distinct) if path.suffix == ".json" else _parsed(text)
        container = OmegaConf.to_container(OmegaConf.create(loaded)) if isinstance(loaded, dict) else loaded
    except MarkedYAMLError as error:
        raise ConfigError(f"{path}, {_explained(error, text)}") from error
    except ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise ConfigError(f"{path}, line {line}: {error.reason} (character {error.character!r}).") from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}, line {error.lineno}, column {error.colno}: {error.msg}.") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: values are nested too deep to be read.") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {error.full_key or 'a key'}: {_first_line(error)}.") from error
    except RepeatedKeyError as error:
        raise ConfigError(f"{path}: found duplicate key {error.key}.") from error
    except (YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: {_first_line(error)}.") from error
    if container is None or container == {}:
        raise ConfigError(f"{path} is empty: it has no keys.")
    if not isinstance(container, dict) or (path.suffix != ".json" and ":" not in text):
        raise ConfigError(f"{path}: the top level must be a mapping of keys to values.")
    return container


def _parsed(text: str) -> Any:
    """Return a YAML text as OmegaConf reads it, which takes 1e-4 for a number and refuses a key given twice."""
    loaded = OmegaConf.load(io.StringIO(text))
    return OmegaConf.to_container(loaded) if isinstance(loaded, DictConfig) else []


def _explained(error: MarkedYAMLError, text: str) -> str:
    """Return where a YAML text is wrong, the parser's reason, and the line itself."""
    mark = error.problem_mark or error.context_mark
    lines = text.splitlines() or [""]
    reason = str(error.problem or error.context)
    if error.context and error.problem:
        start = error.context_mark
        since = f" in line {start.line + 1}" if start is not None and start.line != mark.line else ""
        reason += f" ({error.context}{since})"
    missing_colon = reason.startswith("could not find expected ':'")
    ended = mark.line >= len(lines) or not lines[mark.line].strip()
    at = error.context_mark if (missing_colon or ended) and error.context_mark is not None else mark
    line = lines[at.line] if at.line < len(lines) else ""
    hint = ""
    if "\t" in line[: mark.column + 1]:
        hint = " YAML is indented with spaces, not with tabs."
    elif "mapping values are not allowed" in reason:
        before = lines[mark.line - 1].strip() if mark.line else ""
        if before and ":" not in before:
            hint = f" The line before it, {before!r}, has no colon after its key."
        else:
            hint = " A value with a colon in it needs quotes."
    elif missing_colon:
        hint = " A colon and a space are missing after a key."
    shown = f": {line.strip()!r}" if line.strip() else ""
    return f"line {mark.line + 1}, column {mark.column + 1}: {reason}{shown}.{hint}"


def _check_override(override: str, loaded: Mapping[Any, Any]) -> None:
    """Refuse an override that is not of the form ``key=value``, or that goes into something that has no keys."""
    key, sign, value = override.partition("=")
    parts = key.split(".")
    if not sign or not all(parts):
        raise ConfigError(f"override {override!r} is not of the form key=value (dataflex.select.method=loss).")
    try:
        OmegaConf.from_cli([override])
    except (YAMLError, OmegaConfBaseException, ValueError) as error:
        reason = getattr(error, "problem", None) or _first_line(error)
        raise ConfigError(f"override {override!r}: its value {value!r} cannot be read: {reason}.") from error
    at: Any = loaded
    for number, part in enumerate(parts[:-1], start=1):
        at = at.get(part)
        if at is None:
            return
        if not isinstance(at, Mapping):
            before = ".".join(parts[:number])
            raise ConfigError(f"override {override!r}: {before} is {at!r} in the file, which has no keys below it.")
    if value.strip() == "{}" and at.get(parts[-1]):
        raise ConfigError(
            f"override {override!r} changes nothing, because mappings are merged; {key}=null takes away what the file "
            "has there."
        )


def _check_twice(overrides: list[str]) -> None:
    """Refuse two overrides of one key with different values, of which only the last would count."""
    given: dict[str, str] = {}
    for override in overrides:
        key, _, value = override.partition("=")
        if given.setdefault(key, value) != value:
            raise ConfigError(f"override {override!r}: {key} is given twice, first as {given[key]!r}; keep one.")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def without_other_methods(base: Mapping[Any, Any], change: Any) -> dict[Any, Any]:
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
