"""Raw data files as LLaMA-Factory reads them: an entry of ``dataset_info.json``, its rows with their lines, and faults.

LLaMA-Factory and the datasets library say what is wrong with data in the words of a parser, without a file or a line.
Here the same files are read row by row until the first one that cannot be used. Nothing here imports torch, datasets or
LLaMA-Factory.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from dataflex.errors import did_you_mean, unknown
from dataflex.files import RepeatedKeyError, distinct

INFO_FILE = "dataset_info.json"
FILE_TYPES = {"arrow": "arrow", "csv": "csv", "json": "json", "jsonl": "json", "parquet": "parquet", "txt": "text"}
"""Ending of a file -> its type."""
REMOTE_KEYS = ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")
"""Keys of an entry whose data is not a file below ``dataset_dir``."""
FORMATTINGS = ("alpaca", "sharegpt", "openai")
COLUMNS = {
    "prompt": "instruction",
    "query": "input",
    "response": "output",
    "messages": "conversations",
} | dict.fromkeys(("history", "system", "tools", "images", "videos", "audios", "chosen", "rejected", "kto_tag"))
"""What a column can be of -> the column where an entry names none at all."""
TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}
"""Tag of a message -> its value where an entry names none at all."""
ENTRY_KEYS = (
    "file_name", *REMOTE_KEYS, "formatting", "ranking", "subset", "split", "folder", "num_samples", "columns", "tags",
)  # fmt: skip
HEAD = 1 << 21
"""Characters of a file that are read where not all of it is."""
_CHUNK = 1 << 20
_FIRST_ROWS = 64
"""Rows of a parquet file that are read where not all of it is: they may hold pictures."""
_SHOWN = 60
_MEDIA = ("images", "videos", "audios")


@dataclass(frozen=True)
class Place:
    """Where a row is."""

    file: Path
    row: int
    """From 0."""
    line: int | None = None
    """From 1, of a text file."""
    among: bool = False
    """Whether the line may hold other rows too."""

    def __str__(self) -> str:
        line = "" if self.line is None else f", line {self.line}"
        row = f", row {self.row} (counted from 0)" if self.among or self.line is None else ""
        return f"{self.file}{line}{row}"


class RawDataError(ValueError):
    """A file, or a row of one, cannot be read; the message names it."""


@dataclass(frozen=True)
class Entry:
    """A data set in local files, as ``dataset_info.json`` describes it.

    Attributes:
        name: of the data set.
        files: its files, in order.
        formatting: one of :data:`FORMATTINGS`.
        ranking: whether its rows are pairs of answers.
        columns: what a column is of -> its name in the files, or None.
        tags: those of messages.
    """

    name: str
    files: tuple[Path, ...]
    formatting: str
    ranking: bool
    columns: Mapping[str, str | None]
    tags: Mapping[str, str | None]


def entry_problems(entry: Any) -> Iterator[str]:
    """Yield what is wrong with the form of an entry of ``dataset_info.json``."""
    if not isinstance(entry, dict):
        yield f"must be a mapping with file_name, got {_show(entry)}."
        return
    for key in entry:
        if key not in ENTRY_KEYS:
            yield unknown("key", str(key), ENTRY_KEYS)
    if not any(key in entry for key in ("file_name", *REMOTE_KEYS)):
        yield f"has no file_name (nor one of {', '.join(REMOTE_KEYS)})."
    for key in ("file_name", *REMOTE_KEYS):
        if key in entry and not (isinstance(entry[key], str) and entry[key]):
            yield f"{key} must be text, got {_show(entry[key])}."
    formatting = entry.get("formatting", "alpaca")
    if formatting not in FORMATTINGS:
        yield f"formatting: {unknown('format', str(formatting), FORMATTINGS)}"
    if not isinstance(entry.get("ranking", False), bool):
        yield f"ranking must be true or false, got {_show(entry['ranking'])}."
    samples = entry.get("num_samples")
    if samples is not None and (isinstance(samples, bool) or not isinstance(samples, int) or samples < 1):
        yield f"num_samples must be a whole number of at least 1, got {_show(samples)}."
    for group, known in (("columns", COLUMNS), ("tags", TAGS)):
        given = entry.get(group, {})
        if not isinstance(given, dict):
            yield f"{group} must be a mapping, got {_show(given)}."
            continue
        for key, value in given.items():
            if key not in known:
                yield f"{group}: {unknown('key', str(key), known)}"
            elif value is not None and not isinstance(value, str):
                yield f"{group}.{key} must be text, got {_show(value)}."


def read_entry(name: str, entry: Mapping[str, Any], folder: Path) -> Entry | None:
    """Return a well-formed entry of ``dataset_info.json``, or None where its data is in no local files.

    Args:
        name: of the data set.
        entry: without :func:`entry_problems`.
        folder: ``dataset_dir``.

    Raises:
        RawDataError: if a file is missing or of no known type.
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
            raise RawDataError(f"{file} is no file")
        if file.suffix[1:] not in FILE_TYPES:
            raise RawDataError(f"{file}: the ending must be one of {', '.join(FILE_TYPES)}")
        if FILE_TYPES[file.suffix[1:]] != FILE_TYPES[files[0].suffix[1:]]:
            raise RawDataError(f"{path} holds files of different types: {files[0].name} and {file.name}")
    columns = dict.fromkeys(COLUMNS) | entry["columns"] if "columns" in entry else COLUMNS
    tags = dict.fromkeys(TAGS) | entry["tags"] if "tags" in entry else TAGS
    formatting = str(entry.get("formatting", "alpaca"))
    return Entry(name, tuple(files), formatting, bool(entry.get("ranking", False)), columns, tags)


def rows(file: Path, whole: bool = True) -> Iterator[tuple[Place, Any]]:
    """Yield the rows of a file with their places; what is no mapping of columns to values is yielded as it is.

    Args:
        file: of a type in :data:`FILE_TYPES`.
        whole: else only its first :data:`HEAD` characters (of parquet and arrow files the first rows).

    Raises:
        RawDataError: at the first place that cannot be read.
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
    """JSON values of a stream one after another, read in pieces, with the line of each."""

    def __init__(self, file: Path, stream: IO[str]) -> None:
        self.file, self.stream = file, stream
        self.text, self.at, self.line = "", 0, 1
        self.read = 0

    def more(self) -> bool:
        """Read another piece; return whether there was one."""
        piece = self.stream.read(max(_CHUNK, len(self.text) - self.at))  # growing, so that a huge value stays linear
        self.text, self.at = self.text[self.at :] + piece, 0
        self.read += len(piece)
        return bool(piece)

    def peek(self) -> str:
        """Return the next character that is no space, or nothing at the end."""
        while True:
            while self.at < len(self.text):
                character = self.text[self.at]
                if not character.isspace():
                    return character
                self.line += character == "\n"
                self.at += 1
            if not self.more():
                return ""

    def value(self, decoder: json.JSONDecoder) -> Any:
        """Return the next value.

        Raises:
            RawDataError: naming the line at which it stops being JSON.
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
                line = self.line + self.text.count("\n", self.at, error.pos)
                why = "it is cut off" if cut and error.pos >= len(self.text.rstrip()) else _lower(error.msg)
                raise RawDataError(f"{self.file}, line {line}: not valid JSON: {why}") from error
            except RecursionError as error:
                raise RawDataError(f"{self.file}, line {self.line}: nested too deeply") from error
            self.line += self.text.count("\n", self.at, end)
            self.at = end
            return found


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]


def _json_rows(file: Path, whole: bool) -> Iterator[tuple[Place, Any]]:
    with file.open(encoding="utf-8") as stream:
        source = _JsonStream(file, stream)
        marked = source.peek() == "\ufeff"
        source.at += marked
        array = source.peek() == "["
        if marked and array:  # before lines it is read over
            raise RawDataError(f"{file}, line 1: begins with a byte order mark; save it as UTF-8 without one")
        decoder = json.JSONDecoder(strict=False) if array else json.JSONDecoder(object_pairs_hook=distinct)
        if array:
            source.at += 1
        number = 0
        while (character := source.peek()) and not (array and character == "]"):
            if not whole and source.read > HEAD:
                return
            line = source.line
            found = source.value(decoder)
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
    size = 0
    with file.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream):
            size += len(line)
            if not whole and size > HEAD:
                return
            yield Place(file, number, number + 1), {"text": line.rstrip("\n")}


def _arrow_rows(file: Path, kind: str, whole: bool) -> Iterator[tuple[Place, Any]]:
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
    import pyarrow as pa

    with pa.memory_map(str(file)) as source:
        try:
            yield from pa.ipc.open_stream(source)
        except pa.ArrowInvalid:
            opened = pa.ipc.open_file(source)
            for number in range(opened.num_record_batches):
                yield opened.get_batch(number)


def fault(entry: Entry, stage: str, whole: bool = True, count: int | None = None, answers: bool = True) -> str | None:
    """Return the first thing that keeps a data set from being trained on, with file and line; None where nothing does.

    Args:
        entry: the data set.
        stage: LLaMA-Factory's.
        whole: whether all rows are looked at; else the first ones of each file.
        count: rows that are to be trained on; none: all. All are read in any case, but more need not be of use.
        answers: whether rows need an answer; those that are evaluated by generation do not.
    """
    pairs = "rm" if stage in ("rm", "dpo") else ""
    if entry.ranking and not pairs:
        return f"{entry.name!r} holds pairs of answers (ranking: true), which stage {stage} does not train on."
    if pairs and not entry.ranking:
        return f"{entry.name!r} holds no pairs of answers (ranking: true), which stages rm and dpo train on."
    seen: dict[str, tuple[str, Place]] = {}
    left_out: list[str] = []
    total, complete = 0, True
    without: Place | None = None
    messages = entry.columns["messages"] if entry.formatting != "alpaca" else None
    try:
        for file in entry.files:
            for place, row in _typed(file, whole):
                if not isinstance(row, dict):
                    return f"{place}: {_show(row)} is no row; needed is a mapping of columns to values."
                found = _mixed(row, "", place, seen)
                if found is not None:
                    return found
                if count is not None and total >= count:
                    continue
                found = _unusable(entry, row, stage)
                if found is not None:
                    return f"{place}: {found}"
                dropped = _dropped(entry, row, stage, answers)
                if dropped is not None:
                    left_out.append(f"{place}: {dropped}")
                if without is None and messages is not None and messages not in row:
                    without = place
                total += 1
            complete &= whole or _is_short(file)
    except RawDataError as error:
        return f"{error}."
    if not total:
        return f"{', '.join(map(str, entry.files))} holds no row." if complete else None
    missing = _missing_column(entry, list(seen), complete)
    if missing is not None:
        return missing
    if without is not None:
        return f"{without}: has no {entry.columns['messages']!r}; every row needs a list of messages."
    if complete and len(left_out) == total:
        return f"none of its {total} rows can be trained on; the first, {left_out[0]}"
    return None


def _is_short(file: Path) -> bool:
    """Return whether reading the head of a file was reading all of it."""
    return FILE_TYPES[file.suffix[1:]] not in ("parquet", "arrow") and file.stat().st_size <= HEAD


def _typed(file: Path, whole: bool) -> Iterator[tuple[Place, Any]]:
    """Yield rows; the columns of a CSV file that hold numbers only are numbers, as its reader makes them."""
    if FILE_TYPES[file.suffix[1:]] != "csv" or not (whole or _is_short(file)):
        yield from rows(file, whole)
        return
    found = list(rows(file))
    columns = found[0][1] if found else {}
    numeric = {key for key in columns if all(_is_number(row[key]) for _, row in found)}
    for place, row in found:
        yield (
            place,
            {key: float(value) if key in numeric and isinstance(value, str) else value for key, value in row.items()},
        )


def _is_number(value: str | None) -> bool:
    try:
        return value is None or float(value) is not None
    except ValueError:
        return False


def _kind(value: Any) -> str | None:
    """Return what a value is, for comparison with the same column's other values; None for no value."""
    if value is None:
        return None
    for kind, name in ((bool, "true or false"), (str, "text"), (int | float, "a number"), (list, "a list")):
        if isinstance(value, kind):
            return name
    return "a mapping" if isinstance(value, dict) else type(value).__name__


def _mixed(value: dict[str, Any], path: str, place: Place, seen: dict[str, tuple[str, Place]]) -> str | None:
    """Return what says that a column holds values of two kinds, which no table can; notes what each column holds."""
    for key, item in value.items():
        name = f"{path}{key}"
        found = _mixed_value(item, name, place, seen)
        if found is not None:
            return found
    return None


def _mixed_value(item: Any, name: str, place: Place, seen: dict[str, tuple[str, Place]]) -> str | None:
    kind = _kind(item)
    if place.among and isinstance(item, int) and not -(2**63) <= item < 2**64:
        return f"{place}: {name!r} is {item}, which does not fit 64 bits."
    before = seen.get(name)
    if before is None or before[0] == "nothing":
        seen[name] = (kind or "nothing", place)
    elif kind is not None and kind != before[0]:
        return (
            f"{place}: {name!r} is {kind} ({_show(item)}) here and {before[0]} in {before[1]}; a column holds one kind."
        )
    if isinstance(item, dict):
        return _mixed(item, f"{name}.", place, seen)
    if isinstance(item, list):
        for part in item:
            found = _mixed_value(part, f"{name}[]", place, seen)
            if found is not None:
                return found
    return None


def _columns_read(entry: Entry) -> list[str]:
    """Return which columns LLaMA-Factory reads of every row, those without which nothing can be trained on first."""
    if entry.formatting == "alpaca":
        answers = ["chosen", "rejected"] if entry.ranking else ["response"]
        return ["prompt", *answers, "query", "history", "kto_tag", "system", "tools", *_MEDIA]
    optional = ["system", "tools"] if entry.formatting == "sharegpt" else []
    return ["messages", *(["chosen", "rejected"] if entry.ranking else []), "kto_tag", *optional, *_MEDIA]


def _missing_column(entry: Entry, seen: list[str], complete: bool) -> str | None:
    """Return what says that a column is in no row; of the lesser ones only where all rows were read."""
    there = [name for name in seen if not any(mark in name for mark in (".", "[]"))]
    essential = ("prompt", "messages", "response", "chosen", "rejected")
    for role in _columns_read(entry):
        column = entry.columns[role]
        if role == "messages" and column in seen:
            for key in ("role_tag", "content_tag"):
                tag, parts = entry.tags[key], f"{column}[]."
                inside = [name.removeprefix(parts) for name in seen if name.startswith(parts)]
                if tag is not None and inside and tag not in inside:
                    hint = did_you_mean(tag, inside) or "."
                    return (
                        f"no message in {column!r} of {entry.files[0]} has a {tag!r}{hint} They have "
                        f"{', '.join(map(repr, inside))}; name them under tags in {INFO_FILE} ({key})."
                    )
        if column is not None and column not in seen and (complete or role in essential):
            how = f"columns: {{{role}: {column}}}" if column != COLUMNS[role] else f"{role} is {column!r} by default"
            return (
                f"no row of {entry.files[0]} has a column {column!r}{did_you_mean(column, there)} "
                f"({how}). It has {', '.join(map(repr, there))}; name them under columns in {INFO_FILE}."
            )
    return None


def _text_or_nothing(row: Mapping[str, Any], column: str | None) -> str | None:
    value = row.get(column) if column is not None else None
    if not value or isinstance(value, str):
        return None
    return f"{column!r} is {_kind(value)} ({_show(value)}); needed is text."


def _unusable(entry: Entry, row: Mapping[str, Any], stage: str) -> str | None:
    """Return what in a row LLaMA-Factory cannot handle, or None."""
    if entry.formatting == "alpaca":
        for role in ("prompt", "query", "system"):
            found = _text_or_nothing(row, entry.columns[role])
            if found is not None:
                return found
        history = entry.columns["history"]
        turns = row.get(history) if history is not None else None
        for turn in turns if isinstance(turns, list) else ():
            if not (isinstance(turn, list) and len(turn) == 2 and all(isinstance(each, str) for each in turn)):
                return f"{history!r} must be a list of pairs [question, answer], got {_show(turn)}."
        return None
    column = entry.columns["messages"]
    if column is None:
        return None
    messages = row.get(column)
    if column in row and not isinstance(messages, list):
        return f"{column!r} is {_kind(messages) or 'empty'} ({_show(messages)}); needed is a list of messages."
    role_tag, content_tag = str(entry.tags["role_tag"]), str(entry.tags["content_tag"])
    speakers = [tag for key, tag in entry.tags.items() if key not in ("role_tag", "content_tag")]
    for message in messages or ():
        if not isinstance(message, dict):
            return f"{column!r} holds {_show(message)}; needed are mappings with {role_tag!r} and {content_tag!r}."
        if entry.formatting == "openai" and role_tag in message and message[role_tag] not in speakers:
            known = ", ".join(repr(tag) for tag in speakers if tag is not None)
            return f"a message is of {_show(message[role_tag])}; known are {known} (tags)."
    turns = None if column not in row else _turns(entry, messages or [])
    if turns is not None:
        return turns if stage == "pt" else None  # else the row is left out
    for message in messages or ():
        content = message.get(content_tag)
        if (
            content_tag in message
            and not isinstance(content, str)
            and not (content is None and "tool_calls" in message)
        ):
            return f"{content_tag!r} of a message is {_kind(content) or 'empty'} ({_show(content)}); needed is text."
    return _text_or_nothing(row, entry.columns["system"])


def _dropped(entry: Entry, row: Mapping[str, Any], stage: str, answers: bool) -> str | None:
    """Return why LLaMA-Factory leaves a row out, or None."""
    if entry.formatting != "alpaca":
        column = entry.columns["messages"]
        return None if column is None or column not in row else _turns(entry, row[column])
    if stage != "sft" or entry.ranking or not answers:
        return None
    column = entry.columns["response"]
    if column is None:
        return "the entry names no column for response."
    value = row.get(column)
    if not isinstance(value, str):
        return f"{column!r} is empty." if value is None else f"{column!r} is {_kind(value)} ({_show(value)}), no text."
    return None


def _turns(entry: Entry, messages: list[dict[str, Any]]) -> str | None:
    """Return what is wrong with who speaks when, or None."""
    tags, role_tag = entry.tags, str(entry.tags["role_tag"])
    speakers = [message.get(role_tag) for message in messages]
    if speakers and speakers[0] is not None and speakers[0] == tags["system_tag"]:
        speakers = speakers[1:]
    if entry.formatting == "openai":  # what tools return one after another counts as one message
        after = zip(speakers, [None, *speakers], strict=False)
        speakers = [each for each, before in after if not each == before == tags["observation_tag"]]
    asking = (tags["user_tag"], tags["observation_tag"])
    answering = (tags["assistant_tag"], tags["function_tag"])
    for turn, speaker in enumerate(speakers):
        expected = [tag for tag in (asking, answering)[turn % 2] if tag is not None]
        if speaker not in expected:
            needed = " or ".join(map(repr, expected))
            return f"message {turn + 1} is of {_show(speaker)}, and one of {needed} is needed there."
    if len(speakers) % 2 != (1 if entry.ranking else 0):
        parity = "odd" if entry.ranking else "even"
        return f"it has {len(speakers)} messages, the system's not counted; needed is an {parity} number."
    if not speakers:
        return "it has no messages."
    return None


def _show(value: Any) -> str:
    """Return a value for a message, cut where it is long."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
