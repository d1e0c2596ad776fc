"""Adapter to lm-evaluation-harness: the model, the tasks of this project as tasks of the harness, and its results.

Everything here needs torch and lm-eval, so import this module inside functions.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import lm_eval.api.task
import torch
import transformers
from datasets import Dataset
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager

from dataflex.errors import ConfigError, did_you_mean
from dataflex.evaluation.results import Metric, SubjectResult, mean_metric
from dataflex.evaluation.tasks import MAX_NEW_TOKENS, STOP, FileTask, Question, TaskSettings

STRICT = r"#### (\-?[0-9\.\,]+)"
FLEXIBLE = r"(-?[$0-9.,]{2,})|(-?[0-9]+)"
"""Patterns with which the harness's gsm8k finds the number of an answer: behind ``####``, or the last number of all."""

IGNORED = [",", r"\$", r"\.[0.]*$"]
"""Patterns that are removed from numbers, one after another, before numbers are compared."""

_HIGHER = True
"""Direction of the metrics of a task from a file, all of which are shares of right answers."""

_SUFFIX = {"none": "", "strict-match": "", "flexible-extract": "_flexible"}


class Model(HFLM):
    """The harness's model, with a count of the prompts that are cut because they are longer than its context."""

    cut = 0

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Score continuations, with a single progress bar: the one of :meth:`_loglikelihood_tokens`."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        room = self.max_length + 1  # the last token is only predicted, never read
        self.cut += len({tuple(context) for _, context, target in requests if len(context) + len(target) > room})
        return super()._loglikelihood_tokens(requests, override_bs=override_bs)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Generate answers.

        Raises:
            ConfigError: if an answer may be as long as the model's context.
        """
        for request in requests:
            prompt, options = request.args
            longest = normalize_gen_kwargs(options, self.max_gen_toks)["max_gen_toks"]
            if longest >= self.max_length:
                raise ConfigError(
                    f"max_new_tokens: {longest} must be below the length of the model's context, {self.max_length}."
                )
            self.cut += len(self.tok_encode(prompt)) > self.max_length - longest
        return super().generate_until(requests)


@dataclass(frozen=True)
class Outcome:
    """Outcome of a task in the harness.

    Attributes:
        form: form of the task.
        samples: number of questions.
        num_fewshot: examples before each question.
        metrics: metrics over all questions. Of a group of the harness, the metrics that the group defines.
        subjects: results of each part, if the task has parts.
        chances: probability of guessing each question right. Empty if there are no choices.
        cut: number of prompts that were longer than the model's context.
    """

    form: str
    samples: int
    num_fewshot: int
    metrics: dict[str, Metric]
    subjects: dict[str, SubjectResult]
    chances: list[float]
    cut: int


def load_model(model: str, adapter: Path | None, batch_size: int, device: str | None, dtype: str) -> Model:
    """Load a model, with an adapter if one is given, in evaluation mode.

    Raises:
        ConfigError: if the model cannot be loaded, or the device does not exist.
    """
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device: {place!r} cannot be used here ({str(error).splitlines()[0]}).") from error
    with_tokenizer = adapter is not None and (adapter / "tokenizer_config.json").is_file()
    try:
        with _quiet():
            return Model(
                pretrained=model if adapter is None else _adapted(model, adapter, dtype).to(place),
                tokenizer=str(adapter) if with_tokenizer else model,
                device=place,
                dtype=dtype,
                batch_size=batch_size,
            )
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        on_it = f" with the adapter {adapter}" if adapter else ""
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(f"{model}{on_it} cannot be loaded: {reason[0]}") from error


def _adapted(model: str, adapter: Path, dtype: str) -> torch.nn.Module:
    """Return a model with an adapter.

    The harness would resize the base's embeddings to the number of tokens of the tokenizer. An adapter that was trained
    with embedding layers has as many rows as the base had in training, and fits only a base of that size.
    """
    from peft import PeftModel
    from peft.utils import load_peft_weights

    base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    names = ("embed_tokens", "wte", "word_embeddings", "lm_head", "embed_out")
    weights = load_peft_weights(str(adapter), device="cpu")
    rows = {value.size(0) for name, value in weights.items() if name.split(".")[-2] in names}
    if len(rows) == 1 and rows != {base.get_input_embeddings().weight.size(0)}:
        # The adapter's rows replace the values, so their initialisation does not matter.
        base.resize_token_embeddings(rows.pop(), mean_resizing=False)
    return PeftModel.from_pretrained(base, str(adapter)).eval()


def check_chat_template(model: Model, task: FileTask | None) -> str | None:
    """Return a warning if the model's chat template drops the description before the questions, else None.

    Raises:
        ConfigError: if the model has no chat template.
    """
    if not model.tokenizer.chat_template:
        raise ConfigError("--apply-chat-template: the model's tokenizer has no chat template.")
    if task is not None and not any(task.description(subject) for subject in task.subjects):
        return None
    messages = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    try:
        model.tokenizer.apply_chat_template(messages, tokenize=False)
    except jinja2.TemplateError:
        return "the chat template accepts no system message, so the description before the questions was dropped."
    return None


def harness_tasks(names: Sequence[str]) -> dict[str, Any]:
    """Load the tasks that the harness has under these names. Their data may come from the network.

    Returns:
        Name -> the task or group as the harness loads it.

    Raises:
        ConfigError: if the harness does not know a name, or the data of a task cannot be loaded.
    """
    if not names:
        return {}
    manager = TaskManager()
    unknown = _unknown(names, manager)
    if unknown:
        raise ConfigError(f"--tasks: neither a file nor a task of lm-evaluation-harness: {', '.join(unknown.values())}")
    found = {}
    for name in names:
        try:
            with _quiet():
                found[name] = manager.load([name])
        except (OSError, ValueError, ImportError) as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise ConfigError(f"--tasks: the data of {name!r} cannot be loaded: {reason[0]}") from error
    return found


def unknown_tasks(names: Sequence[str]) -> dict[str, str]:
    """Return the names that the harness does not know -> the name in quotes, with the most similar known name."""
    return _unknown(names, TaskManager())


def _unknown(names: Sequence[str], manager: TaskManager) -> dict[str, str]:
    known = manager.all_tasks
    return {name: f"{name!r}{did_you_mean(name, known)}" for name in names if name not in known}


def configured(task: FileTask) -> dict[str, ConfigurableTask]:
    """Return a task as tasks of the harness, one for each subject, since each subject has separate examples."""
    return {"no subject" if subject is None else subject: _configured(task, subject) for subject in task.subjects}


def _configured(task: FileTask, subject: str | None) -> ConfigurableTask:
    settings = task.settings
    asked = [question for question in task.questions if question.subject == subject]
    examples = task.examples(subject)
    description = task.description(subject)
    config: dict[str, Any] = {
        "task": settings.name if subject is None else f"{settings.name}/{subject}",
        "custom_dataset": lambda: {"test": Dataset.from_list([_document(question, description) for question in asked])},
        "test_split": "test",
        "output_type": "multiple_choice" if task.form == "multiple_choice" else "generate_until",
        "description": "description",
        "doc_to_text": "prompt",
        "doc_to_target": "gold",
        "num_fewshot": len(examples),
        "fewshot_config": {
            "sampler": "first_n",
            "samples": [_document(question, description) for question in examples],
            "doc_to_target": "answer",  # an example shows the whole answer; "gold" is only the index or the number
        },
    }
    if task.form == "multiple_choice":
        config["doc_to_choice"] = "choices"
        metrics: list[dict[str, Any]] = [{"metric": "acc"}, {"metric": "acc_norm"}]
    else:
        until = list(STOP if settings.stop is None else settings.stop)
        longest = settings.max_new_tokens or MAX_NEW_TOKENS
        config["generation_kwargs"] = {"until": until, "max_gen_toks": longest, "do_sample": False}
        config["filter_list"] = [
            _regex("strict-match", regex_pattern=STRICT),
            _regex("flexible-extract", regex_pattern=FLEXIBLE, group_select=-1),
        ]
        metrics = [{"metric": "exact_match", "regexes_to_ignore": IGNORED}]
    config["metric_list"] = [{**metric, "aggregation": "mean", "higher_is_better": _HIGHER} for metric in metrics]
    return ConfigurableTask(config=config)


def _document(question: Question, description: str) -> dict[str, Any]:
    return {
        "prompt": question.prompt,
        "choices": question.choices,
        "gold": question.gold,
        "answer": question.answer,
        "description": description,
    }


def _regex(name: str, **options: Any) -> dict[str, Any]:
    return {"name": name, "filter": [{"function": "regex", **options}, {"function": "take_first"}]}


def run_file_task(model: Model, task: FileTask, apply_chat_template: bool, seed: int) -> Outcome:
    """Ask the questions of a task that was read from a file."""
    with _quiet():
        tasks = configured(task)
    answered, cut = _answered(model, {"tasks": tasks, "groups": {}}, apply_chat_template, seed, None)
    parts: dict[str, list[dict[str, Any]]] = answered["samples"]
    every: dict[str, list[float]] = {}
    subjects = {}
    for name, built in tasks.items():
        values = _values(parts[name])
        metrics = {metric: mean_metric(found, _HIGHER) for metric, found in values.items()}
        subjects[name] = SubjectResult(samples=len(built.eval_docs), metrics=metrics)
        for metric, found in values.items():
            every.setdefault(metric, []).extend(found)
    return Outcome(
        form=task.form,
        samples=len(task.questions),
        num_fewshot=task.settings.num_fewshot or 0,
        metrics={metric: mean_metric(found, _HIGHER) for metric, found in every.items()},
        subjects={} if task.subjects == [None] else subjects,
        chances=[1 / len(question.choices) for question in task.questions if question.choices],
        cut=cut,
    )


def run_harness_task(
    model: Model, name: str, loaded: dict[str, Any], settings: TaskSettings, apply_chat_template: bool, seed: int
) -> Outcome:
    """Run a task of the harness. Its parts become the subjects."""
    for task in loaded["tasks"].values():
        if settings.num_fewshot is not None:
            task.set_config(key="num_fewshot", value=settings.num_fewshot)
        task.set_fewshot_seed(seed=seed)
    answered, cut = _answered(model, loaded, apply_chat_template, seed, settings.limit)
    parts = {part: _harness_result(answered, part) for part in loaded["tasks"]}
    whole = _harness_result(answered, name).metrics if name in answered["results"] else {}
    forms = {str(task.OUTPUT_TYPE) for task in loaded["tasks"].values()}
    form = forms.pop() if len(forms) == 1 else "several"
    chances = []
    if form == "multiple_choice" and "acc" in whole:
        for part, task in loaded["tasks"].items():
            chances += [1 / len(task.doc_to_choice(sample["doc"])) for sample in answered["samples"][part]]
    return Outcome(
        form="generation" if form == "generate_until" else form,
        samples=sum(part.samples for part in parts.values()),
        num_fewshot=max(int(answered["n-shot"][part] or 0) for part in parts),
        metrics=whole,
        subjects={} if list(parts) == [name] else parts,
        chances=chances,
        cut=cut,
    )


def _answered(
    model: Model, tasks: dict[str, Any], apply_chat_template: bool, seed: int, limit: int | None
) -> tuple[dict[str, Any], int]:
    """Return the results of the harness, and the number of prompts that were cut."""
    transformers.set_seed(seed)
    model.cut = 0
    try:
        with _quiet():
            answered = evaluate(
                lm=model,
                task_dict=tasks,
                limit=limit,
                apply_chat_template=apply_chat_template,
                fewshot_as_multiturn=apply_chat_template,
            )
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"--batch-size: memory ran out with {model.batch_size} prompts at once; set a smaller batch size."
        ) from error
    return answered, model.cut


def _values(samples: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """Return metric -> one value for each question."""
    found: dict[str, list[float]] = {}
    for sample in samples:
        for metric in sample["metrics"]:
            found.setdefault(metric + _suffix(sample["filter"]), []).append(float(sample[metric]))
    return found


def _harness_result(answered: dict[str, Any], name: str) -> SubjectResult:
    """Return the harness's own metrics of a task or a group."""
    numbers = answered["results"][name]
    directions = answered["higher_is_better"].get(name, {})
    metrics = {}
    for key, value in numbers.items():
        metric, _, way = key.partition(",")
        if way and not metric.endswith("_stderr") and isinstance(value, int | float):
            error = numbers.get(f"{metric}_stderr,{way}")
            known = isinstance(error, int | float)
            metrics[metric + _suffix(way)] = Metric(
                value=float(value),
                stderr=float(error) if known else None,
                higher_is_better=directions.get(metric),
            )
    return SubjectResult(samples=int(numbers.get("sample_len") or 0), metrics=metrics)


def _suffix(way: str) -> str:
    return _SUFFIX.get(way, f"_{way}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the harness and transformers, except for errors and the progress bars of the model."""
    library = transformers.utils.logging
    logger, level, verbosity = logging.getLogger("lm_eval"), logging.getLogger("lm_eval").level, library.get_verbosity()
    with_bars, bar = library.is_progress_bar_enabled(), lm_eval.api.task.tqdm
    logger.setLevel(logging.ERROR)
    library.set_verbosity_error()
    library.disable_progress_bar()
    lm_eval.api.task.tqdm = lambda rows, total: rows  # else each subject shows a bar for some milliseconds
    try:
        yield
    finally:
        lm_eval.api.task.tqdm = bar
        logger.setLevel(level)
        library.set_verbosity(verbosity)
        if with_bars:
            library.enable_progress_bar()
