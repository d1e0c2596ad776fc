"""Rows preprocessed in batches of our own, so that it is known which value and which rows each sample is of.

LLaMA-Factory hands its processors the rows batch by batch without saying which they are. Here it is given a data set
with one row for each batch, and a processor that looks the batch's rows up and runs LLaMA-Factory's own on them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dataflex.data.columns import Packs, column_of
from dataflex.integrations.llamafactory.parsing import replaced
from dataflex.integrations.llamafactory.stages import STAGES

DOMAIN = "domain"
"""Column that carries the number of a row's value through LLaMA-Factory's preprocessing."""
_ROWS = "rows"
"""Column with the rows of a packed sample."""
_TOKENS = "row_tokens"
"""Column with how many tokens each of them has in it."""


def in_batches(
    preprocess: Callable[..., Any], rows: Any, sizes: Sequence[int], data_args: Any, *args: Any, **named: Any
) -> Any:
    """Do what LLaMA-Factory's ``_get_preprocessed_dataset`` does, in batches that do not cross groups of rows.

    Args:
        preprocess: that function.
        rows: the aligned rows, those of each group together.
        sizes: rows of each group.
        data_args: LLaMA-Factory's arguments of the data.
        args: the further arguments of the function.
        named: those that it is given by name.

    Returns:
        The samples, with the number of their group and, if they are packed, with their rows.
    """
    from llamafactory.data import loader

    make = loader._get_dataset_processor
    packs = data_args.packing and not named.get("is_eval", False)
    only = copy.copy(data_args)
    only.preprocessing_batch_size = 1

    def batchwise(data_args: Any, stage: str, *given: Any, **options: Any) -> _Batchwise:
        return _Batchwise(
            make(data_args, stage, *given, **options), rows, STAGES[stage].note_packing if packs else None
        )

    batches = _batches(rows, sizes, data_args.preprocessing_batch_size)
    with replaced(loader, "_get_dataset_processor", batchwise):
        return preprocess(batches, only, *args, **named)


def shards(size: int, processes: int | None) -> list[int]:
    """Return the rows of each part that the datasets library gives a process of its own, in batches of that part."""
    parts = max(1, min(processes or 1, size))
    return [size // parts + (part < size % parts) for part in range(parts)]


def take_packs(samples: Any) -> tuple[Any, Packs | None]:
    """Return samples without the columns that hold their rows, and these rows; None if they are not there."""
    if _ROWS not in samples.column_names:
        return samples, None
    import pyarrow.compute as pc

    rows, tokens = column_of(samples, _ROWS), column_of(samples, _TOKENS)
    packs = Packs(
        pc.list_value_length(rows).to_numpy().astype(np.int64), rows.flatten().to_numpy(), tokens.flatten().to_numpy()
    )
    return samples.remove_columns([_ROWS, _TOKENS]), packs


def _batches(rows: Any, sizes: Sequence[int], batch_size: int) -> Any:
    """Return a data set with one row for each batch: where it begins and ends, and the number of its group.

    Args:
        rows: the aligned rows; its beginning gets other columns, so that what is made of it is cached as theirs is.
        sizes: rows of each group.
        batch_size: most rows of a batch, which are of one group.
    """
    offset = 0
    begins, ends, numbers = list[int](), list[int](), list[int]()
    for number, size in enumerate(sizes):
        starts = range(offset, offset + size, batch_size)
        offset += size
        begins += starts
        ends += [min(start + batch_size, offset) for start in starts]
        numbers += [number] * len(starts)
    batches = rows.select(range(len(begins))).select_columns(rows.column_names[:1])
    for name, column in (("begin", begins), ("end", ends), (DOMAIN, numbers)):
        batches = batches.add_column(name, column)
    return batches


class _Batchwise:
    """A processor of LLaMA-Factory for the data set that :func:`_batches` makes.

    Args:
        processor: its own.
        rows: the aligned rows, those of each group together.
        note_packing: what also says which rows each sample is packed of; None: they are not packed.
    """

    def __init__(self, processor: Any, rows: Any, note_packing: Callable[..., Any] | None) -> None:
        self.processor, self.rows, self.note_packing = processor, rows, note_packing

    def preprocess_dataset(self, batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        """Return the samples made of one batch, each with the number of its group."""
        (begin,), (end,), (number,) = batch["begin"], batch["end"], batch[DOMAIN]
        if self.note_packing is None:
            samples = self.processor.preprocess_dataset(self.rows[begin:end])
            return {**samples, DOMAIN: [number] * len(next(iter(samples.values()), []))}
        samples, (numbers, tokens) = self.note_packing(self.processor, self.rows[begin:end])
        rows = [[begin + row for row in sample] for sample in numbers]
        return {**samples, _ROWS: rows, _TOKENS: tokens, DOMAIN: [number] * len(rows)}

    def print_data_example(self, example: dict[str, Any]) -> None:
        """Print a sample."""
        self.processor.print_data_example(example)
