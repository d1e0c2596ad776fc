"""Loss curves of a run, from the logs of the Hugging Face Trainer and LLaMA-Factory."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from dataflex.errors import ConfigError
from dataflex.record.files import json_lines, read_object

Curve = list[tuple[int, float]]
"""Pairs of a position (optimizer step, round number or tokens) and a value, ascending, one value per position."""

Entry = dict[str, Any]
"""One log entry. Its ``step`` is an int."""

_EVAL_LOSS = r"eval_(?:(.+)_)?loss"

MEANS = ("token_weighted", "unweighted")
"""Means over the evaluation sets, which are logged together as if they were sets."""

_SECONDS = ("dataflex/train_seconds", "dataflex/decision_seconds", "dataflex/evaluate_seconds")


def read_log(path: Path, *, finished: bool, steps: int | None = None) -> tuple[list[Entry], int]:
    """Return the log entries of a run folder, and the number of optimizer steps done.

    A finished run has ``trainer_state.json``. Before the end, the newest checkpoint's ``trainer_state.json`` holds the
    log up to its step, and LLaMA-Factory's ``trainer_log.jsonl`` the losses since. A ``trainer_state.json`` of another
    step belongs to an earlier run. So does a checkpoint beyond the last line of ``trainer_log.jsonl``.

    Args:
        path: the run folder.
        finished: whether training has ended.
        steps: number of optimizer steps of a finished run, if it is known.
    """
    final = path / "trainer_state.json"
    if finished and final.is_file():
        entries, reached = _read_state(final)
        if steps is None or reached == steps:
            return entries, reached
    later = _read_lines(path / "trainer_log.jsonl")
    if not later:
        return [], 0
    last = later[-1]["step"]
    newest = _newest_checkpoint_state(path)
    entries, reached = _read_state(newest) if newest and _checkpoint_step(newest) <= last else ([], 0)
    return entries + [entry for entry in later if entry["step"] > reached], max(last, reached)


def _read_lines(file: Path) -> list[Entry]:
    """Return the entries of ``trainer_log.jsonl``, ascending by step. Every start of the run appends to this file.

    If a step is smaller than the step before it, the run was resumed from an earlier step. The entries from that step
    on that were logged before are left out.
    """
    kept: list[Entry] = []
    for where, value in json_lines(file):
        entry = _entry(value, "current_steps", where)
        if kept and entry["step"] < kept[-1]["step"]:
            kept = [each for each in kept if each["step"] < entry["step"]]
        kept.append(entry)
    return kept


def _read_state(file: Path) -> tuple[list[Entry], int]:
    """Return the log entries and the last step of a ``trainer_state.json``."""
    state = read_object(file) or {}
    history, global_step = state.get("log_history", []), state.get("global_step", 0)
    if not isinstance(history, list) or not isinstance(global_step, int):
        raise ConfigError(f"{file}: expected a list 'log_history' and an integer 'global_step'.")
    entries = [_entry(value, "step", file) for value in history]
    return entries, max([global_step, *(entry["step"] for entry in entries)])


def train_curve(log: list[Entry]) -> Curve:
    """Return the logged training loss."""
    return curves(log, r"(loss)").get("loss", [])


def tokens_at(log: list[Entry]) -> dict[int, int]:
    """Return the number of tokens trained on up to each logged step; empty for a run that logged none."""
    return {step: int(value) for step, value in curves(log, r"dataflex/(tokens)").get("tokens", [])}


def seconds_at(log: list[Entry]) -> dict[int, float]:
    """Return the seconds of training, decisions and evaluation together up to each logged training loss.

    The log of an evaluation at the same step is left out, because its seconds include the evaluation.
    """
    return {
        entry["step"]: float(sum(entry[key] for key in _SECONDS))
        for entry in log
        if "loss" in entry and all(isinstance(entry.get(key), int | float) for key in _SECONDS)
    }


def train_seconds_at(log: list[Entry]) -> Curve:
    """Return the seconds of training steps up to each step that logged them."""
    return curves(log, r"dataflex/(train_seconds)").get("train_seconds", [])


def eval_curves(log: list[Entry], results: dict[str, Any], last_step: int) -> dict[str, Curve]:
    """Return the loss of each evaluation set, under ``eval`` if the set has no name. Means over the sets are left out.

    Args:
        log: log entries of the Trainer.
        results: contents of ``all_results.json``, the only file that holds an evaluation made after training.
        last_step: step of that evaluation.
    """
    found = curves(log, _EVAL_LOSS)
    for name, final in curves([{**results, "step": last_step}], _EVAL_LOSS).items():
        curve = found.setdefault(name, [])
        if not curve or curve[-1][0] < last_step:
            curve += final
    means = set(MEANS) if found.keys() >= set(MEANS) else set()
    return {name or "eval": curve for name, curve in found.items() if name not in means}


def curves(log: list[Entry], pattern: str) -> dict[str, Curve]:
    """Return a curve for every log key that ``pattern`` matches, named by the group of the pattern.

    If a step was logged twice, the last value counts.
    """
    regex = re.compile(pattern)
    matches = {key: regex.fullmatch(key) for key in dict.fromkeys(key for entry in log for key in entry)}
    names = {key: match.group(1) or "" for key, match in matches.items() if match}
    found: dict[str, dict[int, float]] = {}
    for entry in log:
        for key in names.keys() & entry.keys():
            if isinstance(entry[key], int | float):
                found.setdefault(names[key], {})[entry["step"]] = float(entry[key])
    return {name: sorted(found[name].items()) for name in names.values() if name in found}


def _newest_checkpoint_state(path: Path) -> Path | None:
    """Return the ``trainer_state.json`` of the newest checkpoint."""
    files = [file for file in path.glob("checkpoint-*/trainer_state.json") if _checkpoint_step(file) >= 0]
    return max(files, key=_checkpoint_step, default=None)


def _checkpoint_step(file: Path) -> int:
    """Return the step in the name of a checkpoint's folder; -1 if it has none."""
    number = file.parent.name.removeprefix("checkpoint-")
    return int(number) if number.isdecimal() else -1


def _entry(value: object, step_key: str, where: Path | str) -> Entry:
    """Return a log entry with its step under the key ``step``."""
    if not isinstance(value, dict) or not isinstance(value.get(step_key), int):
        raise ConfigError(f"{where}: a log entry has no integer {step_key!r}: {str(value)[:80]}")
    return {**value, "step": value[step_key]}
