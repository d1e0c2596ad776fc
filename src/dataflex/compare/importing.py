"""Runs that another comparison has made, on another machine or with other metrics, taken over with their results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dataflex.compare.experiment import (
    COMPLETE_FILE,
    FAILED_FILE,
    FORMAT,
    KEY_FILE,
    RUN_FILE,
    Experiment,
    Plan,
    Run,
    inputs_of,
    run_yaml,
)
from dataflex.compare.merging import leaves
from dataflex.compare.result import SUMMARY_FILE, read_result, state_of
from dataflex.errors import ConfigError
from dataflex.files import json_text, write_atomically
from dataflex.record.files import read_object

_NAMED = 5
"""Number of differences of two runs that are named. The others are counted."""


@dataclass(frozen=True)
class Found:
    """The runs that are missing here and complete in folders of other comparisons.

    Attributes:
        runs: each such run -> its folder there.
        notes: number of the runs by folder, and the reason why others are not taken over.
    """

    runs: dict[Run, Path]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Other:
    """A run in the folder of another comparison: its folder, and the content of its key.json."""

    folder: Path
    key: dict[str, Any]


def search(experiment: Experiment, folders: Sequence[Path]) -> Found:
    """Look for runs that are not trained here in the ``output_dir`` of other comparisons. Nothing is written.

    Args:
        experiment: the comparison.
        folders: the other folders. A run is taken from the first folder in which it is complete.

    Raises:
        ConfigError: if a folder has no run of the experiment. The text says how its runs differ.
    """
    if not folders:
        return Found({}, ())
    missing = [run for run in experiment.runs if state_of(run, experiment) in ("to run", "to resume")]
    others = {folder: list(_runs_in(folder, experiment)) for folder in dict.fromkeys(folders)}
    runs: dict[Run, Path] = {}
    for folder, found in others.items():
        if not {run.key for run in experiment.runs} & {other.key.get("key") for other in found}:
            raise ConfigError(_no_run(folder, experiment, found))
        by_key: dict[Any, list[Path]] = {}  # a folder that was set aside has the key of the run that was made again
        for other in found:
            by_key.setdefault(other.key.get("key"), []).append(other.folder)
        for run in (run for run in missing if run not in runs):
            complete = (there for there in by_key.get(run.key, ()) if _is_complete(run, there, experiment))
            there = next(complete, None)
            if there is not None:
                runs[run] = there
    rest = [run for run in missing if run not in runs]
    return Found(runs, tuple(_notes(experiment, runs, rest, others)))


def _runs_in(folder: Path, experiment: Experiment) -> Iterator[_Other]:
    if folder.resolve() == experiment.output.resolve():
        raise ConfigError(f"--merge: {folder} is the output_dir of this experiment; name the folder of another one.")
    files = sorted(folder.glob(f"runs/*/*/{KEY_FILE}"))
    if not files:
        raise ConfigError(
            f"--merge: {folder} has no runs (no runs/VARIANT/SEED/{KEY_FILE} in it); name the output_dir of a "
            "comparison."
        )
    for file in files:
        key = read_object(file)
        if key is not None:
            yield _Other(file.parent, key)


def _is_complete(run: Run, there: Path, plan: Plan) -> bool:
    return read_result(replace(run, folder=there), plan) is not None


def _no_run(folder: Path, experiment: Experiment, found: Sequence[_Other]) -> str:
    reasons = list(_reasons(experiment.runs, experiment, found))
    text = f"--merge: {folder} has no run of this experiment."
    return " ".join([text, *reasons]) if reasons else f"{text} It has no run of the same variants and seeds either."


def _notes(
    experiment: Experiment, runs: Mapping[Run, Path], rest: Sequence[Run], others: Mapping[Path, Sequence[_Other]]
) -> Iterator[str]:
    for folder, found in others.items():
        count = sum(there in {other.folder for other in found} for there in runs.values())
        yield f"{count} run{'s' if count != 1 else ''} to take over from {folder}"
        yield from (f"{folder}: {reason}" for reason in _reasons(rest, experiment, found))


def _reasons(runs: Sequence[Run], experiment: Experiment, found: Sequence[_Other]) -> Iterator[str]:
    """Yield a sentence for all runs that are not taken over for the same reason."""
    named: dict[str, list[str]] = {}
    for run in runs:
        reason = _reason(run, experiment, found)
        if reason is not None:
            named.setdefault(reason, []).append(run.name)
    for reason, names in named.items():
        yield f"not taken over: {', '.join(names)}: {reason}."


def _reason(run: Run, experiment: Experiment, found: Sequence[_Other]) -> str | None:
    """Return why a run is not taken over. None if there is no run of the same key, or of its variant and seed."""
    if any(other.key.get("key") == run.key for other in found):
        return "not complete there, or without a result of each task"
    near = [
        other.key for other in found if (other.key.get("variant"), other.key.get("seed")) == (run.variant, run.seed)
    ]
    if not near:
        return None
    ours = inputs_of(run, experiment)
    differences = min((list(_differences(ours, theirs)) for theirs in near), key=len)
    more = f" and {len(differences) - _NAMED} more" if len(differences) > _NAMED else ""
    return f"another run there: {'; '.join(differences[:_NAMED])}{more}"


def _differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[str]:
    """Yield the differences of two runs: versions, then contents of files, then keys of the configuration."""
    if theirs.get("format") != FORMAT:
        yield f"{KEY_FILE} has format {theirs.get('format')} there and {FORMAT} here"
        return
    for part, own in ours.items():
        here, there = (dict(leaves(value)) for value in (own, theirs.get(part)))
        for path in dict.fromkeys([*here, *there]):
            if here.get(path) == there.get(path):
                continue
            name = ".".join(path)
            if part == "contents" and path in here and path in there:
                yield f"{name} has another content"
            elif part == "contents":
                yield f"{name} counts only {'here' if path in here else 'there'}"
            else:
                yield f"{name or part} is {_shown(there, path)} there and {_shown(here, path)} here"


def _shown(values: Mapping[tuple[str, ...], Any], path: tuple[str, ...]) -> str:
    if path not in values:
        return "missing"
    text = repr(values[path]) if isinstance(values[path], str) else str(values[path])
    return text if len(text) <= 60 else f"{text[:57]}..."


def take_over(run: Run, there: Path) -> None:
    """Copy the results of a complete run into the folder of the same run here. The model is not copied.

    Args:
        run: a run that is not trained here.
        there: folder of the complete run, OUTPUT_DIR/runs/VARIANT/SEED.

    Raises:
        ConfigError: if a file cannot be copied.
    """
    try:
        stored = read_object(there / COMPLETE_FILE)
        assert stored is not None
        origin = {
            "variant": run.variant,
            "taken_over_from": stored.get("taken_over_from", str(there.parents[2].resolve())),
        }
        for name in (KEY_FILE, SUMMARY_FILE):
            if (there / name).is_file():
                write_atomically(run.folder / name, (there / name).read_bytes())
        write_atomically(run.folder / RUN_FILE, run_yaml(run))  # with the output_dir of this run
        (run.folder / FAILED_FILE).unlink(missing_ok=True)
        content = json_text({**stored, **origin}, indent=2) + "\n"
        write_atomically(run.folder / COMPLETE_FILE, content.encode())
    except OSError as error:
        raise ConfigError(f"--merge: {error.filename} cannot be copied ({error.strerror or error}).") from error
