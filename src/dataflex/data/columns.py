"""Columns of the raw data: one value for each sample, even if a packed sample is made of several rows."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataflex.data.sampling import IndexArray
from dataflex.errors import ConfigError, did_you_mean, unknown

ColumnArray = NDArray[np.float64] | NDArray[np.object_]
"""Values of a column: numbers with NaN for a missing value, or text with None for a missing value."""


Wrong = tuple[int | None, str]
"""A row and the problem of its value. The row None means that the whole column is unusable."""


@dataclass(frozen=True)
class WantedColumn:
    """A raw column to store with the samples.

    Attributes:
        key: the setting that requests the column.
        checks: pairs of the setting of a component that reads the column, and a function that checks the values of all
            rows.
    """

    key: str
    checks: tuple[tuple[str, Callable[[str, ColumnArray], Wrong | None]], ...] = ()


@dataclass(frozen=True)
class Packs:
    """The rows of packed samples.

    Attributes:
        sizes: number of rows in each sample, >= 1, shape (n,).
        rows: the rows of all samples, concatenated, shape (m,).
        tokens: number of tokens of each of these rows in its sample, >= 1, shape (m,).
    """

    sizes: IndexArray
    rows: IndexArray
    tokens: IndexArray

    def mean(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the mean over the tokens of each sample, shape (n,). Rows without a value do not count.

        Args:
            values: one value for each row, NaN for a missing value.
        """
        samples = np.repeat(np.arange(self.sizes.size), self.sizes)
        there = values[self.rows]
        known = ~np.isnan(there)
        tokens = np.where(known, self.tokens, 0)
        first = np.full(self.sizes.size, np.nan)
        # In reverse, so that the first of several values of a sample is written last.
        first[samples[known][::-1]] = there[known][::-1]
        # Sums start at the first value, so that the mean of equal values is exactly this value.
        excess = np.where(known & (there != first[samples]), there - first[samples], 0.0)
        sums = np.bincount(samples, excess * tokens, self.sizes.size)
        counts = np.bincount(samples, tokens, self.sizes.size)
        return first + sums / np.maximum(counts, 1)


def column_of(dataset: Any, name: str) -> Any:
    """Return a column of a data set as an arrow array."""
    return dataset.select_columns([name]).with_format("arrow")[:].column(0).combine_chunks()


def check_column(dataset: Any, column: str, key: str, name: str) -> None:
    """Check that a data set has a column and that its values are numbers or text.

    Args:
        dataset: the raw rows.
        column: the name of the column.
        key: the setting that requests the column, for messages.
        name: the name of the data set, for messages.

    Raises:
        ConfigError: if the column does not exist. The message names the data set and its columns.
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
        raise ConfigError(f"{key}: {column!r} of {name!r} holds {kind}; numbers, text or booleans are needed.")


def lacking(column: str, name: str, columns: Sequence[str]) -> str:
    """Return the message that a data set lacks a column."""
    return (
        f"the data set {name!r} has no column {column!r}{did_you_mean(column, columns) or '.'} It has "
        f"{', '.join(map(repr, columns)) or 'none'}. Every training data set needs this column."
    )


def nowhere(what: str, name: str, known: Sequence[str]) -> str:
    """Return the message that no data set has a column, or a key of messages; ``known`` are those that are there."""
    return (
        f"no training data has a {what} {name!r}{did_you_mean(name, known) or '.'} There are "
        f"{', '.join(map(repr, dict.fromkeys(known))) or 'none'}."
    )


def text_is_packed(column: str) -> str:
    """Return why a text column is refused if samples are packed."""
    return (
        f"{column!r} holds text, and with packing a sample is made of several rows: numbers have a mean, text has "
        "none. Set packing: false (and neat_packing: false), or leave the column out."
    )


def read_column(dataset: Any, column: str) -> ColumnArray:
    """Return the values of every row: numbers as float64, null as NaN, booleans as 0 and 1; text unchanged."""
    import pyarrow as pa

    found = column_of(dataset, column)
    if pa.types.is_string(found.type) or pa.types.is_large_string(found.type):
        return np.array(found.to_pylist(), dtype=object)
    if pa.types.is_boolean(found.type):
        found = found.cast(pa.int8())
    return np.asarray(found.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False), dtype=np.float64)


def values_of(dataset: Any, column: str, key: str, name: str) -> tuple[list[str], NDArray[np.int64]]:
    """Return the distinct values of a raw column, sorted and as text, and the index of each row's value among them.

    Numbers are sorted as numbers, text by character codes.

    Args:
        dataset: raw rows.
        column: name of the column.
        key: setting that names the column, for messages.
        name: name of the data set, for messages.

    Raises:
        ConfigError: if the column does not exist, a row has no value in it, or values are neither text nor numbers.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if column not in dataset.column_names:
        raise ConfigError(f"{key}: {unknown('column', column, dataset.column_names)} (of {name!r})")
    found = column_of(dataset, column)
    kind = found.type
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    if not (text or pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        raise ConfigError(
            f"{key}: the column {column!r} of {name!r} holds {kind}; it must hold text, numbers or booleans."
        )
    missing = pc.is_null(found, nan_is_null=True)
    if text:
        missing = pc.or_kleene(missing, pc.equal(pc.utf8_trim_whitespace(found), "").fill_null(True))
    rows = np.flatnonzero(missing.to_numpy(zero_copy_only=False))
    if rows.size:
        some = ", ".join(map(str, rows[:10])) + (", ..." if rows.size > 10 else "")
        raise ConfigError(
            f"{key}: {rows.size} of {len(found)} rows of {name!r} have no value in {column!r} (rows {some}, counted "
            "from 0). Fill in the values, or remove the rows."
        )
    coded = pc.dictionary_encode(found)
    distinct = coded.dictionary.to_pylist()
    order = sorted(range(len(distinct)), key=distinct.__getitem__)
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    return [str(distinct[number]) for number in order], rank[coded.indices.to_numpy(zero_copy_only=False)]


def refuse_values(wanted: WantedColumn, column: str, values: ColumnArray, place: Callable[[int], str]) -> None:
    """Refuse values that a component cannot use.

    Args:
        wanted: the checks of the components that read the column.
        column: the name of the column.
        values: the values of all rows.
        place: returns the file and line of a row from its position in ``values``.

    Raises:
        ConfigError: if a check fails. The message names the setting, the row and the problem.
    """
    for key, check in wanted.checks:
        wrong = check(column, values)
        if wrong is not None:
            where = "" if wrong[0] is None else f"{place(int(wrong[0]))}: "
            raise ConfigError(f"{key}: {where}{wrong[1]}.")


def unusable_score(column: str, values: ColumnArray) -> Wrong | None:
    """Return why a column cannot be the scores of samples (text, an infinite value, no value at all), or None.

    Example:
        >>> import numpy as np
        >>> from dataflex import unusable_score
        >>> unusable_score("quality", np.array([0.5, np.inf, np.nan]))
        (1, "'quality' is inf; a score must be finite")
    """
    if values.dtype == object:
        return None, f"{column!r} holds text, and scores are numbers"
    infinite = np.flatnonzero(np.isinf(values.astype(np.float64)))
    if infinite.size:
        return int(infinite[0]), f"{column!r} is {values[infinite[0]]}; a score must be finite"
    return (None, f"{column!r} has no value in any row") if bool(np.all(np.isnan(values.astype(np.float64)))) else None


def join_columns(parts: Sequence[tuple[str, ColumnArray]], column: str, key: str) -> ColumnArray:
    """Return the concatenated values of several data sets.

    Args:
        parts: the name and the values of each data set.
        column: the name of the column, for messages.
        key: the setting that requests the column, for messages.

    Raises:
        ConfigError: if the column is text in one data set and numbers in another.
    """
    first, values = parts[0]
    for name, other in parts:
        if (other.dtype == object) != (values.dtype == object):
            text, numbers = (name, first) if other.dtype == object else (first, name)
            raise ConfigError(f"{key}: {column!r} is text in {text!r} and numbers in {numbers!r}; use one type.")
    return np.concatenate([other for _, other in parts])


def column_digest(values: ColumnArray) -> str:
    """Return a digest of the values. All NaN values are equal in the digest."""
    if values.dtype == object:
        # The space before a text keeps an empty text apart from a missing one.
        return hashlib.sha256("\0".join("" if text is None else f" {text}" for text in values).encode()).hexdigest()
    plain = np.where(np.isnan(values.astype(np.float64)), np.nan, values)
    return hashlib.sha256(np.ascontiguousarray(plain).data).hexdigest()
