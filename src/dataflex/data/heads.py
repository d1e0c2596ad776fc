"""The columns at the head of a data set's files, read without the datasets library."""

from __future__ import annotations

from dataclasses import dataclass, field

from dataflex.data.raw import FILE_TYPES, HEAD, Entry, rows


@dataclass(frozen=True)
class Head:
    """What the beginning of a data set's files shows of its columns.

    Attributes:
        columns: those that are seen, in their order -> whether their values are text; None if the file's type has
            nothing but text, or some values are text and others are not.
        is_all: whether a column that is not seen cannot come later: all of a file was read, or it has a header.
    """

    columns: dict[str, bool | None] = field(default_factory=dict)
    is_all: bool = True


def head_of(entry: Entry) -> Head:
    """Return the columns of a data set, as far as the first rows of its files show them.

    Raises:
        RawDataError: if a file cannot be read.
    """
    kinds: dict[str, set[bool]] = {}  # of each column, whether its values are text
    is_all = True
    for file in entry.files:
        kind = FILE_TYPES[file.suffix[1:]]
        for _, row in rows(file, whole=False):
            if not isinstance(row, dict):
                return Head(is_all=False)
            for name, value in row.items():
                seen = kinds.setdefault(name, set())
                if kind == "csv":
                    seen |= {True, False}
                elif value is not None:
                    seen.add(isinstance(value, str))
        is_all &= kind != "json" or file.stat().st_size <= HEAD
    columns = {name: None if len(seen) > 1 else True in seen for name, seen in kinds.items()}
    return Head(columns, is_all)
