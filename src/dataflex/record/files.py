"""Read JSON, JSON lines and Parquet columns, with an error that names the file and what is wrong in it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import ConfigError


def read_object(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file, or None where there is no file."""
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise ConfigError(f"{path} is not readable JSON ({one_line(error)}); is it half written?") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(value).__name__}.")
    return value


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield where each object of a JSON-lines file stands, and the object.

    A last line that was cut off while it was written is left out, and so are empty lines and a missing file.
    """
    if not path.is_file():
        return
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            where = f"{path}, line {number}"
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except ValueError as error:
                if not line.endswith(b"\n"):
                    return
                raise ConfigError(f"{where} is not readable JSON ({one_line(error)}).") from error
            if not isinstance(value, dict):
                raise ConfigError(f"{where}: expected a JSON object, found {type(value).__name__}.")
            yield where, value


def read_column(path: Path, name: str) -> NDArray[Any] | None:
    """Return one column of numbers of a Parquet file, nulls as NaN; None where the file has no such column."""
    import pyarrow.parquet  # a third of a second, which reading JSON need not wait for

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if name not in file.schema_arrow.names:
                return None
            if pyarrow.types.is_null(file.schema_arrow.field(name).type):
                return np.full(file.metadata.num_rows, np.nan)
            batches = file.iter_batches(batch_size=1 << 18, columns=[name])
            parts = [batch.column(0).to_numpy(zero_copy_only=False) for batch in batches]
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ConfigError(f"{path} is not readable Parquet ({one_line(error)}); is it half written?") from error
    column = np.concatenate(parts) if parts else np.zeros(0)
    if column.dtype.kind not in "iuf":
        raise ConfigError(f"{path}: column {name!r} must hold numbers, holds {column.dtype}.")
    return column


def read_labels(path: Path, name: str) -> tuple[NDArray[np.int64], list[str]]:
    """Return a column of words as numbers, and the word each number stands for.

    Raises:
        ConfigError: if the file cannot be read, has no such column, or the column has other values or nulls in it.
    """
    import pyarrow.parquet  # a third of a second, which reading JSON need not wait for

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if name not in file.schema_arrow.names:
                raise ConfigError(f"{path} has no column {name!r}; expected a plan written by a DataFlex run.")
            column = file.read(columns=[name], use_threads=False).column(0)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ConfigError(f"{path} is not readable Parquet ({one_line(error)}); is it half written?") from error
    if not pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_encode()
    values = column.combine_chunks()  # an array, its dictionaries made one
    if not pyarrow.types.is_string(values.type.value_type) or values.null_count:
        raise ConfigError(f"{path}: column {name!r} must hold a word in each row, holds {column.type}.")
    return values.indices.to_numpy().astype(np.int64), values.dictionary.to_pylist()


def one_line(error: Exception) -> str:
    """Text of an error without its line breaks."""
    return " ".join(str(error).split())
