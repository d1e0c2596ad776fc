"""Merging a change into a base configuration: nested mappings, dotted keys, and keys that are removed."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from omegaconf import OmegaConf

from dataflex.api.registry import CONFIG_KEYS
from dataflex.config.loading import SECTION
from dataflex.config.yaml_file import kept_of
from dataflex.errors import Problem


def merged(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """Return the base with a variant's keys merged into it.

    Args:
        base: not changed.
        change: nested mappings and dotted keys. Mappings are merged, other values replace, and None removes a key.
            If a family gets another method, the base's parameters of that family are dropped, since they belong to the
            other method.

    Raises:
        OmegaConfBaseException: if the two cannot be merged.
    """
    resolved = OmegaConf.to_container(OmegaConf.create(_merge(base, _expanded(change))), resolve=True)
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


def _merge(base: Mapping[Any, Any], change: Mapping[Any, Any], path: tuple[Any, ...] = ()) -> dict[Any, Any]:
    """Return the mapping at ``path`` of a configuration with a change merged into it."""
    found = dict(base)
    for key, value in change.items():
        old = found.get(key)
        if value is None:
            found.pop(key, None)
        elif isinstance(value, Mapping):
            before = old if isinstance(old, Mapping) else {}
            if path == (SECTION,) and key in CONFIG_KEYS:
                before = kept_of(before, value)
            found[key] = _merge(before, value, (*path, key))
        else:
            found[key] = value
    return found


def _expanded(change: Mapping[str, Any]) -> dict[Any, Any]:
    """Return a change with its dotted keys as nested mappings. Interpolations are not resolved."""
    nested = OmegaConf.create({})
    for key, value in change.items():
        OmegaConf.update(nested, str(key), value, merge=True, force_add=True)
    found = OmegaConf.to_container(nested)
    assert isinstance(found, dict)
    return found


def leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the path and the value of everything in nested mappings that is no mapping."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, (*path, str(key)))
    else:
        yield path, value


def keys_of(change: Mapping[str, Any]) -> list[str]:
    """Return the dotted keys that a change sets or removes.

    Raises:
        OmegaConfBaseException: if the change contradicts itself.
    """
    return [".".join(path) for path, _ in leaves(_expanded(change))]


def idle_changes(base: Mapping[str, Any], change: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield the parts of a change that would not take effect as written.

    These are a removed key that the base does not have, a dotted key that leads through a value that is not a mapping,
    and a key that is given twice. Unknown keys that are set are found later, when the merged configuration is checked.

    Raises:
        OmegaConfBaseException: if the change contradicts itself.
    """
    given: dict[str, str] = {}
    for key, value in change.items():
        holders = str(key).split(".")[:-1]
        for depth in range(1, len(holders) + 1):
            there, found = _found(base, tuple(holders[:depth]))
            if there and found is not None and not isinstance(found, Mapping):
                holder = ".".join(holders[:depth])
                message = f"leads through {holder!r}, which is {found!r} in the base and not a mapping."
                yield Problem(str(key), message)
                break
        for path, leaf in leaves(_expanded({key: value})):
            name = ".".join(path)
            if name in given:
                yield Problem(name, f"is given twice, by {given[name]!r} and by {str(key)!r}; keep one of them.")
            given[name] = str(key)
            if leaf is None and not _found(base, path)[0]:
                yield Problem(name, f"removes a key that the base does not have{_nearest(name, base)}")


def _found(config: Any, path: tuple[str, ...]) -> tuple[bool, Any]:
    """Return whether a nested key exists, and its value."""
    for key in path:
        if not isinstance(config, Mapping) or key not in config:
            return False, None
        config = config[key]
    return True, config


def _nearest(name: str, base: Mapping[str, Any]) -> str:
    """Return the end of a sentence about a missing key: the most similar key, in the same mapping or elsewhere."""
    holder, _, last = name.rpartition(".")
    known = list(_names(base))
    beside = [key for key in known if key.rpartition(".")[0] == holder]
    for keys in (beside, known):
        ends = {key.rpartition(".")[2]: key for key in keys}
        near = difflib.get_close_matches(last, ends, n=1, cutoff=0.75)
        if near:
            return f"; did you mean {ends[near[0]]!r}?"
    return "; remove it."


def _names(config: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in config.items():
        yield f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _names(value, f"{prefix}{key}.")


def value_of(config: Mapping[str, Any], key: str) -> Any:
    """Return the value of a dotted key of at most two parts, or None if the key is missing."""
    section, _, name = key.rpartition(".")
    holder = config.get(section) if section else config
    return holder.get(name) if isinstance(holder, Mapping) else None


def replaced_keys(base: Mapping[str, Any], managed: Sequence[str], who: str) -> Iterator[str]:
    """Yield a line about the keys of the base that ``who`` overrides."""
    said = {key: value_of(base, key) for key in managed}
    named = [f"{key}: {value}" for key, value in said.items() if value is not None]
    expected = {"do_train: True", "do_eval: True"}  # the values that are set anyway need no note
    if set(named) - expected:
        left = ", ".join(each for each in named if each not in expected)
        yield f"the {who} sets or removes these keys itself and ignores their values in the base: {left}."


def remove(config: dict[str, Any], path: tuple[str, ...]) -> None:
    """Remove a nested key if it exists. The mappings around it must exist."""
    *holders, last = path
    for key in holders:
        config = config[key]
    config.pop(last, None)


def dotted(*parts: str) -> str:
    """Join the parts that are not empty into a dotted key."""
    return ".".join(part for part in parts if part)
