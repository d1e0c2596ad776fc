"""``dataflex-cli compare``: run the missing trainings of an experiment, and compare the results."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from dataflex.compare import files, page
from dataflex.compare.experiment import Experiment, Run, load
from dataflex.compare.outcome import Outcome, gather
from dataflex.compare.plan_table import plan_table
from dataflex.compare.result import State, state_of
from dataflex.compare.runner import PROGRAM, Workers, execute, workers
from dataflex.compare.session import Work, carry_out
from dataflex.errors import ConfigError
from dataflex.report.tables import print_tables


def compare(
    path: Path,
    jobs: int | None = None,
    dry_run: bool = False,
    program: Sequence[str] = PROGRAM,
    at_once: Workers | None = None,
) -> int:
    """Run the missing runs of an experiment, and write and print the result.

    Args:
        path: the experiment file.
        jobs: number of runs at the same time. None means one for each CUDA device, or one without any.
        dry_run: only print the plan.
        program: the command line that trains and evaluates.
        at_once: number of runs at the same time and their devices. None means that ``jobs`` decides.

    Returns:
        The exit status: 0, 1 if a run failed or cannot be compared, 130 after Ctrl-C, 143 after SIGTERM.

    Raises:
        ConfigError: if the experiment file has errors. Nothing has run then.
    """

    def work() -> Work:
        experiment = load(path)
        return Work(
            experiment.output,
            lambda: [plan_table(experiment, {run: state_of(run, experiment) for run in experiment.runs})],
            lambda: _run(experiment, jobs, program, at_once),
            experiment.notes,
        )

    kept = "Complete runs are kept. Other runs resume from their checkpoints, if they have any, with"
    return carry_out(work, dry_run=dry_run, on_stop=f"stopped. {kept}: dataflex-cli compare {path}")


def _run(experiment: Experiment, jobs: int | None, program: Sequence[str], at_once: Workers | None) -> int:
    states = {run: state_of(run, experiment) for run in experiment.runs}
    missing = [run for run, state in states.items() if state != "complete"]
    # Seed by seed: an interrupted comparison then has all variants, over fewer seeds.
    missing.sort(key=lambda run: experiment.settings.seeds.index(run.seed))
    failed: dict[str, str] = {}
    if missing:
        at_once = at_once or workers(jobs, experiment.settings.processes)
        _refuse_sharing(experiment, at_once)
        _refuse_many_machines(missing)
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
        print(f"to see the result: open {experiment.output / files.HTML} in a browser")
    return 1 if failed or _left_out(outcome) else 0


def _refuse_sharing(experiment: Experiment, at_once: Workers) -> None:
    most = max(1, len(at_once.devices))
    count = max(1, sum(len(names.split(",")) for names in at_once.devices))
    if experiment.settings.equal.wall_clock is not None and at_once.jobs > most:
        raise ConfigError(
            f"--jobs: {at_once.jobs} runs at the same time on {count} device{'s' if count != 1 else ''} slow each "
            f"other down, and equal: wall_clock compares runs by their time. Use --jobs {most}, or equal: "
            "{tokens: N}."
        )


def _refuse_many_machines(missing: Sequence[Run]) -> None:
    several = os.environ.get("NNODES", "1") != "1" or "RDZV_ID" in os.environ
    if several and any(run.torchrun for run in missing):
        raise ConfigError(
            "environment variable NNODES or RDZV_ID: a comparison launches all processes of a run on this machine. "
            "Unset it. On several machines, train the run.yaml of each run by hand."
        )


def _left_out(outcome: Outcome) -> bool:
    return any(row.problem is not None for row in outcome.rows)


def _counted(states: dict[Run, State]) -> str:
    counts = Counter(states.values())
    return f"{len(states)} runs: " + ", ".join(f"{count} {state}" for state, count in counts.items())
