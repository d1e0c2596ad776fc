"""Files that are written completely or not at all, and JSON that every reader accepts."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Write ``content`` to a temporary file in the same folder, then rename the file to ``path``.

    A reader sees either the old content or the complete new content. Missing parent folders are created.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from dataflex import write_atomically
        >>> folder = Path(tempfile.mkdtemp())
        >>> write_atomically(folder / "scores.json", b"[0.5]")
        >>> [file.name for file in folder.iterdir()]
        ['scores.json']
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())  # the content must be on disk before the file has its name
    temporary.replace(path)


def is_path(name: str) -> bool:
    """Return whether the name of a model or data set is a path, and not the name of a hub's repository (OWNER/NAME)."""
    return name.startswith(("/", "./", "../", "~")) or name.count("/") > 1 or Path(name).exists()


class RepeatedKeyError(ValueError):
    """A mapping in a file has the same key twice.

    Args:
        key: the repeated key.
    """

    def __init__(self, key: str) -> None:
        self.key = key
        super().__init__(f"{key!r} is there twice")


def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the pairs as a dict. Use this function as ``object_pairs_hook`` for JSON files that people write.

    Raises:
        RepeatedKeyError: if a key appears twice. Python's default hook would silently keep the last value.

    Example:
        >>> import json
        >>> from dataflex import distinct
        >>> json.loads('{"code": 0.3, "math": 0.7}', object_pairs_hook=distinct)
        {'code': 0.3, 'math': 0.7}
        >>> json.loads('{"code": 0.3, "code": 0.7}', object_pairs_hook=distinct)
        Traceback (most recent call last):
        dataflex.files.RepeatedKeyError: 'code' is there twice
    """
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise RepeatedKeyError(key)
        found[key] = value
    return found


def json_text(value: Any, **options: Any) -> str:
    """Return JSON (RFC 8259) of plain data and numpy scalars. Values that are not finite become null.

    Args:
        value: the data to write. It is not changed.
        options: further arguments of ``json.dumps``.
    """
    return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value: Any) -> Any:
    """Return a value with Python numbers for NumPy numbers, and None for numbers that are not finite."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
