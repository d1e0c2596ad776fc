"""Digests of what a configuration names: two runs are the same run only if the files behind the names are too."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from dataflex.checks import dataset_names
from dataflex.config import RunConfig
from dataflex.errors import ConfigError

_MODEL_FILES = ("config.json", "adapter_config.json")
"""Files by which a folder is known for a model; their text counts, of all its other files the size."""


def digest(value: Any) -> str:
    """Return the SHA-256 of a JSON value, in hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def contents(config: RunConfig, base: Path) -> dict[str, Any]:
    """Return a digest of everything a configuration names that lies on this machine.

    These are the local files of its data sets (with their entries of ``dataset_info.json``), and every value that is
    the path of a file or of a model folder, from the working directory or from ``base``. What lies elsewhere (a hub)
    is known by its name only.

    Args:
        config: with its assets resolved.
        base: folder of the file the configuration came from.

    Returns:
        Name as the configuration has it -> digest.

    Raises:
        ConfigError: if a file cannot be read.
    """
    found: dict[str, Any] = {}
    try:
        for name in _strings(config.resolved()):
            path = _local(name, base)
            if path is not None:
                found[name] = file_digest(path.resolve()) if path.is_file() else _of_model(path)
        found["data"] = _of_data(config)
    except OSError as error:
        raise ConfigError(f"{error.filename} cannot be read ({error.strerror or error}).") from error
    return found


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str) and value:
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if key != "output_dir":
                yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def _local(name: str, base: Path) -> Path | None:
    """Return the file or model folder of that name, if there is one."""
    if len(name) > 1000 or "\n" in name or "\0" in name:
        return None
    for folder in (Path(), base):
        path = folder / Path(name).expanduser()
        if path.is_file() or any((path / file).is_file() for file in _MODEL_FILES):
            return path
    return None


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal; a file is read once while it stays the same."""
    found = path.stat()
    return _digest_of(path, found.st_size, found.st_mtime_ns)


@cache
def _digest_of(path: Path, size: int, mtime_ns: int) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _of_model(folder: Path) -> dict[str, Any]:
    """Return the digest of a model folder's configuration and the size of every file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): file_digest(path.resolve()) if path.name in _MODEL_FILES else path.stat().st_size
        for path in files
    }


def _of_data(config: RunConfig) -> dict[str, Any]:
    """Return name -> entry of dataset_info.json and digests of its files, for the local data sets that are used."""
    folder = Path(str(config.llamafactory.get("dataset_dir", "data")))
    info_file = folder / "dataset_info.json"
    if not info_file.is_file():
        return {}
    info = json.loads(info_file.read_text(encoding="utf-8"))
    selector = config.build_components().select
    validation = selector.params.model_dump().get("validation") if selector is not None else None
    names = (*dataset_names(config), *dataset_names(config, "eval_dataset"), *(validation or ()))
    found: dict[str, Any] = {}
    for name in dict.fromkeys(names):
        entry = info.get(name, {})
        path = folder / str(entry.get("file_name") or "")
        if not entry.get("file_name") or not path.exists():
            files = []
        else:
            files = [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.is_file())
        digests = {str(file.relative_to(folder)): file_digest(file.resolve()) for file in files}
        found[name] = {"entry": entry, "files": digests}
    return found
