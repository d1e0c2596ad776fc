"""The loss curves of a run, from what the Hugging Face Trainer and LLaMA-Factory logged."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from dataflex.errors import ConfigError
from dataflex.record.files import json_lines, read_object

Curve = list[tuple[int, float]]
"""Optimizer step, round number or tokens, and value; ascending, one value for each."""

Entry = dict[str, Any]
"""One log entry; ``step`` is an int."""

_EVAL_LOSS = r"eval_(?:(.+)_)?loss"

MEANS = ("token_weighted", "unweighted")
"""Logged together as if they were evaluation sets: the means over the sets."""

_SECONDS = ("dataflex/train_seconds", "dataflex/decision_seconds", "dataflex/evaluate_seconds")


def read_log(path: Path, *, finished: bool, steps: int | None = None) -> tuple[list[Entry], int]:
    """Return the log entries of a run folder and the optimizer steps done.

    A finished run has ``trainer_state.json``. Until then the newest checkpoint's holds the log up to its step,
    and LLaMA-Factory's ``trainer_log.jsonl`` the losses since; a ``trainer_state.json`` of another step, and a
    checkpoint beyond the last line of that log, are an earlier run's.

    Args:
        path: the run folder.
        finished: whether training has ended.
        steps: optimizer steps of a finished run, where they are known.
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
    """Return the entries of ``trainer_log.jsonl``, to which every attempt appends, ascending by step.

    Where a step is smaller than the one before, an attempt that got further was given up: what it logged from that
    step on is left out.
    """
    kept: list[Entry] = []
    for where, value in json_lines(file):
        entry = _entry(value, "current_steps", where)
        if kept and entry["step"] < kept[-1]["step"]:
            kept = [each for each in kept if each["step"] < entry["step"]]
        kept.append(entry)
    return kept


def _read_state(file: Path) -> tuple[list[Entry], int]:
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
    """Return the tokens trained on up to each logged step; empty for a run that logged none."""
    return {step: int(value) for step, value in curves(log, r"dataflex/(tokens)").get("tokens", [])}


def seconds_at(log: list[Entry]) -> dict[int, float]:
    """Return the seconds of training, decisions and evaluation together up to each logged training loss.

    The log of an evaluation at the same step has the seconds after it, and does not count.
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
    """Return the loss of each evaluation set, ``eval`` where the set has no name; means over the sets are left out.

    Args:
        log: the Trainer's entries.
        results: ``all_results.json``, the only place of an evaluation made after training.
        last_step: the step that evaluation belongs to.
    """
    found = curves(log, _EVAL_LOSS)
    for name, final in curves([{**results, "step": last_step}], _EVAL_LOSS).items():
        curve = found.setdefault(name, [])
        if not curve or curve[-1][0] < last_step:
            curve += final
    means = set(MEANS) if found.keys() >= set(MEANS) else set()
    return {name or "eval": curve for name, curve in found.items() if name not in means}


def curves(log: list[Entry], pattern: str) -> dict[str, Curve]:
    """Return a curve for every log key that ``pattern`` matches, named by its group.

    Where a step was logged twice the last value wins.
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
    files = [file for file in path.glob("checkpoint-*/trainer_state.json") if _checkpoint_step(file) >= 0]
    return max(files, key=_checkpoint_step, default=None)


def _checkpoint_step(file: Path) -> int:
    number = file.parent.name.removeprefix("checkpoint-")
    return int(number) if number.isdecimal() else -1


def _entry(value: object, step_key: str, where: Path | str) -> Entry:
    """Return a log entry with its step under ``step``."""
    if not isinstance(value, dict) or not isinstance(value.get(step_key), int):
        raise ConfigError(f"{where}: a log entry has no integer {step_key!r}: {str(value)[:80]}")
    return {**value, "step": value[step_key]}
