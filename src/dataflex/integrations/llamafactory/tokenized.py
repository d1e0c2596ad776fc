"""Folders of tokenized data, ``tokenized_path``: one data set of all the data, or a folder for each data set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dataflex.errors import ConfigError


def is_stored(data_args: Any) -> bool:
    """Return whether ``tokenized_path`` holds one tokenized data set, not a folder for each."""
    root = data_args.tokenized_path
    return root is not None and any((Path(root) / name).exists() for name in ("dataset_dict.json", "state.json"))


def refuse_foreign_folder(data_args: Any) -> None:
    """Refuse a ``tokenized_path`` that has something in it, but no tokenized data set of all the data."""
    root = data_args.tokenized_path
    if root is not None and Path(root).is_dir() and any(Path(root).iterdir()) and not is_stored(data_args):
        raise ConfigError(
            f"tokenized_path: {root} holds something else than one tokenized data set (a run with several data sets "
            "keeps each in a folder of its own, a run that only evaluates the evaluation sets). Name an empty folder."
        )
