"""Reading of a YAML or JSON file with ``key=value`` overrides, merged as LLaMA-Factory merges them."""

from __future__ import annotations

import io
import json
import os
import re
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
_INDEX = re.compile(r"\[(\d+)\]")
BESIDE_METHOD = ("every", "keep")
"""Keys beside ``method`` in an entry of a chain that are not parameters of the method."""


def read_yaml(path: Path, overrides: list[str]) -> dict[str, Any]:
    """Return the content of a file (.yaml, .yml or .json) merged with ``key=value`` overrides.

    Overrides are merged as LLaMA-Factory merges them. If an override sets another method for a family, the file's
    parameters of that family are dropped, because they belong to the earlier method.

    Raises:
        ConfigError: if the file is missing or is not a mapping, or if an override cannot be merged into it.
    """
    loaded = _read(path)
    # The checks below split keys at dots, so an index has to be written with dots too.
    overrides = [_with_dots(override) for override in overrides]
    for override in overrides:
        _check_override(override, loaded)
    _check_twice(overrides)
    try:
        change = _with_whole_chains(loaded, OmegaConf.to_container(OmegaConf.from_cli(overrides)))
        merged = OmegaConf.merge(without_other_methods(loaded, change), change)
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        raise ConfigError(f"{' '.join(overrides)}: cannot be merged into {path}: {_first_line(error)}") from error
    try:
        resolved = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        kind = "Its ${...} refers" if isinstance(error, InterpolationResolutionError) else "${...} would refer"
        raise ConfigError(
            f"{path}: {error.full_key or 'a value'}: {_first_line(error)}. {kind} to another key, or to an environment "
            "variable (${oc.env:NAME}). Write \\${ for the two characters themselves."
        ) from error
    assert isinstance(resolved, dict)
    given: dict[str, Any] = filled(resolved, os.environ.get(HANDED_ON))
    return {str(key): value for key, value in given.items()}


def _read(path: Path) -> dict[Any, Any]:
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; give a .yaml, .yml or .json file.")
    if path.suffix not in _SUFFIXES:
        raise ConfigError(f"the configuration must be a .yaml, .yml or .json file, got {str(path)!r}.")
    try:
        # utf-8-sig, because some editors on Windows write a byte order mark.
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
        raise ConfigError(f"{path}: the values are nested too deeply to be read.") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {error.full_key or 'a key'}: {_first_line(error)}.") from error
    except RepeatedKeyError as error:
        raise ConfigError(f"{path}: found duplicate key {error.key}; keep one.") from error
    except (YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: {_first_line(error)}.") from error
    if container is None or container == {}:
        raise ConfigError(f"{path} is empty: it has no keys.")
    # OmegaConf reads a YAML that is one plain word as the mapping {word: None}, hence the search for a colon.
    if not isinstance(container, dict) or (path.suffix != ".json" and ":" not in text):
        raise ConfigError(f"{path}: the top level must be a mapping of keys to values.")
    return container


def _parsed(text: str) -> Any:
    """Return the content of a YAML text as OmegaConf reads it.

    Unlike plain YAML, OmegaConf reads ``1e-4`` as a number and refuses a key that is given twice.
    """
    loaded = OmegaConf.load(io.StringIO(text))
    return OmegaConf.to_container(loaded) if isinstance(loaded, DictConfig) else []


def _explained(error: MarkedYAMLError, text: str) -> str:
    """Return line and column of an error in a YAML text, the parser's reason, the line itself and a hint."""
    mark = error.problem_mark or error.context_mark
    lines = text.splitlines() or [""]
    reason = str(error.problem or error.context)
    if error.context and error.problem:
        start = error.context_mark
        since = f" in line {start.line + 1}" if start is not None and start.line != mark.line else ""
        reason += f" ({error.context}{since})"
    missing_colon = reason.startswith("could not find expected ':'")
    ended = mark.line >= len(lines) or not lines[mark.line].strip()
    # In these two cases the parser stops after the fault. The context mark is at the key or bracket left open.
    at = error.context_mark if (missing_colon or ended) and error.context_mark is not None else mark
    line = lines[at.line] if at.line < len(lines) else ""
    hint = ""
    if "\t" in line[: mark.column + 1]:
        hint = " YAML does not allow tabs as indentation; use spaces."
    elif "mapping values are not allowed" in reason:
        before = lines[mark.line - 1].strip() if mark.line else ""
        if before and ":" not in before:
            hint = f" The line before, {before!r}, has no colon after its key."
        else:
            hint = " Put a value that contains a colon into quotes."
    elif missing_colon:
        hint = " Write a colon and a space after the key."
    shown = f": {line.strip()!r}" if line.strip() else ""
    return f"line {mark.line + 1}, column {mark.column + 1}: {reason}{shown}.{hint}"


def _with_dots(override: str) -> str:
    """Return an override of the section with an index like ``select[0].keep`` written as ``select.0.keep``."""
    key, sign, value = override.partition("=")
    return _INDEX.sub(r".\1", key) + sign + value if key.startswith(f"{_SECTION}.") else override


def _chain(loaded: Any, family: Any) -> list[Any] | None:
    """Return the chain (list of methods) that a file has in a family; None if there is no chain."""
    section = loaded.get(_SECTION) if isinstance(loaded, Mapping) else None
    given = section.get(family) if isinstance(section, Mapping) else None
    return given if family in CONFIG_KEYS and isinstance(given, list) else None


def _with_whole_chains(loaded: Mapping[Any, Any], change: Any) -> Any:
    """Return overrides in which a change of a chain's entry is replaced by the whole changed chain.

    A merge replaces lists as a whole, so a change of one entry would lose the others.
    """
    section = change.get(_SECTION) if isinstance(change, Mapping) else None
    if not isinstance(section, Mapping):
        return change
    found = dict(section)
    for family, entries in section.items():
        chain = _chain(loaded, family)
        if chain is None or not isinstance(entries, Mapping) or not all(str(key).isdecimal() for key in entries):
            continue
        whole = list(chain)
        for key, entry in entries.items():
            old = whole[int(key)]
            mappings = isinstance(old, Mapping) and isinstance(entry, Mapping)
            kept = kept_of(old, entry) if mappings else {}
            whole[int(key)] = OmegaConf.to_container(OmegaConf.merge(kept, entry)) if mappings else entry
        found[family] = whole
    return {**change, _SECTION: found}


def kept_of(old: Mapping[Any, Any], new: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return the keys of a component's mapping that remain valid under a change.

    If the change names another method, only ``every`` and ``keep`` remain. The parameters belong to the old method.
    """
    other = bool(old.get("method")) and bool(new.get("method")) and old["method"] != new["method"]
    return {key: value for key, value in old.items() if not other or key in BESIDE_METHOD}


def _check_index(override: str, family: str, chain: list[Any], part: str) -> None:
    """Raise a ConfigError if an override of a chain names none of its entries."""
    if part.isdecimal() and int(part) < len(chain):
        return
    entries = ", ".join(
        f"{n} ({each.get('method') if isinstance(each, Mapping) else each})" for n, each in enumerate(chain)
    )
    raise ConfigError(
        f"override {override!r}: {_SECTION}.{family} is a list in the file. Name one of its entries by number, as in "
        f"{_SECTION}.{family}.0.method, or give the whole list. Entries: {entries}."
    )


def _check_override(override: str, loaded: Mapping[Any, Any]) -> None:
    """Raise a ConfigError for an override that is not ``key=value``, or whose key lies below a value without keys."""
    key, sign, value = override.partition("=")
    parts: list[Any] = key.split(".")
    if not sign or not all(parts):
        raise ConfigError(f"override {override!r} is not of the form key=value, as in dataflex.select.method=loss.")
    try:
        OmegaConf.from_cli([override])
    except (YAMLError, OmegaConfBaseException, ValueError) as error:
        reason = getattr(error, "problem", None) or _first_line(error)
        raise ConfigError(f"override {override!r}: the value {value!r} cannot be read as YAML: {reason}.") from error
    at: Any = loaded
    chain = _chain(loaded, parts[1]) if parts[0] == _SECTION and len(parts) > 2 else None
    if chain is not None:
        _check_index(override, parts[1], chain, parts[2])
        if len(parts) == 3:
            return
        loaded = {_SECTION: {parts[1]: dict(enumerate(chain))}}
        at, parts = loaded, [*parts[:2], int(parts[2]), *parts[3:]]
    for number, part in enumerate(parts[:-1], start=1):
        at = at.get(part)
        if at is None:
            return
        if not isinstance(at, Mapping):
            before = ".".join(map(str, parts[:number]))
            raise ConfigError(f"override {override!r}: {before} is {at!r} in the file, a value without keys below it.")
    if value.strip() == "{}" and at.get(parts[-1]):
        raise ConfigError(
            f"override {override!r} changes nothing, because mappings are merged; {key}=null removes the mapping of "
            "the file."
        )


def _check_twice(overrides: list[str]) -> None:
    """Raise a ConfigError if two overrides give a key different values: only the last would take effect."""
    given: dict[str, str] = {}
    for override in overrides:
        key, _, value = override.partition("=")
        if given.setdefault(key, value) != value:
            raise ConfigError(f"override {override!r}: {key} is given twice, before as {given[key]!r}; keep one.")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def without_other_methods(base: Mapping[Any, Any], change: Any) -> dict[Any, Any]:
    """Return ``base`` without the parameters that belong to a method which ``change`` replaces."""
    section, changed = base.get(_SECTION), change.get(_SECTION)
    if not isinstance(section, Mapping) or not isinstance(changed, Mapping):
        return dict(base)
    found = dict(section)
    for family in CONFIG_KEYS:
        old, new = section.get(family), changed.get(family)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found[family] = kept_of(old, new)
        elif isinstance(old, Mapping | list) and isinstance(new, Mapping | list):
            del found[family]  # one of the two is a chain, and a mapping cannot be merged with a list
    return {**base, _SECTION: found}
