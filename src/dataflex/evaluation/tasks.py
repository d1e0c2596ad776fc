"""Downstream tasks: their settings, and the questions in their files.

This module finds every problem of a task that shows without a model. It imports neither torch nor the evaluation
harness.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from dataflex.config.loading import validate
from dataflex.data.rng import derive_rng
from dataflex.errors import ConfigError, Problem, did_you_mean

Form = Literal["multiple_choice", "generation"]

LETTERS = string.ascii_uppercase
STOP = ("Question:", "</s>", "<|im_end|>")
"""Default texts that end an answer: those of the harness's gsm8k."""
MAX_NEW_TOKENS = 256

_NEEDED = {
    "multiple_choice": "question, choices, answer",
    "generation": "question (or instruction) and answer (or output) with '#### n', or final",
}
_FINAL = re.compile(r"####\s*(-?[$0-9.,]+)")
_NUMBER = re.compile(r"-?(\d+\.?\d*|\.\d+)")
_SHOWN = 3
"""Number of bad rows of a file that are listed. The others are counted."""


class TaskSettings(BaseModel):
    """One downstream task: a file of questions, or a task of the harness."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[^/\\.][^/\\]*$", description="Name of the result. Default: the name of the file.")
    file: Path | None = Field(None, description="File of questions, one JSON object per line.")
    task: str | None = Field(None, description="A task of lm-evaluation-harness, instead of a file.")
    form: Form | None = Field(None, description="Form of the rows. Default: the form of the first row.")
    fewshot_file: Path | None = Field(None, description="File of rows of the same form that serve as examples.")
    num_fewshot: int | None = Field(
        None, ge=0, description="Examples before each question. Default: 0, or the number of the harness's task."
    )
    choices: Literal["letters", "text"] | None = Field(
        None, description="multiple_choice: score the letter (default) or the text of each choice."
    )
    limit: int | None = Field(
        None,
        ge=1,
        description="Maximum number of questions, drawn with the seed. Default: all. Of a group of the harness, the "
        "maximum of each task.",
    )
    description: str | None = Field(None, description="Text at the start of a prompt; may contain {subject}.")
    prompt: str | None = Field(None, description="Text of a question; may contain {question}, {options}, {subject}.")
    max_new_tokens: int | None = Field(
        None, ge=1, description=f"generation: maximum tokens of an answer. Default: {MAX_NEW_TOKENS}."
    )
    stop: tuple[str, ...] | None = Field(None, description="generation: texts that end an answer.")

    @field_validator("file", "fewshot_file")
    @classmethod
    def _from_base(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        base = (info.context or {}).get("base")
        return value if value is None or base is None else base / value.expanduser()

    @field_validator("description")
    @classmethod
    def _description_fields(cls, value: str | None) -> str | None:
        return _checked_template(value, ("subject",))

    @field_validator("prompt")
    @classmethod
    def _prompt_fields(cls, value: str | None) -> str | None:
        return _checked_template(value, ("question", "options", "subject"), needed="question")


def _checked_template(text: str | None, allowed: Sequence[str], needed: str | None = None) -> str | None:
    if text is None:
        return None
    found = [name for _, name, _, _ in string.Formatter().parse(text) if name is not None]
    for name in found:
        if name not in allowed:
            places = ", ".join(f"{{{each}}}" for each in allowed)
            raise ValueError(f"may contain {places}, not {{{name}}} (write {{{{ and }}}} for braces)")
    if needed and needed not in found:
        raise ValueError(f"must contain {{{needed}}}")
    return text


@dataclass(frozen=True)
class Question:
    """One row, ready to be asked.

    Attributes:
        prompt: text of the question, without examples before it.
        subject: subject that the row names, or None.
        choices: the texts that are scored, for a multiple choice. Empty for a generation.
        gold: index of the right choice, or the right number as text.
        answer: the answer as an example shows it.
    """

    prompt: str
    subject: str | None
    choices: list[str]
    gold: int | str
    answer: str


@dataclass(frozen=True)
class FileTask:
    """A task whose questions have been read.

    Attributes:
        settings: the settings, with ``form`` filled in.
        questions: the questions, in the order of the file.
        pool: rows of ``fewshot_file``, in the order of the file.
    """

    settings: TaskSettings
    questions: list[Question]
    pool: list[Question] = field(default_factory=list)

    @property
    def form(self) -> Form:
        """Form of the questions."""
        assert self.settings.form is not None
        return self.settings.form

    @property
    def subjects(self) -> list[str | None]:
        """Subjects of the questions, in order of first appearance."""
        return list(dict.fromkeys(question.subject for question in self.questions))

    def examples(self, subject: str | None) -> list[Question]:
        """Return the examples before a question: the first rows, for a multiple choice those of its subject."""
        return self._matching(subject)[: self.settings.num_fewshot or 0]

    def _matching(self, subject: str | None) -> list[Question]:
        if self.form == "generation" or subject is None:
            return self.pool
        return [row for row in self.pool if row.subject == subject]

    def description(self, subject: str | None) -> str:
        """Return the text at the start of every prompt."""
        named = (subject or "").replace("_", " ")
        if self.settings.description is not None:
            return self.settings.description.format(subject=named)
        if self.form == "generation" or self.settings.choices == "text":
            return ""
        about = f" about {named}" if named else ""
        return f"The following are multiple choice questions (with answers){about}.\n\n"

    def lacking(self) -> list[Problem]:
        """Return a problem for each subject that has fewer examples than ``num_fewshot``."""
        wanted = self.settings.num_fewshot or 0
        problems = []
        for subject in self.subjects:
            found = len(self._matching(subject))
            if found < wanted:
                of = f" of subject {subject!r}" if self.form == "multiple_choice" and subject is not None else ""
                text = f"is {wanted}, but {self.settings.fewshot_file} has only {found} rows{of}."
                problems.append(Problem(f"{self.settings.name}.num_fewshot", text))
        return _shortened(problems)

    def limited(self, seed: int) -> FileTask:
        """Return the task with at most ``limit`` questions, drawn with ``seed`` and left in their order."""
        limit = self.settings.limit
        if limit is None or limit >= len(self.questions):
            return self
        drawn = derive_rng(seed, "eval", "limit").choice(len(self.questions), limit, replace=False)
        return FileTask(self.settings, [self.questions[i] for i in sorted(drawn)], self.pool)


def read_settings(tasks: Sequence[str], changes: Mapping[str, Any] | None = None) -> list[TaskSettings]:
    """Parse the values of ``--tasks`` into settings.

    Args:
        tasks: each a ``.jsonl`` file, a ``.yaml`` or ``.yml`` file of settings (one mapping, or a list of them, with
            paths relative to the file's folder), or the name of a task of the harness.
        changes: settings that replace those of every task.

    Raises:
        ConfigError: with every problem of the settings, and for names given twice.
    """
    found: list[TaskSettings] = []
    problems: list[Problem] = []
    for text in tasks:
        for raw, base in _raw_settings(text, problems):
            merged = {**raw, **(changes or {})}
            prefix = str(merged.get("name") or text)
            settings = validate(TaskSettings, merged, prefix, problems, base)
            if settings is not None:
                found.append(settings)
    names = [settings.name for settings in found]
    for name in sorted({name for name in names if names.count(name) > 1}):
        problems.append(Problem(name, "two tasks have this name; give each task its own name."))
    if problems:
        raise ConfigError(problems=problems, source="--tasks")
    return found


def _raw_settings(text: str, problems: list[Problem]) -> Iterable[tuple[dict[str, Any], Path]]:
    path = Path(text).expanduser()
    if path.suffix not in (".yaml", ".yml", ".jsonl") and not path.exists() and "/" not in text:
        return [({"name": text, "task": text}, Path())]
    if path.suffix not in (".yaml", ".yml", ".jsonl"):
        problems.append(Problem(text, "expected a .jsonl file, a .yaml file or the name of a task of the harness."))
        return []
    if not path.is_file():
        problems.append(Problem("", _no_file(path)))
        return []
    if path.suffix == ".jsonl":
        return [({"name": path.stem, "file": path.absolute()}, Path())]
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        problems.append(Problem(text, f"cannot be read: {' '.join(str(error).split())}"))
        return []
    entries = loaded if isinstance(loaded, list) else [loaded]
    if not entries or not all(isinstance(entry, dict) for entry in entries):
        problems.append(Problem(text, "must be a mapping of task settings, or a list of them."))
        return []
    return [({**_named(entry)}, path.absolute().parent) for entry in entries]


def _named(entry: dict[Any, Any]) -> dict[str, Any]:
    """Return the settings with a name. The default is the name of the file or of the task."""
    named = {str(key): value for key, value in entry.items()}
    if "name" not in named and (named.get("file") or named.get("task")):
        named["name"] = Path(str(named["file"])).stem if named.get("file") else named["task"]
    return named


def _no_file(path: Path) -> str:
    beside = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
    return f"no such file: {path}{did_you_mean(path.name, beside) or '.'}"


def task_problems(settings: TaskSettings) -> list[Problem]:
    """Return all problems of a task that show without a model and without the harness.

    These are a missing file, rows of an unknown or of mixed forms, invalid answers, settings that do not go together,
    and too few examples. The names of the harness's tasks are not checked here.
    """
    return _of_harness(settings) if settings.task is not None else load_task(settings)[1]


def _of_harness(settings: TaskSettings) -> list[Problem]:
    with_task = ("task", "name", "num_fewshot", "limit")
    return [
        Problem(f"{settings.name}.{key}", f"cannot be set for the harness's task {settings.task!r}, which has its own.")
        for key in TaskSettings.model_fields
        if key not in with_task and getattr(settings, key) is not None
    ]


def load_task(settings: TaskSettings) -> tuple[FileTask | None, list[Problem]]:
    """Read the files of a task.

    Returns:
        The task and no problem, or None and every problem found.
    """
    key, file = settings.name, settings.file
    if file is None:
        return None, [Problem(f"{key}.file", "needed: a .jsonl file of questions (or task: a task of the harness).")]
    rows, problems = _rows(f"{key}.file", file)
    if not rows:
        return None, problems
    form = settings.form or _form_of(rows[0][1])
    if form is None:
        text = f"{file}: the form of the first row is unknown; the row has the keys {_keys(rows[0][1])}. "
        needed = "; ".join(f"{name} needs {keys}" for name, keys in _NEEDED.items())
        return None, [Problem(f"{key}.file", f"{text}{needed}.")]
    settings = settings.model_copy(update={"form": form})
    problems += _unsuitable(settings, form)
    questions = _questions(f"{key}.file", settings, rows, problems)
    pool: list[Question] = []
    if settings.fewshot_file is not None:
        examples, bad = _rows(f"{key}.fewshot_file", settings.fewshot_file)
        problems += bad
        pool = _questions(f"{key}.fewshot_file", settings, examples, problems)
        if settings.fewshot_file.resolve() == file.resolve():
            text = "is the file of the questions, so a question could be its own example; use another file."
            problems.append(Problem(f"{key}.fewshot_file", text))
        if not settings.num_fewshot:
            problems.append(Problem(f"{key}.num_fewshot", "needed with a fewshot_file: how many examples to show."))
    elif settings.num_fewshot:
        problems.append(Problem(f"{key}.fewshot_file", f"needed for num_fewshot: {settings.num_fewshot}."))
    task = FileTask(settings, questions, pool)
    if not problems:
        problems += task.lacking()
    return (None, problems) if problems else (task, [])


def _unsuitable(settings: TaskSettings, form: Form) -> list[Problem]:
    others = ("max_new_tokens", "stop") if form == "multiple_choice" else ("choices",)
    found = [key for key in others if getattr(settings, key) is not None]
    return [Problem(f"{settings.name}.{key}", f"has no effect for the form {form}; remove it.") for key in found]


def _rows(key: str, path: Path) -> tuple[list[tuple[int, dict[str, Any]]], list[Problem]]:
    """Return the rows of a file with their line numbers, and the problems of the file."""
    if not path.is_file():
        return [], [Problem(key, _no_file(path))]
    rows: list[tuple[int, dict[str, Any]]] = []
    problems = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        return [], [Problem(key, f"{path} cannot be read: {error}")]
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            problems.append(Problem(key, f"{path}, line {number}: not valid JSON ({error})."))
            continue
        if isinstance(row, dict):
            rows.append((number, row))
        else:
            problems.append(Problem(key, f"{path}, line {number}: not a JSON object."))
    if not rows and not problems:
        problems.append(Problem(key, f"{path} has no rows."))
    return rows, _shortened(problems)


def _form_of(row: Mapping[str, Any]) -> Form | None:
    if {"question", "choices", "answer"} <= row.keys():
        return "multiple_choice"
    if "choices" not in row and {"question", "instruction"} & row.keys() and {"answer", "output"} & row.keys():
        return "generation"
    return None


def _questions(
    key: str, settings: TaskSettings, rows: Sequence[tuple[int, dict[str, Any]]], problems: list[Problem]
) -> list[Question]:
    """Return the questions of the rows, and append a problem for each invalid row."""
    build = _choice if settings.form == "multiple_choice" else _generation
    questions = []
    bad = []
    path = settings.file if key.endswith(".file") else settings.fewshot_file
    for number, row in rows:
        try:
            questions.append(build(settings, row))
        except _BadRow as error:
            bad.append(Problem(key, f"{path}, line {number}: {error}"))
    problems += _shortened(bad)
    return questions


class _BadRow(ValueError):
    """A row is not a question of the form. The text says why."""


def _missing(form: Form, row: Mapping[str, Any]) -> _BadRow:
    return _BadRow(f"a row of the form {form} needs {_NEEDED[form]}; this one has the keys {_keys(row)}.")


def _choice(settings: TaskSettings, row: Mapping[str, Any]) -> Question:
    if not {"question", "choices", "answer"} <= row.keys():
        raise _missing("multiple_choice", row)
    choices = row["choices"]
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c.strip() for c in choices):
        raise _BadRow(f"choices must be a list of two or more non-empty strings, got {choices!r}.")
    by_text = settings.choices == "text"
    if len(choices) > len(LETTERS):
        raise _BadRow(f"has {len(choices)} choices; at most {len(LETTERS)} are allowed, one for each letter.")
    letters = list(LETTERS[: len(choices)])
    answer = row["answer"]
    gold = letters.index(answer) if answer in letters else answer
    if isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold < len(choices):
        raise _BadRow(
            f"answer must be a letter from A to {letters[-1]} or an index below {len(choices)}, got {gold!r}."
        )
    options = "\n".join(f"{letter}. {choice}" for letter, choice in zip(letters, choices, strict=True))
    default = "Question: {question}\nAnswer:" if by_text else "{question}\n{options}\nAnswer:"
    scored = choices if by_text else letters
    return Question(
        prompt=_prompt(settings, default, _text(row, "question"), options, _subject(row)),
        subject=_subject(row),
        choices=scored,
        gold=gold,
        answer=scored[gold],
    )


def _generation(settings: TaskSettings, row: Mapping[str, Any]) -> Question:
    asked = "instruction" if "instruction" in row else "question"
    answered = "output" if "output" in row else "answer"
    if asked not in row or answered not in row or "choices" in row:
        raise _missing("generation", row)
    answer = _text(row, answered)
    marked = _FINAL.findall(answer)
    final = row.get("final")
    if final is None and not marked:
        raise _BadRow(f"{answered} has no '#### n', and the row has no final; add one of the two.")
    gold = normal_number(str(final if final is not None else marked[-1]))
    if not _NUMBER.fullmatch(gold):
        raise _BadRow(f"the answer must be a number, got {final if final is not None else marked[-1]!r}.")
    question = _text(row, asked)
    if row.get("input"):
        question += f"\n{_text(row, 'input')}"
    return Question(
        prompt=_prompt(settings, "Question: {question}\nAnswer:", question, "", _subject(row)),
        subject=_subject(row),
        choices=[],
        gold=gold,
        answer=answer,
    )


def normal_number(text: str) -> str:
    """Return a number as text without commas, ``$``, a period at the end and zeros after the decimal point."""
    return re.sub(r"\.[0.]*$", "", re.sub(r"[,$\s]", "", text))


def _text(row: Mapping[str, Any], key: str) -> str:
    value = row[key]
    if not isinstance(value, str) or not value.strip():
        raise _BadRow(f"{key} must be a non-empty string, got {value!r}.")
    return value.strip()


def _subject(row: Mapping[str, Any]) -> str | None:
    return None if row.get("subject") is None else str(row["subject"])


def _prompt(settings: TaskSettings, default: str, question: str, options: str, subject: str | None) -> str:
    named = (subject or "").replace("_", " ")
    return (settings.prompt or default).format(question=question, options=options, subject=named)


def _keys(row: Mapping[str, Any]) -> str:
    return ", ".join(sorted(row)) or "none"


def _shortened(problems: list[Problem]) -> list[Problem]:
    """Return the first problems. The last of them says how many more there are."""
    if len(problems) <= _SHOWN:
        return problems
    last = problems[_SHOWN - 1]
    return [
        *problems[: _SHOWN - 1],
        Problem(last.key, f"{last.message} And {len(problems) - _SHOWN} more like these."),
    ]
