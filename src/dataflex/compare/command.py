"""``dataflex-cli compare``: plan, run what is missing, and say what it supports."""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from dataflex.compare import files, page
from dataflex.compare.experiment import Experiment, Run, load
from dataflex.compare.outcome import Outcome, gather
from dataflex.compare.result import State, failure_of, read_result, state_of
from dataflex.compare.runner import PROGRAM, Workers, execute, workers
from dataflex.errors import ConfigError
from dataflex.record.tables import NOTHING, Table, to_text

INTERRUPTED = 130
"""Exit status after Ctrl-C."""

_SECONDS = ("train_seconds", "decision_seconds", "evaluate_seconds", "task_seconds")


def compare(
    path: Path,
    jobs: int | None = None,
    dry_run: bool = False,
    program: Sequence[str] = PROGRAM,
    at_once: Workers | None = None,
) -> int:
    """Run what is missing of an experiment, and write and print its result.

    Args:
        path: the experiment file.
        jobs: runs at a time; None: one for each CUDA device, one without any.
        dry_run: only print what would be run.
        program: the command line that trains and evaluates.
        at_once: instead of ``jobs``: how many runs go on at once, and where.

    Returns:
        0, 1 where a run failed or cannot be compared, 130 after Ctrl-C.

    Raises:
        ConfigError: for what is wrong with the experiment, before anything runs.
    """
    experiment = load(path)
    for note in experiment.notes:
        print(f"dataflex: note: {note}", file=sys.stderr)
    if dry_run:
        states = {run: state_of(run, experiment) for run in experiment.runs}
        _print([plan_table(experiment, states)])
        return 0
    try:
        experiment.output.mkdir(parents=True, exist_ok=True)
        lock = FileLock(experiment.output / ".lock", timeout=0)
        lock.acquire()
    except Timeout as error:
        raise ConfigError(f"output_dir: another comparison is at work in {experiment.output}; wait for it.") from error
    except OSError as error:
        raise ConfigError(
            f"output_dir: {experiment.output} cannot be written to ({error.strerror or error})."
        ) from error
    with lock:
        return _run(experiment, jobs, program, at_once)


def _run(experiment: Experiment, jobs: int | None, program: Sequence[str], at_once: Workers | None) -> int:
    states = {run: state_of(run, experiment) for run in experiment.runs}
    missing = [run for run, state in states.items() if state != "complete"]
    # Seed by seed, so that a comparison cut short is one of fewer seeds.
    missing.sort(key=lambda run: experiment.settings.seeds.index(run.seed))
    failed: dict[str, str] = {}
    if missing:
        print(_counted(states), flush=True)
        try:
            failed = execute(experiment, missing, at_once or workers(jobs), program)
        except KeyboardInterrupt:
            print(
                "dataflex: stopped. What is complete is kept, and other runs go on from their checkpoints where they "
                f"have any: dataflex-cli compare {experiment.path}",
                file=sys.stderr,
            )
            return INTERRUPTED
    else:
        print(f"nothing to do: all {len(states)} runs are complete.")
    outcome = gather(experiment)
    files.write(outcome)
    _print(files.tables(outcome))
    written = [files.MARKDOWN, files.CSV, files.JSON]
    try:
        page.write(outcome)
        written.append(files.HTML)
    except ConfigError as error:
        print(f"dataflex: {files.HTML} is not written: {error}", file=sys.stderr)
    print(f"in {experiment.output}: {', '.join(written)}")
    return 1 if failed or _left_out(outcome) else 0


def _left_out(outcome: Outcome) -> bool:
    return any(row.problem is not None for row in outcome.rows)


def _counted(states: dict[Run, State]) -> str:
    counts = Counter(states.values())
    return f"{len(states)} runs: " + ", ".join(f"{count} {state}" for state, count in counts.items())


def plan_table(experiment: Experiment, states: dict[Run, State]) -> Table:
    """Return what each run still needs, and what that is expected to cost."""
    known = {run: _seconds(run, experiment) for run in states}
    rows = []
    for run, state in states.items():
        expected = known[run] if state == "complete" else _expected(run, known)
        failure = failure_of(run) if state != "complete" else None
        rows.append(
            [
                run.variant,
                str(run.seed),
                f"{state}, failed before" if failure else state,
                str(run.folder.relative_to(experiment.output)),
                NOTHING if expected is None else f"{expected:,.0f}",
            ]
        )
    missing = [run for run, state in states.items() if state != "complete"]
    return Table(
        "Plan", ["variant", "seed", "state", "folder", "seconds"], rows, 4, (_cost(experiment, missing, known),)
    )


def _seconds(run: Run, experiment: Experiment) -> float | None:
    result = read_result(run, experiment)
    return None if result is None else sum(result.costs.get(name, 0.0) for name in _SECONDS)


def _expected(run: Run, known: dict[Run, float | None]) -> float | None:
    """Return the mean seconds of the complete runs of the same variant, else of all."""
    own = [value for other, value in known.items() if value is not None and other.variant == run.variant]
    found = own or [value for value in known.values() if value is not None]
    return sum(found) / len(found) if found else None


def _cost(experiment: Experiment, missing: Sequence[Run], known: dict[Run, float | None]) -> str:
    if not missing:
        return "Nothing to do."
    equal = experiment.settings.equal
    runs = f"{len(missing)} run{'s' if len(missing) != 1 else ''} to go"
    expected = [_expected(run, known) for run in missing]
    measured = [value for value in expected if value is not None]
    if len(measured) == len(missing):
        return (
            f"{runs}: about {sum(measured):,.0f} seconds one after another, judged by the complete runs; the start of "
            "each process is not counted, and what checkpoints save is not taken off."
        )
    if equal.wall_clock is not None:
        total = equal.wall_clock * len(missing)
        return f"{runs}: {total:,.0f} seconds of training and decisions; loading and evaluation are not known yet."
    total = equal.amount * len(missing)
    return f"{runs}: {total:,.0f} {equal.name} in all; the seconds are not known before a run is complete."


def _print(tables: Sequence[Table]) -> None:
    width = shutil.get_terminal_size(fallback=(120, 24)).columns
    print("\n".join(to_text(table, width) for table in tables))
