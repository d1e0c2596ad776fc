"""The raw row of each sample, compared with texts that name their row, and the exported rows of chosen samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
from dataflex.config.loading import RunConfig
from dataflex.data.pool import Pool
from dataflex.integrations.llamafactory.pool_only import pool_of
from dataflex.record.selected import write_selected

SIZE = 60
KINDS = ("easy", "hard", "odd")


def words_of(number: int) -> str:
    """Return two words that no other number below 484 has."""
    return f"{tiny.WORDS[number // len(tiny.WORDS)]} {tiny.WORDS[number % len(tiny.WORDS)]}"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("rows")
    tiny.make_model(root / "model")
    data = root / "data"
    data.mkdir()
    pairs = [
        {"instruction": words_of(i), "input": "", "output": "cat", "kind": KINDS[i * 2 % 3], "note": f"№ {i}"}
        for i in range(SIZE)
    ]
    tiny.add_data(data, "pairs", pairs)
    turns = [{"from": "human", "value": ""}, {"from": "gpt", "value": "dog"}]
    chats = [
        {
            "conversations": [{**turns[0], "value": words_of(i)}, turns[1]][: 1 if i % 7 == 3 else 2],
            "kind": KINDS[i % 3],
        }
        for i in range(SIZE)
    ]
    tiny.add_data(data, "chats", chats, formatting="sharegpt")
    drawn = {"file_name": "pairs.json", "num_samples": 25}
    tiny.add_entries(data, {"drawn": drawn, "elsewhere": {"hf_hub_url": "someone/something"}})
    return root


def load(root: Path, column: str | None = None, **changes: Any) -> tuple[Pool, Any, dict[str, Any]]:
    given = tiny.arguments(root / "model", root / "data", root / "out", template="empty", **changes)
    return *pool_of(RunConfig(given, None), column), given


def numbers_in(pool: Pool, tokenizer: Any) -> list[int]:
    """Return the row that the text of each sample speaks of."""
    known = {words_of(number): number for number in range(SIZE)}
    texts = [tokenizer.decode(row["input_ids"], skip_special_tokens=True) for row in pool.dataset]
    return [known[" ".join(text.split()[:2])] for text in texts]


CASES: dict[str, tuple[str | None, dict[str, Any], int]] = {
    "as it is": (None, {}, SIZE),
    "the first rows": (None, {"max_samples": 20}, 20),
    "a part split off": (None, {"val_size": 0.25}, 45),
    "rows dropped": (None, {"dataset": "chats"}, 51),
    "split and dropped": (None, {"dataset": "chats", "val_size": 0.2}, -1),
    "drawn": (None, {"dataset": "drawn"}, 25),
    "drawn and split": (None, {"dataset": "drawn", "val_size": 5, "max_samples": 15}, 10),
    "two data sets": (None, {"dataset": "chats,pairs", "val_size": 0.1}, -1),
    "divided": ("kind", {}, SIZE),
    "divided, split, dropped": ("kind", {"dataset": "chats", "val_size": 0.2}, -1),
    "two divided": ("kind", {"dataset": "pairs,chats"}, SIZE + 51),
}


@pytest.mark.parametrize("name", CASES)
def test_a_sample_is_traced_to_the_row_of_its_text(root: Path, name: str) -> None:
    column, changes, size = CASES[name]
    pool, tokenizer, _ = load(root, column, **{"dataset": "pairs", **changes})
    everyone = np.arange(pool.size)
    rows = pool.row_numbers(everyone)
    assert rows is not None
    assert rows.tolist() == numbers_in(pool, tokenizer)
    assert pool.size == size or size < 0
    some = everyone[::-3]  # any indices in any order
    assert pool.row_numbers(some).tolist() == rows[some].tolist()  # type: ignore[union-attr]


def test_packed_samples_have_no_row(root: Path) -> None:
    pool, _, _ = load(root, dataset="pairs", packing=True)
    assert pool.size < SIZE
    assert pool.row_numbers(np.arange(pool.size)) is None


def test_chosen_samples_of_a_divided_data_set_are_written_raw(root: Path, tmp_path: Path) -> None:
    pool, tokenizer, given = load(root, "kind", dataset="pairs,chats", eval_dataset="chats")
    numbers = np.array(numbers_in(pool, tokenizer))
    chosen = np.flatnonzero(numbers % 4 == 1)
    written = write_selected(pool, chosen, tmp_path / "new", given)
    of_pairs = pool.domain_counts(np.arange(pool.size))[:3].sum()
    for name, part in (("pairs", chosen[chosen < of_pairs]), ("chats", chosen[chosen >= of_pairs])):
        raw = json.loads((root / "data" / f"{name}.json").read_text())
        lines = (tmp_path / "new" / f"{name}.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == [raw[row] for row in sorted(numbers[part])]
    info = json.loads((tmp_path / "new" / "dataset_info.json").read_text())
    assert info == {
        "pairs": {"file_name": "pairs.jsonl"},
        "chats": {"file_name": "chats.jsonl", "formatting": "sharegpt"},
        "drawn": {"file_name": str(root / "data" / "pairs.json"), "num_samples": 25},
        "elsewhere": {"hf_hub_url": "someone/something"},
    }
    assert written.overrides == (f"dataset_dir={tmp_path / 'new'}", "dataset=pairs,chats")
    (note,) = written.notes  # it would be evaluated on what was chosen
    assert "eval_dataset 'chats'" in note
    again, tokenizer, _ = load(root, dataset_dir=str(tmp_path / "new"), dataset="pairs,chats")
    assert sorted(numbers_in(again, tokenizer)) == sorted(numbers[chosen])


def test_media_of_exported_rows_are_found_in_the_original_folder(root: Path, tmp_path: Path) -> None:
    pool, _, given = load(root, dataset="pairs")
    info = json.loads((root / "data" / "dataset_info.json").read_text())
    source = tmp_path / "media"
    source.mkdir()
    info["pairs"]["columns"] = {"images": "pictures"}
    (source / "dataset_info.json").write_text(json.dumps(info))
    written = write_selected(pool, np.array([1]), tmp_path / "new", {**given, "dataset_dir": str(source)})
    assert written.overrides[-1] == f"media_dir={source}"
    written = write_selected(
        pool, np.array([1]), tmp_path / "new", {**given, "dataset_dir": str(source), "media_dir": "/pictures"}
    )
    assert written.overrides[-1] == "media_dir=/pictures"


def test_the_folder_of_an_asset_is_found(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool, _, given = load(root, dataset="pairs")
    monkeypatch.setenv("DATAFLEX_CACHE", str(tmp_path))
    (tmp_path / "python-docs").symlink_to(root / "data")
    written = write_selected(pool, np.array([1]), tmp_path / "new", {**given, "dataset_dir": "asset:python-docs"})
    assert written.overrides == (f"dataset_dir={tmp_path / 'new'}", "dataset=pairs")
    assert written.tokenized is None
