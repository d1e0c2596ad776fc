"""Renamed parameters of components: the earlier name is still accepted, with a note."""

from __future__ import annotations

from typing import Any

from dataflex.api import registry
from dataflex.api.params import ComponentParams
from dataflex.errors import Problem

_RENAMED = {"sketch": "projection"}
"""Earlier name of a parameter -> present name."""


def with_names_of_now(section: dict[str, Any], place: str, notes: list[str], problems: list[Problem]) -> dict[str, Any]:
    """Return the section with its components' parameters under their present names.

    A parameter is not renamed if its component has a parameter of the earlier name.

    Args:
        section: the section as given; not changed.
        place: dotted key of the section, for messages.
        notes: list to which notes for the user are appended.
        problems: list to which problems are appended.
    """
    found = dict(section)
    for key, family in registry.CONFIG_KEYS.items():
        given = section.get(key)
        if isinstance(given, list):
            found[key] = [
                _renamed(entry, family, f"{place}.{key}.{number}", notes, problems)
                for number, entry in enumerate(given)
            ]
        elif given is not None:
            found[key] = _renamed(given, family, f"{place}.{key}", notes, problems)
    return found


def _renamed(given: Any, family: str, place: str, notes: list[str], problems: list[Problem]) -> Any:
    if not isinstance(given, dict):
        return given
    cls = registry.available(family).get(str(given.get("method")))
    fields = ComponentParams.model_fields if cls is None else cls.Params.model_fields
    entry = dict(given)
    for old, new in _RENAMED.items():
        if old not in entry or old in fields or new not in fields:
            continue
        if new in entry:
            problems.append(
                Problem(f"{place}.{old}", f"is the earlier name of {new}, and both are given; remove {old}.")
            )
            continue
        notes.append(f"{place}.{old} is the earlier name of {new} and is still accepted; write {new}.")
        entry = {new if name == old else name: value for name, value in entry.items()}
    return entry
