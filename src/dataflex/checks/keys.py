"""Keys that LLaMA-Factory does not know, and values that its arguments cannot have."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from typing import Any

from dataflex.checks.arguments import llamafactory_fields, llamafactory_keys, templates
from dataflex.config import SECTION, RunConfig
from dataflex.errors import Problem, did_you_mean, unknown


def problems_of_keys(config: RunConfig) -> Iterator[Problem]:
    """Return what is wrong with single keys and their values."""
    yield from _unknown_keys(config)
    yield from _values(config)


def _unknown_keys(config: RunConfig) -> Iterator[Problem]:
    known = llamafactory_keys()
    if not known or os.environ.get("ALLOW_EXTRA_ARGS", "").lower() in ("1", "true", "y"):
        return
    for key in config.llamafactory:
        if key not in known:
            hint = did_you_mean(key, [*known, SECTION]) or "."
            yield Problem(key, f"not a LLaMA-Factory argument{hint}")


def _values(config: RunConfig) -> Iterator[Problem]:
    """Values that LLaMA-Factory's annotations rule out, and unknown templates."""
    for key, annotation in llamafactory_fields().items():
        value = config.llamafactory.get(key)
        if value is None:
            continue
        names = {node.id for node in ast.walk(annotation) if isinstance(node, ast.Name)} - {"Optional", "Union"}
        choices = [node.value for node in ast.walk(annotation) if isinstance(node, ast.Constant) and node.value]
        if names == {"Literal"} and value not in choices:
            yield Problem(key, unknown("value", str(value), [str(choice) for choice in choices]))
        elif names in ({"int"}, {"float"}) and not _is_number(value):
            yield Problem(key, f"must be a number, got {value!r}.")
    template = config.llamafactory.get("template")
    if template is not None and templates() and template not in templates():
        yield Problem("template", f"unknown template {template!r}{did_you_mean(str(template), templates()) or '.'}")


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True
