"""Tokens on record: what explain shows equals the record, and the texts equal the raw data."""

from __future__ import annotations

import json
import re
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import tiny
from dataflex.cli import main
from dataflex.data.stages import SampleFields
from dataflex.explain.samples import Texts
from dataflex.record.schema import TokensOfSample, TokensOfStep
from dataflex.record.writer import RunWriter
from unit.explain.test_explain import COMPONENTS, ask, refused, write_run

SIZES = {"alpha": 6, "beta": 4}
WEIGHTS = (0.0, 0.0, 1.5, 0.25)
"""Weights of the tokens of a sample, over and over."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tokens")
    for weights in tiny.make_model(root / "model").glob("*.safetensors"):
        weights.unlink()  # the model is not loaded
    tiny.make_data(root / "data", SIZES)
    return root


def outputs(data: Path) -> list[list[str]]:
    """Return the trained tokens of every sample: the words of its response and the end of the text."""
    rows = [row for name in SIZES for row in tiny.rows_of(data / "data", name)]
    return [[*row["output"].split(), "</s>"] for row in rows]


def line(step: int, tokens: list[list[str]], places: list[int], cut: int = 99, number: int | None = None) -> Any:
    """Return a line with these samples; the loss of token t of sample i in step s is s + i / 10 + t / 100."""
    return TokensOfStep(
        step,
        [
            TokensOfSample(
                place,
                number or len(tokens[place]),
                [round(step + place / 10 + t / 100, 3) for t in range(len(tokens[place][:cut]))],
                [0.5] if place == 1 else [WEIGHTS[t % 4] for t in range(len(tokens[place][:cut]))],
            )
            for place in places
        ],
    )


def weight_run(data: Path, output: Path, lines: list[Any]) -> Path:
    """Write the record of a run with a list of weighters, whose samples LLaMA-Factory draws."""
    given = tiny.arguments(data / "model", data / "data", output, dataset="alpha,beta")
    writer = RunWriter(output)
    writer.open_new()
    writer.begin({**given, "dataflex": {"weight": [{"method": "loss"}, {"method": "uniform"}]}}, None)
    for each in lines:
        writer.token_samples(each)
    return output


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokens = outputs(data)
    lines = [line(2, tokens, [7, 0, 1]), line(4, tokens, [0, 9]), line(6, tokens, [7, 3, 3], cut=4)]
    return weight_run(data, tmp_path_factory.mktemp("run") / "run", lines)


def printed(capsys: pytest.CaptureFixture[str], run: Path, *words: str) -> str:
    capsys.readouterr()
    assert main(["explain", str(run), "--tokens", *words]) == 0
    return capsys.readouterr().out


def rows_of(text: str) -> list[tuple[float, float, int, str]]:
    """Return weight, loss, number of tokens and text of each line of tokens."""
    found = re.findall(r"^ *([\d.]+)  +([\d.]+)  +(\d+)(?:  (\".*\"))?$", text, re.MULTILINE)
    return [(float(w), float(loss), int(n), json.loads(quoted or '""')) for w, loss, n, quoted in found]


def test_tokens_are_shown_with_their_texts_in_every_step(run: Path, data: Path, capsys: Any) -> None:
    tokens = outputs(data)
    answer = ask(capsys, run, "--tokens", "--index", "7", "0", "1", "9", "3", text=True)
    assert answer["no_text"] is None
    assert answer["not_on_record"] == []
    steps = {7: [2, 6], 0: [2, 4], 1: [2], 9: [4], 3: [6]}
    assert [each["index"] for each in answer["tokens"]] == list(steps)
    for sample in answer["tokens"]:
        place = sample["index"]
        assert sample["all_steps"] == [each["step"] for each in sample["steps"]] == steps[place]
        assert sample["trained"] == len(tokens[place])
        for each in sample["steps"]:
            kept = tokens[place][: 4 if each["step"] == 6 else 99]
            assert sample["tokens"][: len(each["losses"])] == kept
            assert each["losses"] == [round(each["step"] + place / 10 + t / 100, 3) for t in range(len(kept))]
            assert each["weights"] == [0.5 if place == 1 else WEIGHTS[t % 4] for t in range(len(kept))]
        assert [part["kind"] for part in sample["text"]] == ["prompt", "trained"]


def test_neighbours_of_equal_weight_share_a_line(run: Path, data: Path, capsys: Any) -> None:
    expected = outputs(data)[0]
    text = printed(capsys, run, "--index", "0")
    assert "weight=loss, uniform, step" in text
    rows = rows_of(text)
    assert " ".join(row[3] for row in rows) == " ".join(expected)
    assert [row[0] for row in rows] == [weight for weight, _ in groupby(WEIGHTS[t % 4] for t in range(len(expected)))]
    assert sum(row[2] for row in rows) == len(expected)
    position = 0
    for _, loss, number, words in rows:
        assert words.split() == expected[position : position + number]
        assert loss == pytest.approx(np.mean([4 + t / 100 for t in range(position, position + number)]), rel=1e-3)
        position += number
    count = sum(WEIGHTS[t % 4] > 0 for t in range(len(expected)))
    assert f"Step 4: {count} of {len(expected)} tokens count ({count / len(expected):.3f})" in text
    full = rows_of(printed(capsys, run, "--index", "0", "--full"))
    assert [row[3] for row in full] == expected
    assert [row[2] for row in full] == [1] * len(expected)
    assert rows_of(printed(capsys, run, "--index", "0", "--no-text")) == [(*row[:3], "") for row in rows]


def test_one_weight_of_a_sample_is_the_weight_of_its_tokens(run: Path, data: Path, capsys: Any) -> None:
    (row,) = rows_of(printed(capsys, run, "--index", "1"))
    assert (row[0], row[2], row[3].split()) == (0.5, len(outputs(data)[1]), outputs(data)[1])


def test_a_step_is_chosen(run: Path, capsys: Any) -> None:
    assert "Step 6: " in printed(capsys, run, "--index", "7")
    assert "Only the first 4 of" in printed(capsys, run, "--index", "7")
    assert "Step 2: " in printed(capsys, run, "--index", "7", "--step", "2")
    found = refused(capsys, run, "--tokens", "--index", "7", "--step", "4")
    assert "--step: 4 is not on record for sample 7; on record are its tokens of step 2, 6." in found


def test_samples_on_record_are_listed_and_others_named(run: Path, capsys: Any) -> None:
    answer = ask(capsys, run, "--tokens")
    assert [(each["index"], each["steps"]) for each in answer["recorded"]] == [
        (0, [2, 4]), (1, [2]), (3, [6]), (7, [2, 6]), (9, [4]),
    ]  # fmt: skip
    text = printed(capsys, run)
    assert "Tokens of 5 samples are on record:" in text
    assert re.findall(r"^(\d+) ", text, re.MULTILINE) == ["3", "7", "0", "9", "1"]  # the last step first
    text = printed(capsys, run, "--index", "2", "5", "9")
    assert "The tokens of 2, 5 are not on record. On record are 5 samples: 0, 1, 3, 7, 9" in text
    assert "Sample 9" in text


def test_tokens_of_other_data_are_not_shown(data: Path, tmp_path: Path, capsys: Any) -> None:
    tokens = outputs(data)
    run = weight_run(data, tmp_path / "run", [line(1, tokens, [2], number=99)])
    found = refused(capsys, run, "--tokens", "--index", "2")
    assert f"--index: sample 2 has {len(tokens[2])} trained tokens, on record are 99." in found
    assert "Step 1" in printed(capsys, run, "--index", "2", "--no-text")


def test_a_run_of_rounds_names_the_steps_of_a_samples_tokens(tmp_path: Path, capsys: Any) -> None:
    run = write_run(tmp_path / "run", COMPONENTS["select"])
    writer = RunWriter(run)
    for step in (4, 9):
        writer.token_samples(TokensOfStep(step, [TokensOfSample(33, 2, [1.0, 2.0], [0.0, 1.0])]))
    assert [each["tokens_at"] for each in ask(capsys, run, "--index", "33", "34")["samples"]] == [[4, 9], []]
    assert main(["explain", str(run), "--no-text", "--index", "33"]) == 0
    assert "Its tokens are on record (--tokens), of step 4, 9." in capsys.readouterr().out
    (sample,) = ask(capsys, run, "--tokens", "--index", "33")["tokens"]
    assert (sample["domain"], sample["tokens"]) == ("beta", None)


@pytest.mark.parametrize(
    "words, text",
    [
        (["--tokens", "--text", "x"], "--tokens: shows .* leave out --text"),
        (["--tokens", "--top", "3"], "--tokens: shows .* leave out --top"),
        (["--tokens", "--step", "3"], "--step: only has an effect with --tokens --index"),
        (["--index", "3", "--step", "3"], "--step: only has an effect with --tokens --index"),
        (["--tokens", "--step", "0"], "--step: must be a whole number of at least 1"),
        (["--tokens"], r"--tokens: .* has no tokens on record \(dataflex/token_samples.jsonl\)"),
        (["--tokens", "--index", "50"], "--index: 50 is not in the pool"),
    ],
)
def test_what_cannot_be_shown_is_refused(words: list[str], text: str, tmp_path: Path, capsys: Any) -> None:
    run = write_run(tmp_path / "run", COMPONENTS["select"])
    assert re.search(text, refused(capsys, run, *words))


def test_a_run_without_rounds_names_the_option(run: Path, capsys: Any) -> None:
    assert "the record has no round" in (found := refused(capsys, run))
    assert "--tokens shows the tokens" in found


def test_padding_in_a_text_without_labels_is_not_trained_on() -> None:
    rows = [{"input_ids": [5, 6, 0, 7, 0]}, {"input_ids": [5, 6, 7, 8], "labels": [5, -100, 7, -100]}]
    texts = Texts(SimpleNamespace(dataset=rows, fields=SampleFields()), SimpleNamespace(pad_token_id=0), False)  # type: ignore[arg-type]
    assert texts.trained_tokens(0) == [6, 7]
    assert texts.trained_tokens(1) == [7]
