"""Names of domains as users write them, where the names come from a column of numbers or of true and false.

A domain is named by the text of its value: ``1``, ``0.5``, ``True``. What a YAML file says without quotes may be read
as a number or as true or false (``1``, ``true``, ``no``), and a JSON file has text only. A key that is the text of no
domain means the one domain of the same value: numbers are compared as numbers, true and false in any spelling of YAML.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")

_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?")
_WORDS = {**dict.fromkeys(("true", "yes", "on", "y"), True), **dict.fromkeys(("false", "no", "off", "n"), False)}


def with_text_keys(given: Mapping[Any, T]) -> dict[str, T]:
    """Return a mapping with its keys as text.

    Raises:
        ValueError: if two keys are the same text.
    """
    found: dict[str, T] = {}
    for key, value in given.items():
        if str(key) in found:
            raise ValueError(f"has two entries for {str(key)!r}")
        found[str(key)] = value
    return found


def by_domain(given: Mapping[str, T], names: tuple[str, ...]) -> dict[str, T]:
    """Return a mapping whose keys are the names of the domains they mean; a key that means none stays as it is."""
    free: dict[Any, list[str]] = {}
    for name in names:
        if name not in given:
            free.setdefault(_value(name), []).append(name)
    found: dict[str, T] = {}
    for key, item in given.items():
        meant = free.get(_value(key), []) if key not in names else []
        name = meant[0] if len(meant) == 1 and meant[0] not in found else key
        found[name] = item
    return found


def _value(name: str) -> Any:
    """Return what a name means: a number or true or false with its kind, or the name itself."""
    if name.lower() in _WORDS:
        return "word", _WORDS[name.lower()]
    return ("number", float(name)) if _NUMBER.fullmatch(name) else name
