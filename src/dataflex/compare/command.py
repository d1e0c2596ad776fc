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
from dataflex.report.tables import NOTHING, Table, to_text
from dataflex.trainer import stopping

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
        0, 1 where a run failed or cannot be compared, 130 after Ctrl-C, 143 after SIGTERM.

    Raises:
        ConfigError: for what is wrong with the experiment, before anything runs.
    """
    try:
        experiment = load(path)
        for note in experiment.notes:
            print(f"dataflex: note: {note}", file=sys.stderr)
        if dry_run:
            states = {run: state_of(run, experiment) for run in experiment.runs}
            print_tables([plan_table(experiment, states)])
            return 0
        lock = locked(experiment.output)
        try:
            return _run(experiment, jobs, program, at_once)
        finally:
            lock.release()
    except KeyboardInterrupt as stop:
        return stopping.end(
            stop,
            "stopped. What is complete is kept, and other runs go on from their checkpoints where they have "
            f"any: dataflex-cli compare {path}",
        )


def locked(output: Path) -> FileLock:
    """Return the lock on a folder, taken."""
    lock = FileLock(output / ".lock", timeout=0)
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise ConfigError(f"output_dir: another command is at work in {output}; wait for it.") from error
    except OSError as error:
        raise ConfigError(f"output_dir: {output} cannot be written to ({error.strerror or error}).") from error
    return lock


def _run(experiment: Experiment, jobs: int | None, program: Sequence[str], at_once: Workers | None) -> int:
    states = {run: state_of(run, experiment) for run in experiment.runs}
    missing = [run for run, state in states.items() if state != "complete"]
    # Seed by seed, so that a comparison cut short is one of fewer seeds.
    missing.sort(key=lambda run: experiment.settings.seeds.index(run.seed))
    failed: dict[str, str] = {}
    if missing:
        at_once = at_once or workers(jobs)
        _refuse_sharing(experiment, at_once)
        print(_counted(states), flush=True)
        failed = execute(experiment, missing, at_once, program, len(states))
    else:
        print(f"nothing to do: all {len(states)} runs are complete.")
    outcome = gather(experiment)
    files.write(outcome)
    print_tables(files.tables(outcome))
    written = [files.MARKDOWN, files.CSV, files.JSON]
    try:
        page.write(outcome)
        written.append(files.HTML)
    except ConfigError as error:
        print(f"dataflex: {files.HTML} is not written: {error}", file=sys.stderr)
    print(f"in {experiment.output}: {', '.join(written)}")
    if files.HTML in written:
        print(f"to look at them: open {experiment.output / files.HTML} in a browser")
    return 1 if failed or _left_out(outcome) else 0


def _refuse_sharing(experiment: Experiment, at_once: Workers) -> None:
    most = max(1, len(at_once.devices))
    if experiment.settings.equal.wall_clock is not None and at_once.jobs > most:
        raise ConfigError(
            f"--jobs: {at_once.jobs} runs at a time on {most} device{'s' if most != 1 else ''} take each other's time, "
            f"and equal: wall_clock compares what each does in its own; {most} at most, or use equal: {{tokens: N}}."
        )


def _left_out(outcome: Outcome) -> bool:
    return any(row.problem is not None for row in outcome.rows)


def _counted(states: dict[Run, State]) -> str:
    counts = Counter(states.values())
    return f"{len(states)} runs: " + ", ".join(f"{count} {state}" for state, count in counts.items())


def plan_table(experiment: Experiment, states: dict[Run, State]) -> Table:
    """Return what each run still needs, and what that is expected to cost."""
    known = {run: _seconds(run, experiment) for run in states}
    expected_of = {run: _expected(run, state, known) for run, state in states.items()}
    rows = []
    for run, state in states.items():
        expected = expected_of[run]
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
    return Table(
        "Plan", ["variant", "seed", "state", "folder", "seconds"], rows, 4, (_cost(experiment, states, expected_of),)
    )


def _seconds(run: Run, experiment: Experiment) -> dict[str, float] | None:
    result = read_result(run, experiment)
    return None if result is None else {name: result.costs.get(name, 0.0) for name in _SECONDS}


def _expected(run: Run, state: State, known: dict[Run, dict[str, float] | None]) -> float | None:
    """Return the seconds of a complete run; of another the mean of the same variant's complete runs, else of all."""
    if state == "to record":
        return 0.0
    of_variant = [run] if known[run] else [other for other in known if other.variant == run.variant]
    found = [seconds for other in of_variant if (seconds := known[other])]
    found = found or [seconds for seconds in known.values() if seconds]
    names = ("task_seconds",) if state == "to evaluate" else _SECONDS
    return sum(each[name] for each in found for name in names) / len(found) if found else None


def _cost(experiment: Experiment, states: dict[Run, State], expected_of: dict[Run, float | None]) -> str:
    missing = [run for run, state in states.items() if state != "complete"]
    if not missing:
        return "Nothing to do."
    equal = experiment.settings.equal
    runs = f"{len(missing)} run{'s' if len(missing) != 1 else ''} to go"
    measured = [seconds for run in missing if (seconds := expected_of[run]) is not None]
    if len(measured) == len(missing):
        return (
            f"{runs}: about {sum(measured):,.0f} seconds one after another, judged by the complete runs (of other "
            "variants where one has none: its decisions may cost more); the start of each process is not counted, and "
            "what checkpoints save is not taken off."
        )
    total = equal.amount * sum(state in ("to run", "to resume") for state in states.values())
    if equal.wall_clock is not None:
        return f"{runs}: {total:,.0f} seconds of training and decisions; loading and evaluation are not known yet."
    return f"{runs}: {total:,.0f} {equal.name} in all; the seconds are not known before a run is complete."


def print_tables(tables: Sequence[Table]) -> None:
    """Print tables in the width of the terminal."""
    width = shutil.get_terminal_size(fallback=(120, 24)).columns
    print("\n".join(to_text(table, width) for table in tables))
