"""``dataflex-cli hard-pairs``: the trainings of Selective DPO (Gao et al., ICML 2025, arXiv 2502.09650) in sequence.

For each seed two models are trained, each on one half of the data, and each measures the losses of the other half
(``select: {method: half}``). The difficulty of a pair is the mean of its losses over the seeds and the measurements.
The final training passes once over the easiest share of the pairs, from easy to hard.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, field_validator

from dataflex.compare.digests import expanded
from dataflex.compare.experiment import joined, read_base
from dataflex.compare.merging import replaced_keys
from dataflex.compare.runner import PROGRAM
from dataflex.compare.session import Work, carry_out
from dataflex.compare.settings import Base
from dataflex.config.loading import SECTION, RunConfig
from dataflex.data.stages import STAGES
from dataflex.errors import ConfigError, Problem
from dataflex.files import write_atomically
from dataflex.mixers.base_regression import accuracy
from dataflex.report.tables import NOTHING, Table, print_tables
from dataflex.selectors.base_difficulties import DIFFICULTY, read_difficulties
from dataflex.selectors.half import TABLE
from dataflex.workflows.stages import (
    DOMAIN_COLUMN,
    MANAGED,
    SAME_DATA,
    SET_ITSELF,
    Recipe,
    Stage,
    bring_to_end,
    losses,
    make_stage,
    read_settings,
    refuse_many_nodes,
    run_of,
    state,
)

HALVES = ("first", "second")
FINAL = "final"
SELECT, ORDER = f"{SECTION}.select", f"{SECTION}.order"
LENGTHS = {
    "max_steps": -1,
    f"{SECTION}.train_steps": None,
    f"{SECTION}.train_tokens": None,
    f"{SECTION}.train_seconds": None,
    f"{SECTION}.warmup_steps": 0,
    f"{SECTION}.update_steps": None,
    f"{SECTION}.updates": -1,
}
"""Keys of the length of a training and of its rounds -> the value that every stage begins with."""
_OF_FINAL = ("num_train_epochs", *LENGTHS)
_ONE_PASS = "is set by the command itself: one pass over the easiest pairs in one round; remove it."


class HardPairsSettings(BaseModel):
    """The keys of a file for ``dataflex-cli hard-pairs``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    base: Base = Field(description="A LLaMA-Factory YAML, as a path relative to this file, or its keys.")
    output_dir: str = Field(min_length=1, description="Folder to which the command writes.")
    seeds: list[int] = Field([41, 42, 43], min_length=1, description="Seeds; each divides the data and trains anew.")
    measurements: int = Field(5, ge=1, description="Times that each training measures the losses of the other half.")
    keep: float = Field(0.5, gt=0, lt=1, description="Share of the pairs that the final training keeps.")
    halves: dict[str, Any] = Field(
        default_factory=dict, description="Keys that the trainings on halves change in the base."
    )
    final: dict[str, Any] = Field(default_factory=dict, description="Keys that the final training changes in the base.")

    @field_validator("halves", "final", mode="before")
    @classmethod
    def _empty_is_the_base(cls, value: Any) -> Any:
        return {} if value is None else value

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds) or min(seeds) < 0:
            raise ValueError(f"must be different whole numbers of at least 0, got {seeds}")
        return seeds


@dataclass(frozen=True)
class Plan:
    """The checked stages.

    Attributes:
        halves: the trainings on halves, by seed.
        final: the final training.
        table: file of the difficulties, in the folder of the command.
        notes: notes for the user.
    """

    halves: dict[int, tuple[Stage, Stage]]
    final: Stage
    table: Path
    notes: tuple[str, ...]

    @property
    def all_halves(self) -> list[Stage]:
        """All trainings on halves, in their order."""
        return [stage for both in self.halves.values() for stage in both]


def hard_pairs(path: Path, dry_run: bool = False, program: Sequence[str] = PROGRAM) -> int:
    """Train the stages that are not complete, write the difficulties, and print a summary.

    Args:
        path: the file with the settings.
        dry_run: only print the state of each stage.
        program: command line that trains.

    Returns:
        The exit status: 0, 1 if a stage failed, 130 after Ctrl-C, 143 after SIGTERM.

    Raises:
        ConfigError: with the problems of all stages, before a training starts.
    """

    def work() -> Work:
        plan = load(path)
        return Work(plan.table.parent, lambda: [state_table(plan)], lambda: _run(plan, program), plan.notes)

    kept = "Complete stages are kept, and a stage with a checkpoint is resumed"
    return carry_out(work, dry_run=dry_run, on_stop=f"stopped. {kept}. To continue: dataflex-cli hard-pairs {path}")


def load(path: Path) -> Plan:
    """Return the checked stages.

    Raises:
        ConfigError: with the problems of all stages together.
    """
    settings = read_settings(path, HardPairsSettings)
    problems: list[Problem] = []
    notes: list[str] = []
    base, folder = read_base(settings.base, path, problems, notes)
    notes += replaced_keys(base, (*MANAGED, SELECT, ORDER, "num_train_epochs", *LENGTHS), "command")
    if isinstance(base.get(SECTION), dict):
        base[SECTION] = {key: value for key, value in base[SECTION].items() if key not in ("select", "order")}
    output = expanded(settings.output_dir)
    found: dict[str, Stage | None] = {}
    wrong: dict[str, list[Problem]] = {}
    for recipe in _recipes(settings, output):
        changes = settings.final if recipe.name == FINAL else settings.halves
        found[recipe.name], of_stage = make_stage(recipe, base, changes, folder, output)
        # All trainings on halves have the same problems, which are said once.
        wrong.setdefault(FINAL if recipe.name == FINAL else "halves", of_stage)
    problems += joined(wrong)
    made = {name: stage for name, stage in found.items() if stage is not None}
    if problems or len(made) < len(found):
        raise ConfigError(problems=problems, source=str(path))
    halves = {seed: (made[_name(seed, "first")], made[_name(seed, "second")]) for seed in settings.seeds}
    return Plan(halves, made[FINAL], output / TABLE, tuple(notes))


def _name(seed: int, half: str) -> str:
    return f"seed-{seed}-{half}"


def _recipes(settings: HardPairsSettings, output: Path) -> Iterator[Recipe]:
    data = {"dataset": SAME_DATA, DOMAIN_COLUMN: SAME_DATA}
    for seed in settings.seeds:
        for half in HALVES:
            name = _name(seed, half)
            select = {
                "method": "half",
                "half": half,
                "split_seed": seed,
                "measurements": settings.measurements,
                "folder": str(output / name / "held_out"),
            }
            sets = {**LENGTHS, "num_train_epochs": 0.5, "seed": seed, SELECT: select}
            yield Recipe(name, sets, {**data, SELECT: SET_ITSELF, "seed": SET_ITSELF}, check=_stage_problems)
    table = str(output / TABLE)
    sets = {
        **LENGTHS,
        "num_train_epochs": settings.keep,
        SELECT: {"method": "hard_pairs", "difficulties": [table]},
        ORDER: {"method": "sort", "by": "selection", "descending": True},
    }
    # Without the table the selector measures losses, which needs a warm-up.
    stand_ins = {f"{SELECT}.difficulties": None, f"{SECTION}.warmup_steps": 1}
    managed = {**data, SELECT: SET_ITSELF, **dict.fromkeys(_OF_FINAL, _ONE_PASS)}
    yield Recipe(FINAL, sets, managed, stand_ins)


def _stage_problems(config: RunConfig) -> Iterator[Problem]:
    stage = str(config.llamafactory.get("stage", "sft"))
    if stage not in STAGES or not STAGES[stage].takes_pairs:
        pairs = " or ".join(name for name, each in STAGES.items() if each.takes_pairs)
        yield Problem("stage", f"{stage!r} has no pairs of responses; use {pairs}.")


def state_table(plan: Plan) -> Table:
    """Return a table with the state of each stage. The final one depends on the results of all others."""
    rows: list[list[str]] = []
    waiting: str | None = None
    for stage in plan.all_halves:
        found = state(stage, run_of(stage))
        waiting = waiting if found == "complete" else stage.name
        rows.append([stage.name, _in_words(found), str(stage.folder)])
    if waiting is not None or not plan.table.is_file():
        found = f"after {waiting or plan.table.name}"
    else:
        found = _in_words(state(plan.final, run_of(plan.final)))
    rows.append([FINAL, found, str(plan.final.folder)])
    return Table("Plan", ["stage", "state", "folder"], rows, 3)


def _in_words(found: str) -> str:
    return "changed: will be set aside and trained again" if found == "changed" else found


def _run(plan: Plan, program: Sequence[str]) -> int:
    refuse_many_nodes()
    count = len(plan.all_halves) + 1
    for number, stage in enumerate(plan.all_halves, 1):
        if not _brought_to_end(stage, program, f"stage {number} of {count}"):
            return 1
        if not (table_of(stage)).is_file():
            print(f"dataflex: {stage.name} failed: {table_of(stage)} is missing; {_again(stage)}", file=sys.stderr)
            return 1
    seeds = [_read_both(both) for both in plan.halves.values()]
    write_atomically(plan.table, mean_table(seeds))
    if not _brought_to_end(plan.final, program, f"stage {count} of {count}"):
        return 1
    print_tables(list(_results(plan, seeds)))
    return 0


def _brought_to_end(stage: Stage, program: Sequence[str], place: str) -> bool:
    error = bring_to_end(stage, run_of(stage), program, place)
    if error is not None:
        print(f"dataflex: {stage.name} failed: {error}", file=sys.stderr)
    return error is None


def _again(stage: Stage) -> str:
    return f"remove {stage.folder} to train it again"


def table_of(stage: Stage) -> Path:
    """Return the file of the losses that a training on a half measured."""
    return stage.folder / "held_out" / TABLE


def _read_both(both: tuple[Stage, Stage]) -> pa.Table:
    """Return the difficulties of one seed: those that both trainings measured, sorted by data set and row."""
    joint = pa.concat_tables([read_difficulties(table_of(stage)) for stage in both])
    return joint.sort_by([("dataset", "ascending"), ("row", "ascending")])


def mean_table(seeds: Sequence[pa.Table]) -> bytes:
    """Return a Parquet file with the mean difficulty of every pair over the seeds.

    Args:
        seeds: the difficulties of each seed, of the same pairs in the same order.

    Raises:
        ConfigError: if the seeds measured different pairs.
    """
    places = seeds[0].select(["dataset", "row"])
    if any(not each.select(["dataset", "row"]).equals(places) for each in seeds):
        raise ConfigError("the trainings on halves measured different pairs; the data has changed between them.")
    mean = np.mean([_values(each) for each in seeds], axis=0)
    sink = pa.BufferOutputStream()
    pq.write_table(places.append_column(DIFFICULTY, pa.array(mean)), sink)
    return bytes(sink.getvalue())


def _values(table: pa.Table) -> NDArray[np.float64]:
    values: NDArray[np.float64] = table.column(DIFFICULTY).to_numpy()
    return values


def _results(plan: Plan, seeds: Sequence[pa.Table]) -> Iterator[Table]:
    """Yield the table of the seeds, and the losses of the final model if it was evaluated."""
    values = [_values(each) for each in seeds]
    total, rows = np.sum(values, axis=0), []
    for seed, each in zip(plan.halves, values, strict=True):
        found = accuracy(each, total - each).spearman if len(values) > 1 else math.nan
        said = NOTHING if math.isnan(found) else f"{found:.4f}"
        rows.append([str(seed), f"{each.mean():.4f}", f"{each.std():.4f}", said])
    header = ["seed", "mean loss", "deviation", "rank correlation with the others"]
    notes = (f"The difficulties of {total.size} pairs are in {plan.table}. The final model is in {plan.final.folder}.",)
    yield Table("Held-out losses", header, rows, 1, notes)
    last: Mapping[str, float | None] = dict(losses(plan.final.folder))
    if last:
        rows = [[name, NOTHING if loss is None else f"{loss:.4f}"] for name, loss in last.items()]
        yield Table("Final model", ["data set", "loss"], rows, 1)
