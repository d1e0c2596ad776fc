"""Faults of raw data: the first row that cannot be used for training, with its file and line.

LLaMA-Factory and the datasets library report faults in data in the terms of a parser, without a file or a line. This
module reads the same files row by row until the first unusable row. It imports neither torch nor datasets nor
LLaMA-Factory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dataflex.data.media import MEDIA, unusable_media
from dataflex.data.raw import (
    BOOLEANS,
    COLUMNS,
    FILE_TYPES,
    HEAD,
    INFO_FILE,
    Entry,
    Place,
    RawDataError,
    kind_of,
    rows,
    show,
)
from dataflex.data.responses import entry_fault, missing_response, unusable_response
from dataflex.errors import did_you_mean

_OPENED = 64
"""Number of rows of a data set whose images are opened."""


def fault(
    entry: Entry,
    stage: str,
    whole: bool = True,
    count: int | None = None,
    answers: bool = True,
    media: Path | None = None,
) -> str | None:
    """Return the first fault that makes a data set unusable for training, with file and line, or None.

    Args:
        entry: the data set.
        stage: LLaMA-Factory's name of the training stage.
        whole: whether all rows are checked. If not, only the first rows of each file are checked.
        count: number of rows to train on. None means all rows. All rows must be readable in any case, but rows after
            the first ``count`` need not be usable.
        answers: whether rows need an answer. Rows for evaluation by generation do not.
        media: folder of images, videos and audio. None means that their files are not looked for.
    """
    if (found := entry_fault(entry, stage)) is not None:
        return found
    seen: dict[str, tuple[str, Place]] = {}
    left_out: list[str] = []
    total, complete = 0, True
    without: Place | None = None
    messages = entry.columns["messages"] if entry.formatting != "alpaca" else None
    try:
        for file in entry.files:
            for place, row in _typed(file, whole):
                if not isinstance(row, dict):
                    return f"{place}: {show(row)} is no row; a mapping of columns to values is needed."
                found = _mixed(row, "", place, seen)
                if found is not None:
                    return found
                if count is not None and total >= count:
                    continue
                found = _unusable(entry, row, stage) or unusable_response(entry, row, stage)
                dropped = None if found is not None else why_left_out(entry, row, stage, answers)
                if dropped is not None:
                    left_out.append(f"{place}: {dropped}")
                elif stage != "pt":  # which trains on text alone
                    found = found or unusable_media(entry, row, media, opens=total < _OPENED)
                if found is not None:
                    return f"{place}: {found}"
                if without is None and messages is not None and messages not in row:
                    without = place
                total += 1
            complete &= whole or _is_short(file)
    except RawDataError as error:
        return f"{error}."
    if not total:
        return f"{', '.join(map(str, entry.files))} holds no row." if complete else None
    if (missing := _missing_column(entry, list(seen), complete)) is not None:
        return missing
    if without is not None:
        return f"{without}: has no {entry.columns['messages']!r}; every row needs a list of messages."
    if complete and len(left_out) == total:
        return f"none of its {total} rows can be trained on; the first, {left_out[0]}"
    return None


def _is_short(file: Path) -> bool:
    """Return whether the head of a file is the whole file."""
    return FILE_TYPES[file.suffix[1:]] not in ("parquet", "arrow") and file.stat().st_size <= HEAD


def _typed(file: Path, whole: bool) -> Iterator[tuple[Place, Any]]:
    """Yield rows. As in the datasets library, columns of numbers or of booleans in a CSV file are read as such."""
    if FILE_TYPES[file.suffix[1:]] != "csv" or not (whole or _is_short(file)):
        yield from rows(file, whole)
        return
    found = list(rows(file))
    columns = found[0][1] if found else {}
    readers: dict[str, Callable[[str], Any]] = {}
    for key in columns:
        if all(_is_number(row[key]) for _, row in found):
            readers[key] = float
        elif all(row[key] is None or row[key] in BOOLEANS for _, row in found):
            readers[key] = BOOLEANS.__getitem__
    for place, row in found:
        yield (
            place,
            {key: readers.get(key, str)(value) if isinstance(value, str) else value for key, value in row.items()},
        )


def _is_number(value: str | None) -> bool:
    try:
        return value is None or float(value) is not None
    except ValueError:
        return False


def _mixed(value: dict[str, Any], path: str, place: Place, seen: dict[str, tuple[str, Place]]) -> str | None:
    """Return that a column holds values of two kinds, which a table cannot store. Record the kind of each column."""
    for key, item in value.items():
        name = f"{path}{key}"
        found = _mixed_value(item, name, place, seen)
        if found is not None:
            return found
    return None


def _mixed_value(item: Any, name: str, place: Place, seen: dict[str, tuple[str, Place]]) -> str | None:
    """Return the problem if a value differs in kind from earlier values of its column, or does not fit 64 bits."""
    kind = kind_of(item)
    if place.among and isinstance(item, int) and not -(2**63) <= item < 2**64:
        return f"{place}: {name!r} is {item}, which does not fit 64 bits."
    before = seen.get(name)
    if before is None or before[0] == "nothing":
        seen[name] = (kind or "nothing", place)
    elif kind is not None and kind != before[0]:
        return (
            f"{place}: {name!r} is {kind} ({show(item)}) here and {before[0]} in {before[1]}; a column holds one kind."
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
    """Return the columns that LLaMA-Factory reads in every row, with the indispensable ones first."""
    if entry.formatting == "alpaca":
        answers = ["chosen", "rejected"] if entry.ranking else ["response"]
        return ["prompt", *answers, "query", "history", "kto_tag", "system", "tools", *MEDIA]
    optional = ["system", "tools"] if entry.formatting == "sharegpt" else []
    return ["messages", *(["chosen", "rejected"] if entry.ranking else []), "kto_tag", *optional, *MEDIA]


def _missing_column(entry: Entry, seen: list[str], complete: bool) -> str | None:
    """Return that a column is missing in all rows. Optional columns are reported only if all rows were read."""
    there = [name for name in seen if not any(mark in name for mark in (".", "[]"))]
    essential = ("prompt", "messages", "response", "chosen", "rejected", "kto_tag")
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
    return f"{column!r} is {kind_of(value)} ({show(value)}); text is needed."


def _unusable(entry: Entry, row: Mapping[str, Any], stage: str) -> str | None:
    """Return why LLaMA-Factory cannot handle a row, or None."""
    if entry.formatting == "alpaca":
        for role in ("prompt", "query", "system"):
            found = _text_or_nothing(row, entry.columns[role])
            if found is not None:
                return found
        history = entry.columns["history"]
        turns = row.get(history) if history is not None else None
        for turn in turns if isinstance(turns, list) else ():
            if not (isinstance(turn, list) and len(turn) == 2 and all(isinstance(each, str) for each in turn)):
                return f"{history!r} must be a list of pairs [question, answer], got {show(turn)}."
        return None
    column = entry.columns["messages"]
    if column is None:
        return None
    messages = row.get(column)
    if column in row and not isinstance(messages, list):
        return f"{column!r} is {kind_of(messages) or 'empty'} ({show(messages)}); a list of messages is needed."
    role_tag, content_tag = str(entry.tags["role_tag"]), str(entry.tags["content_tag"])
    speakers = [tag for key, tag in entry.tags.items() if key not in ("role_tag", "content_tag")]
    for message in messages or ():
        if not isinstance(message, dict):
            return f"{column!r} holds {show(message)}; mappings with {role_tag!r} and {content_tag!r} are needed."
        if entry.formatting == "openai" and role_tag in message and message[role_tag] not in speakers:
            known = ", ".join(repr(tag) for tag in speakers if tag is not None)
            return f"the speaker of a message is {show(message[role_tag])}; known speakers are {known} (tags)."
    turns = None if column not in row else _turns(entry, messages or [])
    if turns is not None:
        return turns if stage == "pt" else None  # otherwise the row is left out
    for message in messages or ():
        content = message.get(content_tag)
        if (
            content_tag in message
            and not isinstance(content, str)
            and not (content is None and "tool_calls" in message)
        ):
            return f"{content_tag!r} of a message is {kind_of(content) or 'empty'} ({show(content)}); text is needed."
    return _text_or_nothing(row, entry.columns["system"])


def why_left_out(entry: Entry, row: Mapping[str, Any], stage: str, answers: bool = True) -> str | None:
    """Return why LLaMA-Factory leaves a row out, or None.

    Args:
        entry: the data set.
        row: the row.
        stage: LLaMA-Factory's name of the training stage.
        answers: whether the row needs an answer.
    """
    if entry.formatting != "alpaca":
        column = entry.columns["messages"]
        turns = None if column is None or column not in row else _turns(entry, row[column])
        return turns or (missing_response(entry, row, stage) if answers else None)
    if not answers:
        return None
    missing = missing_response(entry, row, stage)
    if missing is not None or stage != "sft":
        return missing
    column = entry.columns["response"]
    if column is None:
        return "the entry names no column for response."
    value = row.get(column)
    if not isinstance(value, str):
        return f"{column!r} is empty." if value is None else f"{column!r} is {kind_of(value)} ({show(value)}), no text."
    return None


def _turns(entry: Entry, messages: list[dict[str, Any]]) -> str | None:
    """Return the error in the order of the speakers, or None."""
    tags, role_tag = entry.tags, str(entry.tags["role_tag"])
    speakers = [message.get(role_tag) for message in messages]
    if speakers and speakers[0] is not None and speakers[0] == tags["system_tag"]:
        speakers = speakers[1:]
    if entry.formatting == "openai":  # consecutive results of tools count as one message
        after = zip(speakers, [None, *speakers], strict=False)
        speakers = [each for each, before in after if not each == before == tags["observation_tag"]]
    asking = (tags["user_tag"], tags["observation_tag"])
    answering = (tags["assistant_tag"], tags["function_tag"])
    for turn, speaker in enumerate(speakers):
        expected = [tag for tag in (asking, answering)[turn % 2] if tag is not None]
        if speaker not in expected:
            needed = " or ".join(map(repr, expected))
            return f"the speaker of message {turn + 1} is {show(speaker)}; {needed} is needed there."
    if len(speakers) % 2 != (1 if entry.ranking else 0):
        parity = "odd" if entry.ranking else "even"
        return f"it has {len(speakers)} messages, the system's not counted; an {parity} number is needed."
    if not speakers:
        return "it has no messages."
    return None
