"""``dataflex-cli doremi``: the three trainings of DoReMi (Xie et al. 2023, arXiv 2305.10429) in sequence.

The first stage trains a reference model on the data in its own proportions. The second stage trains a proxy model with
``mix: {method: doremi}``, which finds weights of the domains. The final training draws samples in proportion to the
average of these weights.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator

from dataflex import assets
from dataflex.api.components import family_key
from dataflex.compare.digests import expanded
from dataflex.compare.experiment import joined, read_base
from dataflex.compare.merging import replaced_keys
from dataflex.compare.runner import PROGRAM
from dataflex.compare.session import Work, carry_out, say
from dataflex.compare.settings import Base
from dataflex.config import checks
from dataflex.config.loading import SECTION, RunConfig
from dataflex.config.masking import masked
from dataflex.errors import ConfigError, Problem
from dataflex.record.files import read_object
from dataflex.report.tables import NOTHING, Table, print_tables
from dataflex.workflows.stages import (
    DOMAIN_COLUMN,
    MANAGED,
    SAME_DATA,
    SET_ITSELF,
    Recipe,
    Stage,
    StageRun,
    bring_to_end,
    losses,
    make_stage,
    read_settings,
    refuse_many_nodes,
    run_of,
    state,
)

STAGES = ("reference", "proxy", "final")
FIXED_MIXERS = ("proportional", "uniform", "static")
"""Mixers that the reference may use. Their shares do not change during training."""
WEIGHTS_FILE = Path("dataflex") / "domain_weights.json"
"""File with the domain weights that the proxy found, in the proxy's output folder."""


class DoremiSettings(BaseModel):
    """The keys of a file for ``dataflex-cli doremi``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    base: Base = Field(description="A LLaMA-Factory YAML, as a path relative to this file, or its keys.")
    output_dir: str = Field(min_length=1, description="Folder to which the three trainings write.")
    reference: dict[str, Any] = Field(
        default_factory=dict, description="Keys that the reference training changes in the base."
    )
    proxy: dict[str, Any] = Field(default_factory=dict, description="Keys that the proxy training changes in the base.")
    final: dict[str, Any] = Field(default_factory=dict, description="Keys that the final training changes in the base.")

    @field_validator(*STAGES, mode="before")
    @classmethod
    def _empty_is_the_base(cls, value: Any) -> Any:
        return {} if value is None else value


def doremi(path: Path, print_only: bool = False, dry_run: bool = False, program: Sequence[str] = PROGRAM) -> int:
    """Train the stages that are not complete, and print the shares, the weights and the final losses.

    Args:
        path: the file with the settings.
        print_only: only print the YAMLs of the stages. Model folders of stages with ``model_config`` are written.
        dry_run: only print the state of each stage.
        program: command line that trains.

    Returns:
        The exit status: 0, 1 if a stage failed, 130 after Ctrl-C, 143 after SIGTERM.

    Raises:
        ConfigError: with the problems of all stages, before a training starts.
    """
    if print_only:
        stages, notes = load(path)
        say(notes)
        _print_yamls(stages)
        return 0

    def work() -> Work:
        stages, notes = load(path)
        return Work(stages[0].folder.parent, lambda: [state_table(stages)], lambda: _run(stages, program), notes)

    kept = "Complete stages are kept, and a stage with a checkpoint is resumed"
    return carry_out(work, dry_run=dry_run, on_stop=f"stopped. {kept}. To continue: dataflex-cli doremi {path}")


def load(path: Path) -> tuple[tuple[Stage, ...], list[str]]:
    """Return the three stages, and notes for the user.

    Raises:
        ConfigError: with the problems of all stages together.
    """
    settings = read_settings(path, DoremiSettings)
    problems: list[Problem] = []
    notes: list[str] = []
    base, folder = read_base(settings.base, path, problems, notes)
    notes += replaced_keys(base, (*MANAGED, f"{SECTION}.mix"), "command")
    output = expanded(settings.output_dir)
    found = {
        recipe.name: make_stage(recipe, base, getattr(settings, recipe.name), folder, output)
        for recipe in _recipes(base, settings, output)
    }
    problems += joined({name: each for name, (_, each) in found.items()})
    stages = tuple(stage for stage, _ in found.values() if stage is not None)
    if problems:
        raise ConfigError(problems=problems, source=str(path))
    return stages, notes


def _recipes(base: Mapping[str, Any], settings: DoremiSettings, output: Path) -> Iterator[Recipe]:
    mix, data = f"{SECTION}.mix", {"dataset": SAME_DATA, DOMAIN_COLUMN: SAME_DATA}
    model = settings.reference.get("model_name_or_path") or base.get("model_name_or_path")
    model = assets.resolve(model) if isinstance(model, str) else model
    names = checks.dataset_names(RunConfig(dict(base), None))
    yield Recipe("reference", {mix: {"method": "proportional"}}, data, check=_reference_problems)
    yield Recipe(
        "proxy",
        {mix: {"method": "doremi", "reference_model": str(output / "reference")}},
        {**data, **{f"{mix}.{key}": SET_ITSELF for key in ("method", "reference_model")}},
        {f"{mix}.reference_model": model},
        _data_problems,
    )
    yield Recipe(
        "final",
        {mix: {"method": "static", "proportions": str(output / "proxy" / WEIGHTS_FILE), "unit": "tokens"}},
        {**data, **{f"{mix}.{key}": SET_ITSELF for key in ("method", "proportions", "unit")}},
        {f"{mix}.proportions": dict.fromkeys(names, 1.0)},
        _data_problems,
    )


def _data_problems(config: RunConfig) -> Iterator[Problem]:
    divided = config.dataflex is not None and config.dataflex.domain_column is not None
    if not divided and len(checks.dataset_names(config)) < 2:
        yield Problem(
            "dataset", f"DoReMi weighs domains against each other; name two or more data sets, or set {DOMAIN_COLUMN}."
        )


def _reference_problems(config: RunConfig) -> Iterator[Problem]:
    yield from _data_problems(config)
    for key, (cls, _) in config.params.items():
        if family_key(key) in ("select", "weight") or (key == "mix" and cls.name not in FIXED_MIXERS):
            allowed = f"use one of {', '.join(FIXED_MIXERS)}" if key == "mix" else "remove it with null"
            yield Problem(f"{SECTION}.{key}", f"the reference must be trained without {cls.name!r}; {allowed}.")


def _print_yamls(stages: Sequence[Stage]) -> None:
    for stage in stages:
        stage.write_model()
    texts = [
        f"# {stage.name}.yaml\n{yaml.safe_dump(masked(stage.yaml()), sort_keys=False, allow_unicode=True)}"
        for stage in stages
    ]
    print("---\n".join(texts), end="")


def state_table(stages: Sequence[Stage]) -> Table:
    """Return a table with the state of each stage.

    A stage depends on the result of the stage before it. So its state is not known until that stage is complete.
    """
    rows: list[list[str]] = []
    before: StageRun | None = None
    waiting: str | None = None
    for stage in stages:
        found = f"after {waiting}"
        if waiting is None:
            before = run_of(stage, before)
            found = state(stage, before)
            waiting = None if found == "complete" else stage.name
            if found == "changed":
                found = "changed: will be set aside and trained again"
        else:
            waiting = stage.name
        rows.append([stage.name, found, str(stage.folder)])
    return Table("Plan", ["stage", "state", "folder"], rows, 3)


def _run(stages: Sequence[Stage], program: Sequence[str]) -> int:
    refuse_many_nodes()
    before: StageRun | None = None
    for number, stage in enumerate(stages, 1):
        before = run_of(stage, before)
        error = bring_to_end(stage, before, program, f"stage {number} of {len(stages)}")
        if error is None and stage.name == "proxy" and _proportions(stage.folder) is None:
            error = (
                f"{stage.folder / WEIGHTS_FILE} is missing or has no proportions; remove {stage.folder} to "
                "train the proxy again"
            )
        if error is not None:
            print(f"dataflex: {stage.name} failed: {error}", file=sys.stderr)
            return 1
    print_tables([result_table(stages)])
    return 0


def _proportions(folder: Path) -> dict[str, float] | None:
    found = (read_object(folder / WEIGHTS_FILE) or {}).get("proportions")
    return found if isinstance(found, dict) else None


def result_table(stages: Sequence[Stage]) -> Table:
    """Return a table with the share in the reference, the weight and the final loss of each domain."""
    reference, proxy, final = (stage.folder for stage in stages)
    weights, shares, found = _proportions(proxy) or {}, _token_shares(reference), dict(losses(final))
    header = ["data set", "reference share", "proxy average weight"] + (["final loss"] if found else [])
    columns: tuple[Mapping[str, float | None], ...] = (shares, weights, found) if found else (shares, weights)
    rows = [
        [name, *(NOTHING if (value := column.get(name)) is None else f"{value:.4f}" for column in columns)]
        for name in dict.fromkeys([*weights, *found])
    ]
    note = f"Shares are shares of the trained tokens. The final model is in {final}."
    return Table("DoReMi", header, rows, 1, (note,))


def _token_shares(folder: Path) -> dict[str, float | None]:
    """Return the share of each domain in the tokens that a run trained on; empty if the run logged none."""
    prefix = "dataflex/domain_tokens/"
    history = (read_object(folder / "trainer_state.json") or {}).get("log_history") or []
    tokens: dict[str, float] = {}
    for entry in history:
        tokens |= {key.removeprefix(prefix): value for key, value in entry.items() if key.startswith(prefix)}
    total = sum(tokens.values())
    return {name: value / total for name, value in tokens.items()} if total else {}
