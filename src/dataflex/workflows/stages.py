"""A stage of a workflow: one training, made of the base and what the stage changes in it, in a folder of its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from dataflex.compare.digests import digests_of_named
from dataflex.compare.experiment import KEY_FILE, Plan, Run, absolute_plugin, keyed
from dataflex.compare.merging import dotted, idle_changes, keys_of, merged
from dataflex.compare.result import state_of
from dataflex.compare.runner import Workers, execute, set_aside
from dataflex.compare.settings import problem_of
from dataflex.config import checks
from dataflex.config.loading import SECTION, RunConfig, parse_config
from dataflex.config.processes import is_worker
from dataflex.config.yaml_file import read_yaml
from dataflex.errors import ConfigError, Problem
from dataflex.record.files import read_object
from dataflex.record.versions import installed_versions
from dataflex.workflows.small_model import SmallModel, small_model

MANAGED = ("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "do_train")
"""Keys that every workflow sets or leaves out itself: in the base they are replaced, in a stage refused."""

SET_ITSELF = "is set by the command itself."
SAME_DATA = "has to be the same in all trainings; put it in the base."
DOMAIN_COLUMN = f"{SECTION}.domain_column"

MODEL_CHANGES = "model_config"
"""The key of a stage that is no key of a training: the model is made from the base's, and trained from scratch."""

ALONE = Workers(1, whole_machine=True)
"""One stage at a time, launched as by hand."""


@dataclass(frozen=True)
class Recipe:
    """What a workflow says about one of its stages.

    Attributes:
        name: of the stage, and of its folder.
        sets: what it changes in the base, before the user does.
        managed: key that the user may not change -> why.
        stand_ins: key -> a value to check in the place of a path that an earlier stage makes.
        check: what is right for any training, and not for this stage.
    """

    name: str
    sets: Mapping[str, Any]
    managed: Mapping[str, str] = field(default_factory=dict)
    stand_ins: Mapping[str, Any] = field(default_factory=dict)
    check: Callable[[RunConfig], Iterator[Problem]] | None = None


@dataclass(frozen=True)
class Stage:
    """A stage that has no problems.

    Attributes:
        name: of the stage.
        raw: the YAML it is trained with.
        config: the same, parsed.
        source: the same with the model that ``model`` is made from, assets resolved: its files are those the stage
            depends on.
        model: the model folder to be made before; None where the base's is trained.
        base: folder of the file the base is in.
    """

    name: str
    raw: dict[str, Any]
    config: RunConfig
    source: RunConfig
    model: SmallModel | None
    base: Path

    @property
    def folder(self) -> Path:
        """Its output_dir."""
        return Path(str(self.config.llamafactory["output_dir"]))

    @property
    def plan(self) -> Plan:
        """What the runner needs to know."""
        given = self.config.llamafactory
        asked = bool(given.get("do_eval")) or str(given.get("eval_strategy") or "no") != "no"
        measured = bool(checks.dataset_names(self.config, "eval_dataset")) and not given.get("predict_with_generate")
        return Plan({self.name: self.source}, self.base, (), asked and measured)

    def write_model(self) -> None:
        """Make the model folder, where the stage has one of its own."""
        if self.model is not None:
            self.model.write(Path(str(self.config.llamafactory["model_name_or_path"])))

    def yaml(self) -> dict[str, Any]:
        """Return what is trained, such that it can be written into any folder."""
        section = self.raw[SECTION]
        if not section.get("plugins"):
            return self.raw
        plugins = [absolute_plugin(name, self.base) for name in section["plugins"]]
        return {**self.raw, SECTION: {**section, "plugins": plugins}}


@dataclass(frozen=True, eq=False)
class StageRun(Run):
    """The run of a stage, of which there is one for all seeds."""

    @property
    def name(self) -> str:
        """That of the stage."""
        return self.variant


def read_settings(path: Path, kind: type[BaseModel]) -> Any:
    """Read and validate the file of a workflow.

    Raises:
        ConfigError: with every problem found in its keys.
    """
    try:
        return kind.model_validate(read_yaml(path, []))
    except ValidationError as error:
        problems = [problem_of(item, (), {(): kind}) for item in error.errors()]
        raise ConfigError(problems=problems, source=str(path)) from error


def without_managed(base: Mapping[str, Any]) -> dict[str, Any]:
    """Return the base without what the workflow says itself."""
    return {key: value for key, value in base.items() if key not in MANAGED}


def make_stage(
    recipe: Recipe, base: Mapping[str, Any], change: Mapping[str, Any], base_folder: Path, output: Path
) -> tuple[Stage | None, list[Problem]]:
    """Return a stage, checked as ``dataflex-cli check`` does, or its problems.

    Args:
        recipe: what the workflow says about it.
        base: the configuration all stages start from, in native keys.
        change: what the user changes in it for this stage.
        base_folder: of the file the base is in.
        output: folder of the workflow.
    """
    changes = {key: value for key, value in change.items() if key != MODEL_CHANGES}
    try:
        fixed = {**dict.fromkeys(MANAGED, SET_ITSELF), **recipe.managed}
        own = {key: fixed[each] for key in keys_of(changes) for each in fixed if _touches(key, each)}
        before = merged(without_managed(base), recipe.sets)
        idle = list(idle_changes(before, changes))
        raw = merged(before, changes)
    except (OmegaConfBaseException, ValueError) as error:
        return None, [Problem("", f"cannot be merged into the base: {str(error).splitlines()[0]}")]
    if own:
        return None, [Problem(key, why) for key, why in own.items()]
    if idle:
        return None, idle
    if not isinstance(raw.get(SECTION, {}), dict):
        return None, [Problem(SECTION, f"must be a mapping, got {raw[SECTION]!r}.")]
    raw = {**raw, "do_train": True, "output_dir": str(output / recipe.name), SECTION: raw.get(SECTION, {})}
    model, problems = _model(raw, change) if MODEL_CHANGES in change else (None, [])
    source = raw if model is None else {**raw, "train_from_scratch": True}
    if model is not None:
        folder = output / "models" / f"{recipe.name}-{model.key[:8]}"
        raw = {**source, "model_name_or_path": str(folder)}
    now = merged({**source, "output_dir": str(output)}, recipe.stand_ins)
    checked, found = parse_config(now, base=base_folder)
    problems += found or [*checks.problems_of(checked), *(recipe.check(checked) if recipe.check else ())]
    config, further = parse_config(raw, base=base_folder)
    later, _ = parse_config(source, base=base_folder)
    problems += [problem for problem in further if problem not in problems]
    if problems:
        return None, problems
    return Stage(recipe.name, raw, config, later.with_assets(), model, base_folder), []


def _touches(key: str, fixed: str) -> bool:
    """Return whether giving ``key`` a value changes ``fixed``, or a part of it."""
    return f"{key}.".startswith(f"{fixed}.") or f"{fixed}.".startswith(f"{key}.")


def _model(raw: Mapping[str, Any], change: Mapping[str, Any]) -> tuple[SmallModel | None, list[Problem]]:
    problems = []
    method = str(raw.get("finetuning_type", "lora"))
    if method != "full":
        message = f"{method!r} trains a part of a model that is there; with {MODEL_CHANGES} it must be full."
        problems.append(Problem("finetuning_type", message))
    if raw.get("train_from_scratch", True) is not True:
        problems.append(Problem("train_from_scratch", f"with {MODEL_CHANGES} there are no weights to begin with."))
    try:
        revision = raw.get("model_revision")
        return small_model(str(raw.get("model_name_or_path") or ""), revision, change[MODEL_CHANGES]), problems
    except ConfigError as error:
        return None, [*problems, *(replace(each, key=dotted(MODEL_CHANGES, each.key)) for each in error.problems)]


def run_of(stage: Stage, after: Run | None = None) -> StageRun:
    """Return the run of a stage, named by all it depends on.

    Args:
        stage: with everything there that it names.
        after: the run before it, on which it depends.

    Raises:
        ConfigError: if a file cannot be read.
    """
    found = digests_of_named(stage.source, stage.base)
    depends_on = {"contents": found, "versions": installed_versions(), "after": None if after is None else after.key}
    key, configuration = keyed(stage.config, stage.base, depends_on)
    seed = int(stage.config.llamafactory.get("seed", 42))
    return StageRun(stage.name, seed, {**configuration, "output_dir": str(stage.folder)}, found, key, stage.folder)


def state(stage: Stage, run: Run) -> str:
    """Return how far the run of a stage is: a state of a comparison's run, or ``changed``.

    Raises:
        ConfigError: if something else is in its folder.
    """
    key = read_object(stage.folder / KEY_FILE)
    if key is not None:
        return "changed" if key.get("key") != run.key else state_of(run, stage.plan)
    if stage.folder.is_dir() and any(stage.folder.iterdir()):
        raise ConfigError(
            f"output_dir: {stage.folder} holds something that this command did not make (it has no {KEY_FILE}); move "
            "it away, or choose another folder."
        )
    return "to run"


def bring_to_end(stage: Stage, run: Run, program: Sequence[str], place: str) -> str | None:
    """Train a stage as far as it is not trained, and return why it failed, if it did.

    Args:
        stage: the stage.
        run: its run.
        program: the command line that trains.
        place: its number among the stages, for the terminal.

    Raises:
        ConfigError: if something else is in its folder.
        KeyboardInterrupt: if the user stops it; the process has ended then.
    """
    found = state(stage, run)
    if found == "changed":
        print(f"{stage.name}: what it depends on changed; the run of before is now in {set_aside(stage.folder)}")
    if found == "complete":
        print(f"{place}: {stage.name}: complete ({stage.folder})", flush=True)
        return None
    print(f"{place}: {stage.name}", flush=True)
    stage.write_model()
    return execute(stage.plan, [run], ALONE, program).get(run.name)


def refuse_many_nodes() -> None:
    """Refuse an environment in which a workflow could not launch its stages.

    Raises:
        ConfigError: inside torchrun, and for a training on several machines.
    """
    if is_worker():
        raise ConfigError("this command launches trainings itself; start it as one process, not with torchrun.")
    if os.environ.get("NNODES", "1") != "1" or "RDZV_ID" in os.environ:
        raise ConfigError(
            "environment variable NNODES: a training on several machines has to be launched on each of them; print the "
            "stages with --print, and train them one after another."
        )


def losses(folder: Path) -> Iterator[tuple[str, float | None]]:
    """Yield evaluation data set, or mean, and loss at the end of a run; nothing where it did not evaluate."""
    evaluation = (read_object(folder / "dataflex" / "summary.json") or {}).get("evaluation") or {}
    for name, numbers in (evaluation.get("domains") or {}).items():
        yield name, numbers.get("loss")
    if "token_weighted" in evaluation:
        yield "all, token-weighted", evaluation["token_weighted"].get("loss")
