"""Columns of the raw data: their values, one for each sample, also where a sample is packed of several rows."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataflex.data.sampling import IndexArray
from dataflex.errors import ConfigError, did_you_mean

ColumnArray = NDArray[np.float64] | NDArray[np.object_]
"""Numbers, NaN where there is none; or text, None where there is none."""


Wrong = tuple[int | None, str]
"""A row and what is wrong with its value; no row: with the whole column."""


@dataclass(frozen=True)
class WantedColumn:
    """A raw column that is to be kept with the samples.

    Attributes:
        key: the setting that asks for it.
        checks: the settings of the components that read it, and what tells whether they can use the values of all rows.
    """

    key: str
    checks: tuple[tuple[str, Callable[[str, ColumnArray], Wrong | None]], ...] = ()


@dataclass(frozen=True)
class Packs:
    """Which rows packed samples are made of.

    Attributes:
        sizes: rows in each sample, >= 1, shape (n,).
        rows: the rows of one sample after another, shape (m,).
        tokens: tokens of each of them that are in the sample, >= 1, shape (m,).
    """

    sizes: IndexArray
    rows: IndexArray
    tokens: IndexArray

    def mean(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the mean over the tokens of each sample, shape (n,); rows without a value do not count.

        Args:
            values: of every row, NaN where it has none.
        """
        samples = np.repeat(np.arange(self.sizes.size), self.sizes)
        there = values[self.rows]
        known = ~np.isnan(there)
        tokens = np.where(known, self.tokens, 0)
        first = np.full(self.sizes.size, np.nan)
        first[samples[known][::-1]] = there[known][::-1]
        # From the first value on, so that the mean of equal values is exactly that value.
        excess = np.where(known & (there != first[samples]), there - first[samples], 0.0)
        sums = np.bincount(samples, excess * tokens, self.sizes.size)
        counts = np.bincount(samples, tokens, self.sizes.size)
        return first + sums / np.maximum(counts, 1)


def column_of(dataset: Any, name: str) -> Any:
    """Return a column of a data set as an arrow array."""
    return dataset.select_columns([name]).with_format("arrow")[:].column(0).combine_chunks()


def check_column(dataset: Any, column: str, key: str, name: str) -> None:
    """Refuse a column that a data set lacks, or whose values are no numbers and no text.

    Args:
        dataset: the raw rows.
        column: its column.
        key: the setting that asks for it, for messages.
        name: of the data set, for messages.

    Raises:
        ConfigError: naming the data set and its columns.
    """
    if column not in dataset.column_names:
        raise ConfigError(f"{key}: {lacking(column, name, dataset.column_names)}")
    import pyarrow as pa

    kind, is_of = dataset.data.schema.field(column).type, pa.types
    tests = (
        is_of.is_integer,
        is_of.is_floating,
        is_of.is_boolean,
        is_of.is_null,
        is_of.is_string,
        is_of.is_large_string,
    )
    if not any(test(kind) for test in tests):
        raise ConfigError(f"{key}: {column!r} of {name!r} holds {kind}; needed are numbers, text or true and false.")


def lacking(column: str, name: str, columns: Sequence[str]) -> str:
    """Return what says that a data set has no such column."""
    return (
        f"the data set {name!r} has no column {column!r}{did_you_mean(column, columns) or '.'} It has "
        f"{', '.join(map(repr, columns)) or 'none'}. Every data set that is trained on needs a column that is kept."
    )


def text_is_packed(column: str) -> str:
    """Return why a column of text is refused if samples are packed."""
    return (
        f"{column!r} holds text, and with packing a sample is made of several rows: numbers have a mean, text has "
        "none. Set packing: false (and neat_packing: false), or leave the column out."
    )


def read_column(dataset: Any, column: str) -> ColumnArray:
    """Return the values of every row: numbers as float64, NaN for null, truth values as 0 and 1; text as it is."""
    import pyarrow as pa

    found = column_of(dataset, column)
    if pa.types.is_string(found.type) or pa.types.is_large_string(found.type):
        return np.array(found.to_pylist(), dtype=object)
    if pa.types.is_boolean(found.type):
        found = found.cast(pa.int8())
    return np.asarray(found.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False), dtype=np.float64)


def refuse_values(wanted: WantedColumn, column: str, values: ColumnArray, place: Callable[[int], str]) -> None:
    """Refuse values that a component cannot use.

    Args:
        wanted: who reads the column.
        column: its name.
        values: those of all rows.
        place: says where a row is, by its position in ``values``.

    Raises:
        ConfigError: naming the setting, the row and what is wrong.
    """
    for key, check in wanted.checks:
        wrong = check(column, values)
        if wrong is not None:
            where = "" if wrong[0] is None else f"{place(int(wrong[0]))}: "
            raise ConfigError(f"{key}: {where}{wrong[1]}.")


def unusable_score(column: str, values: ColumnArray) -> Wrong | None:
    """Return what keeps a column from being the scores of samples: text, an infinite number, no number at all."""
    if values.dtype == object:
        return None, f"{column!r} holds text, and scores are numbers"
    infinite = np.flatnonzero(np.isinf(values.astype(np.float64)))
    if infinite.size:
        return int(infinite[0]), f"{column!r} is {values[infinite[0]]}; a score must be finite"
    return (None, f"{column!r} has no value in any row") if bool(np.all(np.isnan(values.astype(np.float64)))) else None


def join_columns(parts: Sequence[tuple[str, ColumnArray]], column: str, key: str) -> ColumnArray:
    """Return the values of several data sets one after another.

    Args:
        parts: name of each data set and its values.
        column: the column's name, for messages.
        key: the setting that asks for it, for messages.

    Raises:
        ConfigError: if one holds text and another numbers.
    """
    first, values = parts[0]
    for name, other in parts:
        if (other.dtype == object) != (values.dtype == object):
            text, numbers = (name, first) if other.dtype == object else (first, name)
            raise ConfigError(f"{key}: {column!r} is text in {text!r} and numbers in {numbers!r}; make it one of both.")
    return np.concatenate([other for _, other in parts])


def column_digest(values: ColumnArray) -> str:
    """Return a digest of the values; every NaN counts as the same."""
    if values.dtype == object:
        return hashlib.sha256("\0".join("" if text is None else f" {text}" for text in values).encode()).hexdigest()
    plain = np.where(np.isnan(values.astype(np.float64)), np.nan, values)
    return hashlib.sha256(np.ascontiguousarray(plain).data).hexdigest()
