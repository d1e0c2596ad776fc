"""Rewards: one number per response, higher is better; by exact match, a Python function, a model or a judge.

A configuration names a reward by its type, ``reward: exact_match``, or by a mapping with parameters, ``reward: {type:
python, path: my_rewards.py, function: score}``. All checks that need no loading run when the configuration is read.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.util
import json
import math
import numbers
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from dataflex import ComponentError, ComponentParams

RewardArray = NDArray[np.float64]

_SHOWN = 60
"""Characters of a text that are shown in a message."""
_FIRST_WAIT = 1.0
"""Seconds between the first and the second request to a judge; the wait doubles with every further attempt."""
_LONGEST_WAIT = 30.0
"""Longest wait between two requests to a judge, in seconds."""
_TRANSIENT = (408, 409, 429)
"""HTTP statuses below 500 after which a request is repeated."""


class Reward(Protocol):
    """Rates responses. Called on the main process only."""

    def __call__(self, prompts: list[str], responses: list[str], references: list[str]) -> RewardArray:
        """Return one finite number per response, shape (n,), float64; higher is better.

        Args:
            prompts: the text before each response.
            responses: the texts to rate.
            references: the right answer to each prompt, from the validation samples.

        Raises:
            ComponentError: if a response cannot be rated; the message names the reward, the response and the cause.
        """
        ...


class RewardParams(ComponentParams):
    """Base of the parameters of all rewards."""

    def build(self) -> Reward:
        """Return the reward. Nothing is loaded before the reward is called first."""
        raise NotImplementedError


class ExactMatchParams(RewardParams):
    """Parameters of a reward that is 1 if the response has the reference's answer, else 0."""

    type: Literal["exact_match"] = "exact_match"
    pattern: str = Field(
        r"####\s*(.+)", description="Regular expression; the first group of its last match is the answer."
    )

    @field_validator("pattern")
    @classmethod
    def _has_a_group(cls, value: str) -> str:
        try:
            groups = re.compile(value).groups
        except re.error as error:
            raise ValueError(f"is not a regular expression: {error}") from error
        if groups < 1:
            raise ValueError("needs a group in parentheses, (...), around the answer")
        return value

    def build(self) -> Reward:
        """Return the reward."""
        return ExactMatch(self.pattern)


class PythonParams(RewardParams):
    """Parameters of a reward that is a function (prompt, response, reference) -> float in a Python file."""

    type: Literal["python"] = "python"
    path: str = Field(description="Python file, relative to the working directory or to the YAML's folder.")
    function: str = Field(description="Name of the function in the file.")

    @field_validator("path")
    @classmethod
    def _file_exists(cls, value: str, info: ValidationInfo) -> str:
        return str(_located(value, info, Path.is_file, "file"))

    @model_validator(mode="after")
    def _defines_the_function(self) -> Self:
        """Check that the file can be parsed and defines the function at its top level."""
        try:
            names = _top_level_names(ast.parse(Path(self.path).read_bytes(), self.path))
        except (SyntaxError, ValueError) as error:
            raise ValueError(f"{self.path} cannot be parsed as a Python file: {error}") from error
        if self.function not in names:
            raise ValueError(
                f"{self.path} has no function {self.function!r}; the file has {', '.join(sorted(names)) or 'none'}"
            )
        return self

    def build(self) -> Reward:
        """Return the reward."""
        return PythonFunction(Path(self.path), self.function)


class ModelParams(RewardParams):
    """Parameters of a reward that is the output of a sequence-classification model."""

    type: Literal["model"] = "model"
    path: str = Field(description="Model folder, relative to the working directory or to the YAML's folder.")
    batch_size: int = Field(8, ge=1, description="Responses in one forward pass.")

    @field_validator("path")
    @classmethod
    def _folder_exists(cls, value: str, info: ValidationInfo) -> str:
        folder = _located(value, info, Path.is_dir, "folder")
        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder} has no config.json; a model saved by transformers is needed")
        return str(folder)

    def build(self) -> Reward:
        """Return the reward."""
        return RewardModel(Path(self.path), self.batch_size)


class JudgeParams(RewardParams):
    """Parameters of a reward that a language model behind an OpenAI-compatible server gives."""

    type: Literal["judge"] = "judge"
    base_url: str = Field(description="Address of the server without /chat/completions, e.g. http://localhost:8000/v1.")
    model: str = Field(description="Name of the model on the server.")
    api_key_env: str | None = Field(
        None, description="Environment variable that holds the API key. If null, no key is sent."
    )
    prompt: str = Field(
        "Rate the response to the prompt from 0 (useless) to 10 (perfect), given a reference answer.\n\n"
        "Prompt:\n{prompt}\n\nReference answer:\n{reference}\n\nResponse:\n{response}\n\n"
        "End your answer with the rating, a single number.",
        description="Prompt of the judge, with {prompt}, {response} and {reference}.",
    )
    scale: tuple[float, float] = Field((0.0, 10.0), description="Lowest and highest number the judge may give.")
    options: dict[str, Any] = Field(
        default_factory=lambda: {"temperature": 0}, description="Further fields of the request."
    )
    timeout: float = Field(60.0, gt=0, description="Longest time of one request, in seconds.")
    retries: int = Field(3, ge=0, description="Further attempts after a failed request.")
    concurrency: int = Field(8, ge=1, description="Number of requests that run at the same time.")

    @field_validator("base_url")
    @classmethod
    def _is_a_url(cls, value: str) -> str:
        if not re.fullmatch(r"https?://[^\s/?#]+(/[^\s?#]*)?", value):
            raise ValueError("must look like http://host:port/v1")
        return value.rstrip("/")

    @field_validator("api_key_env")
    @classmethod
    def _is_set(cls, value: str | None) -> str | None:
        if value is not None and not os.environ.get(value):
            raise ValueError("names an environment variable that is not set or empty")
        return value

    @field_validator("prompt")
    @classmethod
    def _shows_the_response(cls, value: str) -> str:
        if "{response}" not in value:
            raise ValueError("needs {response}; without it the judge does not see the response that it rates")
        return value

    @field_validator("scale")
    @classmethod
    def _ascends(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[0] >= value[1]:
            raise ValueError(f"must be the lowest and the highest number, in this order; got {list(value)}")
        return value

    def build(self) -> Reward:
        """Return the reward."""
        return Judge(self)


def _from_name(value: Any) -> Any:
    return {"type": value} if isinstance(value, str) else value


_Reward = Annotated[ExactMatchParams | PythonParams | ModelParams | JudgeParams, Field(discriminator="type")]

RewardChoice = Annotated[_Reward, BeforeValidator(_from_name, json_schema_input_type=Literal["exact_match"] | _Reward)]
"""Field type of a reward: a mapping with ``type`` and parameters, or the type alone."""


def _located(value: str, info: ValidationInfo, exists: Callable[[Path], bool], kind: str) -> Path:
    """Return the absolute path of a file or folder.

    ``value`` is relative to the working directory or to the context's ``base``.
    """
    base = (info.context or {}).get("base")
    folders = list(dict.fromkeys(folder for folder in (Path.cwd(), base) if folder is not None))
    for folder in folders:
        if exists(folder / value):
            return (folder / value).resolve()
    raise ValueError(f"no such {kind} in {' or '.join(map(str, folders))}")


def _top_level_names(tree: ast.Module) -> set[str]:
    """Return the names that a module defines or imports at its top level, including those inside ``if`` and ``try``."""
    names: set[str] = set()
    nodes = list(tree.body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names.update(alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.Assign):
            names.update(target.id for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.If | ast.Try):
            nodes += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
    return names


class ExactMatch:
    """Compares answers without regard to case, spacing and the commas of numbers."""

    def __init__(self, pattern: str) -> None:
        self._pattern = re.compile(pattern)

    def __call__(self, prompts: list[str], responses: list[str], references: list[str]) -> RewardArray:
        """Return 1.0 or 0.0 for each response, shape (n,).

        If the pattern is not in the reference, the whole texts are compared. If it is in the reference but not in the
        response, the reward is 0.
        """
        return np.array(
            [float(self._equal(*pair)) for pair in zip(responses, references, strict=True)], dtype=np.float64
        )

    def _equal(self, response: str, reference: str) -> bool:
        wanted = self._answer(reference)
        if wanted is None:
            return _normalised(response) == _normalised(reference)
        given = self._answer(response)
        return given is not None and _normalised(given) == _normalised(wanted)

    def _answer(self, text: str) -> str | None:
        """Return the first group of the last match, or None without a match."""
        found = list(self._pattern.finditer(text))
        return found[-1][1] or "" if found else None


def _normalised(text: str) -> str:
    """Return a text in lower case without thousands commas; other commas and whitespace become one space."""
    return " ".join(re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text.casefold()).replace(",", " ").split())


class PythonFunction:
    """Calls a function of a Python file for every response."""

    def __init__(self, path: Path, function: str) -> None:
        self._path = path
        self._name = function
        self._function: Callable[[str, str, str], Any] | None = None
        """The function, imported at the first call."""

    def __call__(self, prompts: list[str], responses: list[str], references: list[str]) -> RewardArray:
        """Return the function's values, shape (n,).

        Raises:
            ComponentError: if the file cannot be imported, the function raises, or its result is not a finite number.
        """
        label = f"reward python ({self._path}, {self._name})"
        if self._function is None:
            self._function = _imported(label, self._path, self._name)
        values = np.empty(len(responses), dtype=np.float64)
        for index, texts in enumerate(zip(prompts, responses, references, strict=True)):
            try:
                value = self._function(*texts)
            except Exception as error:  # the user's function may raise anything
                cause = f"raised {type(error).__name__}: {error}"
                raise ComponentError(f"{label} {cause} {_of(index, texts[0], texts[1])}.") from error
            if not isinstance(value, numbers.Real | np.bool_) or not math.isfinite(value):
                cause = f"returned {value!r}"
                raise ComponentError(f"{label} {cause} {_of(index, texts[0], texts[1])}. A finite number is needed.")
            values[index] = float(value)
        return values


def _of(index: int, prompt: str, response: str) -> str:
    """Return the part of a message that names the response."""
    return f"for response {index} ({_short(response)} to the prompt {_short(prompt)})"


def _short(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")


def _imported(label: str, path: Path, name: str) -> Callable[[str, str, str], Any]:
    """Return a function of a Python file, which is imported once per process."""
    module_name = f"dataflex_reward_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    module = sys.modules.get(module_name)
    if module is None:
        spec = importlib.util.spec_from_file_location(module_name, path)
        if spec is None or spec.loader is None:
            raise ComponentError(f"{label}: the file name must end in .py.")
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module  # before the file runs: dataclasses, for one, look their module up there
        try:
            spec.loader.exec_module(module)
        except Exception as error:  # the user's file may raise anything
            del sys.modules[module_name]  # so that a later call imports the file again
            raise ComponentError(f"{label}: importing it failed with {type(error).__name__}: {error}") from error
    function = vars(module).get(name)
    if not callable(function):
        raise ComponentError(f"{label}: {name} is not a function (its type is {type(function).__name__}).")
    return function


class RewardModel:
    """Scores texts with a sequence-classification model of transformers and the model's tokenizer.

    The model is on the training device during a call and in main memory between calls.
    """

    def __init__(self, path: Path, batch_size: int) -> None:
        self._path = path
        self._batch_size = batch_size
        self._loaded: tuple[Any, Any] | None = None
        """The model and its tokenizer, loaded at the first call."""

    def __call__(self, prompts: list[str], responses: list[str], references: list[str]) -> RewardArray:
        """Return the last logit of each response, shape (n,). Most reward models have a single logit.

        The text is the tokenizer's chat template applied to prompt and response. Without a template it is the prompt, a
        new line and the response. It is truncated at the tokenizer's limit.

        Raises:
            ComponentError: if the model cannot be loaded, has no trained output layer, or gives a logit that is not
                finite.
        """
        import torch

        from dataflex import preserved_rng

        with preserved_rng(), torch.no_grad():
            if self._loaded is None:
                self._loaded = _load_reward_model(self._path)
            model, tokenizer = self._loaded
            device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
            # Without a padding token, texts of unequal length cannot share a forward pass.
            size = 1 if tokenizer.pad_token_id is None else self._batch_size
            texts = [_conversation(tokenizer, *pair) for pair in zip(prompts, responses, strict=True)]
            parts = []
            model.to(device)
            try:
                for begin in range(0, len(texts), size):
                    inputs = tokenizer(
                        texts[begin : begin + size],
                        padding=size > 1,
                        truncation=True,
                        add_special_tokens=tokenizer.chat_template is None,
                        return_tensors="pt",
                    )
                    parts.append(model(**inputs.to(device)).logits[:, -1].cpu().double())
            finally:
                model.to("cpu")
        values = torch.cat(parts).numpy() if parts else np.empty(0)
        bad = np.flatnonzero(~np.isfinite(values))
        if bad.size:
            index = int(bad[0])
            cause = f"gave {values[index]} {_of(index, prompts[index], responses[index])}"
            raise ComponentError(f"reward model ({self._path}) {cause}.")
        return values


def _load_reward_model(path: Path) -> tuple[Any, Any]:
    """Return the model in evaluation mode and its tokenizer.

    Raises:
        ComponentError: if the model or the tokenizer cannot be loaded, or weights are missing.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, padding_side="right")
        with _one_process():
            model, report = AutoModelForSequenceClassification.from_pretrained(
                path, dtype="auto", output_loading_info=True
            )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ComponentError(f"reward model ({path}) cannot be loaded: {error}") from error
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"]))
        raise ComponentError(
            f"reward model ({path}) has no weights for {missing}: the model was not trained to score texts."
        )
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model.eval(), tokenizer


@contextlib.contextmanager
def _one_process() -> Iterator[None]:
    """Load a model whole on this process, even if ZeRO-3 shards the models of the training.

    Only the main process loads the reward model. Sharding is collective, so it would wait for the other processes.
    """
    from transformers.integrations import deepspeed

    training = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = training


def _conversation(tokenizer: Any, prompt: str, response: str) -> str:
    if tokenizer.chat_template is None:
        return f"{prompt}\n{response}"
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    return tokenizer.apply_chat_template(turns, tokenize=False)


class Judge:
    """Asks a chat model for a number."""

    def __init__(self, params: JudgeParams) -> None:
        self._params = params
        self._url = f"{params.base_url}/chat/completions"

    def __call__(self, prompts: list[str], responses: list[str], references: list[str]) -> RewardArray:
        """Return the judge's numbers, shape (n,), within ``scale``.

        Raises:
            ComponentError: if a response has no number after all attempts; the message has the address and the last
                failure.
        """
        import httpx

        key = os.environ[self._params.api_key_env] if self._params.api_key_env else None
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        texts = list(zip(range(len(responses)), prompts, responses, references, strict=True))
        with (
            httpx.Client(headers=headers, timeout=self._params.timeout) as client,
            ThreadPoolExecutor(self._params.concurrency) as threads,
        ):
            return np.array(list(threads.map(lambda given: self._ask(client, *given), texts)), dtype=np.float64)

    def _ask(self, client: Any, index: int, prompt: str, response: str, reference: str) -> float:
        """Return the judge's number for one response."""
        import httpx

        given = {"prompt": prompt, "response": response, "reference": reference}
        question = re.sub(r"\{(prompt|response|reference)\}", lambda match: given[match[1]], self._params.prompt)
        body = {
            "model": self._params.model,
            "messages": [{"role": "user", "content": question}],
            **self._params.options,
        }
        failure, attempts = "", 0
        for attempt in range(self._params.retries + 1):
            if attempt:
                time.sleep(min(_FIRST_WAIT * 2 ** (attempt - 1), _LONGEST_WAIT))
            attempts += 1
            try:
                reply = client.post(self._url, json=body)
            except httpx.HTTPError as error:
                failure = f"{type(error).__name__}: {error}"
                continue
            if reply.status_code != 200:
                failure = f"HTTP {reply.status_code}: {_short(reply.text)}"
                if reply.status_code < 500 and reply.status_code not in _TRANSIENT:
                    break
                continue
            try:
                answer = reply.json()["choices"][0]["message"]["content"]
            except (json.JSONDecodeError, KeyError, IndexError, TypeError):
                failure = f"no chat completion: {_short(reply.text)}"
                continue
            number = _final_number(str(answer))
            low, high = self._params.scale
            if number is not None and low <= number <= high:
                return number
            failure = f"an answer that does not end with a number from {low:g} to {high:g}: {_short_end(str(answer))}"
        times = "attempt" if attempts == 1 else "attempts"
        raise ComponentError(
            f"reward judge ({self._params.model} at {self._url}) failed {_of(index, prompt, response)}, "
            f"{attempts} {times}; the last: {failure}."
        )


def _final_number(text: str) -> float | None:
    """Return the number at the end of a text (``Rating: 8/10`` gives 8), or None."""
    match = re.search(r"(?<![\d.])(-?\d+(?:\.\d+)?)(?:\s*(?:/|out of)\s*\d+(?:\.\d+)?)?\W*$", text)
    return None if match is None else float(match[1])


def _short_end(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else f"...{text[-_SHOWN:]}")
