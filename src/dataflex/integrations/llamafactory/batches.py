"""Preprocessing of rows in batches that DataFlex cuts, so that the group and the rows of each sample are known.

LLaMA-Factory passes rows to its processors batch by batch and does not say which rows they are. Here it gets a data set
with one row per batch instead. Its processor is replaced by one that looks up the rows of the batch and runs
LLaMA-Factory's processor on them.
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
"""Column that carries the number of a row's group through LLaMA-Factory's preprocessing."""
_ROWS = "rows"
"""Column with the rows of a packed sample."""
_TOKENS = "row_tokens"
"""Column with the number of tokens that each of these rows has in the sample."""


def in_batches(
    preprocess: Callable[..., Any], rows: Any, sizes: Sequence[int], data_args: Any, *args: Any, **named: Any
) -> Any:
    """Run LLaMA-Factory's ``_get_preprocessed_dataset`` in batches that never contain rows of two groups.

    Args:
        preprocess: LLaMA-Factory's ``_get_preprocessed_dataset``.
        rows: aligned rows, sorted by group.
        sizes: number of rows of each group.
        data_args: LLaMA-Factory's data arguments.
        args: further positional arguments of the function.
        named: further keyword arguments of the function.

    Returns:
        The samples, with the number of their group and, if they are packed, with their rows.
    """
    from llamafactory.data import loader

    make = loader._get_dataset_processor
    packs = data_args.packing and not named.get("is_eval", False)
    only = copy.copy(data_args)
    only.preprocessing_batch_size = 1  # one row of the data set that LLaMA-Factory sees stands for a whole batch

    def batchwise(data_args: Any, stage: str, *given: Any, **options: Any) -> _Batchwise:
        return _Batchwise(
            make(data_args, stage, *given, **options), rows, STAGES[stage].note_packing if packs else None
        )

    batches = _batches(rows, sizes, data_args.preprocessing_batch_size)
    with replaced(loader, "_get_dataset_processor", batchwise):
        return preprocess(batches, only, *args, **named)


def shards(size: int, processes: int | None) -> list[int]:
    """Return the number of rows of each shard when the datasets library divides rows over processes.

    Each process cuts its shard into batches, so a batch never crosses the end of a shard.
    """
    parts = max(1, min(processes or 1, size))
    return [size // parts + (part < size % parts) for part in range(parts)]


def take_packs(samples: Any) -> tuple[Any, Packs | None]:
    """Return the samples without the columns that hold their rows, and these rows.

    The rows are None if there are no such columns.
    """
    if _ROWS not in samples.column_names:
        return samples, None
    import pyarrow.compute as pc

    rows, tokens = column_of(samples, _ROWS), column_of(samples, _TOKENS)
    packs = Packs(
        pc.list_value_length(rows).to_numpy().astype(np.int64), rows.flatten().to_numpy(), tokens.flatten().to_numpy()
    )
    return samples.remove_columns([_ROWS, _TOKENS]), packs


def _batches(rows: Any, sizes: Sequence[int], batch_size: int) -> Any:
    """Return a data set with one row per batch: the first row, the end, and the number of the group.

    Args:
        rows: aligned rows.
        sizes: number of rows of each group.
        batch_size: largest number of rows in a batch. All rows of a batch belong to one group.
    """
    offset = 0
    begins, ends, numbers = list[int](), list[int](), list[int]()
    for number, size in enumerate(sizes):
        starts = range(offset, offset + size, batch_size)
        offset += size
        begins += starts
        ends += [min(start + batch_size, offset) for start in starts]
        numbers += [number] * len(starts)
    # Derived from `rows`, and not created from scratch, so that the datasets library includes the rows in the
    # fingerprint by which it caches the samples made from this data set.
    batches = rows.select(range(len(begins))).select_columns(rows.column_names[:1])
    for name, column in (("begin", begins), ("end", ends), (DOMAIN, numbers)):
        batches = batches.add_column(name, column)
    return batches


class _Batchwise:
    """LLaMA-Factory processor for the data set of :func:`_batches`.

    Args:
        processor: LLaMA-Factory's processor for the rows.
        rows: aligned rows, sorted by group.
        note_packing: runs the processor and also returns the rows of each packed sample. None means no packing.
    """

    def __init__(self, processor: Any, rows: Any, note_packing: Callable[..., Any] | None) -> None:
        self.processor, self.rows, self.note_packing = processor, rows, note_packing

    def preprocess_dataset(self, batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        """Return the samples of one batch, each with the number of its group."""
        (begin,), (end,), (number,) = batch["begin"], batch["end"], batch[DOMAIN]
        if self.note_packing is None:
            samples = self.processor.preprocess_dataset(self.rows[begin:end])
            return {**samples, DOMAIN: [number] * len(next(iter(samples.values()), []))}
        samples, (numbers, tokens) = self.note_packing(self.processor, self.rows[begin:end])
        rows = [[begin + row for row in sample] for sample in numbers]
        return {**samples, _ROWS: rows, _TOKENS: tokens, DOMAIN: [number] * len(rows)}

    def print_data_example(self, example: dict[str, Any]) -> None:
        """Print a sample, in the way of LLaMA-Factory's processor."""
        self.processor.print_data_example(example)
