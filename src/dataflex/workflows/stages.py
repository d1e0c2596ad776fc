"""A stage of a workflow: one training with the base's keys, the stage's changes and a separate output folder."""

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
"""Keys that every workflow sets or leaves out itself. They are replaced in the base and refused in a stage."""

SET_ITSELF = "is set by the command itself; remove it."
SAME_DATA = "must be the same in all trainings; set it in the base."
DOMAIN_COLUMN = f"{SECTION}.domain_column"

MODEL_CHANGES = "model_config"
"""Key of a stage with changes of the base model's configuration. Such a stage trains from scratch."""

ALONE = Workers(1, whole_machine=True)
"""Run one stage at a time, on the whole machine, launched as a user would launch it."""


@dataclass(frozen=True)
class Recipe:
    """Definition of a stage by its workflow.

    Attributes:
        name: name of the stage and of its folder.
        sets: keys that the workflow changes in the base, before the user's changes.
        managed: key that the user may not change -> the reason.
        stand_ins: key -> value that is checked instead of a path that an earlier stage writes.
        check: yields problems of settings that are right for a training in general, but not for this stage.
    """

    name: str
    sets: Mapping[str, Any]
    managed: Mapping[str, str] = field(default_factory=dict)
    stand_ins: Mapping[str, Any] = field(default_factory=dict)
    check: Callable[[RunConfig], Iterator[Problem]] | None = None


@dataclass(frozen=True)
class Stage:
    """A stage without problems.

    Attributes:
        name: name of the stage.
        raw: content of the YAML with which the stage is trained.
        config: ``raw``, parsed.
        source: the same configuration, but with the model from which ``model`` is derived and with assets resolved. The
            stage depends on the files that it names.
        model: model folder to write before the training; None if the base's model is trained.
        base: folder of the file with the base.
    """

    name: str
    raw: dict[str, Any]
    config: RunConfig
    source: RunConfig
    model: SmallModel | None
    base: Path

    @property
    def folder(self) -> Path:
        """The stage's ``output_dir``."""
        return Path(str(self.config.llamafactory["output_dir"]))

    @property
    def plan(self) -> Plan:
        """The stage as the runner of comparisons needs it."""
        given = self.config.llamafactory
        asked = bool(given.get("do_eval")) or str(given.get("eval_strategy") or "no") != "no"
        measured = bool(checks.dataset_names(self.config, "eval_dataset")) and not given.get("predict_with_generate")
        return Plan({self.name: self.source}, self.base, (), asked and measured)

    def write_model(self) -> None:
        """Write the model folder if the stage trains a changed model."""
        if self.model is not None:
            self.model.write(Path(str(self.config.llamafactory["model_name_or_path"])))

    def yaml(self) -> dict[str, Any]:
        """Return the content of the stage's YAML with absolute plug-in paths, so that it is valid in any folder."""
        section = self.raw[SECTION]
        if not section.get("plugins"):
            return self.raw
        plugins = [absolute_plugin(name, self.base) for name in section["plugins"]]
        return {**self.raw, SECTION: {**section, "plugins": plugins}}


@dataclass(frozen=True, eq=False)
class StageRun(Run):
    """The run of a stage. A stage has one run, while a variant of a comparison has one for each seed."""

    @property
    def name(self) -> str:
        """Name of the stage."""
        return self.variant


def read_settings(path: Path, kind: type[BaseModel]) -> Any:
    """Read and validate the file of a workflow.

    Raises:
        ConfigError: with all problems of its keys together.
    """
    try:
        return kind.model_validate(read_yaml(path, []))
    except ValidationError as error:
        problems = [problem_of(item, (), {(): kind}) for item in error.errors()]
        raise ConfigError(problems=problems, source=str(path)) from error


def without_managed(base: Mapping[str, Any]) -> dict[str, Any]:
    """Return the base without the keys that the workflow sets itself."""
    return {key: value for key, value in base.items() if key not in MANAGED}


def make_stage(
    recipe: Recipe, base: Mapping[str, Any], change: Mapping[str, Any], base_folder: Path, output: Path
) -> tuple[Stage | None, list[Problem]]:
    """Return a stage and an empty list, or None and the problems that ``dataflex-cli check`` would find.

    Args:
        recipe: definition of the stage by its workflow.
        base: configuration that all stages share, without flat keys of the earlier release.
        change: keys that the user changes in the base for this stage.
        base_folder: folder of the file with the base.
        output: output folder of the workflow.
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
    # Paths that earlier stages or write_model() will write do not exist yet, so existing ones are checked instead.
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
    """Return whether a value for ``key`` changes ``fixed``, a part of it or the mapping that contains it."""
    return f"{key}.".startswith(f"{fixed}.") or f"{fixed}.".startswith(f"{key}.")


def _model(raw: Mapping[str, Any], change: Mapping[str, Any]) -> tuple[SmallModel | None, list[Problem]]:
    problems = []
    method = str(raw.get("finetuning_type", "lora"))
    if method != "full":
        message = f"must be full with {MODEL_CHANGES}, got {method!r}, which trains only a part of an existing model."
        problems.append(Problem("finetuning_type", message))
    if raw.get("train_from_scratch", True) is not True:
        problems.append(
            Problem(
                "train_from_scratch",
                f"must be true with {MODEL_CHANGES}, because a changed model has no weights; remove it.",
            )
        )
    try:
        revision = raw.get("model_revision")
        return small_model(str(raw.get("model_name_or_path") or ""), revision, change[MODEL_CHANGES]), problems
    except ConfigError as error:
        return None, [*problems, *(replace(each, key=dotted(MODEL_CHANGES, each.key)) for each in error.problems)]


def run_of(stage: Stage, after: Run | None = None) -> StageRun:
    """Return the run of a stage, with a key computed from everything that the stage depends on.

    Args:
        stage: the stage. All files that it names must exist.
        after: run of the stage before, on which this stage depends; None for the first stage.

    Raises:
        ConfigError: if a file cannot be read.
    """
    found = digests_of_named(stage.source, stage.base)
    depends_on = {"contents": found, "versions": installed_versions(), "after": None if after is None else after.key}
    key, configuration = keyed(stage.config, stage.base, depends_on)
    seed = int(stage.config.llamafactory.get("seed", 42))
    return StageRun(stage.name, seed, {**configuration, "output_dir": str(stage.folder)}, found, key, stage.folder)


def state(stage: Stage, run: Run) -> str:
    """Return the state of a stage's run: a state of a comparison's run, or ``changed`` if a dependency changed.

    Raises:
        ConfigError: if the stage's folder holds other files.
    """
    key = read_object(stage.folder / KEY_FILE)
    if key is not None:
        return "changed" if key.get("key") != run.key else state_of(run, stage.plan)
    if stage.folder.is_dir() and any(stage.folder.iterdir()):
        raise ConfigError(
            f"output_dir: {stage.folder} holds files that this command did not write (there is no {KEY_FILE} in it); "
            "move them, or choose another folder."
        )
    return "to run"


def bring_to_end(stage: Stage, run: Run, program: Sequence[str], place: str) -> str | None:
    """Train a stage until it is complete. Return the reason if it failed, otherwise None.

    Args:
        stage: the stage.
        run: run of the stage.
        program: command line that trains.
        place: number of the stage, as text for the terminal.

    Raises:
        ConfigError: if the stage's folder holds other files.
        KeyboardInterrupt: if the user stops the command. The training process has ended by then.
    """
    found = state(stage, run)
    if found == "changed":
        print(f"{stage.name}: its settings or files changed; the earlier run is kept in {set_aside(stage.folder)}")
    if found == "complete":
        print(f"{place}: {stage.name}: complete ({stage.folder})", flush=True)
        return None
    print(f"{place}: {stage.name}", flush=True)
    stage.write_model()
    return execute(stage.plan, [run], ALONE, program).failed.get(run.name)


def refuse_many_nodes() -> None:
    """Refuse an environment in which a workflow cannot launch its stages.

    Raises:
        ConfigError: if the process was started by torchrun, or if several machines are set.
    """
    if is_worker():
        raise ConfigError("this command launches the trainings itself; start it without torchrun, as a single process.")
    if os.environ.get("NNODES", "1") != "1" or "RDZV_ID" in os.environ:
        raise ConfigError(
            "environment variable NNODES: this command cannot launch trainings on several machines. Print the stages "
            "with --print, and train them in sequence by launching each on every machine."
        )


def losses(folder: Path) -> Iterator[tuple[str, float | None]]:
    """Yield (evaluation data set or mean, loss) of a run's last evaluation; nothing if the run did not evaluate."""
    evaluation = (read_object(folder / "dataflex" / "summary.json") or {}).get("evaluation") or {}
    for name, numbers in (evaluation.get("domains") or {}).items():
        yield name, numbers.get("loss")
    if "token_weighted" in evaluation:
        yield "all, token-weighted", evaluation["token_weighted"].get("loss")
