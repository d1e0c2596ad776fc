"""Messages for unknown and misplaced keys: each says where the key belongs, or names the nearest known key."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from dataflex.api import registry
from dataflex.api.selector import refuses_limit
from dataflex.config.arguments import llamafactory_keys
from dataflex.config.legacy import FLAT_KEYS
from dataflex.config.yaml_file import BESIDE_METHOD
from dataflex.errors import unknown

SECTION = "dataflex"
_NEAR = 0.6


def belongs(key: str, place: str, own: Collection[str], section: Mapping[str, Any] | None) -> str | None:
    """Return a sentence that says where a misplaced key belongs; None if no part of a file has such a key.

    Args:
        key: the key as written.
        place: dotted key of the mapping that holds the key: empty for the top of the file, ``dataflex``,
            ``dataflex.select`` and so on.
        own: the keys of the section.
        section: the section, if the file has one. Its methods are named before others.
    """
    inside = place.removeprefix(SECTION).removeprefix(".")
    if "." in key and key.split(".")[0] in (SECTION, *own):
        return f"dotted keys work only on the command line; write {nested(key, '...')} in the file."
    if key in own and place != SECTION:
        return f"belongs in the {SECTION}: section; write {nested(f'{SECTION}.{key}', '...')}."
    if key in llamafactory_keys() and place:
        return f"is an argument of LLaMA-Factory; move it to the top of the file, beside {SECTION}:."
    if key in FLAT_KEYS and place and not difflib.get_close_matches(key, own, n=1, cutoff=0.9):
        return (
            f"is a flat key of the earlier release; flat keys are only allowed at the top of a file without {SECTION}:."
        )
    if key == "method" and not inside:
        return (
            f"belongs under a family: {nested(f'{SECTION}.select.method', '...')}, or mix, order or weight "
            "instead of select."
        )
    if key in ("every", "keep") and inside in ("mix", "order"):
        return "is only for select and weight; remove it."
    if key == "params" and inside:
        return f"is not needed: write the parameters of a method beside method, directly under {place}."
    methods = list(_methods_with(key, section or {}))
    if methods:
        return _of_methods(key, inside.partition(".")[0], methods, section or {})
    for family, kind in registry.CONFIG_KEYS.items():
        if key in registry.available(kind) and not inside:
            return f"is a {kind}; write {SECTION}: {{{family}: {{method: {key}}}}}."
    near = difflib.get_close_matches(key, BESIDE_METHOD, n=1, cutoff=0.75)
    if near and inside.partition(".")[0] in ("select", "weight"):
        return f"unknown key {key!r}; did you mean {near[0]!r}?"
    return None


def _of_methods(key: str, here: str, methods: list[tuple[str, str]], section: Mapping[str, Any]) -> str:
    """Return a sentence that names the methods that have a parameter of a key's name.

    Args:
        key: the key as written.
        here: configuration key of the family that holds the key; empty if none does.
        methods: (family, method) of each method, the section's own methods first.
        section: the section, if the file has one.
    """
    family, method = methods[0]
    names = ", ".join(name for each, name in methods if each == family)
    own = section.get(here)
    known, method_here = "", own.get("method") if isinstance(own, Mapping) else None
    if method_here is not None and method_here in registry.available(registry.CONFIG_KEYS[here]):
        fields = registry.get(registry.CONFIG_KEYS[here], method_here).Params.model_fields
        known = f" Parameters of {method_here}: {', '.join(fields) or 'none'}."
    if here == family:
        return f"{method_here} has no {key}; these have: {names}.{known}" if known else f"is a parameter of {names}."
    given = section.get(family)
    if isinstance(given, Mapping) and given.get("method") == method:
        return f"is a parameter of {family}: {{method: {method}}}; move it under {SECTION}.{family}.{known}"
    return f"is a parameter of a {registry.CONFIG_KEYS[family]} ({names}); it belongs under {SECTION}.{family}.{known}"


def _methods_with(key: str, section: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """Yield (family, method) of the methods with a parameter of that name, the section's methods first."""
    given = {family: section.get(family) for family in registry.CONFIG_KEYS}
    named = {family: value.get("method") for family, value in given.items() if isinstance(value, Mapping)}
    known = [
        (family, method)
        for family, kind in registry.CONFIG_KEYS.items()
        for method, cls in registry.available(kind).items()
        if key in cls.Params.model_fields and not (key == "max_overhead" and refuses_limit(cls))
    ]
    yield from (each for each in known if named.get(each[0]) == each[1])
    yield from (each for each in known if each[0] in named and named[each[0]] != each[1])
    yield from (each for each in known if each[0] not in named)


def unknown_at_top(key: str, own: Collection[str]) -> str:
    """Return the message for an unknown key at the top of a file, with the nearest known key."""
    if ":" in key:
        return "unknown key; write a space after the colon that ends a key."
    near = difflib.get_close_matches(key, [*llamafactory_keys(), SECTION, *own], n=1, cutoff=_NEAR)
    if near and near[0] in own and near[0] not in llamafactory_keys():
        return f"not a LLaMA-Factory argument; did you mean {near[0]!r}, which belongs under {SECTION}:?"
    return f"not a LLaMA-Factory argument{f'; did you mean {near[0]!r}?' if near else '.'}"


def unknown_in(place: str, key: str, known: Collection[str]) -> str:
    """Return the message for an unknown key inside the section, with the nearest key of that mapping or of the top."""
    text = unknown("key", key, known)
    if "did you mean" in text:
        return text
    near = difflib.get_close_matches(key, llamafactory_keys(), n=1, cutoff=0.8)
    if near:
        return f"unknown key {key!r}; did you mean LLaMA-Factory's {near[0]!r}, at the top of the file?"
    return text


def nested(key: str, value: str) -> str:
    """Return ``a: {b: value}`` for the key ``a.b``."""
    first, *rest = key.split(".")
    return f"{first}: " + "".join(f"{{{part}: " for part in rest) + value + "}" * len(rest)
