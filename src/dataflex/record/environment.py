"""``environment.json``: the environment in which a run was started, in addition to its configuration.

The file has one entry for each start of the run, the first and every resume: versions, processes, command line, and
digests of the plug-ins, the data and the base model.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from dataflex.api.registry import ENTRY_POINT_GROUP
from dataflex.config.checks import dataset_names
from dataflex.config.loading import SECTION, TRAINER_CLASS, RunConfig
from dataflex.config.masking import masked, masked_argument
from dataflex.data.fingerprints import WEIGHTS, digest_of_ends, file_digest, is_file, is_model_folder, model_digests
from dataflex.record.configuration import FILE as CONFIGURATION
from dataflex.record.configuration import PLUGINS, Recorded
from dataflex.record.files import json_lines, read_object
from dataflex.record.identity import now
from dataflex.record.schema import CHANGES, ENVIRONMENT, Change, Environment, Start, from_json
from dataflex.record.versions import installed_versions

_WHOLE = 2**30
"""Largest size in bytes of a data file whose whole content is digested. Of a larger file, the size and the ends are."""

_VARIABLES = (
    "FORCE_TORCHRUN",
    "NPROC_PER_NODE",
    "NNODES",
    "NODE_RANK",
    "WORLD_SIZE",
    "MIN_NNODES",
    "MAX_NNODES",
    "MAX_RESTARTS",
    "MASTER_ADDR",
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "ACCELERATE_TORCH_DEVICE",
    "ALLOW_EXTRA_ARGS",
    "DISABLE_VERSION_CHECK",
    "USE_MODELSCOPE_HUB",
    "USE_OPENMIND_HUB",
    "HF_ENDPOINT",
    "HF_HUB_OFFLINE",
    "PYTHONHASHSEED",
    "CUBLAS_WORKSPACE_CONFIG",
)
"""Environment variables that are recorded if they are set: the launcher's, and those that change the loaded files."""


def environment(config: RunConfig, kept: Recorded, world_size: int, step: int) -> Start:
    """Return the entry of one start of a run, without the fingerprints of its data.

    Args:
        config: configuration of the run, with its assets resolved.
        kept: recorded form of the configuration.
        world_size: number of processes.
        step: number of optimizer steps done before this start.
    """
    return Start(
        step=step,
        started=now(),
        versions={"python": platform.python_version(), **installed_versions()},
        platform=platform.platform(),
        processes=world_size,
        devices=_devices(),
        environment={name: masked(os.environ[name]) for name in _VARIABLES if name in os.environ},
        working_directory=str(Path.cwd()),
        command=[masked_argument(argument) for argument in sys.argv],
        configuration=config.source and str(Path(config.source).absolute()),
        plugins=_plugins(kept),
        model=_model(str(config.llamafactory.get("model_name_or_path") or ""), kept),
        datasets=_datasets(config),
        files=_named_files(kept.configuration.get(SECTION)),
    )


def _devices() -> list[str]:
    """Return the names of the accelerators that this process sees; empty on a CPU."""
    import torch

    return [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]


def _plugins(kept: Recorded) -> list[dict[str, str]]:
    """Return the plug-in files with their digests, and the installed plug-in packages."""
    files = [
        {"file": f"{PLUGINS}/{name}", "from": str(kept.sources[name]), "sha256": hashlib.sha256(text).hexdigest()}
        for name, text in kept.plugins.items()
    ]
    installed = [
        {"entry_point": f"{point.name} = {point.value}", "package": f"{point.dist.name} {point.dist.version}"}
        for point in entry_points(group=ENTRY_POINT_GROUP)
        if point.dist is not None
    ]
    return [*files, *installed]


def _model(name: str, kept: Recorded) -> dict[str, Any]:
    """Return the identity of the base model: the files of its folder, or the commit of the hub's model in the cache."""
    given = str(kept.configuration.get("model_name_or_path", name))
    folder = Path(name)
    if is_model_folder(folder):
        return {"name": given, "files": _of_folder(folder)}
    commit = _hub_commit(name, kept.configuration)
    return {"name": given} if commit is None else {"name": given, "commit": commit}


def _of_folder(folder: Path) -> dict[str, dict[str, Any]]:
    """Return size and digest of the files of a model. The digest of a weights file covers its size and its ends."""
    found: dict[str, dict[str, Any]] = {}
    try:
        digests = model_digests(folder)
    except OSError as error:  # the run may work without this file, so the record must not end it
        return {str(error.filename): {"unreadable": str(error.strerror)}}
    for name, digest in digests.items():
        key = "sha256_of_ends" if Path(name).suffix in WEIGHTS else "sha256"
        found[name] = {"bytes": (folder / name).stat().st_size, key: digest}
    return found


def _hub_commit(name: str, configuration: dict[str, Any]) -> str | None:
    """Return the commit of a model in the hub's cache; None if it is not there."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        path = try_to_load_from_cache(
            name,
            "config.json",
            cache_dir=configuration.get("cache_dir"),
            revision=configuration.get("model_revision") or "main",
        )
    except HFValidationError:  # not a name of this hub: a folder that was deleted, or a name of another hub
        return None
    return Path(path).parent.name if isinstance(path, str) else None


def local_datasets(config: RunConfig) -> Iterator[tuple[str, dict[str, Any], list[Path]]]:
    """Yield name, entry of dataset_info.json and local files of each data set of the run.

    These are the data sets for training and evaluation, and those that a component names for validation.

    Raises:
        ConfigError: if dataset_info.json is not readable.
    """
    if TRAINER_CLASS in config.llamafactory:  # a script has given the data sets, and their files are unknown
        return
    folder = Path(str(config.llamafactory.get("dataset_dir", "data")))
    info = read_object(folder / "dataset_info.json") or {}
    names = [*dataset_names(config), *dataset_names(config, "eval_dataset")]
    for _, component in config.build_components().items():
        asked = component.needs(config).validation
        names += () if asked is None else asked.validation or ()
    for name in dict.fromkeys(names):
        entry = info.get(name) or {}
        path = folder / str(entry.get("file_name") or "")
        there = bool(entry.get("file_name")) and path.exists()
        files = [] if not there else [path] if path.is_file() else sorted(each for each in path.rglob("*"))
        yield name, entry, [each for each in files if each.is_file()]


def _datasets(config: RunConfig) -> dict[str, dict[str, Any]]:
    """Return the entry and the files with their digests of each data set of the run."""
    return {
        name: {"entry": masked(entry), "files": {str(file.absolute()): _of_file(file) for file in files}}
        for name, entry, files in local_datasets(config)
    }


def _of_file(path: Path) -> dict[str, Any]:
    """Return size and digest of a file."""
    try:
        size = path.stat().st_size
        if size <= _WHOLE:
            return {"bytes": size, "sha256": file_digest(path)}
        return {"bytes": size, "sha256_of_ends": digest_of_ends(path)}
    except OSError as error:
        return {"unreadable": str(error.strerror)}


def _named_files(section: Any) -> dict[str, Any]:
    """Return the local files and models that the section names at any level, with their digests."""
    found: dict[str, Any] = {}
    for name in _strings(section):
        path = Path(name)
        if path.is_absolute() and is_file(path):
            found[name] = _of_file(path)
        elif path.is_absolute() and is_model_folder(path):
            found[name] = _of_folder(path)
    return found


def _strings(value: Any) -> Iterator[str]:
    """Yield all strings in nested dictionaries and lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def read_environment(record: Path) -> Environment:
    """Return the starts of a run from the folder of its record. Records of the first release have none.

    Raises:
        ConfigError: if the file is malformed.
    """
    return from_json(Environment, read_object(record / ENVIRONMENT) or {}, record / ENVIRONMENT)


@dataclass(frozen=True)
class Repeated:
    """The last start of the run whose recorded configuration is run again."""

    start: Start
    was_changed: bool
    """Whether a part of that run had other settings."""


def repeated_start(config: RunConfig) -> Repeated | None:
    """Return the last start on record if a configuration is the file of a record, otherwise None."""
    file = Path(config.source).absolute() if config.source else None
    if file is None or file.name != CONFIGURATION or not (file.parent / ENVIRONMENT).is_file():
        return None
    starts = read_environment(file.parent).starts
    lines = [from_json(Change, value, where) for where, value in json_lines(file.parent / CHANGES)]
    return Repeated(starts[-1] if starts else Start(0), any(line.holds for line in lines))


def differences(repeated: Repeated, now: Start) -> list[str]:
    """Return the differences of a start from the recorded one that it repeats, if results may depend on them."""
    found, then = [], repeated.start
    if repeated.was_changed:
        found.append("settings were changed during that run, and config.yaml has only the last ones (changes.jsonl)")
    if then.processes not in (None, now.processes):
        found.append(f"it had {then.processes} processes, this one {now.processes} (NPROC_PER_NODE)")
    if then.devices not in (None, now.devices):
        devices = [", ".join(dict.fromkeys(each or [])) or "the CPU" for each in (then.devices, now.devices)]
        found.append(f"it ran on {devices[0]}, this one on {devices[1]}")
    for package, version in then.versions.items():
        if now.versions.get(package) != version:
            found.append(f"{package} was {version}, now {now.versions.get(package, 'not installed')}")
    if then.model and then.model != now.model:
        found.append("the files of the base model differ")
    for name, entry in then.datasets.items():
        if name in now.datasets and _digests(entry) != _digests(now.datasets[name]):
            found.append(f"data set {name!r} has another content")
    tokenized = [key for key, value in then.fingerprints.items() if now.fingerprints.get(key) != value]
    if tokenized and not any("content" in each for each in found):
        found.append(f"{', '.join(tokenized)} gives other samples")
    return found


def _digests(entry: dict[str, Any]) -> list[Any]:
    """Return the entry and the contents of a data set, without the paths of its files."""
    return [entry.get("entry"), list((entry.get("files") or {}).values())]
