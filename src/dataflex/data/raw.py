"""Raw data files as LLaMA-Factory reads them: entries of ``dataset_info.json``, and rows with their lines.

This module imports neither torch nor datasets nor LLaMA-Factory.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from dataflex.errors import unknown
from dataflex.files import RepeatedKeyError, distinct

INFO_FILE = "dataset_info.json"
FILE_TYPES = {"arrow": "arrow", "csv": "csv", "json": "json", "jsonl": "json", "parquet": "parquet", "txt": "text"}
"""File extension -> file type."""
REMOTE_KEYS = ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")
"""Keys of an entry whose data is not a file below ``dataset_dir``."""
FORMATTINGS = ("alpaca", "sharegpt", "openai")
COLUMNS = {
    "prompt": "instruction",
    "query": "input",
    "response": "output",
    "messages": "conversations",
} | dict.fromkeys(("history", "system", "tools", "images", "videos", "audios", "chosen", "rejected", "kto_tag"))
"""Role of a column -> default column name, used if an entry has no ``columns``."""
TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}
"""Tag of a message -> default value, used if an entry has no ``tags``."""
ENTRY_KEYS = (
    "file_name", *REMOTE_KEYS, "formatting", "ranking", "subset", "split", "folder", "num_samples", "columns", "tags",
)  # fmt: skip
BOOLEANS = {**dict.fromkeys(("True", "TRUE", "true"), True), **dict.fromkeys(("False", "FALSE", "false"), False)}
"""Text in a CSV file -> the boolean as which the datasets library reads it, in a column of such texts."""
HEAD = 1 << 21
"""Number of characters that are read if only the head of a file is read."""
_CHUNK = 1 << 20
_FIRST_ROWS = 64
"""Number of rows of a parquet file that are read if only the head is read. Few, because rows may hold images."""
_SHOWN = 60


@dataclass(frozen=True)
class Place:
    """The position of a row in a file."""

    file: Path
    row: int
    """Number of the row, from 0."""
    line: int | None = None
    """Line number in a text file, from 1."""
    among: bool = False
    """Whether the line may hold further rows."""

    def __str__(self) -> str:
        line = "" if self.line is None else f", line {self.line}"
        row = f", row {self.row} (counted from 0)" if self.among or self.line is None else ""
        return f"{self.file}{line}{row}"


class RawDataError(ValueError):
    """A file or a row of a file cannot be read. The message names the position."""


@dataclass(frozen=True)
class Entry:
    """A data set in local files, as ``dataset_info.json`` describes it.

    Attributes:
        name: the name of the data set.
        files: its files, in order.
        formatting: one of :data:`FORMATTINGS`.
        ranking: whether its rows are pairs of answers.
        columns: role of a column -> its name in the files, or None.
        tags: tag of a message -> its value in the files, or None.
    """

    name: str
    files: tuple[Path, ...]
    formatting: str
    ranking: bool
    columns: Mapping[str, str | None]
    tags: Mapping[str, str | None]


def entry_problems(entry: Any) -> Iterator[str]:
    """Yield the errors in the form of an entry of ``dataset_info.json``."""
    if not isinstance(entry, dict):
        yield f"must be a mapping with file_name, got {show(entry)}."
        return
    for key in entry:
        if key not in ENTRY_KEYS:
            yield unknown("key", str(key), ENTRY_KEYS)
    if not any(key in entry for key in ("file_name", *REMOTE_KEYS)):
        yield f"has no file_name (nor one of {', '.join(REMOTE_KEYS)})."
    for key in ("file_name", *REMOTE_KEYS):
        if key in entry and not (isinstance(entry[key], str) and entry[key]):
            yield f"{key} must be text, got {show(entry[key])}."
    formatting = entry.get("formatting", "alpaca")
    if formatting not in FORMATTINGS:
        yield f"formatting: {unknown('format', str(formatting), FORMATTINGS)}"
    if not isinstance(entry.get("ranking", False), bool):
        yield f"ranking must be true or false, got {show(entry['ranking'])}."
    samples = entry.get("num_samples")
    if samples is not None and (isinstance(samples, bool) or not isinstance(samples, int) or samples < 1):
        yield f"num_samples must be a whole number of at least 1, got {show(samples)}."
    for group, known in (("columns", COLUMNS), ("tags", TAGS)):
        given = entry.get(group, {})
        if not isinstance(given, dict):
            yield f"{group} must be a mapping, got {show(given)}."
            continue
        for key, value in given.items():
            if key not in known:
                yield f"{group}: {unknown('key', str(key), known)}"
            elif value is not None and not isinstance(value, str):
                yield f"{group}.{key} must be text, got {show(value)}."


def read_entry(name: str, entry: Mapping[str, Any], folder: Path) -> Entry | None:
    """Return a well-formed entry of ``dataset_info.json``, or None if its data is not in local files.

    Args:
        name: the name of the data set.
        entry: an entry without :func:`entry_problems`.
        folder: ``dataset_dir``.

    Raises:
        RawDataError: if a file is missing or has an unknown type.
    """
    if any(key in entry for key in REMOTE_KEYS):
        return None
    path = folder / str(entry["file_name"])
    if path.is_dir():
        files = sorted(path.iterdir())
    elif path.exists():
        files = [path]
    else:
        raise RawDataError(f"the file of data set {name!r} does not exist: {path}")
    if not files:
        raise RawDataError(f"{path} is an empty folder")
    for file in files:
        if not file.is_file():
            raise RawDataError(f"{file} is not a file")
        if file.suffix[1:] not in FILE_TYPES:
            raise RawDataError(f"{file}: the file extension must be one of {', '.join(FILE_TYPES)}")
        if FILE_TYPES[file.suffix[1:]] != FILE_TYPES[files[0].suffix[1:]]:
            raise RawDataError(f"{path} holds files of different types: {files[0].name} and {file.name}")
    columns = dict.fromkeys(COLUMNS) | entry["columns"] if "columns" in entry else COLUMNS
    tags = dict.fromkeys(TAGS) | entry["tags"] if "tags" in entry else TAGS
    formatting = str(entry.get("formatting", "alpaca"))
    return Entry(name, tuple(files), formatting, bool(entry.get("ranking", False)), columns, tags)


def rows(file: Path, whole: bool = True) -> Iterator[tuple[Place, Any]]:
    """Yield the rows of a file with their positions.

    A row that is no mapping of columns to values is yielded unchanged.

    Args:
        file: a file of a type in :data:`FILE_TYPES`.
        whole: whether to read the whole file. If not, read only its first :data:`HEAD` characters (of parquet and arrow
            files, the first rows).

    Raises:
        RawDataError: at the first position that cannot be read.
    """
    kind = FILE_TYPES[file.suffix[1:]]
    try:
        if kind == "json":
            yield from _json_rows(file, whole)
        elif kind == "csv":
            yield from _csv_rows(file, whole)
        elif kind == "text":
            yield from _text_rows(file, whole)
        else:
            yield from _arrow_rows(file, kind, whole)
    except UnicodeDecodeError as error:
        raise RawDataError(f"{_undecodable(file)}: not UTF-8 text ({error.reason})") from error
    except OSError as error:
        raise RawDataError(f"{file} cannot be read: {error.strerror or error}") from error


def _undecodable(file: Path) -> str:
    with file.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return f"{file}, line {number}"
    return str(file)


class _JsonStream:
    """A stream of consecutive JSON values, read in pieces, with the line number of each value."""

    def __init__(self, file: Path, stream: IO[str]) -> None:
        self.file, self.stream = file, stream
        self.text, self.at, self.line = "", 0, 1
        self.read = 0

    def more(self) -> bool:
        """Read another piece. Return whether the stream had one."""
        piece = self.stream.read(
            max(_CHUNK, len(self.text) - self.at)
        )  # pieces grow, so that a huge value stays linear
        self.text, self.at = self.text[self.at :] + piece, 0
        self.read += len(piece)
        return bool(piece)

    def peek(self) -> str:
        """Return the next character that is not white space, or an empty string at the end."""
        while True:
            while self.at < len(self.text):
                character = self.text[self.at]
                if not character.isspace():
                    return character
                self.line += character == "\n"
                self.at += 1
            if not self.more():
                return ""

    def value(self, decoder: json.JSONDecoder, is_item: bool) -> Any:
        """Return the next value.

        Args:
            decoder: the parser of the value.
            is_item: whether the value is an item of a list, and not a record of JSON lines.

        Raises:
            RawDataError: if the text is not valid JSON. The message names the line of the error. For JSON lines, it
                names the line in which the record begins.
        """
        while True:
            try:
                found, end = decoder.raw_decode(self.text, self.at)
            except RepeatedKeyError as error:
                raise RawDataError(f"{self.file}, line {self.line}: the key {error}") from error
            except json.JSONDecodeError as error:
                cut = error.pos >= len(self.text) - 10 or error.msg.startswith(("Unterminated string", "Invalid \\"))
                if cut and self.more():
                    continue
                end = len(self.text.rstrip())
                why = "it is cut off" if cut and error.pos >= end else _lower(error.msg)
                line = self.line + self.text.count("\n", self.at, min(error.pos, end))
                if not is_item and line > self.line:
                    # The parser reads on into the next record if a line is cut off, so its own line misleads.
                    line, why = self.line, f"{why} (the error is noticed in line {line})"
                raise RawDataError(f"{self.file}, line {line}: not valid JSON: {why}") from error
            except RecursionError as error:
                raise RawDataError(f"{self.file}, line {self.line}: nested too deeply") from error
            self.line += self.text.count("\n", self.at, end)
            self.at = end
            return found


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]


def _json_rows(file: Path, whole: bool) -> Iterator[tuple[Place, Any]]:
    """Yield the place and the value of each row of a JSON file: the items of a list, or JSON lines."""
    with file.open(encoding="utf-8") as stream:
        source = _JsonStream(file, stream)
        marked = source.peek() == "\ufeff"
        source.at += marked
        array = source.peek() == "["
        if marked and array:  # a byte order mark is skipped in a file of JSON lines
            raise RawDataError(f"{file}, line 1: begins with a byte order mark; save it as UTF-8 without one")
        decoder = json.JSONDecoder(strict=False) if array else json.JSONDecoder(object_pairs_hook=distinct)
        if array:
            source.at += 1
        number = 0
        while (character := source.peek()) and not (array and character == "]"):
            if not whole and source.read > HEAD:
                return
            line = source.line
            found = source.value(decoder, is_item=array)
            yield Place(file, number, line, array), {"text": found} if array and isinstance(found, str) else found
            number += 1
            if array:
                separator = source.peek()
                if separator == ",":
                    source.at += 1
                elif separator != "]":
                    why = "it is cut off" if not separator else "expecting ',' or ']'"
                    raise RawDataError(f"{file}, line {source.line}: not valid JSON: {why}")
        if array:
            if not character:
                raise RawDataError(f"{file}, line {source.line}: not valid JSON: it is cut off")
            source.at += 1
            if source.peek():
                raise RawDataError(f"{file}, line {source.line}: not valid JSON: something follows the closing ']'")


def _csv_rows(file: Path, whole: bool) -> Iterator[tuple[Place, Any]]:
    """Yield the place and the values of each row of a CSV file. An empty field is None."""
    csv.field_size_limit(sys.maxsize)
    with file.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream)
        header = next(reader, None)
        if header is None:
            return
        try:
            line, size = reader.line_num + 1, 0
            for number, cells in enumerate(reader):
                size += sum(map(len, cells))
                if not whole and size > HEAD:
                    return
                if len(cells) > len(header):
                    raise RawDataError(f"{file}, line {line}: {len(cells)} fields, and the header has {len(header)}")
                if cells:
                    padded = [*cells, *[""] * (len(header) - len(cells))]
                    values = {key: cell or None for key, cell in zip(header, padded, strict=True)}
                    yield Place(file, number, line), values
                line = reader.line_num + 1
        except csv.Error as error:
            raise RawDataError(f"{file}, line {reader.line_num}: not valid CSV: {error}") from error


def _text_rows(file: Path, whole: bool) -> Iterator[tuple[Place, Any]]:
    """Yield the place and the text of each line of a text file."""
    size = 0
    with file.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream):
            size += len(line)
            if not whole and size > HEAD:
                return
            yield Place(file, number, number + 1), {"text": line.rstrip("\n")}


def _arrow_rows(file: Path, kind: str, whole: bool) -> Iterator[tuple[Place, Any]]:
    """Yield the place and the values of each row of a Parquet or Arrow file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        batches = pq.ParquetFile(file).iter_batches(1000 if whole else _FIRST_ROWS) if kind == "parquet" else _ipc(file)
        number = 0
        for batch in batches:
            for row in batch.to_pylist():
                yield Place(file, number), row
                number += 1
            if not whole:
                return
    except pa.ArrowException as error:
        raise RawDataError(f"{file} is no {kind} file: {_lower(str(error).splitlines()[0])}") from error


def _ipc(file: Path) -> Iterator[Any]:
    """Yield the batches of an Arrow file, in the stream format or the file format."""
    import pyarrow as pa

    with pa.memory_map(str(file)) as source:
        try:
            yield from pa.ipc.open_stream(source)
        except pa.ArrowInvalid:
            opened = pa.ipc.open_file(source)
            for number in range(opened.num_record_batches):
                yield opened.get_batch(number)


def kind_of(value: Any) -> str | None:
    """Return the kind of a value, for comparison with other values of the same column; None for null."""
    if value is None:
        return None
    for kind, name in ((bool, "true or false"), (str, "text"), (int | float, "a number"), (list, "a list")):
        if isinstance(value, kind):
            return name
    return "a mapping" if isinstance(value, dict) else type(value).__name__


def show(value: Any) -> str:
    """Return a value as text for a message, shortened if it is long."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
