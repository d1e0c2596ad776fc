"""Batches that are halved while a device has not the memory for them: the one way for all that measures."""

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
    """Give back to the device what torch keeps of its memory for later."""
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()


@dataclass
class BatchLimit:
    """The most tokens of a batch, padding counted, that a device was found to have the memory for.

    Attributes:
        what: is done to a batch: ``to <what> of 4 samples of 20 tokens``.
        single: what to set where a sample alone does not fit.
        items: what a batch is made of.
        unit: of their lengths.
        collective: a forward is one of all processes together, so that none may halve its batch while the others wait.
        tokens: the limit; None: not met yet.
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
        """Return what a function makes of a batch, in as few parts as fit into the memory: (their rows, the value).

        Args:
            compute: the function.
            rows: the batch, at least one.
            lengths: of every row there is, indexed by ``rows``.

        Raises:
            ComponentError: if a row alone does not fit, or a batch does not and the forward is collective.
        """
        if self.tokens is None:
            return self._halved(compute, rows, lengths)
        count = max(1, self.tokens // _width(rows, lengths))
        cut = [rows[begin : begin + count] for begin in range(0, rows.size, count)]
        return [part for some in cut for part in self._halved(compute, some, lengths)]

    def _halved(
        self, compute: Callable[[IndexArray], T], rows: IndexArray, lengths: NDArray[Any]
    ) -> list[tuple[IndexArray, T]]:
        tokens = rows.size * _width(rows, lengths)
        try:
            return [(rows, compute(rows))]
        except torch.OutOfMemoryError as error:
            if rows.size == 1 or self.collective:
                remedy = self.single if rows.size == 1 else f"Set dataflex.probe_batch_tokens to less than {tokens}."
                items = self.items if rows.size > 1 else self.items.removesuffix("s")
                raise ComponentError(
                    f"the device has not the memory to {self.what} of {rows.size} {items} of {tokens // rows.size} "
                    f"{self.unit}. {remedy}"
                ) from error
        # Behind the handler: the error's traceback holds what filled the memory.
        release_memory()
        self.tokens = tokens // 2
        logger.warning(
            "Out of memory to %s of %d %s: batches have at most %d %s from now on.",
            *(self.what, rows.size, self.items, self.tokens, self.unit),
        )
        return [part for half in np.array_split(rows, 2) for part in self._halved(compute, half, lengths)]


def _width(rows: IndexArray, lengths: NDArray[Any]) -> int:
    return max(1, int(lengths[rows].max()))
