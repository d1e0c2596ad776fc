"""Digests of files: of models (by their text files and the ends of their weight files) and of data."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

MODEL_FILES = ("config.json", "adapter_config.json")
"""A folder with one of these files is a model folder."""

TEXTS = (".json", ".txt", ".jinja", ".model", ".py")
"""Files of a model folder that are hashed completely: configuration, tokenizer, code."""

WEIGHTS = (".safetensors", ".bin", ".gguf")
"""Files of a model folder that are hashed by their size and their ends."""

_END = 2**20
"""Number of hashed bytes at each end of a weight file."""

_OF_A_TRAINING = ("training_args.bin", "key.json", "complete.json", "failed.json", "log.txt")
"""Files that a training writes beside its model, in addition to ``trainer_*`` and ``*results.json``."""


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal. A file is read only once while it stays unchanged."""
    resolved = path.resolve()
    found = resolved.stat()
    return _digest_of(resolved, found.st_size, found.st_mtime_ns)


@cache
def _digest_of(path: Path, size: int, mtime_ns: int) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest_of_ends(path: Path) -> str:
    """Return a digest of a file's size, its first MiB and its last MiB."""
    with path.open("rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(0)
        first = stream.read(_END)
        stream.seek(max(0, size - _END))
        return hashlib.sha256(first + stream.read(_END) + str(size).encode()).hexdigest()


def model_digests(folder: Path) -> dict[str, str]:
    """Return file -> digest of the files directly in a folder that belong to the model."""
    texts = {path.name: file_digest(path) for path in model_texts(folder)}
    weights = [path for path in _of_no_training(folder) if path.suffix in WEIGHTS]
    return texts | {path.name: digest_of_ends(path) for path in weights}


def model_texts(folder: Path) -> list[Path]:
    """Return the files directly in a model folder that are its configuration, tokenizer and code."""
    return [path for path in _of_no_training(folder) if path.suffix in TEXTS]


def _of_no_training(folder: Path) -> Iterator[Path]:
    """Yield the files directly in a folder, except the files that a training writes beside its model."""
    for path in sorted(folder.iterdir()):
        of_a_training = path.name in _OF_A_TRAINING or path.name.startswith("trainer_")
        if path.is_file() and not of_a_training and not path.name.endswith("results.json"):
            yield path


def is_file(path: Path) -> bool:
    """Return whether the file exists. Unlike ``Path.is_file``, this accepts text that cannot be a path."""
    return os.path.isfile(path)  # noqa: PTH113


def is_model_folder(path: Path) -> bool:
    """Return whether a folder holds a model or an adapter."""
    return any(is_file(path / file) for file in MODEL_FILES)
