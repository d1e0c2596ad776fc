"""Checks of a run's data sets: their entries in ``dataset_info.json``, and the first rows of their files."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dataflex import assets
from dataflex.config.checks.values import dataset_names, is_packed, named_data_sets, truthy, word
from dataflex.config.loading import SECTION, RunConfig
from dataflex.data.columns import WantedColumn, lacking, nowhere, text_is_packed
from dataflex.data.faults import fault
from dataflex.data.heads import head_of
from dataflex.data.raw import INFO_FILE, RawDataError, entry_problems, read_entry
from dataflex.data.stages import STAGES
from dataflex.errors import Problem, unknown

_PTX = f"{SECTION}.ptx.dataset"


def problems_of_data(config: RunConfig) -> Iterator[Problem]:
    """Yield the problems of the data sets that a configuration names."""
    if truthy(config, "do_train") and not dataset_names(config):
        yield Problem("dataset", "needed for training: the names of one or more data sets.")
    # Without these families LLaMA-Factory loads such a data set twice, so naming it twice has a meaning.
    if not config.families.isdisjoint(("select", "mix", "order")):
        for name, times in Counter(named_data_sets(config)).items():
            if times > 1:
                yield Problem(
                    "dataset", f"{name!r} is named {times} times; name it once, and set its share with {SECTION}.mix."
                )
    folder = _folder(config)
    if folder is None or not (named := {key: names for key, names in _named(config).items() if names}):
        return
    path = folder / INFO_FILE
    try:
        info = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        if not folder.is_dir():
            yield Problem("dataset_dir", _no_folder(folder))
            return
        yield Problem("dataset_dir", f"there is no {INFO_FILE} in {str(folder)!r}; name the folder that has it.")
        return
    except json.JSONDecodeError as error:
        yield Problem(
            "dataset_dir", f"{path} is not valid JSON: {error.msg} in line {error.lineno}, column {error.colno}."
        )
        return
    except (OSError, UnicodeDecodeError) as error:
        yield Problem("dataset_dir", f"{path} cannot be read: {error}.")
        return
    if not isinstance(info, dict):
        yield Problem(
            "dataset_dir", f"{path} must be a JSON object with an entry for each data set, got a {type(info).__name__}."
        )
        return
    stage = word(config, "stage", "sft")
    fits = config.dataflex is None or stage in STAGES  # otherwise the stage itself is refused
    yield from _columns(config, info, folder)
    yield from _spans(config, info, folder)
    media = Path(str(config.llamafactory.get("media_dir") or folder))
    for key, names in named.items():
        answers = not (key == "eval_dataset" and truthy(config, "predict_with_generate"))
        ptx = config.dataflex.ptx if config.dataflex is not None and key == _PTX else None
        of_key = stage if ptx is None else ptx.stage
        for name in names:
            found = _dataset(name, info, folder, of_key if fits else None, answers, media)
            yield from (Problem(key, message) for message in found)


def _no_folder(folder: Path) -> str:
    """Return the message for a folder that does not exist. A relative path is shown with the folder it starts from."""
    start = "" if folder.is_absolute() else f" in {str(Path.cwd())!r}"
    return f"the folder {str(folder)!r} does not exist{start}; name the folder that has {INFO_FILE}."


def _folder(config: RunConfig) -> Path | None:
    """Return the folder of local data sets; None if the data sets are not local, or are tokenized already."""
    folder = config.llamafactory.get("dataset_dir", "data")
    if not isinstance(folder, str) or folder == "ONLINE" or folder.startswith("REMOTE:"):
        return None
    if config.llamafactory.get("tokenized_path"):
        return None
    if folder.startswith(assets.PREFIX):
        name = folder.removeprefix(assets.PREFIX)
        if not (name in assets.ASSETS and assets.is_cached(name)):
            return None
        folder = assets.resolve(folder)
    return Path(folder)


def _named(config: RunConfig) -> dict[str, tuple[str, ...]]:
    """Return the names of data sets, by the configuration key that names them."""
    named = {key: dataset_names(config, key) for key in ("dataset", "eval_dataset")}
    for key, component in config.build_components().items():
        asked = component.needs(config).validation
        if asked is not None:
            named[f"{SECTION}.{key}.validation"] = tuple(asked.validation or ())
    if config.dataflex is not None and config.dataflex.ptx is not None:
        named[_PTX] = tuple(config.dataflex.ptx.dataset)
    return named


def _dataset(
    name: str, info: dict[str, Any], folder: Path, stage: str | None, answers: bool, media: Path
) -> Iterator[str]:
    """Yield messages about one data set.

    Args:
        name: name of the data set.
        info: content of ``dataset_info.json``.
        folder: folder of ``dataset_info.json``.
        stage: stage whose fields the rows need; None skips the check of the rows.
        answers: whether the rows need answers.
        media: folder of images, videos and audio.
    """
    if name not in info:
        yield f"{unknown('data set', name, info)} (from {folder / INFO_FILE})"
        return
    wrong = [f"the entry of {name!r} in {folder / INFO_FILE}: {message}" for message in entry_problems(info[name])]
    yield from wrong
    if wrong:
        return
    try:
        entry = read_entry(name, info[name], folder)
    except RawDataError as error:
        yield f"{error}."
        return
    found = None if entry is None or stage is None else fault(entry, stage, whole=False, answers=answers, media=media)
    if found is not None:
        yield f"{name!r} cannot be used: {found}"


def _columns(config: RunConfig, info: dict[str, Any], folder: Path) -> Iterator[Problem]:
    """Yield why raw columns cannot be kept with the samples, as far as the heads of the files show it."""
    wanted = config.wanted_columns()
    packs = is_packed(config)
    for name in dataset_names(config) if wanted else ():
        if name not in info or any(entry_problems(info[name])):
            continue  # said elsewhere
        try:
            entry = read_entry(name, info[name], folder)
            head = None if entry is None else head_of(entry)
        except RawDataError:
            continue  # said elsewhere
        if head is None or not head.columns:
            continue
        for column, each in wanted.items():
            if column not in head.columns and head.is_all:
                yield Problem(each.key, lacking(column, name, list(head.columns)))
            elif head.columns.get(column) and packs:
                yield Problem(each.key, text_is_packed(column))
            elif head.columns.get(column):
                yield from _of_text(column, each)


def _spans(config: RunConfig, info: dict[str, Any], folder: Path) -> Iterator[Problem]:
    """Yield the columns of spans that no data set has, as far as the heads of the files show it."""
    wanted = {key: params.spans_column for key, params in config.wanted_weights().items() if params.spans_column}
    known: list[str] = []
    for name in dataset_names(config) if wanted else ():
        try:
            usable = name in info and not any(entry_problems(info[name]))
            entry = read_entry(name, info[name], folder) if usable else None
            head = None if entry is None else head_of(entry)
        except RawDataError:
            return  # said elsewhere
        if head is None or not head.columns or not head.is_all:
            return  # one more column may be there
        known += head.columns
    for key, column in wanted.items():
        if known and column not in known:
            yield Problem(f"{SECTION}.{key}.spans_column", nowhere("column", column, known))


def _of_text(column: str, wanted: WantedColumn) -> Iterator[Problem]:
    """Yield the problems that components report for a column of text, whatever the texts are."""
    for key, check in wanted.checks:
        wrong = check(column, np.array([""], dtype=object))
        if wrong is not None and wrong[0] is None:
            yield Problem(key, f"{wrong[1]}.")
