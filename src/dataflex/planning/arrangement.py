"""Checks of the permutation that an order returns, and the planner's use of it."""

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
    """Return a key of an order, which a stored pass is compared with: the order's name and parameters as JSON.

    Existing paths that are read are made absolute, so that the key does not depend on the working directory. Paths that
    are written are left out, because they do not change the order.
    """
    found: dict[str, Any] = {"method": order.name, **order.params.model_dump(mode="json")}
    for name, mark in path_fields(type(order.params)).items():
        if mark.is_written:
            del found[name]
        elif isinstance(found[name], str) and Path(found[name]).exists():
            found[name] = str(Path(found[name]).resolve())
    return json.dumps(found, sort_keys=True)


def arranged(order: Order, ctx: RoundContext, selection: Selection) -> IndexArray:
    """Return the permutation that an order arranges a selection in.

    Raises:
        ComponentError: if the order returns no permutation.
    """
    return as_permutation(label_of(order, ("arrange",)), order.arrange(ctx, selection), selection.indices.size)


def as_permutation(label: str, given: Any, size: int) -> IndexArray:
    """Return a component's result as an array, after checking that it is a permutation of ``range(size)``.

    Args:
        label: name of the component's method, for the error.
        given: the result.
        size: length of the permutation.

    Raises:
        ComponentError: if the result is no permutation.
    """
    try:
        positions = np.asarray(given)
    except ValueError as error:
        raise ComponentError(
            f"{label} returned a {type(given).__name__} that cannot be converted to an array: {error}"
        ) from error
    whole = positions.shape == (size,) and np.issubdtype(positions.dtype, np.integer)
    if not whole or not np.array_equal(np.sort(positions), np.arange(size)):
        raise ComponentError(
            f"{label} must return a permutation of {size} positions (the integers 0 to {size - 1}), but did not."
        )
    return positions


def in_passes(positions: IndexArray, groups: IndexArray, passes: IndexArray) -> IndexArray:
    """Reorder the samples of each group so that earlier passes come first.

    Every group keeps its positions in the permutation.

    Args:
        positions: a permutation of a selection, shape (n,).
        groups: the group of each sample of the selection, shape (n,).
        passes: the pass of each sample over its group, shape (n,).

    Returns:
        The changed permutation, shape (n,).
    """
    place = np.arange(positions.size)
    group, number = groups[positions], passes[positions]
    found = np.empty_like(positions)
    found[np.lexsort((place, group))] = positions[np.lexsort((place, number, group))]
    return found
