"""``dataflex-cli compare``: run the missing trainings of an experiment, and compare the results."""

from __future__ import annotations

import math
import os
import shlex
import sys
import time
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from dataflex.compare import files, page
from dataflex.compare.experiment import Experiment, Run, joined, load
from dataflex.compare.importing import search, take_over
from dataflex.compare.outcome import Outcome, gather
from dataflex.compare.plan_table import plan_table
from dataflex.compare.remaining import as_text, known_seconds, time_left
from dataflex.compare.result import State, read_result, state_of
from dataflex.compare.runner import PROGRAM, Ended, Workers, execute, workers
from dataflex.compare.session import Work, carry_out, say
from dataflex.errors import ConfigError, Problem
from dataflex.report.tables import Table, print_tables
from dataflex.trainer.console import duration

TIME_LIMIT_REACHED = 124
"""Exit status if runs are left because of the time limit, as that of the program ``timeout``."""


@dataclass(frozen=True)
class _Limit:
    """A time limit: its length in seconds, and the value of ``time.monotonic()`` at its end."""

    seconds: float
    until: float


def compare(
    path: Path,
    jobs: int | None = None,
    dry_run: bool = False,
    program: Sequence[str] = PROGRAM,
    at_once: Workers | None = None,
    time_limit: float | None = None,
    merge: Sequence[Path] = (),
) -> int:
    """Run the missing runs of an experiment, and write and print the result.

    Args:
        path: the experiment file.
        jobs: number of runs at the same time. None means one for each CUDA device, or one without any.
        dry_run: only print the plan.
        program: the command line that trains and evaluates.
        at_once: number of runs at the same time and their devices. None means that ``jobs`` decides.
        time_limit: seconds after which no run is started and running ones are interrupted.
        merge: folders of other comparisons. Runs that are complete there are taken over.

    Returns:
        The exit status: 0, 1 if a run failed or cannot be compared, 124 if runs are left because of the time limit, 130
        after Ctrl-C, 143 after SIGTERM.

    Raises:
        ConfigError: if the experiment file has errors, or a folder to merge has no run of it. Nothing has run then.
    """
    limit = None if time_limit is None else _Limit(time_limit, time.monotonic() + time_limit)
    again = f"dataflex-cli compare {shlex.quote(str(path))}" + ("" if jobs is None else f" --jobs {jobs}")
    again += "".join(f" --merge {shlex.quote(str(folder))}" for folder in merge)

    def work() -> Work:
        experiment = load(path)
        found = search(experiment, merge)

        def plan() -> list[Table]:
            say(found.notes)
            states = {run: state_of(run, experiment) for run in experiment.runs}
            return [plan_table(experiment, {**states, **dict.fromkeys(found.runs, "complete")})]

        def run() -> int:
            for each, there in found.runs.items():
                if state_of(each, experiment) in ("to run", "to resume"):  # it may have been made in the meantime
                    take_over(each, there)
            say(found.notes)
            return _run(experiment, jobs, program, at_once, limit, again)

        return Work(experiment.output, plan, run, experiment.notes)

    kept = "Complete runs are kept. Other runs resume from their checkpoints, if they have any, with"
    return carry_out(work, dry_run=dry_run, on_stop=f"stopped. {kept}: {again}")


def _run(
    experiment: Experiment,
    jobs: int | None,
    program: Sequence[str],
    at_once: Workers | None,
    limit: _Limit | None,
    again: str,
) -> int:
    states = {run: state_of(run, experiment) for run in experiment.runs}
    missing = [run for run, state in states.items() if state != "complete"]
    # Seed by seed: an interrupted comparison then has all variants, over fewer seeds.
    missing.sort(key=lambda run: experiment.settings.seeds.index(run.seed))
    ended = Ended({}, (), {})
    if missing:
        at_once = at_once or workers(jobs, experiment.settings.processes)
        _refuse_sharing(experiment, at_once)
        _refuse_many_machines(missing)
        _refuse_arguments(experiment, {run.variant for run in missing if states[run] in ("to run", "to resume")})
        known = known_seconds(((run.variant, read_result(run, experiment)) for run in states), at_once.at_once)
        left = time_left(known, [], [run.variant for run in missing], at_once.jobs)
        print(f"{_counted(states)}{as_text(left)}", flush=True)
        until = math.inf if limit is None else limit.until
        ended = execute(experiment, missing, at_once, program, len(states), until, known)
    else:
        print(f"nothing to do: all {len(states)} runs are complete.")
    outcome = _write(experiment)
    if limit is not None and ended.left:
        print(_left_text(outcome, ended, limit, again))
        return TIME_LIMIT_REACHED
    return 1 if ended.failed or _left_out(outcome) else 0


def _write(experiment: Experiment) -> Outcome:
    """Write and print the result of the complete runs."""
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
    return outcome


def _left_text(outcome: Outcome, ended: Ended, limit: _Limit, again: str) -> str:
    """Return the closing line of a command whose time limit left runs over."""
    complete = sum(row.result is not None for row in outcome.rows)
    counts = [f"{complete} of {len(outcome.rows)} runs are complete", f"{len(ended.left)} left"]
    counts += [f"{len(ended.failed)} failed"] if ended.failed else []
    longest = max(ended.too_long.values(), default=0.0)
    enough = f"{limit.seconds:.10g}" if longest < limit.seconds else f"SECONDS, above {longest:,.0f}"
    text = f"time limit of {duration(limit.seconds)}: {', '.join(counts)}. To continue: {again} --time-limit {enough}"
    if ended.too_long:
        runs = ", ".join(f"{name} (about {duration(seconds)})" for name, seconds in ended.too_long.items())
        text += f"\nnot started, because a run could neither end before the limit nor resume (no save_steps): {runs}"
    return text


def _refuse_arguments(experiment: Experiment, to_train: Collection[str]) -> None:
    """Raise an error for arguments that LLaMA-Factory, or this machine, does not accept, before any run starts.

    ``dry_run`` accepts an argument that another machine could train with. The runs of a comparison train here. Only the
    variants ``to_train`` are checked: complete runs may be of a machine with other devices.
    """
    from dataflex.integrations.llamafactory import parsing

    found: dict[str, list[Problem]] = {}
    for variant in (name for name in experiment.configs if name in to_train):
        config, problems = experiment.configs[variant], found.setdefault(f"variants.{variant}", [])
        try:
            parsing.dry_run(config)
        except ConfigError as error:
            problems += error.problems
        else:
            missing = parsing.unsupported_here(config)
            problems += [Problem(key, "this machine has no device that supports it. Remove it.") for key in missing]
    every = list(joined(found)) if found else []
    if every:
        raise ConfigError(problems=every, source=str(experiment.path))


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
