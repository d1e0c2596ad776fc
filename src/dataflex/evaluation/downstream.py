"""Downstream evaluation of a model on tasks, with one JSON file of results for each task."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataflex.errors import ConfigError, Problem
from dataflex.evaluation.results import CHOICE_METRICS, Metric, TaskResult, chance_note, mean_of_subjects
from dataflex.evaluation.tasks import FileTask, TaskSettings, load_task, task_problems
from dataflex.files import write_atomically
from dataflex.record.versions import installed_versions

if TYPE_CHECKING:
    from dataflex.evaluation.harness import Outcome

BATCH_SIZE = 8
DTYPES = ("auto", "float32", "bfloat16", "float16")
SEED = 42


@dataclass(frozen=True)
class Asking:
    """How questions are put to a model.

    Attributes:
        batch_size: prompts in a batch, at least 1.
        device: the device to run on. None means the accelerator if there is one.
        dtype: one of `DTYPES`; ``auto`` is the type that the weights are stored in.
        apply_chat_template: format the questions with the model's chat template.
        seed: seed of the draw under a task's ``limit``, and of anything that a task of the harness draws.
    """

    batch_size: int = BATCH_SIZE
    device: str | None = None
    dtype: str = "auto"
    apply_chat_template: bool = False
    seed: int = SEED


DEFAULT = Asking()


def evaluate_tasks(
    model: str, adapter: Path | None, tasks: Sequence[TaskSettings], output: Path, asking: Asking = DEFAULT
) -> list[TaskResult]:
    """Run tasks one after another, and write ``NAME.json`` of each as soon as it is done.

    Args:
        model: a folder with weights, or a name on the hub.
        adapter: folder of a PEFT adapter of that model.
        tasks: the tasks to run, with distinct names.
        output: folder to write to, created if it does not exist. An earlier result of the same name is replaced.
        asking: how the questions are put to the model.

    Raises:
        ConfigError: with every problem of the tasks before anything is loaded; if lm-eval is not installed; if a
            task's data or the model cannot be loaded; if memory runs out.
    """
    files = _loaded(tasks, asking.seed)
    if find_spec("lm_eval") is None:
        raise ConfigError('downstream evaluation needs lm-evaluation-harness: pip install "dataflex[eval]".')
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output: {output} cannot be created ({error.strerror or error}).") from error
    from dataflex.evaluation import harness

    own = harness.harness_tasks([settings.task for settings in tasks if settings.task is not None])
    lm = harness.load_model(model, adapter, asking.batch_size, asking.device, asking.dtype)
    about: dict[str, Any] = {"model": model, "adapter": None if adapter is None else str(adapter)}
    about["versions"] = {**installed_versions(), "lm_eval": version("lm_eval")}
    results = []
    for settings in tasks:
        start = time.perf_counter()
        task = files.get(settings.name)
        notes = []
        if asking.apply_chat_template and (note := harness.check_chat_template(lm, task)):
            notes.append(note)
        if task is not None:
            outcome = harness.run_file_task(lm, task, asking.apply_chat_template, asking.seed)
        else:
            assert settings.task is not None
            theirs = own[settings.task]
            outcome = harness.run_harness_task(
                lm, settings.task, theirs, settings, asking.apply_chat_template, asking.seed
            )
        if outcome.cut:
            notes.append(
                f"{outcome.cut} prompts were longer than the model's context of {lm.max_length} tokens, so their "
                "beginnings were cut off."
            )
        asked = {**asdict(asking), "device": str(lm.device)}
        result = _result(settings, outcome, notes, {**about, "seconds": time.perf_counter() - start}, asked)
        write_atomically(output / f"{settings.name}.json", (result.model_dump_json(indent=2) + "\n").encode())
        results.append(result)
    return results


def _result(
    settings: TaskSettings, outcome: Outcome, notes: list[str], about: dict[str, Any], asked: dict[str, Any]
) -> TaskResult:
    """Return the result of a task, for its file.

    Args:
        settings: settings of the task.
        outcome: the outcome of the harness.
        notes: facts that a reader of the result should know.
        about: the model, its adapter, versions and seconds.
        asked: how the questions were put to the model.
    """
    return TaskResult(
        task=settings.name,
        form=outcome.form,
        file=None if settings.file is None else str(settings.file),
        samples=outcome.samples,
        num_fewshot=outcome.num_fewshot,
        metrics=outcome.metrics,
        chance=sum(outcome.chances) / len(outcome.chances) if outcome.chances else None,
        subjects=outcome.subjects,
        subject_mean=mean_of_subjects(outcome.subjects) if len(outcome.subjects) > 1 else {},
        notes=[*notes, *_chance_notes(outcome.metrics, outcome.chances)],
        settings={**settings.model_dump(mode="json"), **asked},
        **about,
    )


def _loaded(tasks: Sequence[TaskSettings], seed: int) -> dict[str, FileTask]:
    """Return the questions of each task that has a file, by the name of the task.

    Raises:
        ConfigError: with every problem of all tasks.
    """
    files: dict[str, FileTask] = {}
    problems: list[Problem] = []
    for settings in tasks:
        if settings.task is not None:
            problems += task_problems(settings)
            continue
        loaded, found = load_task(settings)
        problems += found
        if loaded is not None:
            files[settings.name] = loaded.limited(seed)
    if problems:
        raise ConfigError(problems=problems, source="--tasks")
    return files


def _chance_notes(metrics: Mapping[str, Metric], chances: Sequence[float]) -> list[str]:
    """Return a warning for each accuracy that guessing may reach, or one warning if both accuracies are equal."""
    found = {name: metrics[name] for name in CHOICE_METRICS if name in metrics} if chances else {}
    if found.get("acc") == found.get("acc_norm"):
        found.pop("acc_norm", None)
    notes = [chance_note(name, metric, chances) for name, metric in found.items()]
    return [note for note in notes if note is not None]
