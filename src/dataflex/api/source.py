"""The file and line of a component that is not built in, for messages to its author."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dataflex.api.component import Component

_PACKAGE = str(Path(__file__).parents[1])


def file_of(cls: type) -> str | None:
    """Return the file that defines a class. None for a built-in class or a class that was defined without a file."""
    module = sys.modules.get(cls.__module__)
    file = vars(module).get("__file__") if module is not None else None  # an interactive session has none
    return None if file is None or file.startswith(_PACKAGE) else file


def place_of(cls: type) -> str | None:
    """Return ``FILE, line N`` of a class, or None if :func:`file_of` returns None."""
    file = file_of(cls)
    if file is None:
        return None
    try:
        return f"{file}, line {_first_line(cls)}"
    except (OSError, TypeError):  # The file has changed since the import, or a call created the class.
        return file


@cache  # Cached because reading a source file takes milliseconds and labels are needed at every step.
def _first_line(cls: type) -> int:
    return inspect.getsourcelines(cls)[1]


def label_of(component: Component, methods: Sequence[str] = ()) -> str:
    """Return the family and name of a component. If it is not built in, add its class, file and line.

    Args:
        component: the component.
        methods: methods that the component may define. The label names the first one found, with its line.
    """
    cls = type(component)
    name = f"{component.family} {component.name!r}"
    file = file_of(cls)
    if file is None:
        return name
    for method in methods:
        for base in cls.__mro__:
            own = base.__dict__.get(method)
            if inspect.isfunction(own) and inspect.unwrap(own).__code__.co_filename == file:
                return f"{name} ({cls.__name__}.{method}, {file}, line {inspect.unwrap(own).__code__.co_firstlineno})"
    return f"{name} ({cls.__name__}, {place_of(cls)})"
