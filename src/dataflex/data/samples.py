"""Samples outside a pool: a list of rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dataflex.data.sampling import IndexArray
from dataflex.data.stages import SampleFields
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
    """A list of rows in the format of the training collator. Tokens without an attention mask get a mask of ones.

    Args:
        rows: each with the tokens of a sample, and with labels of the same length if the stage has some. A row with
            ``input_ids`` alone is accepted in every stage, for measurements that read a prompt.
        fields: the fields of a sample in the stage.

    Raises:
        ComponentError: if a row has no tokens.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]], fields: SampleFields = SampleFields()) -> None:  # noqa: B008
        self._tokens = [fields.tokens if fields.tokens[0] in row else ("input_ids",) for row in rows]
        for number, (row, names) in enumerate(zip(rows, self._tokens, strict=True)):
            missing = [name for name in names if not len(row.get(name, ()))]
            if missing:
                raise ComponentError(f"row {number} of the samples to measure has no {missing[0]}.")
        self._rows = [
            {
                **{name.replace("input_ids", "attention_mask"): [1] * len(row[name]) for name in names},
                **row,
            }
            for row, names in zip(rows, self._tokens, strict=True)
        ]

    @property
    def size(self) -> int:
        """Number of samples, N."""
        return len(self._rows)

    @cached_property
    def lengths(self) -> NDArray[np.int32]:
        """Number of tokens of every sample, shape (N,)."""
        sums = [sum(len(row[name]) for name in names) for row, names in zip(self._rows, self._tokens, strict=True)]
        return np.array(sums, dtype=np.int32)

    def rows(self, indices: IndexArray) -> list[dict[str, Any]]:
        """Return samples in the format of the collator."""
        return [dict(self._rows[int(index)]) for index in indices]
