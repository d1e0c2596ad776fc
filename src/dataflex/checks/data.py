"""The data sets of a run, as far as ``dataset_info.json`` tells."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dataflex import assets
from dataflex.checks.arguments import dataset_names, truthy
from dataflex.config import SECTION, RunConfig
from dataflex.errors import Problem, unknown


def problems_of_data(config: RunConfig) -> Iterator[Problem]:
    """Return what is wrong with the data sets that are named."""
    yield from _datasets(config)


def _datasets(config: RunConfig) -> Iterator[Problem]:
    if truthy(config, "do_train") and not dataset_names(config):
        yield Problem("dataset", "needed for training: the names of one or more data sets.")
    folder = str(config.llamafactory.get("dataset_dir", "data"))
    if folder.startswith(assets.PREFIX):
        name = folder.removeprefix(assets.PREFIX)
        if not (name in assets.ASSETS and assets.is_cached(name)):
            return
        folder = assets.resolve(folder)
    if folder == "ONLINE" or folder.startswith("REMOTE:") or config.llamafactory.get("tokenized_path"):
        return
    path = Path(folder) / "dataset_info.json"
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        yield Problem("dataset_dir", f"{folder!r} has no dataset_info.json.")
        return
    except ValueError as error:
        yield Problem("dataset_dir", f"{path} is not valid JSON: {error}")
        return
    named = {key: dataset_names(config, key) for key in ("dataset", "eval_dataset")}
    for key, component in config.build_components().items():
        if component.needs_validation:
            named[f"{SECTION}.{key}.validation"] = tuple(component.params.validation or ())
    for key, names in named.items():
        for name in names:
            yield from _dataset(key, name, info, Path(folder))


def _dataset(key: str, name: str, info: dict[str, Any], folder: Path) -> Iterator[Problem]:
    if name not in info:
        yield Problem(key, f"{unknown('data set', name, info)} (from {folder / 'dataset_info.json'})")
        return
    file_name = info[name].get("file_name")
    remote = any(source in info[name] for source in ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url"))
    if file_name and not remote and not (folder / file_name).exists():
        yield Problem(key, f"the file of data set {name!r} does not exist: {folder / file_name}")
