"""Samples outside a pool: a list of rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dataflex.data.sampling import IndexArray
from dataflex.errors import ComponentError


class Samples(Protocol):
    """The samples of a measurement. A :class:`~dataflex.data.pool.Pool` implements this protocol."""

    @property
    def size(self) -> int:
        """Number of samples, N."""
        ...

    @property
    def lengths(self) -> NDArray[np.int32]:
        """Number of tokens of every sample, shape (N,)."""
        ...

    def rows(self, indices: IndexArray) -> list[dict[str, Any]]:
        """Return samples in the format of the collator."""
        ...


class RowList:
    """A list of rows in the format of the training collator. A row without ``attention_mask`` gets a mask of ones.

    Args:
        rows: each with ``input_ids`` (at least one) and, in stage sft, ``labels`` of the same length.

    Raises:
        ComponentError: if a row has no ``input_ids``.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]]) -> None:
        empty = [number for number, row in enumerate(rows) if not len(row.get("input_ids", ()))]
        if empty:
            raise ComponentError(f"row {empty[0]} of the samples to measure has no input_ids.")
        self._rows = [{"attention_mask": [1] * len(row["input_ids"]), **row} for row in rows]

    @property
    def size(self) -> int:
        """Number of samples, N."""
        return len(self._rows)

    @cached_property
    def lengths(self) -> NDArray[np.int32]:
        """Number of tokens of every sample, shape (N,)."""
        return np.array([len(row["input_ids"]) for row in self._rows], dtype=np.int32)

    def rows(self, indices: IndexArray) -> list[dict[str, Any]]:
        """Return samples in the format of the collator."""
        return [dict(self._rows[int(index)]) for index in indices]
