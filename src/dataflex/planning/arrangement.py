"""What an order returns, checked, and what the planner makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from dataflex.api.context import RoundContext
from dataflex.api.order import Order
from dataflex.api.params import path_fields
from dataflex.api.selection import Selection
from dataflex.api.source import label_of
from dataflex.data.sampling import IndexArray
from dataflex.errors import ComponentError


def maker_of(order: Order) -> str:
    """Return what tells an order's walk from others: its name and parameters, whatever its paths are relative to."""
    found: dict[str, Any] = {"method": order.name, **order.params.model_dump(mode="json")}
    for name, mark in path_fields(type(order.params)).items():
        if mark.is_written:
            del found[name]
        elif isinstance(found[name], str) and Path(found[name]).exists():
            found[name] = str(Path(found[name]).resolve())
    return json.dumps(found, sort_keys=True)


def arranged(order: Order, ctx: RoundContext, selection: Selection) -> IndexArray:
    """Return the permutation that an order puts a selection into.

    Raises:
        ComponentError: if it returns none.
    """
    return as_permutation(label_of(order, ("arrange",)), order.arrange(ctx, selection), selection.indices.size)


def as_permutation(label: str, given: Any, size: int) -> IndexArray:
    """Return what somebody gave as an array, after checking that it is a permutation of ``range(size)``.

    Raises:
        ComponentError: naming what gave it, if it is none.
    """
    try:
        positions = np.asarray(given)
    except ValueError as error:
        raise ComponentError(f"{label} returned a {type(given).__name__} that is no array: {error}") from error
    whole = positions.shape == (size,) and np.issubdtype(positions.dtype, np.integer)
    if not whole or not np.array_equal(np.sort(positions), np.arange(size)):
        raise ComponentError(f"{label} did not return a permutation of {size} positions, as integers.")
    return positions


def in_passes(positions: IndexArray, groups: IndexArray, passes: IndexArray) -> IndexArray:
    """Return a permutation whose groups have the same places, but in each of which earlier passes come first.

    Args:
        positions: a permutation of a selection.
        groups: the group of each of the selection's samples.
        passes: the pass of each over its group.
    """
    place = np.arange(positions.size)
    group, number = groups[positions], passes[positions]
    found = np.empty_like(positions)
    found[np.lexsort((place, group))] = positions[np.lexsort((place, number, group))]
    return found
