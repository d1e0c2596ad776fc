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
    """A list of rows in the format of the training collator. Tokens without ``attention_mask`` get a mask of ones.

    Args:
        rows: each with ``input_ids`` (at least one) and, in stage sft, ``labels`` of the same length. A pair of
            responses has these fields twice, with ``chosen_`` and ``rejected_`` before their names.

    Raises:
        ComponentError: if a row has no ``input_ids``.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self._rows = []
        for number, row in enumerate(rows):
            masks = {}
            for prefix in _prefixes(row):
                tokens = row.get(f"{prefix}input_ids", ())
                if not len(tokens):
                    raise ComponentError(f"row {number} of the samples to measure has no {prefix}input_ids.")
                masks[f"{prefix}attention_mask"] = [1] * len(tokens)
            self._rows.append({**masks, **row})

    @property
    def size(self) -> int:
        """Number of samples, N."""
        return len(self._rows)

    @cached_property
    def lengths(self) -> NDArray[np.int32]:
        """Number of tokens of every sample, shape (N,)."""
        sums = [sum(len(row[f"{prefix}input_ids"]) for prefix in _prefixes(row)) for row in self._rows]
        return np.array(sums, dtype=np.int32)

    def rows(self, indices: IndexArray) -> list[dict[str, Any]]:
        """Return samples in the format of the collator."""
        return [dict(self._rows[int(index)]) for index in indices]


def _prefixes(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the first parts of the names of a row's fields of tokens."""
    return ("chosen_", "rejected_") if "chosen_input_ids" in row or "rejected_input_ids" in row else ("",)
