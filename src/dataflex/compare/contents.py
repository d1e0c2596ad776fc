"""Digests of what a configuration names: two runs are the same run only if the files behind the names are too."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from dataflex.checks import dataset_names
from dataflex.config import RunConfig
from dataflex.errors import ConfigError
from dataflex.record.files import read_object
from dataflex.reference import TABLE_FILE, ReferenceParams

_MODEL_FILES = ("config.json", "adapter_config.json")
"""Files by which a folder is known for a model."""

_TEXTS = (".json", ".txt", ".jinja", ".model", ".py")
"""Files of a model folder that count with all they hold: configuration, tokenizer, code."""

_WEIGHTS = (".safetensors", ".bin", ".gguf")
"""Files of a model folder that count by their size and their ends."""

_END = 2**20
"""Bytes at each end of a file of weights."""

_OF_A_TRAINING = ("training_args.bin", "key.json", "complete.json", "failed.json", "log.txt")
"""Files that a training leaves beside its model; so are ``trainer_*`` and ``*results.json``."""


def digest(value: Any) -> str:
    """Return the SHA-256 of a JSON value, in hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def expanded(name: str) -> Path:
    """Return a path with ``~`` filled in; unlike ``Path.expanduser``, of an unknown user it stays as it is."""
    return Path(os.path.expanduser(name))  # noqa: PTH111


def contents(config: RunConfig, base: Path) -> dict[str, str]:
    """Return a digest of everything a configuration names that lies on this machine.

    These are the local files of its data sets (with their entries of ``dataset_info.json``), every value that is the
    path of a file or of a model folder, from the working directory or from ``base``, and the table of reference losses
    that is used without its model. What lies elsewhere (a hub) is known by its name only. A file that stays the same is
    read once.

    Args:
        config: with its assets resolved.
        base: folder of the file the configuration came from.

    Returns:
        File, or data set, as the configuration names it -> digest.

    Raises:
        ConfigError: if a file cannot be read.
    """
    found: dict[str, str] = {}
    try:
        for name in _strings(config.resolved()):
            path = _local(name, base)
            if path is not None and path.is_file():
                found[name] = file_digest(path)
            elif path is not None:
                found |= {f"{name}/{file}": value for file, value in _of_model(path).items()}
        found |= _of_data(config)
        found |= _of_reference_losses(config)
    except OSError as error:
        raise ConfigError(f"{error.filename} cannot be read ({error.strerror or error}).") from error
    return found


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str) and value:
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if key == "adapter_name_or_path" and isinstance(item, str):
                yield from (part.strip() for part in item.split(",") if part.strip())
            elif key != "output_dir":
                yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def _local(name: str, base: Path) -> Path | None:
    """Return the file or model folder of that name, if there is one."""
    for folder in (Path(), base):
        path = folder / expanded(name)
        if _is_file(path) or any(_is_file(path / file) for file in _MODEL_FILES):
            return path
    return None


def _is_file(path: Path) -> bool:
    """Return whether there is such a file; unlike ``Path.is_file``, of a text that can be no path too."""
    return os.path.isfile(path)  # noqa: PTH113


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal; a file is read once while it stays the same."""
    resolved = path.resolve()
    found = resolved.stat()
    return _digest_of(resolved, found.st_size, found.st_mtime_ns)


@cache
def _digest_of(path: Path, size: int, mtime_ns: int) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _digest_of_ends(path: Path) -> str:
    """Return a digest of a file's size, its first and its last MiB."""
    with path.open("rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(0)
        first = stream.read(_END)
        stream.seek(max(0, size - _END))
        return hashlib.sha256(first + stream.read(_END) + str(size).encode()).hexdigest()


def _of_model(folder: Path) -> dict[str, str]:
    """Return file -> digest of those files directly in a folder that make the model."""
    texts = {path.name: file_digest(path) for path in model_texts(folder)}
    weights = [path for path in _of_no_training(folder) if path.suffix in _WEIGHTS]
    return texts | {path.name: _digest_of_ends(path) for path in weights}


def model_texts(folder: Path) -> list[Path]:
    """Return the files directly in a model folder that are its configuration, tokenizer and code."""
    return [path for path in _of_no_training(folder) if path.suffix in _TEXTS]


def _of_no_training(folder: Path) -> Iterator[Path]:
    """Yield the files directly in a folder but those that a training leaves beside its model."""
    for path in sorted(folder.iterdir()):
        of_a_training = path.name in _OF_A_TRAINING or path.name.startswith("trainer_")
        if path.is_file() and not of_a_training and not path.name.endswith("results.json"):
            yield path


def _of_data(config: RunConfig) -> dict[str, str]:
    """Return digests of the entries of dataset_info.json and of the files, of the local data sets that are used.

    Those are the data sets trained on, evaluated on, and named for validation by a component.
    """
    folder = Path(str(config.llamafactory.get("dataset_dir", "data")))
    info_file = folder / "dataset_info.json"
    info = read_object(info_file) or {}
    names = [*dataset_names(config), *dataset_names(config, "eval_dataset")]
    for _, component in config.build_components().items():
        if component.needs_validation:
            names += component.params.validation or ()
    found: dict[str, str] = {}
    for name in dict.fromkeys(names):
        entry = info.get(name) or {}
        found[f"the entry {name} of {info_file}"] = digest(entry)
        path = folder / str(entry.get("file_name") or "")
        if not entry.get("file_name") or not path.exists():
            continue
        files = [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.is_file())
        found |= {str(file): file_digest(file) for file in files}
    return found


def _of_reference_losses(config: RunConfig) -> dict[str, str]:
    """Return the digest of what lists a table of reference losses, where no model is named that it is made from."""
    found: dict[str, str] = {}
    for _, params in config.params.values():
        if not isinstance(params, ReferenceParams) or params.reference_losses is None:
            continue
        file = Path(params.reference_losses) / TABLE_FILE
        if params.reference_model is None and file.is_file():
            found[str(file)] = file_digest(file)
    return found
