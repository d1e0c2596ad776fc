"""Batches that are halved when a device runs out of memory, in the same way for all measurements."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from dataflex.data.sampling import IndexArray
from dataflex.errors import ComponentError

T = TypeVar("T")
logger = logging.getLogger(__name__)


def release_memory() -> None:
    """Give the memory that torch has cached back to the device."""
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()


@dataclass
class BatchLimit:
    """Limit of a batch's tokens, padding counted, that is lowered when the device runs out of memory.

    Attributes:
        what: the operation, for messages: ``to <what> of 4 samples of 20 tokens``.
        single: advice for messages, if a single sample does not fit.
        items: plural name of the items of a batch.
        unit: unit of their lengths.
        collective: whether all processes run a forward pass together, so that no process may halve a batch while the
            others wait.
        tokens: the limit. None means that memory has not run out so far.
    """

    what: str
    single: str
    items: str = "samples"
    unit: str = "tokens"
    collective: bool = False
    tokens: int | None = None

    def parts(
        self, compute: Callable[[IndexArray], T], rows: IndexArray, lengths: NDArray[Any]
    ) -> list[tuple[IndexArray, T]]:
        """Apply a function to a batch, in as few parts as fit into memory; return pairs of a part's rows and its value.

        Args:
            compute: the function.
            rows: the batch, at least one row.
            lengths: lengths of all rows that exist, indexed by ``rows``.

        Raises:
            ComponentError: if a single row does not fit, or if a batch does not fit and the forward is collective.
        """
        if self.tokens is None:
            return self._halved(compute, rows, lengths)
        count = max(1, self.tokens // _width(rows, lengths))
        cut = [rows[begin : begin + count] for begin in range(0, rows.size, count)]
        return [part for some in cut for part in self._halved(compute, some, lengths)]

    def _halved(
        self, compute: Callable[[IndexArray], T], rows: IndexArray, lengths: NDArray[Any]
    ) -> list[tuple[IndexArray, T]]:
        """Apply the function to a batch, or to the halves of the batch if memory runs out."""
        tokens = rows.size * _width(rows, lengths)
        try:
            return [(rows, compute(rows))]
        except torch.OutOfMemoryError as error:
            if rows.size == 1 or self.collective:
                remedy = self.single if rows.size == 1 else f"Set dataflex.probe_batch_tokens to less than {tokens}."
                items = self.items if rows.size > 1 else self.items.removesuffix("s")
                raise ComponentError(
                    f"the device does not have enough memory to {self.what} of {rows.size} {items} of "
                    f"{tokens // rows.size} {self.unit}. {remedy}"
                ) from error
        # After the except block, because the error's traceback holds the tensors that filled the memory.
        release_memory()
        self.tokens = tokens // 2
        logger.warning(
            "Out of memory to %s of %d %s: later batches have at most %d %s.",
            *(self.what, rows.size, self.items, self.tokens, self.unit),
        )
        return [part for half in np.array_split(rows, 2) for part in self._halved(compute, half, lengths)]


def _width(rows: IndexArray, lengths: NDArray[Any]) -> int:
    """Return the length of the longest row, at least 1."""
    return max(1, int(lengths[rows].max()))
