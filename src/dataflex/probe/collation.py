"""The training collator's tensors, made directly from Arrow's buffers if that gives the same result.

A collator takes rows of Python lists. Making, padding and reading the lists costs about ten times as much as the tokens
need. For rows that hold nothing but tokens, one assignment does the padding instead. This shortcut has three
conditions: the class of the collator is named in :class:`Collation`, the samples have no other column, and a few
samples of the run give equal tensors both ways. In every other case the collator is called.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dataflex.data.pool import Pool
from dataflex.data.sample_media import collated
from dataflex.data.samples import Samples
from dataflex.data.sampling import IndexArray
from dataflex.data.token_loss import IGNORE_INDEX

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

Collate = Callable[[list[dict[str, Any]]], Mapping[str, Any]]

_TOKENS, _MASK, _LABELS = "input_ids", "attention_mask", "labels"
_COMPARED = 8
"""Number of samples compared in both ways, in addition to the shortest and the longest sample."""


class Collation:
    """Turns samples into the training collator's batches.

    Args:
        collate: the training collator.
        plain: classes of collators, in addition to those of Transformers, that only pad if rows hold nothing but
            tokens, masks and labels. Subclasses of these classes are not included.
    """

    def __init__(self, collate: Collate, plain: tuple[type, ...] = ()) -> None:
        self.collate, self._plain = collate, plain
        self._readers: WeakKeyDictionary[Pool, tuple[_Padding, _Reader | None]] = WeakKeyDictionary()
        """Padding and reader of each pool. The reader is None if the pool's rows need the collator."""

    def of(self, samples: Samples, indices: IndexArray) -> Mapping[str, Any]:
        """Return the collated batch of samples, given their indices, (B,)."""
        # At every call, because the tokenizer's padding side may change, for example for generation.
        padding = _padding_of(self.collate, self._plain)
        if padding is not None and isinstance(samples, Pool):
            of, reader = self._readers.get(samples, (None, None))
            if of != padding:
                reader = self._reader(samples, padding)
                self._readers[samples] = padding, reader
            found = None if reader is None else reader.read(indices)
            if found is not None:
                return found
        batch: Mapping[str, Any] = collated(self.collate, samples.rows(indices), indices.tolist())
        return batch

    def _reader(self, pool: Pool, padding: _Padding) -> _Reader | None:
        """Return a reader of a pool's columns; None if the collator must be called."""
        columns = _plain_columns(pool.dataset, padding)
        if columns is None:
            return None
        reader = _Reader(pool.dataset.select_columns(columns).with_format("arrow"), columns, padding)
        shortest, longest = int(pool.lengths.argmin()), int(pool.lengths.argmax())
        spaced = np.linspace(0, pool.size - 1, min(pool.size, _COMPARED)).astype(np.int64)
        for indices in (np.array([shortest]), np.unique([shortest, longest, *spaced])):
            if not _same(reader.read(indices), self.collate(pool.rows(indices))):
                logger.info("The collator does more than padding, so it is called for every batch.")
                return None
        return reader


@dataclass(frozen=True)
class _Padding:
    """Padding rule of a collator.

    Attributes:
        token: padding value of ``input_ids``.
        label: padding value of ``labels``.
        left: whether padding is on the left.
        multiple: the width of a batch is a multiple of this number.
        makes_labels: whether labels are a copy of the tokens in which the padding token is ignored.
    """

    token: int
    label: int
    left: bool
    multiple: int
    makes_labels: bool


class _Reader:
    """Reads samples of a data set in Arrow's format, and pads them."""

    def __init__(self, dataset: Dataset, columns: list[str], padding: _Padding) -> None:
        self._dataset, self._columns, self._padding = dataset, columns, padding

    def read(self, indices: IndexArray) -> dict[str, Tensor] | None:
        """Return the padded columns, each (B, T), int64; None if a row has a null or columns of different lengths."""
        table = self._dataset[indices.tolist()]
        padding, place, lengths = self._padding, None, np.empty(0, dtype=np.int64)
        fill = {_TOKENS: padding.token, _MASK: 0, _LABELS: padding.label}
        found: dict[str, Tensor] = {}
        for name in self._columns:
            lists = table.column(name).combine_chunks()
            values = lists.flatten()
            if lists.null_count or values.null_count:
                return None
            own = np.diff(lists.offsets.to_numpy())
            if place is None:
                place, lengths = _places(own, padding), own
            elif not np.array_equal(own, lengths):
                return None
            padded = np.full(place.shape, fill[name], dtype=np.int64)
            padded[place] = values.to_numpy()
            found[name] = torch.from_numpy(padded)
        if padding.makes_labels:
            tokens = found[_TOKENS]
            found[_LABELS] = tokens.masked_fill(tokens == padding.token, IGNORE_INDEX)
        return found


def _places(lengths: NDArray[np.int64], padding: _Padding) -> NDArray[np.bool_]:
    """Return the mask of the tokens of a batch, (B, T), from the lengths of its rows; padding is False."""
    width = -(-int(lengths.max()) // padding.multiple) * padding.multiple
    columns = np.arange(width)
    return columns >= width - lengths[:, None] if padding.left else columns < lengths[:, None]


def _padding_of(collate: Collate, plain: tuple[type, ...]) -> _Padding | None:
    """Return a collator's padding rule; None if its class is unknown or its settings ask for more than padding."""
    from transformers import DataCollatorForLanguageModeling, DataCollatorForSeq2Seq

    if type(collate) not in (DataCollatorForLanguageModeling, DataCollatorForSeq2Seq, *plain):
        return None
    if isinstance(collate, DataCollatorForLanguageModeling):
        if collate.mlm:
            return None
        label, makes_labels = IGNORE_INDEX, True
    elif isinstance(collate, DataCollatorForSeq2Seq):
        if collate.padding is not True and collate.padding != "longest":
            return None
        label, makes_labels = collate.label_pad_token_id, False
    else:
        return None
    tokenizer = collate.tokenizer
    if collate.return_tensors != "pt" or tokenizer.pad_token_id is None:
        return None
    left = tokenizer.padding_side == "left"
    return _Padding(tokenizer.pad_token_id, label, left, collate.pad_to_multiple_of or 1, makes_labels)


def _plain_columns(dataset: Dataset, padding: _Padding) -> list[str] | None:
    """Return the columns that a collator pads; None if another column exists that the collator may use."""
    import pyarrow as pa

    schema = dataset.features.arrow_schema
    filled = [field for field in schema if not pa.types.is_null(field.type)]
    wanted = {_TOKENS, _MASK} if padding.makes_labels else {_TOKENS, _MASK, _LABELS}
    if {field.name for field in filled} != wanted:
        return None
    if padding.makes_labels and len(filled) < len(schema):
        return None
    lists_of_integers = all(
        pa.types.is_list(field.type) and pa.types.is_integer(field.type.value_type) for field in filled
    )
    return [field.name for field in filled] if lists_of_integers else None


def _same(found: Mapping[str, Any] | None, wanted: Mapping[str, Any]) -> bool:
    """Return whether two batches have the same keys and equal tensors."""
    if found is None or found.keys() != wanted.keys():
        return False
    return all(
        isinstance(value, Tensor) and value.dtype == found[name].dtype and torch.equal(value, found[name])
        for name, value in wanted.items()
    )
