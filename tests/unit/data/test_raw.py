"""Faults of raw data files with file and line, compared with the files that the datasets library refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dataflex.data import faults, raw

ALPACA = {"instruction": "the cat", "input": "", "output": "sees"}
CHAT = {"conversations": [{"from": "human", "value": "the cat"}, {"from": "gpt", "value": "sees"}]}
OPENAI_TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
OPENAI_TAGS |= {"observation_tag": "tool", "function_tag": "function", "system_tag": "system"}
OPENAI = {"formatting": "openai", "columns": {"messages": "messages"}, "tags": OPENAI_TAGS}


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def said(*messages: tuple[str, str]) -> dict[str, Any]:
    return {"conversations": [{"from": who, "value": text} for who, text in messages]}


def spoken(*messages: dict[str, Any]) -> dict[str, Any]:
    return {"messages": list(messages)}


def fault(folder: Path, name: str, content: str | bytes, stage: str = "sft", **entry: Any) -> str | None:
    """Return what is found, which must be the same by the head alone: the files are short."""
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    described = {"file_name": name, **entry}
    assert list(raw.entry_problems(described)) == []
    read = raw.read_entry("set", described, folder)
    assert read is not None
    found = faults.fault(read, stage)
    if not name.endswith((".parquet", ".arrow")):
        assert faults.fault(read, stage, whole=False) == found
    return found


CALL = {"function": {"name": "f", "arguments": "{}"}}
SHAREGPT = {"formatting": "sharegpt"}
FAULTS: dict[str, tuple[str, str | bytes, dict[str, Any], list[str]]] = {
    "a cut line": ("a.jsonl", lines(ALPACA, ALPACA) + '{"instruction": "x', {}, ["line 3", "cut off"]),
    "a cut line that ends": ("a.jsonl", lines(ALPACA) + '{"instruction": "x",\n', {}, ["line 2: ", "cut off"]),
    "a cut line without an end": ("a.jsonl", lines(ALPACA) + '{"instruction": "x",', {}, ["line 2: ", "cut off"]),
    "a cut text that ends": ("a.jsonl", lines(ALPACA) + '{"instruction": "x\n', {}, ["line 2: ", "cut off"]),
    "a cut line in between": ("a.jsonl", '{"input": "x",\n' + lines(ALPACA), {}, ["line 1: ", "noticed in line 2"]),
    "a cut array that ends": ("a.json", f"[{json.dumps(ALPACA)},\n" + '{"a": 1,\n\n', {}, ["line 2: ", "cut off"]),
    "a bad line in between": ("a.jsonl", lines(ALPACA) + '{"a" "x"}\n' + lines(ALPACA), {}, ["line 2", "':'"]),
    "a cut array": ("a.json", json.dumps([ALPACA] * 3, indent=1)[:-30], {}, ["line 14", "cut off"]),
    "no comma": ("a.json", f"[{json.dumps(ALPACA)}\n{json.dumps(ALPACA)}]", {}, ["line 2", "','"]),
    "a rest": ("a.json", f"[{json.dumps(ALPACA)}]\nrest", {}, ["line 2", "']'"]),
    "a single quote": ("a.jsonl", "{'instruction': 'x'}\n", {}, ["line 1", "double quotes"]),
    "an empty file": ("a.json", "", {}, ["a.json", "no row"]),
    "an empty array": ("a.json", "[]", {}, ["a.json", "no row"]),
    "an empty table": ("a.csv", "instruction,input,output\n", {}, ["a.csv", "no row"]),
    "a key twice": ("a.jsonl", '{"output": "x", "output": "y"}\n', {}, ["line 1", "'output'", "twice"]),
    "not UTF-8": ("a.jsonl", lines(ALPACA).encode() + '{"é": 1}\n'.encode("latin1"), {}, ["line 2", "UTF-8"]),
    "a byte order mark": ("a.json", b"\xef\xbb\xbf[]", {}, ["line 1", "byte order mark"]),
    "rows that are numbers": ("a.json", "[1, 2]", {}, ["row 0", "1 is no row"]),
    "a number for text": ("a.jsonl", lines(ALPACA, {**ALPACA, "instruction": 5}), {}, ["line 2", "'instruction'", "5"]),
    "numbers for text": ("a.jsonl", lines({**ALPACA, "input": 5}), {}, ["line 1", "'input' is a number", "text"]),
    "mixed in a column not read": (
        "a.jsonl",
        lines({**ALPACA, "id": 1}, {**ALPACA, "id": "b"}),
        {},
        ["line 2", "'id' is text", "a number in", "line 1"],
    ),
    "mixed inside": ("a.jsonl", lines({**ALPACA, "x": [{"y": 1}, {"y": "z"}]}), {}, ["line 1", "'x[].y'"]),
    "answers that are numbers": ("a.jsonl", lines(*[{**ALPACA, "output": 4}] * 2), {}, ["none of its 2", "line 1"]),
    "no answers": ("a.jsonl", lines({**ALPACA, "output": None}), {}, ["none of its 1", "'output' is empty"]),
    "a wrong column": (
        "a.jsonl",
        lines({"instructoin": "x", "input": "", "output": "y"}),
        {},
        ["'instruction'", "did you mean 'instructoin'", "columns"],
    ),
    "a wrong mapping": (
        "a.jsonl",
        lines({"question": "x", "answer": "y"}),
        {"columns": {"prompt": "question", "response": "anwser"}},
        ["'anwser'", "'answer'", "columns: {response: anwser}"],
    ),
    "no input column": ("a.jsonl", lines({"instruction": "x", "output": "y"}), {}, ["'input'", "query"]),
    "history": ("a.jsonl", lines({**ALPACA, "old": [["x"]]}), {"columns": {"prompt": "instruction", "query": "input",
        "response": "output", "history": "old"}}, ["line 1", "'old'", "pairs"]),
    "pairs of answers": ("a.jsonl", lines(ALPACA), {"ranking": True}, ["pairs of answers", "stage sft"]),
    "no messages": ("a.jsonl", lines(ALPACA), SHAREGPT, ["'conversations'", "'instruction'"]),
    "messages in one row only": ("a.jsonl", lines(CHAT, {"x": 1}), SHAREGPT, ["line 2", "no 'conversations'"]),
    "messages that are text": ("a.jsonl", lines({"conversations": "hi"}), SHAREGPT, ["line 1", "list of messages"]),
    "a wrong role tag": (
        "a.jsonl",
        lines({"conversations": [{"role": "human", "value": "x"}]}),
        SHAREGPT,
        ["no message in 'conversations'", "'from'", "'role', 'value'", "role_tag"],
    ),
    "a wrong content tag": (
        "a.jsonl",
        lines({"conversations": [{"from": "human", "values": "x"}, {"from": "gpt", "values": "x"}]}),
        SHAREGPT,
        ["a 'value'; did you mean 'values'?", "content_tag"],
    ),
    "a huge number": ("a.json", json.dumps([{**ALPACA, "id": 10**30}]), {}, ["row 0", "'id'", "64 bits"]),
    "an unknown role": (
        "a.jsonl",
        lines(said(("user", "x"), ("gpt", "y"))),
        SHAREGPT,
        ["none of its 1", "line 1", '"user"', "'human'"],
    ),
    "a message too few": ("a.jsonl", lines(said(("human", "x"))), SHAREGPT, ["none", "1 messages", "an even number"]),
    "two of one speaker": ("a.jsonl", lines(said(("human", "x"), ("human", "y"))), SHAREGPT, ["message 2", "'gpt'"]),
    "a number in a message": ("a.jsonl", lines(said(("human", 3), ("gpt", 4))), SHAREGPT, ["'value'", "a number (3)"]),
    "an unknown role of openai": (
        "a.jsonl",
        lines(spoken({"role": "human", "content": "x"})),
        OPENAI,
        ["line 1", '"human"', "'user'"],
    ),
    "a table with a long line": ("a.csv", "instruction,input,output\na,b,c\na,b,c,d\n", {}, ["line 3", "4 fields"]),
    "a table of numbers": ("a.csv", "instruction,input,output\n1,,c\n2,,d\n", {}, ["line 2", "'instruction'"]),
    "no parquet": ("a.parquet", b"hello", {}, ["a.parquet", "no parquet file"]),
    "no arrow": ("a.arrow", b"hello", {}, ["a.arrow", "no arrow file"]),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named_with_file_and_line(tmp_path: Path, name: str) -> None:
    file, content, entry, words = FAULTS[name]
    found = fault(tmp_path, file, content, **entry)
    assert found is not None
    for word in words:
        assert word in found, found
    assert found.endswith((".", "?"))
    assert "\n" not in found


SOME_ANSWERS = lines(ALPACA, {**ALPACA, "output": None}, {"instruction": "x"})
GOOD: dict[str, tuple[str, str | bytes, str, dict[str, Any]]] = {
    "an array": ("a.json", json.dumps([ALPACA] * 2), "sft", {}),
    "an array over lines": ("a.json", json.dumps([ALPACA] * 2, indent=2), "sft", {}),
    "lines": ("a.jsonl", lines(ALPACA, ALPACA), "sft", {}),
    "lines with blank ones": ("a.jsonl", f"\n{lines(ALPACA)}\n\n{lines(ALPACA)}", "sft", {}),
    "objects over lines": ("a.json", json.dumps(ALPACA, indent=2) * 2, "sft", {}),
    "a byte order mark before lines": ("a.jsonl", b"\xef\xbb\xbf" + lines(ALPACA).encode(), "sft", {}),
    "digits as text": ("a.json", json.dumps([{**ALPACA, "output": "1"}]), "sft", {}),
    "some rows without an answer": ("a.jsonl", SOME_ANSWERS, "sft", {}),
    "whole and other numbers": ("a.jsonl", lines({**ALPACA, "x": 1}, {**ALPACA, "x": 1.5}), "sft", {}),
    "no answers in pt": ("a.jsonl", lines({"text": "x"}), "pt", {"columns": {"prompt": "text"}}),
    "text": ("a.txt", "one\ntwo\n", "pt", {"columns": {"prompt": "text"}}),
    "a table": ("a.csv", 'instruction,input,output\n"a\nb",,c\n1,,d\n', "sft", {}),
    "a chat": ("a.jsonl", lines(said(("system", "s"), ("human", "x"), ("gpt", "y"))), "sft", SHAREGPT),
    "a tab in an array": ("a.json", json.dumps([ALPACA]).replace("the cat", "the\tcat"), "sft", {}),
    "chats without a tag, or a text, that are left out": (
        "a.jsonl",
        lines(CHAT, {"conversations": [{"value": "x"}]}, {"conversations": [{"from": "human", "value": None}]}),
        "sft",
        SHAREGPT,
    ),
    "some bad chats": ("a.jsonl", lines(CHAT, said(("gpt", "y"))), "sft", SHAREGPT),
    "tools": (
        "a.jsonl",
        lines(spoken(
            {"role": "user", "content": "x"}, {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "content": "1"}, {"role": "tool", "content": "2"}, {"role": "assistant", "content": "y"},
        )),
        "sft",
        OPENAI,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_no_fault_is_found_in_data_that_loads(tmp_path: Path, name: str) -> None:
    file, content, stage, entry = GOOD[name]
    assert fault(tmp_path, file, content, stage, **entry) is None


def test_faults_in_arrow_tables_are_found(tmp_path: Path) -> None:
    good, bad = (pa.Table.from_pylist([ALPACA, {**ALPACA, "output": output}]) for output in ("x", None))
    for name, table in (("good", good), ("bad", bad)):
        pq.write_table(table, tmp_path / f"{name}.parquet")
        with pa.ipc.new_stream(tmp_path / f"{name}.arrow", table.schema) as writer:
            writer.write_table(table)
    pq.write_table(pa.table({"instruction": [1], "input": [""], "output": ["x"]}), tmp_path / "numbers.parquet")
    for name in ("good.parquet", "good.arrow", "bad.parquet"):
        read = raw.read_entry("set", {"file_name": name}, tmp_path)
        assert read is not None
        assert faults.fault(read, "sft") is None
    read = raw.read_entry("set", {"file_name": "numbers.parquet"}, tmp_path)
    assert read is not None
    assert "row 0 (counted from 0): 'instruction' is a number (1)" in str(faults.fault(read, "sft"))


def test_faults_in_the_head_of_a_long_file_are_found_without_reading_the_rest(tmp_path: Path) -> None:
    long = {**ALPACA, "output": "x" * 1000}
    count = raw.HEAD // 1000 + 10
    file = tmp_path / "a.jsonl"
    entry = {"file_name": file.name, "columns": {"prompt": "instruction", "response": "output", "system": "system"}}
    for last in ({**ALPACA, "system": "s"}, {**ALPACA, "instruction": 5}):
        file.write_text(lines(*[long] * count, last))
        read = raw.read_entry("set", entry, tmp_path)
        assert read is not None
        assert faults.fault(read, "sft", whole=False) is None  # the column may come, and the number is not seen
        found = faults.fault(read, "sft")
        assert found is None if "system" in last else f"line {count + 1}" in str(found)
    file.write_text(lines(*[{**long, "output": 3, "o": "x" * 1000}] * count))
    read = raw.read_entry("set", {**entry, "columns": {"prompt": "insruction"}}, tmp_path)
    assert read is not None
    assert "'insruction'" in str(faults.fault(read, "pt", whole=False))  # without it nothing could be trained on


def test_rows_of_prompts_alone_are_accepted_if_answers_are_generated(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines({**ALPACA, "output": None}))
    read = raw.read_entry("set", {"file_name": "a.jsonl"}, tmp_path)
    assert read is not None
    assert "'output' is empty" in str(faults.fault(read, "sft"))
    assert faults.fault(read, "sft", answers=False) is None


def test_a_value_longer_than_a_read_block_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{**ALPACA, "output": "x" * 3_000_000}, ALPACA]))
    assert [place.row for place, _ in raw.rows(tmp_path / "a.json")] == [0, 1]


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("a.json", ["mapping", '"a.json"']),
        (["a.json"], ["mapping"]),
        (3, ["mapping", "3"]),
        ({}, ["file_name"]),
        ({"file_name": 3}, ["file_name must be text", "3"]),
        ({"file_nam": "a.json"}, ["'file_nam'", "'file_name'"]),
        ({"file_name": "a.json", "formatting": "alpacca"}, ["formatting", "'alpacca'", "'alpaca'"]),
        ({"file_name": "a.json", "columns": {"promt": "x"}}, ["columns", "'promt'", "'prompt'"]),
        ({"file_name": "a.json", "columns": ["x"]}, ["columns must be a mapping"]),
        ({"file_name": "a.json", "columns": {"prompt": 3}}, ["columns.prompt must be text", "3"]),
        ({"file_name": "a.json", "tags": {"role": "x"}}, ["tags", "'role'", "'role_tag'"]),
        ({"file_name": "a.json", "ranking": "yes"}, ["ranking", "true or false"]),
        ({"file_name": "a.json", "num_samples": 0}, ["num_samples", "at least 1"]),
    ],
)
def test_an_entry_of_a_wrong_form_is_refused(entry: Any, words: list[str]) -> None:
    found = " ".join(raw.entry_problems(entry))
    for word in words:
        assert word in found, found


def test_missing_files_and_folders_of_mixed_types_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "a.json").write_text("[]")
    (tmp_path / "mixed" / "b.csv").write_text("")
    (tmp_path / "none").mkdir()
    (tmp_path / "a.xml").write_text("")
    for name, word in (
        ("gone.json", "does not exist"),
        ("mixed", "different types"),
        ("none", "empty"),
        ("a.xml", "json"),
    ):
        with pytest.raises(raw.RawDataError, match=word):
            raw.read_entry("set", {"file_name": name}, tmp_path)
    assert raw.read_entry("set", {"hf_hub_url": "owner/name"}, tmp_path) is None
