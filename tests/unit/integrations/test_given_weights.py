"""Token weights that the data gives, token by token, through every form of LLaMA-Factory's preprocessing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
from dataflex import GivenWeightParams
from dataflex.config.loading import RunConfig
from dataflex.data.pool import Pool
from dataflex.errors import ConfigError
from dataflex.integrations.llamafactory.loading import Loader, Wanted, load_noting_rows
from dataflex.integrations.llamafactory.pool_only import pool_of

OPENAI: dict[str, Any] = {
    "formatting": "openai",
    "columns": {"messages": "messages"},
    "tags": {
        "role_tag": "role",
        "content_tag": "content",
        "user_tag": "user",
        "assistant_tag": "assistant",
        "observation_tag": "tool",
        "function_tag": "function",
        "system_tag": "system",
    },
}
TALK = {
    "messages": [
        {"role": "system", "content": "the big bird"},
        {"role": "user", "content": "the cat sees the dog"},
        {"role": "assistant", "content": "red sun < moon tree > river likes", "weight": 0.25},
        {"role": "user", "content": "finds the road"},
        {"role": "assistant", "content": "blue house", "weight": None},
    ],
    "spans": [{"message": 2, "begin": 0, "end": 7, "weight": 2.0}],
}
CALL = {
    "messages": [
        {"role": "user", "content": "old cat", "weight": None},
        {
            "role": "assistant",
            "content": None,
            "weight": 3.0,
            "tool_calls": [{"type": "function", "function": {"name": "finds", "arguments": "road"}}],
        },
        {"role": "tool", "content": "new bird", "weight": None},
        {"role": "tool", "content": "small dog", "weight": None},
        {"role": "assistant", "content": "sees moon", "weight": None},
    ],
    "spans": [{"message": 4, "begin": 5, "end": 9, "weight": 0.0}],
}
"""A function call, whose two results LLaMA-Factory joins to one message. The span is the word moon."""
SHAREGPT: dict[str, Any] = {"formatting": "sharegpt", "columns": {"messages": "conversations", "tools": "tools"}}
TOOLS = json.dumps([{"name": "finds", "description": "finds", "parameters": {"type": "object", "properties": {}}}])
CHAT = {
    "conversations": [
        {"from": "human", "value": "old cat"},
        {"from": "function_call", "value": '{"name": "finds", "arguments": {"the": "road"}}', "weight": 3},
        {"from": "observation", "value": "new bird"},
        {"from": "gpt", "value": "sees < moon >"},
    ],
    "tools": TOOLS,
    "spans": [],
}
BROKEN = {
    "conversations": [{"from": "human", "value": "old cat"}, {"from": "human", "value": "red sun"}],
    "tools": "",
    "spans": [{"message": 9, "begin": 5, "end": 2, "weight": -1.0}],
}
"""A row that LLaMA-Factory leaves out, so its span does not count."""
ALPACA: dict[str, Any] = {
    "columns": {"prompt": "instruction", "query": "input", "response": "output", "history": "history"}
}
PAIR = {
    "instruction": "the cat",
    "input": "sees",
    "output": "red sun < moon > river",
    "history": [["finds road", "blue house"]],
    "weight": 0.5,
    "spans": [{"begin": 17, "end": 22, "weight": 4.0}],
}
ALL: dict[str, Any] = {
    "roles": {"assistant": 1.0, "function": 0.5},
    "message_key": "weight",
    "marks": [{"begin": "<", "end": ">", "weight": 0.5}],
    "spans_column": "spans",
}
PROMPTS = {**ALL, "roles": {**ALL["roles"], "user": 0.125, "observation": 7.0, "system": 6.0}}

CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "several turns": (
        "talk",
        ALL,
        {},
        "red 0.5 sun 0.5 < 0.125 moon 0.125 tree 0.125 > 0.125 river 0.25 likes 0.25 </s> 0.25 blue 1 house 1 </s> 1",
    ),
    "masked history": ("talk", ALL, {"mask_history": True}, "blue 1 house 1 </s> 1"),
    "prompts": (
        "talk",
        PROMPTS,
        {"train_on_prompt": True},
        # "System: the big bird ... </s>" without its first token, which nothing predicts; then the first turn.
        ": 6 the 6 big 6 bird 6 <unk> 6 <unk> 6 <unk> 6 </s> 6 "
        "<unk> 0.125 : 0.125 the 0.125 cat 0.125 sees 0.125 the 0.125 dog 0.125 </s> 0.125 <unk> 0.125 : 0.125 "
        "red 0.5 sun 0.5 < 0.125 moon 0.125 tree 0.125 > 0.125 river 0.25 likes 0.25 </s> 0.25 "
        "<unk> 0.125 : 0.125 finds 0.125 the 0.125 road 0.125 </s> 0.125 <unk> 0.125 : 0.125 blue 1 house 1 </s> 1",
    ),
    "prompts and a merged system message": (
        "talk",
        PROMPTS,
        {"train_on_prompt": True, "template": "llama2"},
        # "<s> [ INST ] << SYS >> the big bird detailed thinking off << / SYS >>"; the frame of the turn is the user's.
        "[ 0.125 <unk> 0.125 ] 0.125 <unk> 6 <unk> 6 <unk> 6 the 6 big 6 bird 6 <unk> 6 <unk> 6 <unk> 6 <unk> 6 "
        "<unk> 6 <unk> 6 the 0.125 cat 0.125 sees 0.125 the 0.125 dog 0.125 <unk> 0.125 <unk> 0.125 ] 0.125 "
        "red 0.5 sun 0.5 < 0.125 moon 0.125 tree 0.125 > 0.125 river 0.25 likes 0.25 </s> 0.25 "
        "<s> 0.125 [ 0.125 <unk> 0.125 ] 0.125 finds 0.125 the 0.125 road 0.125 <unk> 0.125 <unk> 0.125 ] 0.125 "
        "blue 1 house 1 </s> 1",
    ),
    "ends on the next prompt": (
        "talk",
        ALL,
        {"template": "bailing"},
        "red 0.5 sun 0.5 < 0.125 moon 0.125 tree 0.125 > 0.125 river 0.25 likes 0.25 </s> 0.25 blue 1 house 1 </s> 1",
    ),
    "ends on the next prompt, masked history": (
        "talk",
        ALL,
        {"template": "bailing", "mask_history": True},
        "blue 1 house 1 </s> 1",
    ),
    "cut off in the second turn": (
        "talk",
        ALL,
        {"cutoff_len": 33},
        "red 0.5 sun 0.5 < 0.125 moon 0.125 tree 0.125 > 0.125 river 0.25 likes 0.25 </s> 0.25 blue 1",
    ),
    "cut off in a response": ("talk", ALL, {"cutoff_len": 17}, "red 0.5 sun 0.5 < 0.125 moon 0.125 tree 0.125"),
    "cut off in the history": ("talk", ALL, {"cutoff_len": 20, "mask_history": True}, "blue 1 house 1 </s> 1"),
    "added thoughts": (
        "talk",
        ALL,
        {"template": "qwen3"},
        # The marks hold in the empty thought "< think > < / think >" too; "</" is one unknown token.
        "< 0.125 <unk> 0.125 > 0.125 <unk> 0.125 <unk> 0.125 > 0.125 "
        "red 0.5 sun 0.5 < 0.125 moon 0.125 tree 0.125 > 0.125 river 0.25 likes 0.25 <|im_end|> 0.25 "
        "< 0.5 <unk> 0.5 > 0.5 <unk> 0.5 <unk> 0.5 > 0.5 blue 1 house 1 <|im_end|> 1",
    ),
    "thoughts in the prompt": (
        "talk",
        ALL,
        {"template": "qwen3", "enable_thinking": False},
        "red 0.5 sun 0.5 < 0.125 moon 0.125 tree 0.125 > 0.125 river 0.25 likes 0.25 <|im_end|> 0.25 "
        "blue 1 house 1 <|im_end|> 1",
    ),
    "results of tools that are joined": (
        "call",
        {**ALL, "marks": []},
        {},
        # "Action: finds Action Input: road" in quotes; a function 0.5 times the message 3.
        "<unk> 1.5 : 1.5 finds 1.5 <unk> 1.5 <unk> 1.5 : 1.5 "
        + '" 1.5 road 1.5 " 1.5 </s> 1.5 '
        + "sees 1 moon 0 </s> 1",
    ),
    "sharegpt with tools": (
        "chat",
        ALL,
        {"cutoff_len": 200},
        "<unk> 1.5 : 1.5 finds 1.5 <unk> 1.5 <unk> 1.5 : 1.5 "
        '<unk> 1.5 the 1.5 <unk> 1.5 " 1.5 road 1.5 <unk> 1.5 </s> 1.5 '
        "sees 1 < 0.5 moon 0.5 > 0.5 </s> 1",
    ),
    "sharegpt with tools, prompts": (
        "chat",
        {**PROMPTS, "spans_column": None},
        {"train_on_prompt": True, "cutoff_len": 200},
        "... <unk> 0.125 : 0.125 old 0.125 cat 0.125 </s> 0.125 <unk> 0.125 : 0.125 "
        "<unk> 1.5 : 1.5 finds 1.5 <unk> 1.5 <unk> 1.5 : 1.5 "
        '<unk> 1.5 the 1.5 <unk> 1.5 " 1.5 road 1.5 <unk> 1.5 </s> 1.5 '
        "<unk> 7 : 7 new 7 bird 7 </s> 7 <unk> 7 : 7 sees 1 < 0.5 moon 0.5 > 0.5 </s> 1",
    ),
    "alpaca": (
        "pair",
        ALL,
        {},
        "blue 1 house 1 </s> 1 red 0.5 sun 0.5 < 0.25 moon 0.25 > 0.25 river 2 </s> 0.5",
    ),
    "alpaca, ends on the next prompt": (
        "pair",
        ALL,
        {"template": "bailing"},
        "blue 1 house 1 </s> 1 red 0.5 sun 0.5 < 0.25 moon 0.25 > 0.25 river 2 </s> 0.5",
    ),
    "alpaca, a response cut off to nothing": (
        "pair",
        {"message_key": "weight"},
        {"template": "bailing", "mask_history": True, "cutoff_len": 4},
        "</s> 0.5",
    ),
    "alpaca by role alone": (
        "pair",
        {"roles": {"assistant": 0.75}},
        {"mask_history": True},
        "red 0.75 sun 0.75 < 0.75 moon 0.75 > 0.75 river 0.75 </s> 0.75",
    ),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("weights")
    tiny.make_model(root / "model")
    data = root / "data"
    data.mkdir()
    tiny.add_data(data, "talk", [TALK], **OPENAI)
    tiny.add_data(data, "call", [CALL], **OPENAI)
    tiny.add_data(data, "chat", [CHAT, BROKEN], **SHAREGPT)
    tiny.add_data(data, "pair", [PAIR], **ALPACA)
    tiny.add_data(data, "many", [numbered(number) for number in range(SIZE)], **ALPACA)
    tiny.add_entries(data, {"drawn": {"file_name": "many.json", "num_samples": 25, **ALPACA}})
    return root


@pytest.fixture(autouse=True)
def _types_of_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put back what LLaMA-Factory changes in the datasets library for neat_packing."""
    from datasets.arrow_writer import OptimizedTypedSequence

    monkeypatch.setattr(OptimizedTypedSequence, "__init__", OptimizedTypedSequence.__init__)


@pytest.fixture(autouse=True)
def _templates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put back what a run sets in LLaMA-Factory's templates, which are shared."""
    from llamafactory.data.template import TEMPLATES

    for name in ("enable_thinking", "preserve_thinking"):
        monkeypatch.setattr(TEMPLATES["qwen3"], name, getattr(TEMPLATES["qwen3"], name))


def load(
    root: Path, dataset: str, section: dict[str, Any], column: str | None = None, **changes: Any
) -> tuple[Pool, Any]:
    given = tiny.arguments(root / "model", root / "data", root / "out", dataset=dataset, **changes)
    return pool_of(RunConfig(given, None), column, (), {"weight": GivenWeightParams(**section)})


def weighted(pool: Pool, tokenizer: Any) -> list[list[tuple[str, float]]]:
    """Return the trained tokens of each sample with their weights."""
    weights = pool.given_weights["weight"].rows(np.arange(pool.size))
    found = []
    for row, given in zip(pool.dataset, weights, strict=True):
        trained = [label for label in row["labels"][1:] if label != -100]
        found.append(list(zip(map(tokenizer.decode, trained), given.tolist(), strict=True)))
    return found


def pairs_in(text: str) -> list[tuple[str, float]]:
    """Return the tokens and weights of a text in which they alternate."""
    words = text.split()
    return [(token, float(weight)) for token, weight in zip(words[::2], words[1::2], strict=True)]


@pytest.mark.parametrize("name", CASES)
def test_every_trained_token_has_the_weight_of_its_text(root: Path, name: str) -> None:
    dataset, section, changes, expected = CASES[name]
    pool, tokenizer = load(root, dataset, section, **changes)
    [found] = weighted(pool, tokenizer)
    if expected.startswith("..."):
        wanted = pairs_in(expected.removeprefix("..."))
        system, found = found[: -len(wanted)], found[-len(wanted) :]
        assert {weight for _, weight in system} == {6.0}
        assert "finds" in [token for token, _ in system]  # the description of the tools
    else:
        wanted = pairs_in(expected)
    assert found == wanted


SIZE = 40


def numbered(number: int) -> dict[str, Any]:
    """Return a row that names its number in two words. The next word has its own weight, 1 / (number + 1)."""
    first, second = tiny.WORDS[number // 20], tiny.WORDS[number % 20]
    words = f"{first} {second} "
    return {
        "instruction": words + "likes",
        "input": "",
        "output": f"{words}road bird" + " small" * (number % 5),
        "history": [],
        "weight": number + 1,
        "kind": "ab"[number % 2],
        "spans": [{"begin": len(words), "end": len(words) + 4, "weight": (number + 1) ** -2}],
    }


def of_number(words: list[str]) -> list[tuple[str, float]]:
    """Return the tokens that a row of ``numbered`` trains on, given its first two words, with their weights."""
    number = tiny.WORDS.index(words[0]) * 20 + tiny.WORDS.index(words[1])
    weight = np.float32(number + 1)
    parts = [(words[0], weight), (words[1], weight), ("road", np.float32(1 / (number + 1))), ("bird", weight)]
    return [*parts, *[("small", weight)] * (number % 5), ("</s>", weight)]


DATA: dict[str, tuple[str | None, dict[str, Any]]] = {
    "as it is": (None, {}),
    "the first rows": (None, {"max_samples": 11}),
    "split": (None, {"val_size": 0.25}),
    "drawn": (None, {"dataset": "drawn"}),
    "divided": ("kind", {}),
    "divided and split": ("kind", {"val_size": 0.2}),
    "workers": (None, {"preprocessing_num_workers": 2, "overwrite_cache": True}),
    "packed": (None, {"packing": True}),
    "packed without attention": (None, {"packing": True, "neat_packing": True}),
    "packed in small batches": (None, {"packing": True, "preprocessing_batch_size": 16}),
    "packed and split": (None, {"packing": True, "val_size": 0.2}),
    "packed and divided": ("kind", {"packing": True}),
    "packed by workers": (None, {"packing": True, "preprocessing_num_workers": 2, "overwrite_cache": True}),
    "packed to short samples": (None, {"packing": True, "cutoff_len": 24}),
}


@pytest.mark.parametrize("name", DATA)
def test_weights_follow_their_rows(root: Path, name: str) -> None:
    column, changes = DATA[name]
    section = {"message_key": "weight", "spans_column": "spans"}
    pool, tokenizer = load(root, section=section, column=column, **{"dataset": "many", **changes})
    seen = 0
    for found in weighted(pool, tokenizer):
        while found:
            wanted = of_number([token for token, _ in found[:2]])
            tokens = found[: len(wanted)]
            assert [token for token, _ in tokens] == [token for token, _ in wanted]
            np.testing.assert_allclose([each for _, each in tokens], [each for _, each in wanted], rtol=1e-6)
            found, seen = found[len(wanted) :], seen + 1
    expected = 11 if "max_samples" in changes else 25 if "dataset" in changes else SIZE
    assert seen == expected if "val_size" not in changes else 20 < seen < SIZE


def test_several_data_sets_of_different_forms(root: Path) -> None:
    pool, tokenizer = load(root, "pair,chat,talk", ALL, cutoff_len=256)
    assert [len(pool.dataset), *pool.domains] == [3, "pair", "chat", "talk"]
    expected = [pairs_in(CASES[name][3]) for name in ("alpaca", "sharegpt with tools", "several turns")]
    assert weighted(pool, tokenizer) == expected


def test_normalized_weights_have_mean_1(root: Path) -> None:
    plain, tokenizer = load(root, "talk", ALL)
    scaled, _ = load(root, "talk", {**ALL, "normalized": True})
    before = np.array([weight for _, weight in weighted(plain, tokenizer)[0]])
    after = np.array([weight for _, weight in weighted(scaled, tokenizer)[0]])
    np.testing.assert_allclose(after, before / before.mean(), rtol=1e-6)
    assert before.mean() != 1
    assert scaled.given_weights["weight"].digest == plain.given_weights["weight"].digest


def spans(*given: Any) -> dict[str, Any]:
    return {**TALK, "spans": list(given)}


def span(**changes: Any) -> dict[str, Any]:
    return {"message": 2, "begin": 0, "end": 3, "weight": 1.0, **changes}


def saying(text: str, **keys: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "cat"}, {"role": "assistant", "content": text, **keys}]
    return {"messages": messages, "spans": []}


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "outside": (spans(span(end=900)), "span 0 of 'spans' is from 0 to 900, and the content of its message has 33 char"),
    "empty": (spans(span(), span(begin=5, end=5)), "span 1 of 'spans' is from 5 to 5, and the content"),
    "overlap": (spans(span(begin=2, end=8), span()), "the spans 0 to 3 and 2 to 8 of 'spans' overlap in one message"),
    "negative": (spans(span(weight=-0.5)), "the weight of span 0 of 'spans' is -0.5; a finite number of 0 or more"),
    "no weight": (spans(span(weight=None)), "span 0 of 'spans' has no weight"),
    "no begin": (spans(span(begin=None)), "span 0 of 'spans' needs begin: a number of characters; it is None"),
    "no message": (spans(span(message=None)), "span 0 of 'spans' needs message: the number of a message, from 0"),
    "system": (spans(span(message=0)), "span 0 of 'spans' names message 0; spans can be in the messages 1, 2, 3, 4"),
    "function": ({**CALL, "spans": [span(message=1, end=2)]}, "'spans' has a span in a function call, whose text the"),
    "negative message": (saying("sun", weight=-1.0), "'weight' of message 1 is -1.0; a finite number of 0 or more"),
    "open": (saying("red < sun"), "'<' (character 4 of a response) is not closed by '>'"),
    "closed": (saying("red > sun < moon >"), "'>' (character 4 of a response) ends no '<'"),
    "nested": (saying("red < sun < moon > >"), "'<' (character 10 of a response) begins inside another '<'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_row_with_wrong_weights_is_named(root: Path, tmp_path: Path, name: str) -> None:
    row, text = WRONG[name]
    good = saying("sun < moon >", weight=1.0)
    file = tmp_path / "wrong.json"
    file.write_text("[\n" + ",\n".join(map(json.dumps, [good, good, row])) + "\n]")
    tiny.add_entries(tmp_path, {"wrong": {"file_name": "wrong.json", **OPENAI}})
    with pytest.raises(ConfigError) as error:
        load(root, "wrong", ALL, dataset_dir=str(tmp_path))
    assert str(error.value).startswith(f"dataflex.weight: {file}, line 4, row 2 (counted from 0): {text}")


def test_differing_weights_of_joined_results_matter_only_if_prompts_are_trained(root: Path, tmp_path: Path) -> None:
    row = json.loads(json.dumps(CALL))
    row["messages"][2]["weight"] = 0.5
    tiny.add_data(tmp_path, "call", [row], **OPENAI)
    section = {"message_key": "weight"}
    load(root, "call", section, dataset_dir=str(tmp_path))
    with pytest.raises(ConfigError, match=r"messages 2 to 3 .* become one message, and their 'weight' differs"):
        load(root, "call", section, dataset_dir=str(tmp_path), train_on_prompt=True)


@pytest.mark.parametrize(
    ("dataset", "section", "text"),
    [
        ("talk", {"message_key": "wieght"}, "dataflex.weight.message_key: no training data has a key of messages"),
        ("pair", {"message_key": "wieght"}, "no training data has a column 'wieght'; did you mean 'weight'?"),
        ("pair", {"spans_column": "span"}, "dataflex.weight.spans_column: no training data has a column 'span'"),
        ("pair", {"spans_column": "output"}, "'output' holds string; a list of mappings with begin, end, weight"),
        ("pair", {"spans_column": "weight"}, "'weight' holds double; a list of mappings"),
        (
            "pair,talk",
            {"marks": [{"begin": "[[", "end": "]]", "weight": 0}]},
            "dataflex.weight.marks: no response of the training data holds '[['",
        ),
        ("pair", {"roles": {"assistant": 0}}, "dataflex.weight: the weight of every trained token is 0"),
    ],
)
def test_sources_that_give_nothing_are_refused(root: Path, dataset: str, section: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(root, dataset, section)
    assert text in str(error.value)


def test_a_source_in_one_of_several_data_sets_is_enough(root: Path) -> None:
    pool, tokenizer = load(root, "call,many", {"roles": {"assistant": 2.0}, "marks": []})
    assert pool.size == SIZE + 1
    section = {"marks": [{"begin": "<", "end": ">", "weight": 0.5}]}
    pool, tokenizer = load(root, "many,talk", section)
    first, *_, last = weighted(pool, tokenizer)
    assert {weight for _, weight in first} == {1.0}
    assert {weight for _, weight in last} == {1.0, 0.5}


@pytest.mark.parametrize("names", ["talk", "talk,pair"])
def test_weights_are_stored_with_tokenized_data(root: Path, tmp_path: Path, names: str) -> None:
    pool, tokenizer = load(root, names, ALL)
    kept = tmp_path / "tokenized"

    def stored(section: dict[str, Any]) -> Pool:
        """Load as a run does, which writes the folder."""
        from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
        from llamafactory.hparams import get_train_args
        from llamafactory.model import load_tokenizer

        given = tiny.arguments(root / "model", root / "data", tmp_path / "out", dataset=names)
        model_args, data_args, training_args, *_ = get_train_args(
            {**given, "tokenized_path": str(kept), "use_cpu": True}
        )
        module = load_tokenizer(model_args)
        template = get_template_and_fix_tokenizer(module["tokenizer"], data_args)
        load = Loader(get_dataset, template, model_args, training_args, "sft", module)
        wanted = Wanted(weights={"weight": GivenWeightParams(**section)})
        return load_noting_rows(load, data_args, tuple(data_args.dataset), None, wanted)[0]

    for section in (ALL, ALL, {**ALL, "normalized": True}):
        found = stored(section)
        assert weighted(found, tokenizer) == weighted(pool, tokenizer) or section is not ALL
        assert found.fingerprint == pool.fingerprint
        assert found.column_fingerprints == pool.column_fingerprints
    with pytest.raises(ConfigError, match=r"dataflex_token_weights.parquet holds token weights of other parameters"):
        stored({"roles": {"assistant": 0.5}})
    for file in kept.rglob("dataflex_token_weights.parquet"):
        file.unlink()
    with pytest.raises(ConfigError, match=r"holds tokenized samples without token weights. Remove the folder"):
        stored(ALL)
    shutil.rmtree(kept)
