"""Model folders without weights, to train from scratch: another model's configuration with some keys changed."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataflex import assets
from dataflex.compare.digests import digest, expanded
from dataflex.data.fingerprints import file_digest, model_texts
from dataflex.errors import ConfigError, Problem, unknown
from dataflex.files import is_path, json_text

CONFIG = "config.json"
_NOT_COPIED = (CONFIG, "adapter_config.json")
_TEXTS = ("*.json", "*.txt", "*.jinja", "*.model", "*.py")


@dataclass(frozen=True)
class SmallModel:
    """A model folder that can be written.

    Attributes:
        config: complete content of ``config.json``.
        files: further files that are copied into the folder: tokenizer, generation settings, code.
        key: digest of both, in hexadecimal.
    """

    config: dict[str, Any]
    files: tuple[Path, ...]
    key: str

    def write(self, folder: Path) -> None:
        """Write the folder, completely or not at all. An existing folder stays unchanged."""
        if folder.is_dir():
            return
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            for file in self.files:
                shutil.copyfile(file, work / file.name)
            (work / CONFIG).write_text(json_text(self.config, indent=2) + "\n", encoding="utf-8")
            work.chmod(0o755)  # mkdtemp makes a folder that only its owner can read
            work.rename(folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)


def small_model(name: str, revision: str | None, changes: Any) -> SmallModel:
    """Return the model ``name`` with some values of its configuration changed.

    Args:
        name: a model folder, ``asset:NAME`` or a hub name. From a hub only the small files are downloaded, not the
            weights.
        revision: revision of a hub name.
        changes: key of ``config.json`` -> value; a mapping changes the keys of a nested configuration.

    Raises:
        ConfigError: if there is no such model, if a key is unknown, or if the values contradict each other. The keys of
            its problems are relative to ``changes``.
    """
    if not isinstance(changes, dict) or not changes:
        raise ConfigError(f"must be a mapping of keys of {CONFIG} to values, got {changes!r}.")
    source = _folder(name, revision)
    config = json.loads((source / CONFIG).read_text(encoding="utf-8"))
    problems: list[Problem] = []
    result = _changed(config, _defaults(config), changes, (), problems)
    vocabulary = config.get("vocab_size"), result.get("vocab_size")
    if all(isinstance(size, int) for size in vocabulary) and vocabulary[1] < vocabulary[0]:
        message = f"must be at least the {vocabulary[0]} of {name!r}, whose tokenizer is used, got {vocabulary[1]}."
        problems.append(Problem("vocab_size", message))
    problems = problems or _refused(result)
    if problems:
        raise ConfigError(problems=problems)
    files = [file for file in model_texts(source) if file.name not in _NOT_COPIED and ".index." not in file.name]
    key = digest([result, {file.name: file_digest(file) for file in files}])
    return SmallModel(result, tuple(files), key)


def _folder(name: str, revision: str | None) -> Path:
    """Return the folder of a model's small files, downloaded from the hub if ``name`` is not a local folder."""
    folder = expanded(assets.resolve(name))
    if (folder / CONFIG).is_file():
        return folder
    if is_path(name):
        raise ConfigError(f"no model in {name!r}: there is no {CONFIG}.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        found = Path(snapshot_download(name, revision=revision, allow_patterns=list(_TEXTS), ignore_patterns=["*/*"]))
    except (OSError, ValueError, HfHubHTTPError) as error:
        said = str(error).splitlines()[0]
        raise ConfigError(
            f"{name!r} is neither a model folder nor can it be downloaded from the hub: {said}"
        ) from error
    if not (found / CONFIG).is_file():
        raise ConfigError(f"the model {name!r} of the hub has no {CONFIG}.")
    return found


def _defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the default configuration of a model type; empty if the type's code is not in transformers."""
    from transformers import CONFIG_MAPPING

    kind = config.get("model_type")
    return CONFIG_MAPPING[kind]().to_dict() if kind in CONFIG_MAPPING else {}


def _changed(
    config: Mapping[str, Any],
    defaults: Mapping[str, Any],
    changes: Mapping[str, Any],
    where: tuple[str, ...],
    problems: list[Problem],
) -> dict[str, Any]:
    """Return a configuration with changes, and add a problem for each unknown key."""
    result = dict(config)
    for key, value in changes.items():
        at, old, default = (*where, str(key)), config.get(key), defaults.get(key)
        if key not in config and key not in defaults:
            problems.append(Problem(".".join(at), unknown("key", str(key), [*config, *defaults])))
        elif isinstance(value, dict) and (isinstance(old, dict) or isinstance(default, dict)):
            nested = default if isinstance(default, dict) else {}
            result[key] = _changed(old if isinstance(old, dict) else nested, nested, value, at, problems)
        else:
            result[key] = value
    return result


def _refused(config: dict[str, Any]) -> list[Problem]:
    """Return a problem if the model's configuration class in transformers refuses the values."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING

    if config.get("model_type") not in CONFIG_MAPPING:
        return []
    try:
        CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
    except (ValueError, TypeError, StrictDataclassError) as error:
        return [
            Problem(
                "", f"the model's configuration class refuses the values: {error.__cause__ or error}".replace("\n", " ")
            )
        ]
    return []
