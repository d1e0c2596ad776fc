"""Where a component that is not built in is defined, for messages: its author needs the file and the line."""

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
    """Return the file a class is defined in; None of what is built in, or was made without a file."""
    module = sys.modules.get(cls.__module__)
    file = None if module is None else module.__file__
    return None if file is None or file.startswith(_PACKAGE) else file


def place_of(cls: type) -> str | None:
    """Return ``FILE, line N`` of a class; None where :func:`file_of` is."""
    file = file_of(cls)
    if file is None:
        return None
    try:
        return f"{file}, line {_first_line(cls)}"
    except (OSError, TypeError):  # the file changed meanwhile, or the class was made by a call
        return file


@cache  # reading a source file takes milliseconds, and labels are made at every step
def _first_line(cls: type) -> int:
    return inspect.getsourcelines(cls)[1]


def label_of(component: Component, methods: Sequence[str] = ()) -> str:
    """Return the family and name of a component and, where it is not built in, its class and where that is defined.

    Args:
        component: the component.
        methods: what it may define, the first one found is named with its line.
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
