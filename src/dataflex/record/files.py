"""Read JSON, JSON lines and Parquet, with an error that names the file and what is wrong in it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataflex.errors import ConfigError

if TYPE_CHECKING:
    import pyarrow


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


def parquet_table(path: Path, names: Sequence[str]) -> pyarrow.Table:
    """Return columns of a Parquet file, as far as it has them.

    Raises:
        ConfigError: if it cannot be read.
    """
    import pyarrow.parquet  # a third of a second, which reading JSON need not wait for

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            there = [name for name in names if name in file.schema_arrow.names]
            return file.read(columns=there, use_threads=False)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ConfigError(f"{path} is not readable Parquet ({one_line(error)}); is it half written?") from error


def one_line(error: Exception) -> str:
    """Text of an error without its line breaks."""
    return " ".join(str(error).split())
