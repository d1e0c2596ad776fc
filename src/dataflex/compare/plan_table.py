"""The table of a comparison's runs: the state of each, and the expected cost of the rest."""

from __future__ import annotations

from dataflex.compare.experiment import Experiment, Run
from dataflex.compare.result import State, failure_of, read_result
from dataflex.report.tables import NOTHING, Table

_SECONDS = ("train_seconds", "decision_seconds", "evaluate_seconds", "task_seconds")


def plan_table(experiment: Experiment, states: dict[Run, State]) -> Table:
    """Return the state of each run and the seconds it is expected to take."""
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
    """Return the seconds of a complete run. Of another run return an estimate, or None if no run is complete.

    The estimate is the mean over the complete runs of the same variant. If the variant has none, the estimate is the
    mean over all complete runs.
    """
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
    processes = experiment.settings.processes
    runs = f"{len(missing)} run{'s' if len(missing) != 1 else ''} to go"
    runs += f", each on {processes} processes" if processes > 1 else ""
    measured = [seconds for run in missing if (seconds := expected_of[run]) is not None]
    if len(measured) == len(missing):
        return (
            f"{runs}: about {sum(measured):,.0f} seconds one after another, estimated from the complete runs. A "
            "variant without a complete run is estimated from the other variants, and its decisions may cost more. "
            "The start of each process is not included. Steps that a checkpoint saves are not subtracted."
        )
    total = equal.amount * sum(state in ("to run", "to resume") for state in states.values())
    if equal.wall_clock is not None:
        return f"{runs}: {total:,.0f} seconds of training and decisions; loading and evaluation are not known yet."
    return f"{runs}: {total:,.0f} {equal.name} in all; the seconds are unknown until a run is complete."
