"""``dataflex-cli list``: the text about families, methods and their parameters, made from the registry."""

from __future__ import annotations

from collections.abc import Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from annotated_types import Ge, Gt, Le, Lt, MinLen, MultipleOf
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from dataflex.api import registry
from dataflex.api.component import Component
from dataflex.api.params import PathMark
from dataflex.errors import ConfigError, unknown


def render(name: str | None, plugins: list[str]) -> str:
    """Return the text about a family, a method, or all methods.

    Args:
        name: a family, its configuration key, or a method. None means all methods.
        plugins: Python files that register further components.

    Raises:
        ConfigError: if no family and no method has this name.
    """
    registry.load_components(plugins)
    keys = {family: key for key, family in registry.CONFIG_KEYS.items()}
    blocks = []
    for family, key in keys.items():
        methods = registry.available(family)
        whole = name in (None, family, key)
        shown = methods if whole else {method: cls for method, cls in methods.items() if method == name}
        if shown:
            head = f"{key}: ({family})"
            width = max(map(len, shown))
            blocks.append("\n".join([head, *(_method(method, cls, width) for method, cls in shown.items())]))
    if not blocks:
        known = [*keys, *keys.values(), *(method for family in keys for method in registry.available(family))]
        text = unknown("family or method", str(name), sorted(set(known)))
        own = "" if plugins else " A method of your own needs --plugins FILE."
        raise ConfigError(text + own)
    return "\n\n".join(blocks)


def _method(method: str, cls: type[Component], width: int) -> str:
    summary = (cls.__doc__ or "").strip().splitlines()
    lines = [f"  {method:<{width}} {summary[0] if summary else ''}"]
    lines += [f"      {_parameter(name, field)}" for name, field in cls.Params.model_fields.items()]
    return "\n".join(lines)


def _parameter(name: str, field: FieldInfo) -> str:
    kind = values_in_words(field.annotation, field.metadata)
    default = "required" if field.is_required() else f"default {in_yaml(field.get_default(call_default_factory=True))}"
    return f"{name} ({kind}; {default}): {field.description or ''}"


def in_yaml(value: Any) -> str:
    """Return a default value in YAML, on one line."""
    plain = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(plain, default_flow_style=True, width=1000, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def values_in_words(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """Return the values that a parameter takes in words, for example ``number in (0, 1] or null``.

    Args:
        annotation: the type of the parameter.
        metadata: the constraints of the parameter, as pydantic stores them.
    """
    kinds = [part if isinstance(part, str) else _kind(*part) for part in _alternatives(annotation, list(metadata))]
    kinds = list(dict.fromkeys(kinds))
    return kinds[0] if len(kinds) == 1 else f"{', '.join(kinds[:-1])} or {kinds[-1]}"


def _alternatives(annotation: Any, limits: list[Any]) -> list[Any]:
    """Return the members of a union type, each with its constraints. ``"null"`` comes last if None is a member."""
    while get_origin(annotation) is Annotated:
        annotation, *more = get_args(annotation)
        limits = [*more, *limits]
    if get_origin(annotation) not in (Union, UnionType):
        return [(annotation, limits)]
    parts = [_alternatives(part, limits) for part in get_args(annotation) if part is not NoneType]
    return [*(each for part in parts for each in part), *(["null"] if NoneType in get_args(annotation) else [])]


def _kind(annotation: Any, metadata: list[Any]) -> str:
    """Return a type that is no union in words."""
    limits = [limit for each in metadata for limit in (each.metadata if isinstance(each, FieldInfo) else [each])]
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return parts[0] if len(parts) == 1 else f"one of {', '.join(map(in_yaml, parts))}"
    if origin is list:
        return f"list of {_plural(values_in_words(*parts))}{_bounds(limits)}"
    if origin is tuple and Ellipsis not in parts:
        return f"list of {len(parts)} {_plural(values_in_words(parts[0]))}"
    if origin is dict:
        return f"mapping of {_plural(values_in_words(parts[0]))} to {_plural(values_in_words(parts[1]))}"
    if any(isinstance(limit, PathMark) for limit in limits):
        return "path"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"mapping {{{', '.join(_key(*item) for item in annotation.model_fields.items())}}}"
    return f"{_KINDS.get(annotation, 'value')}{_bounds(limits)}"


_KINDS: dict[Any, str] = {int: "whole number", float: "number", bool: "true or false", str: "text"}


def _key(name: str, field: FieldInfo) -> str:
    """Return the key of a mapping, with its value if only one value is allowed."""
    fixed = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    return f"{name}: {fixed[0]}" if len(fixed) == 1 else name


def _plural(kind: str) -> str:
    head, _, rest = kind.partition(" ")
    if head == "whole":
        return kind.replace("whole number", "whole numbers", 1)
    if head in ("number", "path", "list", "mapping", "value"):
        return f"{head}s {rest}".rstrip()
    return kind


def _bounds(limits: Sequence[Any]) -> str:
    """Return the range that constraints allow, with a space before it. Without constraints the text is empty."""
    low = next((limit for limit in limits if isinstance(limit, Ge | Gt)), None)
    high = next((limit for limit in limits if isinstance(limit, Le | Lt)), None)
    lower = low.ge if isinstance(low, Ge) else low.gt if isinstance(low, Gt) else None
    upper = high.le if isinstance(high, Le) else high.lt if isinstance(high, Lt) else None
    text = ""
    if lower is not None and upper is not None:
        text = f" in {'[' if isinstance(low, Ge) else '('}{lower}, {upper}{']' if isinstance(high, Le) else ')'}"
    elif lower is not None:
        text = f" {'>=' if isinstance(low, Ge) else '>'} {lower}"
    elif upper is not None:
        text = f" {'<=' if isinstance(high, Le) else '<'} {upper}"
    for limit in limits:
        if isinstance(limit, MultipleOf):
            text += f", a multiple of {limit.multiple_of}"
        elif isinstance(limit, MinLen):
            text += f", at least {limit.min_length} long" if limit.min_length > 1 else ", not empty"
    return text
