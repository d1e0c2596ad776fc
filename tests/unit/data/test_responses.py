"""Faults of the responses in the rows of preference stages, compared with LLaMA-Factory's own converters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dataflex.data import faults, raw

PAIR = {"q": "a", "chosen": "b", "rejected": "c"}
SIDES = {"chosen": "chosen", "rejected": "rejected"}
PAIRS = {"ranking": True, "columns": {"prompt": "q", **SIDES}}
ASKED = [{"from": "human", "value": "x"}]
TALK = {"conversations": ASKED, "chosen": {"from": "gpt", "value": "b"}, "rejected": {"from": "gpt", "value": "c"}}
TALKS = {"ranking": True, "formatting": "sharegpt", "columns": {"messages": "conversations", **SIDES}}
LIKED = {"q": "a", "r": "b", "good": True}
FEEDBACK = {"columns": {"prompt": "q", "response": "r", "kto_tag": "good"}}
CHAT = {"conversations": [*ASKED, {"from": "gpt", "value": "y"}], "good": False}
CHATS = {"formatting": "sharegpt", "columns": {"messages": "conversations", "kto_tag": "good"}}


def entry_of(folder: Path, rows: list[Any], name: str = "a.jsonl", **described: Any) -> raw.Entry:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    entry = {"file_name": name, **described}
    assert list(raw.entry_problems(entry)) == []
    read = raw.read_entry("set", entry, folder)
    assert read is not None
    return read


def reworded(row: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**row, **changes}


FAULTS: dict[str, tuple[str, list[dict[str, Any]], dict[str, Any], list[str]]] = {
    "no pairs": ("dpo", [PAIR], {"columns": {"prompt": "q"}}, ["ranking: true", "rm and dpo"]),
    "no column for a side": ("rm", [PAIR], {"ranking": True, "columns": {"prompt": "q", "chosen": "chosen"}},
        ["names no column for rejected", "columns"]),
    "pairs in another stage": ("kto", [PAIR], PAIRS, ["(ranking: true)", "stage kto"]),
    "no tag in the entry": ("kto", [LIKED], {"columns": {"prompt": "q", "response": "r"}},
        ["names no column for kto_tag", "true for a desired"]),
    "a wrong column": ("dpo", [reworded(PAIR, chosn="x")], {"ranking": True, "columns":
        {"prompt": "q", "chosen": "chosn_", "rejected": "rejected"}}, ["'chosn_'", "did you mean 'chosn'"]),
    "a wrong column for the tag": ("kto", [LIKED], {"columns": {"prompt": "q", "response": "r", "kto_tag": "god"}},
        ["'god'", "did you mean 'good'"]),
    "pairs without a rejected answer": ("dpo", [reworded(PAIR, rejected=None)] * 2, PAIRS,
        ["none of its 2 rows", "line 1: 'rejected' is empty; a pair needs"]),
    "lists of messages as answers": ("dpo", [reworded(PAIR, chosen=[*ASKED, TALK["chosen"]])], PAIRS,
        ["line 1: 'chosen' is a list", "text is needed", "keep the last one"]),
    "messages as answers": ("dpo", [reworded(PAIR, chosen=TALK["chosen"])], PAIRS,
        ["line 1: 'chosen' is a mapping", "formatting: sharegpt"]),
    "text as a message": ("rm", [reworded(TALK, rejected="c")], TALKS,
        ["line 1: 'rejected' is text", "a message is needed", "formatting: alpaca"]),
    "a message without text": ("rm", [TALK, reworded(TALK, chosen={"from": "gpt", "value": None})], TALKS,
        ["line 2: 'chosen' has no 'value'"]),
    "an unknown speaker": ("rm", [reworded(TALK, chosen={"from": "bot", "value": "x"})], TALKS,
        ["line 1: the speaker of 'chosen' is \"bot\"", "'gpt'"]),
    "no rejected message": ("dpo", [reworded(TALK, rejected=None)], TALKS, ["none of its 1", "'rejected' is empty"]),
    "a tag that is a number": ("kto", [reworded(LIKED, good=1)], FEEDBACK, ["line 1", "a number (1)", "true or false"]),
    "tags that are empty": ("kto", [reworded(LIKED, good=None)], FEEDBACK, ["none of its 1", "'good' (kto_tag)"]),
    "a tag of a chat that is text": ("kto", [reworded(CHAT, good="yes")], CHATS, ["line 1", '("yes")']),
    "an undesired answer that is empty": ("kto", [LIKED, reworded(LIKED, r=None, good=False)], FEEDBACK,
        ["line 2: 'r' is empty", "text is needed"]),
    "feedback in stage sft": ("sft", [LIKED], FEEDBACK, ["none of its 1", "only stage kto"]),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_the_first_fault_is_found_in_the_head_too(tmp_path: Path, name: str) -> None:
    stage, rows, described, texts = FAULTS[name]
    entry = entry_of(tmp_path, rows, **described)
    found = faults.fault(entry, stage)
    assert found is not None
    assert faults.fault(entry, stage, whole=False) == found
    for text in texts:
        assert text in found


USABLE: dict[str, tuple[str, list[dict[str, Any]], dict[str, Any]]] = {
    "pairs": ("dpo", [PAIR, reworded(PAIR, rejected=None), reworded(PAIR, chosen="")], PAIRS),
    "talks": ("rm", [TALK, reworded(TALK, chosen=None)], TALKS),
    "feedback": ("kto", [LIKED, reworded(LIKED, good=False), reworded(LIKED, good=None)], FEEDBACK),
    "chats": ("kto", [CHAT, reworded(CHAT, good=True)], CHATS),
    "feedback as prompts": ("pt", [LIKED], FEEDBACK),
}


@pytest.mark.parametrize("name", USABLE)
def test_rows_that_are_trained_on_or_left_out_are_no_fault(tmp_path: Path, name: str) -> None:
    stage, rows, described = USABLE[name]
    assert faults.fault(entry_of(tmp_path, rows, **described), stage) is None


def test_tags_in_a_table_are_read_as_booleans(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("q,r,good\na,b,True\nc,d,false\n")
    read = raw.read_entry("set", {"file_name": "a.csv", **FEEDBACK}, tmp_path)
    assert read is not None
    assert faults.fault(read, "kto") is None
    assert faults.fault(read, "kto", whole=False) is None
    (tmp_path / "a.csv").write_text("q,r,good\na,b,yes\n")
    assert "line 2: 'good' (kto_tag) is text (\"yes\")" in str(faults.fault(read, "kto"))


@pytest.mark.parametrize("described, row", [(PAIRS, PAIR), (TALKS, TALK), (FEEDBACK, LIKED), (CHATS, CHAT)])
def test_a_row_is_left_out_if_llamafactory_finds_less_than_two_responses(
    tmp_path: Path, described: dict[str, Any], row: dict[str, Any]
) -> None:
    """The converters of LLaMA-Factory decide by the types of the values which responses a row has."""
    from llamafactory.data.converter import get_dataset_converter
    from llamafactory.data.parser import DatasetAttr

    attributes = DatasetAttr("file", "set")
    attributes.join({"formatting": "alpaca", **described})
    convert = get_dataset_converter(attributes.formatting, attributes, None)  # type: ignore[arg-type]
    stage = "dpo" if described.get("ranking") else "kto"
    entry = entry_of(tmp_path, [row], **described)
    for column in ("chosen", "rejected", "good"):
        for value in ("text", 1, None, True, {"from": "gpt", "value": "y"}):
            changed = {**row, column: value} if column in row else row
            found = convert(changed)
            fits = len(found["_response"]) >= 2 and len(found["_prompt"]) % 2 == 1
            told = faults.why_left_out(entry, changed, stage) or faults.fault(
                entry_of(tmp_path, [changed], **described), stage
            )
            assert (told is None) == fits, (column, value, told)
