"""Rewards: exact match, functions in a file, a reward model and a judge, and the errors of each."""

from __future__ import annotations

import contextlib
import json
import math
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification
from transformers.integrations import deepspeed

from dataflex.errors import ComponentError
from dataflex.selectors import base_rewards
from dataflex.selectors.base_rewards import ExactMatchParams, Reward, RewardChoice
from tiny import make_model

CHOICE: TypeAdapter[Any] = TypeAdapter(RewardChoice)


def reward_of(given: Any, base: Path | None = None) -> Reward:
    return CHOICE.validate_python(given, context={"base": base}).build()


def call(reward: Reward, *texts: tuple[str, str, str]) -> list[float]:
    values = reward(*(list(column) for column in zip(*texts, strict=True)))  # type: ignore[arg-type]
    assert values.dtype == np.float64
    assert values.shape == (len(texts),)
    return values.tolist()


# Exact match


@pytest.mark.parametrize(
    "response, reference, expected",
    [
        ("so it is\n#### 42", "6 x 7\n#### 42", 1),
        ("#### 41\nno:\n#### 42", "#### 42", 1),  # the last counts
        ("#### 42\nno:\n#### 41", "#### 42", 0),
        ("#### 1,000", "####1000", 1),
        ("#### 1000000", "#### 1,000,000", 1),
        ("#### 1,2", "#### 12", 0),  # two numbers are not one
        ("#### a, b", "#### A,B ", 1),
        ("42", "#### 42", 0),  # not in the form asked for
        ("", "#### 42", 0),
        (" Paris \n", "paris", 1),  # the pattern is not in the reference
        ("It is Paris", "paris", 0),
        ("", "", 1),
    ],
)
def test_exact_match_compares_the_final_answers(response: str, reference: str, expected: float) -> None:
    assert call(reward_of("exact_match"), ("q", response, reference)) == [expected]


def test_exact_match_can_use_another_pattern() -> None:
    reward = reward_of({"type": "exact_match", "pattern": r"answer is \(?([A-D])"})
    texts = [("q", "I think the answer is C.", "The answer is (C)"), ("q", "the answer is B", "answer is C")]
    assert call(reward, *texts) == [1, 0]


def test_a_name_alone_is_the_type_of_the_reward() -> None:
    assert CHOICE.validate_python("exact_match") == ExactMatchParams()
    assert CHOICE.validate_python(CHOICE.dump_python(ExactMatchParams(), mode="json")) == ExactMatchParams()


@pytest.mark.parametrize(
    "given, message",
    [
        ("exact", "'exact_match', 'python', 'model', 'judge'"),
        ({"pattern": "(a)"}, "type"),
        ({"type": "exact_match", "pattern": "("}, "not a regular expression"),
        ({"type": "exact_match", "pattern": "a"}, "needs a group"),
        ({"type": "exact_match", "patterns": "(a)"}, "patterns"),
        ("python", "path"),
        ({"type": "python", "path": "none.py", "function": "f"}, "no such file in"),
        ({"type": "model", "path": "none"}, "no such folder in"),
        ({"type": "judge", "model": "m", "base_url": "localhost:8000"}, "must look like"),
        ({"type": "judge", "model": "m", "base_url": "http://"}, "must look like"),
        ({"type": "judge", "model": "m", "base_url": "http://a/v1", "prompt": "rate"}, "needs {response}"),
        ({"type": "judge", "model": "m", "base_url": "http://a/v1", "scale": [5, 1]}, "lowest and the highest"),
        ({"type": "judge", "model": "m", "base_url": "http://a/v1", "api_key_env": "NOT_SET_X"}, "not set"),
    ],
)
def test_bad_parameters_are_refused_before_loading(given: Any, message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        CHOICE.validate_python(given)
    assert message in str(caught.value)


# Functions


def write(folder: Path, text: str, name: str = "my_rewards.py") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def python(path: Path | str, function: str = "score", base: Path | None = None) -> Reward:
    return reward_of({"type": "python", "path": str(path), "function": function}, base)


def test_a_function_gets_the_three_texts(tmp_path: Path) -> None:
    path = write(
        tmp_path, "def score(prompt, response, reference):\n    return len(response) - len(prompt + reference)\n"
    )
    assert call(python(path), ("a", "bbbb", "cc"), ("", "b", "")) == [1, 1]


@pytest.mark.parametrize("value, expected", [("True", 1), ("0.5", 0.5), ("np.float32(2)", 2), ("np.bool_(False)", 0)])
def test_numpy_numbers_and_booleans_count_as_rewards(tmp_path: Path, value: str, expected: float) -> None:
    path = write(tmp_path, f"import numpy as np\ndef score(prompt, response, reference):\n    return {value}\n")
    assert call(python(path), ("a", "b", "c")) == [expected]


@pytest.mark.parametrize("value", ["None", "'1'", "math.nan", "math.inf", "[1]", "1j"])
def test_a_reward_that_is_not_a_number_is_an_error(tmp_path: Path, value: str) -> None:
    text = f"import math\ndef score(prompt, response, reference):\n    return 1 if response == 'good' else {value}\n"
    reward = python(write(tmp_path, text))
    with pytest.raises(
        ComponentError, match=r"my_rewards.py, score\) returned .*response 1 \('bad' to the prompt 'p'\)"
    ):
        call(reward, ("p", "good", ""), ("p", "bad", ""))


def test_a_function_that_raises_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path, "def score(prompt, response, reference):\n    return {}[response]\n")
    with pytest.raises(ComponentError, match=r"raised KeyError: 'b' for response 0") as caught:
        call(python(path), ("a" * 100, "b", ""))
    assert "a" * 60 + "..." in str(caught.value)


def test_a_file_that_cannot_be_imported_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path, "import no_such_module\ndef score(a, b, c): ...\n")
    reward = python(path)  # found at once, run at the first call
    with pytest.raises(ComponentError, match="importing it failed with ModuleNotFoundError"):
        call(reward, ("a", "b", "c"))
    path = write(tmp_path, "score = 1\n", "number.py")
    with pytest.raises(ComponentError, match="score is not a function"):
        call(python(path), ("a", "b", "c"))


def test_a_missing_function_is_refused_before_loading(tmp_path: Path) -> None:
    text = "import sys\nif sys.platform:\n    def branch(): ...\nfrom math import sqrt as root\nalias = branch\n"
    text += "class Thing: ...\n"
    path = write(tmp_path, text)
    for name in ("branch", "root", "alias", "Thing"):
        python(path, name)
    with pytest.raises(ValidationError, match=r"no function 'score'; the file has Thing, alias, branch, root, sys"):
        python(path)
    with pytest.raises(ValidationError, match="cannot be parsed as a Python file"):
        python(write(tmp_path, "def score(:\n", "broken.py"))


def test_paths_are_found_beside_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, here = tmp_path / "configs", tmp_path / "here"
    base.mkdir()
    here.mkdir()
    write(base, "def score(p, r, f):\n    return 1\n")
    monkeypatch.chdir(here)
    assert call(python("my_rewards.py", base=base), ("", "", "")) == [1]
    with pytest.raises(ValidationError, match=str(here)):
        python("my_rewards.py")
    write(here, "def score(p, r, f):\n    return 2\n")
    assert call(python("my_rewards.py", base=base), ("", "", "")) == [2]  # the working directory first


# Reward model

TEXTS = [
    ("the cat", "sees the moon", ""),
    ("the dog", "likes", ""),
    ("a tree", "the river makes red blue old new small big house", ""),
    ("road", "bird", ""),
]


@pytest.fixture
def scorer(tmp_path: Path) -> Path:
    """Return the folder of a tiny reward model with the tiny tokenizer."""
    config = LlamaConfig.from_pretrained(make_model(tmp_path))
    config.num_labels = 1
    torch.manual_seed(1)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    return tmp_path


def separate_pad(folder: Path) -> None:
    """Give the tokenizer a padding token of its own, which no text has."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = "<unk>"
    tokenizer.save_pretrained(folder)
    config = LlamaConfig.from_pretrained(folder, num_labels=1)
    config.pad_token_id = None
    config.save_pretrained(folder)


def by_hand(folder: Path, text: str, special: bool = True) -> float:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = LlamaForSequenceClassification.from_pretrained(folder).eval()
    ids = tokenizer(text, add_special_tokens=special, return_tensors="pt").input_ids
    with torch.no_grad():
        hidden = model.model(input_ids=ids).last_hidden_state
        return float(model.score(hidden[0, -1])[-1])


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_reward_model_equals_its_layers_called_by_hand(scorer: Path, batch_size: int) -> None:
    separate_pad(scorer)
    reward = reward_of({"type": "model", "path": str(scorer), "batch_size": batch_size})
    state = torch.get_rng_state()
    values = call(reward, *TEXTS)
    assert torch.equal(torch.get_rng_state(), state)
    assert np.allclose(values, [by_hand(scorer, f"{prompt}\n{response}") for prompt, response, _ in TEXTS], atol=1e-5)
    assert len(set(values)) == len(values)
    assert call(reward, *TEXTS) == values


def test_reward_model_uses_its_chat_template(scorer: Path) -> None:
    separate_pad(scorer)
    tokenizer = AutoTokenizer.from_pretrained(scorer)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'][0] }} {{ m['content'] }} {% endfor %}"
    tokenizer.save_pretrained(scorer)
    values = call(reward_of({"type": "model", "path": str(scorer)}), *TEXTS)
    expected = [by_hand(scorer, f"u {prompt} a {response} ", special=False) for prompt, response, _ in TEXTS]
    assert np.allclose(values, expected, atol=1e-5)


def test_reward_model_without_a_padding_token_scores_the_last_token(scorer: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(scorer)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(scorer)
    values = call(reward_of({"type": "model", "path": str(scorer)}), *TEXTS)
    assert np.allclose(values, [by_hand(scorer, f"{prompt}\n{response}") for prompt, response, _ in TEXTS], atol=1e-5)


def test_several_logits_give_the_last_one_as_reward(scorer: Path) -> None:
    config = LlamaConfig.from_pretrained(scorer)
    config.num_labels = 2
    LlamaForSequenceClassification(config).save_pretrained(scorer)
    separate_pad(scorer)
    config = LlamaConfig.from_pretrained(scorer)
    config.num_labels = 2
    config.save_pretrained(scorer)
    values = call(reward_of({"type": "model", "path": str(scorer)}), *TEXTS)
    assert np.allclose(values, [by_hand(scorer, f"{prompt}\n{response}") for prompt, response, _ in TEXTS], atol=1e-5)


def test_reward_model_is_not_sharded_under_zero3(scorer: Path) -> None:
    config = deepspeed.HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
    try:
        assert deepspeed.is_deepspeed_zero3_enabled()
        values = call(reward_of({"type": "model", "path": str(scorer)}), *TEXTS)
        assert deepspeed.is_deepspeed_zero3_enabled()
        assert deepspeed.deepspeed_config() is config.config
    finally:
        deepspeed.unset_hf_deepspeed_config()
    assert call(reward_of({"type": "model", "path": str(scorer)}), *TEXTS) == values


def test_a_model_that_cannot_score_is_refused(tmp_path: Path) -> None:
    make_model(tmp_path / "causal")
    with pytest.raises(ComponentError, match=r"no weights for score.weight"):
        call(reward_of({"type": "model", "path": str(tmp_path / "causal")}), *TEXTS)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValidationError, match=r"no config.json"):
        reward_of({"type": "model", "path": "empty"}, tmp_path)
    (tmp_path / "empty" / "config.json").write_text("{}")
    with pytest.raises(ComponentError, match="cannot be loaded"):
        call(reward_of({"type": "model", "path": "empty"}, tmp_path), *TEXTS)


def test_a_model_that_gives_nan_is_an_error(scorer: Path) -> None:
    model = LlamaForSequenceClassification.from_pretrained(scorer)
    with torch.no_grad():
        model.score.weight.fill_(math.nan)
    model.save_pretrained(scorer)
    with pytest.raises(ComponentError, match=r"gave nan for response 0 \('sees the moon'"):
        call(reward_of({"type": "model", "path": str(scorer)}), *TEXTS)


# Judge


class Server:
    """A chat server on this machine that answers by a function of (request number, request body)."""

    def __init__(self, answer: Any) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[Any] = []
        self.paths: list[str] = []
        lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    number = len(server.bodies)
                    server.bodies.append(body)
                    server.headers.append(self.headers)
                    server.paths.append(self.path)
                status, text = answer(number, body)
                if status == 200 and not text.startswith("{"):
                    text = json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})
                data = text.encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                with contextlib.suppress(BrokenPipeError):  # a client that waits no longer
                    self.wfile.write(data)

            def log_message(self, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_port}/v1"

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(base_rewards, "_FIRST_WAIT", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    servers: list[Server] = []

    def start(answer: Any) -> Server:
        servers.append(Server(answer))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def judge(url: str, **changes: Any) -> Reward:
    return reward_of({"type": "judge", "base_url": url, "model": "wise", "retries": 2, **changes})


def test_judge_asks_about_every_response(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "secret")
    server = serve(lambda _number, body: (200, f"Fine. Rating: {body['messages'][0]['content'].split('|')[1]}/10"))
    reward = judge(
        f"{server.url}/",
        api_key_env="MY_KEY",
        prompt="{prompt}|{response}|{reference} {json}",
        options={"temperature": 0, "max_tokens": 5},
        concurrency=3,
    )
    texts = [(f"p{number} {{reference}}", str(number / 2), f"f{number}") for number in range(12)]
    assert call(reward, *texts) == [number / 2 for number in range(12)]
    asked = sorted(body["messages"][0]["content"] for body in server.bodies)
    # what is put in is not searched again, and other braces stay
    assert asked == sorted(f"{prompt}|{response}|{reference} {{json}}" for prompt, response, reference in texts)
    body = server.bodies[0]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("wise", 0, 5)
    assert set(server.paths) == {"/v1/chat/completions"}
    assert {headers["Authorization"] for headers in server.headers} == {"Bearer secret"}


def test_judge_works_without_a_key_and_with_defaults(serve: Any) -> None:
    server = serve(lambda _number, _body: (200, "**7**"))
    assert call(judge(server.url), ("What?", "That.", "This.")) == [7]
    assert server.headers[0]["Authorization"] is None
    question = server.bodies[0]["messages"][0]["content"]
    assert all(text in question for text in ("What?", "That.", "This."))


@pytest.mark.parametrize("status", [500, 503, 429])
def test_judge_tries_again(serve: Any, status: int) -> None:
    server = serve(lambda number, _body: (status, "busy") if number == 0 else (200, "4"))
    assert call(judge(server.url), ("p", "r", "f")) == [4]
    assert len(server.bodies) == 2


@pytest.mark.parametrize(
    "status, text, attempts, message",
    [
        (500, "on fire", 3, r"3 attempts; the last: HTTP 500: 'on fire'"),
        (401, "who are you", 1, r"1 attempt; the last: HTTP 401: 'who are you'"),
        (200, "It is quite good.", 3, r"does not end with a number from 0 to 10: 'It is quite good.'"),
        (200, "11", 3, r"does not end with a number from 0 to 10: '11'"),
        (200, "{}", 3, r"no chat completion: '{}'"),
    ],
)
def test_judge_that_fails_is_named(serve: Any, status: int, text: str, attempts: int, message: str) -> None:
    server = serve(lambda _number, _body: (status, text))
    with pytest.raises(ComponentError, match=message) as caught:
        call(judge(server.url), ("p", "r", "f"))
    assert f"wise at {server.url}/chat/completions" in str(caught.value)
    assert "response 0 ('r' to the prompt 'p')" in str(caught.value)
    assert len(server.bodies) == attempts


def test_unreachable_judge_is_named(serve: Any) -> None:
    server = Server(lambda _number, _body: (200, "1"))
    server.close()  # its port is free again
    with pytest.raises(ComponentError, match=rf"{server.url}/chat/completions\) failed .*the last: ConnectError"):
        call(judge(server.url, retries=1), ("p", "r", "f"))


def test_slow_judge_is_named(serve: Any) -> None:
    stop = threading.Event()
    server = serve(lambda _number, _body: (200, str(int(stop.wait(2)))))
    with pytest.raises(ComponentError, match="the last: ReadTimeout"):
        call(judge(server.url, timeout=0.2, retries=0), ("p", "r", "f"))
    stop.set()


def test_one_failure_stops_the_rest(serve: Any) -> None:
    server = serve(lambda _number, _body: (400, "no"))
    with pytest.raises(ComponentError, match="HTTP 400"):
        call(judge(server.url, concurrency=2), *[("p", "r", "f")] * 200)
    assert len(server.bodies) < 100


@pytest.mark.parametrize(
    "answer, expected",
    [
        ("8", 8),
        ("Rating: 8/10", 8),
        ("Score: **7.5**.", 7.5),
        ("3 reasons speak for 9 out of 10", 9),
        ('{"score": 6}', 6),
        ("-2", -2),
        ("1.2.3", None),
        ("8 is what I give", None),
        ("", None),
    ],
)
def test_the_last_number_of_an_answer_is_read(answer: str, expected: float | None) -> None:
    assert base_rewards._final_number(answer) == expected
