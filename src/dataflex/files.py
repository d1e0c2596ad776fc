"""Writing files so that a reader never sees half of one, and JSON that every reader takes."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Write ``content`` to a temporary name beside ``path``, then rename it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


class RepeatedKeyError(ValueError):
    """A key stands twice in one mapping of a file.

    Args:
        key: the key.
    """

    def __init__(self, key: str) -> None:
        self.key = key
        super().__init__(f"{key!r} is there twice")


def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a mapping of pairs; the ``object_pairs_hook`` of JSON files that people write.

    Raises:
        RepeatedKeyError: if a key is there twice, of which Python's own reader would keep the last.
    """
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise RepeatedKeyError(key)
        found[key] = value
    return found


def json_text(value: Any, **options: Any) -> str:
    """Return JSON (RFC 8259) of plain data and numpy scalars; a number that is not finite becomes null.

    Args:
        value: what is written; not changed.
        options: further arguments of ``json.dumps``.
    """
    return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
