"""Digests of the files that a configuration names: two runs are the same run only if these files are equal too."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dataflex.api.reference import TABLE_FILE
from dataflex.config.loading import RunConfig
from dataflex.data.fingerprints import file_digest, is_file, is_model_folder, model_digests
from dataflex.errors import ConfigError
from dataflex.record.environment import local_datasets


def digest(value: Any) -> str:
    """Return the SHA-256 of a JSON value, in hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def expanded(name: str) -> Path:
    """Return a path with ``~`` expanded.

    Unlike ``Path.expanduser``, leave ``~user`` as it is if that user is unknown.
    """
    return Path(os.path.expanduser(name))  # noqa: PTH111


BESIDE = "base:"
"""Stands in a key for the folder of the file that the base is in."""


def without_places(value: Any, base: Path, assets: Mapping[str, str]) -> Any:
    """Return plain data in which no path depends on where this machine keeps the clone, the cache or the home folder.

    A path in the folder of an asset begins with ``asset:NAME``, a path in the working directory is relative, a path
    below ``base`` begins with :data:`BESIDE`, and one in the home folder with ``~``. Other texts stay as they are.

    Args:
        value: texts, numbers, lists and mappings. The values of a mapping are changed, not its keys.
        base: folder of the file that the configuration came from.
        assets: folder of an asset -> ``asset:NAME``.
    """
    folders = [(folder, f"{name}/") for folder, name in assets.items()]
    folders += [(str(Path.cwd()), ""), (str(base), BESIDE), (str(expanded("~")), "~/")]

    def replaced(part: Any) -> Any:
        if isinstance(part, Mapping):
            return {key: replaced(item) for key, item in part.items()}
        if isinstance(part, list | tuple):
            return [replaced(item) for item in part]
        if isinstance(part, str) and part.startswith("/"):
            path = Path(part)
            return next((f"{name}{path.relative_to(of)}" for of, name in folders if path.is_relative_to(of)), part)
        return part

    return replaced(value)


def digests_of_named(config: RunConfig, base: Path) -> dict[str, str]:
    """Return a digest of everything on this machine that a configuration names.

    These are:

    - the local files of its data sets, and their entries of ``dataset_info.json``;
    - every value that is the path of a file or of a model folder, relative to the working directory or to ``base``;
    - the file that lists a table of reference losses, if the table is used without its model.

    Anything elsewhere (on a hub) counts by its name alone. A file that does not change is read only once.

    Args:
        config: with its assets resolved.
        base: folder of the file that the configuration came from.

    Returns:
        Name of a file or data set in the configuration, :func:`without_places` -> digest.

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
                found |= {f"{name}/{file}": value for file, value in model_digests(path).items()}
        found |= _of_data(config)
        found |= _of_reference_losses(config)
    except OSError as error:
        raise ConfigError(f"{error.filename} cannot be read ({error.strerror or error}).") from error
    assets = {str(config.llamafactory[key]): name for key, name in config.assets.items()}
    names: list[str] = without_places(list(found), base, assets)
    return dict(zip(names, found.values(), strict=True))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str) and value:
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            # LLaMA-Factory takes several adapters as one text with commas. The output_dir is no input of a run.
            if key == "adapter_name_or_path" and isinstance(item, str):
                yield from (part.strip() for part in item.split(",") if part.strip())
            elif key != "output_dir":
                yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def _local(name: str, base: Path) -> Path | None:
    """Return the file or model folder of that name, or None if there is none."""
    for folder in (Path(), base):
        path = folder / expanded(name)
        if is_file(path) or is_model_folder(path):
            return path
    return None


def _of_data(config: RunConfig) -> dict[str, str]:
    """Return digests of the files of the local data sets, and of their entries of dataset_info.json."""
    info_file = Path(str(config.llamafactory.get("dataset_dir", "data"))) / "dataset_info.json"
    found: dict[str, str] = {}
    for name, entry, files in local_datasets(config):
        found[f"{info_file}, entry {name}"] = digest(entry)
        found |= {str(file): file_digest(file) for file in files}
    return found


def _of_reference_losses(config: RunConfig) -> dict[str, str]:
    """Return the digest of the file that lists a table of reference losses, if no model is named for the table."""
    found: dict[str, str] = {}
    for needs in config.build_components().needs(config).values():
        asked = needs.reference
        if asked is None or asked.reference_losses is None:
            continue
        file = Path(asked.reference_losses) / TABLE_FILE
        if asked.reference_model is None and file.is_file():
            found[str(file)] = file_digest(file)
    return found
