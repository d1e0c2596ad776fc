"""What went wrong while LLaMA-Factory loaded data: the setting, the data set, the file and line, the root cause.

LLaMA-Factory's errors say neither which data set they are about nor where. Which one it was at, and at which of its
steps, is read from the frames of the error; where in the files, by reading them (:mod:`dataflex.data.faults`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from traceback import walk_tb
from typing import Any

from dataflex.data import raw
from dataflex.data.faults import fault
from dataflex.errors import ConfigError, DataFlexError
from dataflex.record.files import one_line

_NOTHING_LEFT = ("Cannot find valid samples", "Cannot find sufficient samples")
"""What LLaMA-Factory says where preprocessing leaves no sample."""
_SPEAKING = (ValueError, RuntimeError, OSError, ImportError)
"""Errors whose text says enough without their type."""


@dataclass(frozen=True)
class Load:
    """One load by LLaMA-Factory.

    Attributes:
        data_args: its arguments.
        stage: its stage.
        key: the setting that names the data sets; empty: ``dataset`` and ``eval_dataset``, each its own.
        generates: whether evaluation data is answered by generation.
    """

    data_args: Any
    stage: str
    key: str = ""
    generates: bool = False

    def names(self, key: str) -> list[str]:
        """Return the data sets that are named by ``key``."""
        found = self.data_args.eval_dataset if key == "eval_dataset" else self.data_args.dataset
        return list(dict.fromkeys(found or self.data_args.eval_dataset or []))


@contextmanager
def told(load: Load) -> Iterator[None]:
    """Turn whatever a load raises into an error that says what to mend.

    Raises:
        ConfigError: for anything that is not one of our own errors.
    """
    try:
        yield
    except DataFlexError:
        raise
    except Exception as error:  # LLaMA-Factory, datasets, pandas and templates raise anything about somebody's data
        raise _explained(load, error) from error


def refuse_empty(load: Load, module: Mapping[str, Any]) -> None:
    """Refuse what was loaded where a part of it has no sample.

    Raises:
        ConfigError: naming the part.
    """
    if load.data_args.streaming:
        return
    for part, key in (("train_dataset", "dataset"), ("eval_dataset", "eval_dataset")):
        found = module.get(part)
        for dataset in found.values() if isinstance(found, dict) else [found]:
            if dataset is not None and not len(dataset):
                raise _without_samples(load, load.key or key, load.names(key))


def _explained(load: Load, error: Exception) -> ConfigError:
    key, name, step, rows = _where(load, error)
    names = [name] if name is not None else load.names(key)
    root = _root(error)
    if step == "split_dataset":
        return ConfigError(
            f"val_size: {load.data_args.val_size!r} cannot be split off the {rows} rows of {_joined(names)}; give a "
            f"share between 0 and 1, or a number below {rows}, that leaves rows on both sides."
        )
    if str(root).startswith(_NOTHING_LEFT):
        return _without_samples(load, load.key or key, names)
    if isinstance(root, StopIteration):
        return _without_rows(load, load.key or key, names)
    found = _fault(load, load.key or key, names)
    return ConfigError(_sentence(load.key or key, names, found or _text(root)))


def _where(load: Load, error: Exception) -> tuple[str, str | None, str, int]:
    """Return the setting and the data set an error is about, the step of the load, and the rows that were to be split.

    The frames are those of ``llamafactory.data.loader``. ``test_contract.py`` holds it to their names.
    """
    key, name, step, rows = "dataset", None, "", 0
    for frame, _ in walk_tb(error.__traceback__):
        function, local = frame.f_code.co_name, frame.f_locals
        if function == "_get_merged_dataset":
            step, name = function, local.get("dataset_name")
            key = "eval_dataset" if local["dataset_names"] is load.data_args.eval_dataset else "dataset"
        elif function == "split_dataset":
            step, rows = function, len(local["dataset"])
        elif function == "_get_preprocessed_dataset":
            step = function
            key = "eval_dataset" if local["is_eval"] and load.data_args.eval_dataset else "dataset"
        elif function == "load_from_disk":
            step, key = function, "tokenized_path"
    return key, name, step, rows


def _root(error: Exception) -> Exception:
    """Return what an error was raised for first; text that another process sent is no cause."""
    while isinstance(error.__cause__, Exception) and type(error.__cause__).__name__ != "RemoteTraceback":
        error = error.__cause__
    return error


def _text(error: Exception) -> str:
    text = one_line(error)
    if not text:
        return type(error).__name__
    return text if isinstance(error, _SPEAKING) else f"{type(error).__name__}: {text}"


def _joined(names: list[str]) -> str:
    return ", ".join(map(repr, names)) or "the data"


def _sentence(key: str, names: list[str], what: str) -> str:
    return f"{key}: {_joined(names)} cannot be used: {what}"


def _without_rows(load: Load, key: str, names: list[str]) -> ConfigError:
    if load.data_args.max_samples == 0:
        return ConfigError(f"max_samples: 0 leaves no row of {_joined(names)}.")
    return ConfigError(_sentence(key, names, _fault(load, key, names) or "it is empty."))


def _without_samples(load: Load, key: str, names: list[str]) -> ConfigError:
    found = _fault(load, key, names)
    if found is None and load.stage == "pt" and load.data_args.packing:
        found = (
            f"packing makes samples of {load.data_args.cutoff_len} tokens (cutoff_len) out of every "
            f"{load.data_args.preprocessing_batch_size} rows (preprocessing_batch_size), and there are fewer tokens in "
            "them; lower cutoff_len, or set packing: false."
        )
    why = found or "LLaMA-Factory left all rows out; its warnings above say why."
    verb = "has" if len(names) == 1 else "have"
    return ConfigError(f"{key}: {_joined(names)} {verb} no sample left after preprocessing: {why}")


def _fault(load: Load, key: str, names: list[str]) -> str | None:
    """Return the first thing that is wrong in the files of the data sets; None where none shows or there are none."""
    folder = load.data_args.dataset_dir
    info = _info(folder)
    for name in names:
        if name not in info:
            continue
        form = next(raw.entry_problems(info[name]), None)
        if form is not None:
            return f"its entry in {raw.INFO_FILE}: {form}"
        try:
            entry = raw.read_entry(name, info[name], Path(str(folder)))
        except raw.RawDataError as error:
            return f"{error}."
        if entry is None:
            continue
        answers = not (load.generates and key == "eval_dataset")
        found = fault(entry, load.stage, count=load.data_args.max_samples, answers=answers)
        if found is not None:
            return found
    return None


def place_of_row(folder: Any, name: str, row: int) -> str:
    """Return where a row of a data set is: file and line, if it is in one local file.

    Args:
        folder: ``dataset_dir``.
        name: of the data set.
        row: its number, from 0.
    """
    plainly = f"row {row} (counted from 0) of {name!r}"
    info = _info(folder)
    if name not in info or any(raw.entry_problems(info[name])):
        return plainly
    try:
        entry = raw.read_entry(name, info[name], Path(str(folder)))
        if entry is None or len(entry.files) != 1:
            return plainly
        place, _ = next(islice(raw.rows(entry.files[0]), row, None))
    except (raw.RawDataError, StopIteration):  # the file is not what was loaded any more
        return plainly
    return str(place)


def _info(folder: Any) -> dict[str, Any]:
    """Return the entries LLaMA-Factory reads; none where they are on a hub, or there is no such file."""
    if isinstance(folder, dict):
        return folder
    try:
        found = json.loads((Path(str(folder)) / raw.INFO_FILE).read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
