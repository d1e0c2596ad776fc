"""The columns in the first rows of a data set's files, read without the datasets library."""

from __future__ import annotations

from dataclasses import dataclass, field

from dataflex.data.raw import FILE_TYPES, HEAD, Entry, rows


@dataclass(frozen=True)
class Head:
    """The columns in the first rows of a data set's files.

    Attributes:
        columns: column -> whether its values are text, in the order of the file. None if the file type only has text,
            or if some values are text and others are not.
        is_all: whether no further column can follow: the whole file was read, or the file has a header.
    """

    columns: dict[str, bool | None] = field(default_factory=dict)
    is_all: bool = True


def head_of(entry: Entry) -> Head:
    """Return the columns of a data set that the first rows of its files show.

    Raises:
        RawDataError: if a file cannot be read.
    """
    kinds: dict[str, set[bool]] = {}  # column -> whether its values are text, over all rows
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
