"""Domain names as users write them, if the names come from a column of numbers or booleans.

A domain is named by the text of its value: ``1``, ``0.5``, ``True``. A YAML parser may read an unquoted name as a
number or a boolean (``1``, ``true``, ``no``), and the keys of a JSON file are always text. If a key is not the text of
a domain, it refers to the one domain with the same value: numbers are compared as numbers, and booleans in any YAML
spelling.
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
        ValueError: if two keys have the same text.
    """
    found: dict[str, T] = {}
    for key, value in given.items():
        if str(key) in found:
            raise ValueError(f"has two entries for {str(key)!r}")
        found[str(key)] = value
    return found


def by_domain(given: Mapping[str, T], names: tuple[str, ...]) -> dict[str, T]:
    """Return a mapping whose keys are replaced by the domain names that they refer to. Unknown keys stay unchanged.

    Example:
        >>> from dataflex import by_domain
        >>> by_domain({"1.0": 0.3, "yes": 0.7}, ("1", "True"))
        {'1': 0.3, 'True': 0.7}
    """
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
    """Return the value of a name: a number or boolean together with its kind, or the name itself."""
    if name.lower() in _WORDS:
        return "word", _WORDS[name.lower()]
    return ("number", float(name)) if _NUMBER.fullmatch(name) else name
