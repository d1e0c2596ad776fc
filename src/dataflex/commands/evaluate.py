"""``dataflex-cli eval``: find the model, the tasks and the folder of the results, and evaluate."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataflex import assets
from dataflex.errors import ConfigError, Problem, did_you_mean
from dataflex.evaluation.downstream import Asking, evaluate_tasks
from dataflex.evaluation.results import result_tables
from dataflex.evaluation.tasks import read_settings, task_problems
from dataflex.record.configuration import read_configuration
from dataflex.report.tables import print_tables

_ADAPTER = ("adapter_model.safetensors", "adapter_model.bin")
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Target:
    """The model that is evaluated.

    Attributes:
        model: a folder with weights, or the name of a hub model.
        adapter: folder of the adapter on the model. None means no adapter.
        run: the run folder that the user named. None means that the user named a model.
    """

    model: str
    adapter: Path | None
    run: Path | None


def resolve_target(named: str, adapter: Path | None = None) -> Target:
    """Find the model behind a run folder, a model folder, ``asset:NAME`` or a hub name.

    Args:
        named: the run, folder or model that the user named.
        adapter: folder of an adapter to load on the model. None means no further adapter.

    Raises:
        ConfigError: if the folder does not exist, if it has no weights, or if the training of the run is not finished.
    """
    if adapter is not None:
        _base_of(adapter)
    if named.startswith(assets.PREFIX):
        return Target(assets.resolve(named), adapter, None)
    folder = Path(named).expanduser()
    if not folder.exists():
        if not _HUB_NAME.fullmatch(named) or (len(folder.parts) > 1 and folder.parent.is_dir()):
            beside = [str(path) for path in folder.parent.iterdir()] if folder.parent.is_dir() else []
            raise ConfigError(f"no such run or model folder: {named}{did_you_mean(str(folder), beside) or '.'}")
        return Target(named, adapter, None)
    if not folder.is_dir():
        raise ConfigError(f"{named} is a file. Expected a run folder, a model folder, asset:NAME or a hub model.")
    run = folder if (folder / "dataflex" / "config.yaml").is_file() else None
    if run is not None:
        _check_finished(run)
    if (folder / "adapter_config.json").is_file():
        if adapter is not None:
            raise ConfigError(f"--adapter: {named} already has an adapter. Name its base model instead.")
        return Target(_base_of(folder), folder, folder)
    if not (folder / "config.json").is_file() or not _has(folder, _WEIGHTS):
        raise ConfigError(f"{named} has no weights{_checkpoints_in(folder)}.")
    return Target(str(folder), adapter, run)


def _check_finished(run: Path) -> None:
    """Check that a run has ended and has weights that can be evaluated, or raise an error."""
    if not (run / "dataflex" / "summary.json").is_file():
        raise ConfigError(
            f"{run}: the training has not ended (dataflex/summary.json does not exist), so there are no weights to "
            f"evaluate{_checkpoints_in(run)}."
        )
    if not _has(run, _WEIGHTS) and not _has(run, _ADAPTER):
        raise ConfigError(f"{run} has no weights: they were not saved, or were deleted{_checkpoints_in(run)}.")
    recorded = read_configuration(run)
    earlier = [name for name in str(recorded.get("adapter_name_or_path") or "").split(",") if name]
    if len(earlier) > 1 or (earlier and recorded.get("create_new_adapter")):
        raise ConfigError(
            f"{run}: the adapter was trained on a base model into which other adapters were merged "
            "(adapter_name_or_path). Export the whole model with dataflex-cli export, and evaluate the export."
        )


def _base_of(folder: Path) -> str:
    """Return the base model of an adapter folder."""
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise ConfigError(f"{folder} is no adapter folder: adapter_config.json is missing.")
    if not _has(folder, _ADAPTER):
        raise ConfigError(f"{folder} has no adapter weights ({' or '.join(_ADAPTER)}).")
    try:
        base = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} names no base model (base_model_name_or_path).") from error
    base = assets.resolve(str(base))
    if not Path(base).exists() and not _HUB_NAME.fullmatch(base):
        raise ConfigError(
            f"{path}: the base model {base} does not exist. Name another, and this folder with --adapter."
        )
    return base


def _has(folder: Path, names: tuple[str, ...]) -> bool:
    return any((folder / name).is_file() for name in names)


def _checkpoints_in(folder: Path) -> str:
    """Return the end of a sentence that names the last checkpoint in a folder. Without one the text is empty."""
    numbers = sorted(
        int(path.name.removeprefix("checkpoint-"))
        for path in folder.glob("checkpoint-*")
        if path.name.removeprefix("checkpoint-").isdigit()
    )
    return f"; the last checkpoint is {folder / f'checkpoint-{numbers[-1]}'}" if numbers else ""


@dataclass(frozen=True)
class Request:
    """An evaluation that the user requests.

    Attributes:
        named: run folder, model folder, ``asset:NAME`` or the name of a hub model.
        tasks: files or names of tasks, as :func:`dataflex.evaluation.tasks.read_settings` reads them.
        adapter: folder of an adapter to load on the model. None means no further adapter.
        output: folder of the results. None means ``dataflex/tasks`` of the run.
        changes: settings that replace the same settings of every task.
    """

    named: str
    tasks: list[str]
    adapter: Path | None
    output: Path | None
    changes: dict[str, Any]


def evaluate(request: Request, asking: Asking) -> Path:
    """Evaluate, print the tables, and return the folder of the results.

    Args:
        request: the model, the tasks and the folders.
        asking: the settings of the forward passes, such as batch size and data type.

    Raises:
        ConfigError: if the arguments, the tasks or the model have errors. The error lists all of them.
    """
    problems: list[Problem] = []
    settings = []
    try:
        settings = read_settings(request.tasks, request.changes)
        problems += [problem for each in settings for problem in task_problems(each)]
    except ConfigError as error:
        problems += error.problems
    target, output = None, request.output
    try:
        target = resolve_target(request.named, request.adapter)
        if output is None and target.run is not None:
            output = target.run / "dataflex" / "tasks"
        if output is None:
            missing = f"required, because {request.named} is not a run folder; name a folder for the results."
            problems.append(Problem("--output", missing))
    except ConfigError as error:
        problems += error.problems
    if problems or target is None or output is None:
        raise ConfigError(problems=problems, source="eval")
    print_tables(result_tables(evaluate_tasks(target.model, target.adapter, settings, output, asking)))
    return output
