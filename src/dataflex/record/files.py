"""Readers of JSON, JSON lines and Parquet. Their errors name the file and the fault in it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataflex.errors import ConfigError

if TYPE_CHECKING:
    import pyarrow


def read_object(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file, or None if the file does not exist."""
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
    """Yield the file and line number of each object of a JSON-lines file, and the object.

    An incomplete last line, which a killed process leaves, is skipped. So are empty lines and a missing file.
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


def parquet_table(path: Path, names: Sequence[str]) -> pyarrow.Table:
    """Return columns of a Parquet file. Names that the file does not have are skipped.

    Raises:
        ConfigError: if the file cannot be read.
    """
    import pyarrow.parquet  # takes a third of a second, so readers of JSON do not import it

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            there = [name for name in names if name in file.schema_arrow.names]
            return file.read(columns=there, use_threads=False)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ConfigError(f"{path} is not readable Parquet ({one_line(error)}); is it half written?") from error


def one_line(error: Exception) -> str:
    """Return the text of an error without line breaks."""
    return " ".join(str(error).split())
