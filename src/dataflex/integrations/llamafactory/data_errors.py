"""Explanations of errors in LLaMA-Factory's data loading: the setting, the data set, the file and line, the root cause.

LLaMA-Factory's errors name neither the data set nor the file. The data set and the step of the load are read from the
stack frames of the error. The line in the file is found by reading the file (:mod:`dataflex.data.faults`).
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

from dataflex.data import faults, raw
from dataflex.data.stages import FEEDBACK, SampleFields
from dataflex.errors import ConfigError, DataFlexError
from dataflex.record.files import one_line

_NOTHING_LEFT = ("Cannot find valid samples", "Cannot find sufficient samples")
"""Beginnings of LLaMA-Factory's errors for preprocessing that leaves no sample."""
_SPEAKING = (ValueError, RuntimeError, OSError, ImportError)
"""Errors whose text is clear without the name of their type."""


@dataclass(frozen=True)
class Load:
    """One load of data by LLaMA-Factory.

    Attributes:
        data_args: LLaMA-Factory's data arguments.
        stage: LLaMA-Factory's stage.
        key: setting that names the data sets. If empty, ``dataset`` names the training and ``eval_dataset`` the
            evaluation data sets.
        generates: whether evaluation generates responses.
    """

    data_args: Any
    stage: str
    key: str = ""
    generates: bool = False

    def names(self, key: str) -> list[str]:
        """Return the names of the data sets that the setting ``key`` lists."""
        found = self.data_args.eval_dataset if key == "eval_dataset" else self.data_args.dataset
        return list(dict.fromkeys(found or self.data_args.eval_dataset or []))


@contextmanager
def told(load: Load) -> Iterator[None]:
    """Convert any error of a load into an error that tells the user what to fix.

    Raises:
        ConfigError: for every error that is not a :class:`DataFlexError` already.
    """
    try:
        yield
    except DataFlexError:
        raise
    except Exception as error:  # faulty data raises errors of any type in LLaMA-Factory, datasets, pandas and templates
        raise _explained(load, error) from error


def refuse_empty(load: Load, module: Mapping[str, Any]) -> None:
    """Check that every loaded part of the data has a sample.

    Raises:
        ConfigError: naming the part without samples.
    """
    if load.data_args.streaming:
        return
    for part, key in (("train_dataset", "dataset"), ("eval_dataset", "eval_dataset")):
        found = module.get(part)
        for dataset in found.values() if isinstance(found, dict) else [found]:
            if dataset is not None and not len(dataset):
                raise _without_samples(load, load.key or key, load.names(key))


def refuse_other_stage(load: Load, module: Mapping[str, Any], fields: SampleFields) -> None:
    """Check that the samples have the fields that the stage reads. Stored samples may be those of another stage.

    Raises:
        ConfigError: naming the folder of the samples and the fields that they have.
    """
    folder = load.data_args.tokenized_path
    if folder is None or load.data_args.streaming:
        return
    for dataset in module.values():
        for part in dataset.values() if isinstance(dataset, dict) else [dataset]:
            there = set() if part is None else set(part.column_names)
            needed, others = {*fields.tokens, *fields.others}, set(FEEDBACK.others) - set(fields.others)
            if part is not None and (needed - there or there & others):
                named = ", ".join(part.column_names)
                raise ConfigError(
                    f"tokenized_path: the samples in {folder} have the fields {named}. They were tokenized for another "
                    "stage; name an empty folder."
                )


def _explained(load: Load, error: Exception) -> ConfigError:
    """Return the explanation of an error of LLaMA-Factory's load."""
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
    """Return the setting and the data set of an error, the step of the load, and the number of rows to be split.

    The frames are those of ``llamafactory.data.loader``. ``test_contract.py`` checks the names of its functions and
    variables that are read here.
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
    """Return the error at the start of a chain of causes.

    The text that another process sent does not count as a cause.
    """
    while isinstance(error.__cause__, Exception) and type(error.__cause__).__name__ != "RemoteTraceback":
        error = error.__cause__
    return error


def _text(error: Exception) -> str:
    """Return the text of an error on one line, with its type if the text alone may be unclear."""
    text = one_line(error)
    if not text:
        return type(error).__name__
    return text if isinstance(error, _SPEAKING) else f"{type(error).__name__}: {text}"


def _joined(names: list[str]) -> str:
    """Return the names of data sets for a message."""
    return ", ".join(map(repr, names)) or "the data"


def _sentence(key: str, names: list[str], what: str) -> str:
    """Return the message that data sets cannot be used."""
    return f"{key}: {_joined(names)} cannot be used: {what}"


def _without_rows(load: Load, key: str, names: list[str]) -> ConfigError:
    """Return the error for data sets without a row."""
    if load.data_args.max_samples == 0:
        return ConfigError(f"max_samples: 0 leaves no row of {_joined(names)}.")
    return ConfigError(_sentence(key, names, _fault(load, key, names) or "it is empty."))


def _without_samples(load: Load, key: str, names: list[str]) -> ConfigError:
    """Return the error for data sets of which preprocessing leaves no sample."""
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
    """Return the first fault in the files of the data sets; None if there are no local files or no fault is found."""
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
        media = None if load.data_args.media_dir is None else Path(str(load.data_args.media_dir))
        found = faults.fault(entry, load.stage, count=load.data_args.max_samples, answers=answers, media=media)
        if found is not None:
            return found
    return None


def why_left_out(folder: Any, stage: str, name: str, row: int) -> str | None:
    """Return why LLaMA-Factory leaves a row of a data set out; None if the data set is not one local file.

    Args:
        folder: the value of ``dataset_dir``.
        stage: LLaMA-Factory's stage.
        name: name of the data set.
        row: number of the row, from 0.
    """
    found = _row(folder, name, row)
    return None if found is None or not isinstance(found[2], dict) else faults.why_left_out(found[0], found[2], stage)


def place_of_row(folder: Any, name: str, row: int) -> str:
    """Return the position of a row of a data set: file and line if the data set is one local file.

    Args:
        folder: the value of ``dataset_dir``.
        name: name of the data set.
        row: number of the row, from 0.
    """
    found = _row(folder, name, row)
    return f"row {row} (counted from 0) of {name!r}" if found is None else str(found[1])


def _row(folder: Any, name: str, row: int) -> tuple[raw.Entry, raw.Place, Any] | None:
    """Return the entry of a data set, and the place and content of a row; None if the data is not one local file."""
    info = _info(folder)
    if name not in info or any(raw.entry_problems(info[name])):
        return None
    try:
        entry = raw.read_entry(name, info[name], Path(str(folder)))
        if entry is None or len(entry.files) != 1:
            return None
        return entry, *next(islice(raw.rows(entry.files[0]), row, None))
    except (raw.RawDataError, StopIteration):  # the file has changed since it was loaded
        return None


def _info(folder: Any) -> dict[str, Any]:
    """Return the entries of ``dataset_info.json``; none if they are on a hub, or if there is no such file."""
    if isinstance(folder, dict):
        return folder
    try:
        found = json.loads((Path(str(folder)) / raw.INFO_FILE).read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
