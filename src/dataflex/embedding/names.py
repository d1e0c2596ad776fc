"""Names of encoders, and the contents of their files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from dataflex.errors import ConfigError

MODULES_FILE = "modules.json"
"""A folder with this file has the layout of sentence-transformers."""
_UNREAD_FOLDERS = {"onnx", "openvino", "coreml"}
_READ_FILES = (".json", ".safetensors", ".bin", ".txt", ".model", ".py", ".jinja")


def is_url(name: str) -> bool:
    """Return whether the name of an encoder is the URL of a service."""
    return name.startswith(("http://", "https://"))


def files_digest(folder: Path) -> str:
    """Return a digest of the files of an encoder: their names and contents."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        inside = file.relative_to(folder)
        unread = inside.parts[0] in _UNREAD_FOLDERS or any(part.startswith(".") for part in inside.parts)
        if unread or file.suffix not in _READ_FILES or not file.is_file():
            continue
        digest.update(f"{inside.as_posix()} {file.stat().st_size} ".encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def read_json(file: Path) -> Any:
    """Return the contents of an encoder's JSON file, or None if the file does not exist.

    Raises:
        ConfigError: if the file is not valid JSON.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ConfigError(f"encoder: {file} is not valid JSON: {error}.") from error
