"""The downstream tasks of a comparison: their settings, their files, and the known metrics of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from dataflex.compare.digests import digest, expanded
from dataflex.compare.merging import dotted
from dataflex.compare.settings import ExperimentSettings, problem_of
from dataflex.data.fingerprints import file_digest
from dataflex.errors import ConfigError, Problem

if TYPE_CHECKING:
    from dataflex.evaluation.tasks import TaskSettings

HARNESS = "lm_eval"
"""The package that evaluates the tasks."""

TASK_METRICS = {
    "multiple_choice": ("acc", "acc_norm"),
    "generation": ("exact_match", "exact_match_flexible"),
}
"""Form of a task -> its metrics. The first one gets a finding by default."""


@dataclass(frozen=True)
class Task:
    """A downstream task of every run.

    Attributes:
        name: name of the task and of its results.
        settings: the settings for ``dataflex-cli eval``, with absolute paths.
        key: digest of the settings, of the files they name and of the harness's version.
    """

    name: str
    settings: dict[str, Any]
    key: str


def tasks_of(
    settings: ExperimentSettings, here: Path, problems: list[Problem]
) -> tuple[tuple[Task, ...], dict[str, tuple[str, ...]]]:
    """Return the tasks, and the known metrics of each. Problems are appended to ``problems``."""
    if settings.evaluate is None:
        return (), {}
    from dataflex.evaluation.tasks import TaskSettings, load_task, task_problems

    if find_spec(HARNESS) is None:
        problems.append(Problem("evaluate", 'needs lm-evaluation-harness: pip install "dataflex[eval]".'))
        return (), {}
    found: dict[str, Task] = {}
    known: dict[str, tuple[str, ...]] = {}
    named: list[tuple[str, str]] = []
    for number, entry in enumerate(settings.evaluate.tasks):
        key = f"evaluate.tasks.{number}"
        for task in _task_settings(key, entry, here, problems, TaskSettings):
            bad = task_problems(task)
            problems += [replace(problem, key=dotted(key, problem.key)) for problem in bad]
            if task.name in found:
                problems.append(Problem(key, f"there is another task {task.name!r}; give each task its own name."))
            if bad:
                continue
            if task.task is not None:
                named.append((key, task.task))
            read = load_task(task)[0] if task.task is None else None
            known[task.name] = TASK_METRICS[read.form] if read is not None else ()
            dumped = task.model_dump(mode="json", exclude_none=True)
            found[task.name] = Task(task.name, dumped, task_key(dumped))
    problems += _unknown_tasks(named)
    return tuple(found.values()), known


def task_key(settings: Mapping[str, Any]) -> str:
    """Return a digest of a task's settings, of the files they name and of the harness's version."""
    files = {key: file_digest(Path(settings[key])) for key in ("file", "fewshot_file") if key in settings}
    return digest([{**settings, **files}, version(HARNESS)])  # a file counts by its content, wherever it is


def _unknown_tasks(named: Sequence[tuple[str, str]]) -> Iterator[Problem]:
    """Yield a problem for each name that the harness does not know.

    Without names the harness is not loaded, because loading takes seconds.
    """
    if named:
        from dataflex.evaluation.harness import unknown_tasks

        unknown_names = unknown_tasks([name for _, name in named])
        for key, name in named:
            if name in unknown_names:
                yield Problem(key, f"neither a file nor a task of lm-evaluation-harness: {unknown_names[name]}.")


def _task_settings(key: str, entry: Any, here: Path, problems: list[Problem], kind: type[TaskSettings]) -> Any:
    """Return the settings of one entry: a mapping, a file, or the name of a task of the harness."""
    from dataflex.evaluation.tasks import read_settings as read_tasks

    if isinstance(entry, str):
        is_file = Path(entry).suffix in (".jsonl", ".yaml", ".yml")
        try:
            return read_tasks([str(here / expanded(entry)) if is_file else entry])
        except ConfigError as error:
            problems += [replace(problem, key=dotted(key, problem.key)) for problem in error.problems]
            return []
    named = entry.get("file") or entry.get("task")
    default = {"name": Path(str(named)).stem if entry.get("file") else str(named)} if named else {}
    try:
        return [kind.model_validate({**default, **entry}, context={"base": here})]
    except ValidationError as error:
        problems += [problem_of(item, (key,), {(): kind}) for item in error.errors()]
        return []
