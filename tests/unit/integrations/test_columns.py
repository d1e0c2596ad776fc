"""Raw columns stored with the samples: each value belongs to the row that the sample's tokens come from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
from dataflex.config.loading import RunConfig
from dataflex.data.columns import Packs, WantedColumn, column_digest, join_columns
from dataflex.data.pool import Pool
from dataflex.errors import ConfigError
from dataflex.integrations.llamafactory.loading import Loader, Wanted, load_noting_rows
from dataflex.integrations.llamafactory.parsing import parse
from dataflex.integrations.llamafactory.pool_only import pool_of

SIZE = 60
KINDS = ("easy", "hard", "odd")
INVALID = [number for number in range(SIZE) if number % 7 == 3]
"""Rows of ``chats`` that LLaMA-Factory drops: they end with a question."""


def words_of(number: int) -> str:
    """Return two words that no other number below 484 has."""
    return f"{tiny.WORDS[number // len(tiny.WORDS)]} {tiny.WORDS[number % len(tiny.WORDS)]}"


def quality_of(number: int, dataset: str = "pairs") -> float:
    if number % 11 == 5:
        return np.nan
    return number * number / 4 + (100 if dataset == "chats" else 0)


def row_of(number: int, dataset: str) -> dict[str, Any]:
    """Return the columns beside the text: rows are of different lengths."""
    quality = quality_of(number, dataset)
    return {
        "quality": None if np.isnan(quality) else quality,
        "rank": number,
        "good": number % 3 == 0,
        "kind": KINDS[number * 2 % 3],
        "note": None if number == 4 else f"№ {number}",
        "tags": [number],
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("columns")
    tiny.make_model(root / "model")
    data = root / "data"
    data.mkdir()
    answers = [" ".join(["road"] * (1 + number % 5)) for number in range(SIZE)]
    pairs, chats, texts = [], [], []
    for number in range(SIZE):
        text, answer = words_of(number), answers[number]
        pairs.append({"instruction": text, "input": "", "output": answer, **row_of(number, "pairs")})
        turns = [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]
        chats.append({"conversations": turns[: 1 if number in INVALID else 2], **row_of(number, "chats")})
        texts.append({"text": f"{text} {answer}", **row_of(number, "pairs")})
    bare = [{key: row[key] for key in ("instruction", "input", "output")} for row in pairs]
    worded = [{**row, "quality": "good"} for row in pairs]
    entries: dict[str, Any] = {"chats": {"formatting": "sharegpt"}, "texts": {"columns": {"prompt": "text"}}}
    files = {"pairs": pairs, "chats": chats, "texts": texts, "bare": bare, "worded": worded}
    for name, rows in files.items():
        tiny.add_data(data, name, rows, **entries.get(name, {}))
    tiny.add_entries(data, {"drawn": {"file_name": "pairs.json", "num_samples": 25}})
    return root


@pytest.fixture(autouse=True)
def _types_of_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put back what LLaMA-Factory changes in the datasets library for neat_packing."""
    from datasets.arrow_writer import OptimizedTypedSequence

    monkeypatch.setattr(OptimizedTypedSequence, "__init__", OptimizedTypedSequence.__init__)


def load(
    root: Path, columns: tuple[str, ...], domain_column: str | None = None, **changes: Any
) -> tuple[Pool, Any, dict[str, Any]]:
    given = tiny.arguments(root / "model", root / "data", root / "out", template="empty", **changes)
    return *pool_of(RunConfig(given, None), domain_column, columns), given


KNOWN = {words_of(number): number for number in range(SIZE)}


def numbers_in(pool: Pool) -> list[int]:
    """Return the row that the text of each sample speaks of."""
    return [KNOWN[" ".join(pool.text(index).split()[:2])] for index in range(pool.size)]


CASES: dict[str, tuple[str | None, dict[str, Any]]] = {
    "as it is": (None, {}),
    "the first rows": (None, {"max_samples": 20}),
    "a part split off": (None, {"val_size": 0.25}),
    "rows dropped": (None, {"dataset": "chats"}),
    "split and dropped": (None, {"dataset": "chats", "val_size": 0.2}),
    "drawn": (None, {"dataset": "drawn"}),
    "two data sets": (None, {"dataset": "chats,pairs", "val_size": 0.1}),
    "divided": ("kind", {}),
    "divided, split, dropped": ("kind", {"dataset": "chats", "val_size": 0.2}),
    "two divided": ("kind", {"dataset": "pairs,chats"}),
    "texts": (None, {"dataset": "texts", "stage": "pt", "packing": False}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_column_has_the_value_of_the_raw_row_of_each_sample(root: Path, name: str) -> None:
    domain_column, changes = CASES[name]
    pool, _, _ = load(root, ("quality", "rank", "good", "note"), domain_column, **{"dataset": "pairs", **changes})
    numbers = numbers_in(pool)
    assert pool.column("rank").tolist() == numbers
    assert pool.column("rank").dtype == np.float64
    named = [pool.domains[number] for number in pool.domain_ids(np.arange(pool.size))]
    in_chats = [domain.startswith("chats") or changes.get("dataset") == "chats" for domain in named]
    expected = [quality_of(n, "chats" if chat else "pairs") for n, chat in zip(numbers, in_chats, strict=True)]
    np.testing.assert_array_equal(pool.column("quality"), expected)
    assert pool.column("good").tolist() == [float(number % 3 == 0) for number in numbers]
    assert pool.column("note").tolist() == [None if number == 4 else f"№ {number}" for number in numbers]
    if "chats" in str(changes.get("dataset")):
        assert pool.size < SIZE * (1 + ("," in changes["dataset"]))
    with pytest.raises(ValueError, match="read-only"):
        pool.column("rank")[0] = 1


def parts_of(sample: dict[str, Any], tokenizer: Any) -> list[tuple[int, int]]:
    """Return the rows in a packed conversation and their tokens: each is a question that is not trained on, and an
    answer that is."""
    starts = [0]
    for position, (before, label) in enumerate(zip(sample["labels"], sample["labels"][1:], strict=False), 1):
        if before != -100 and label == -100:
            starts.append(position)
    found = []
    for begin, end in zip(starts, [*starts[1:], len(sample["labels"])], strict=True):
        words = tokenizer.decode(sample["input_ids"][begin:end], skip_special_tokens=True).split()
        if words:  # else it is the padding
            found.append((KNOWN[" ".join(words[:2])], end - begin))
    return found


def mean_of(parts: list[tuple[int, int]], dataset: str) -> float:
    known = [(quality_of(number, dataset), tokens) for number, tokens in parts]
    known = [(value, tokens) for value, tokens in known if not np.isnan(value)]
    return sum(value * tokens for value, tokens in known) / sum(n for _, n in known) if known else np.nan


PACKED: dict[str, tuple[str | None, dict[str, Any]]] = {
    "packing": (None, {"packing": True}),
    "neat_packing": (None, {"neat_packing": True}),
    "in small batches": (None, {"packing": True, "preprocessing_batch_size": 7}),
    "in two processes": (None, {"packing": True, "preprocessing_batch_size": 16, "preprocessing_num_workers": 2}),
    "rows dropped": (None, {"packing": True, "dataset": "chats", "val_size": 0.2}),
    "divided": ("kind", {"packing": True, "dataset": "chats", "preprocessing_batch_size": 9}),
}


@pytest.mark.parametrize("name", PACKED)
def test_a_packed_sample_has_the_mean_over_its_tokens(root: Path, name: str) -> None:
    domain_column, changes = PACKED[name]
    changes = {"dataset": "pairs", "cutoff_len": 24, **changes}
    pool, tokenizer, _ = load(root, ("quality",), domain_column, **changes)
    plain, _, _ = load(root, (), domain_column, **changes)
    assert [row["input_ids"] for row in pool.dataset] == [row["input_ids"] for row in plain.dataset]
    assert pool.dataset.column_names == plain.dataset.column_names
    parts = [parts_of(sample, tokenizer) for sample in pool.dataset]
    numbers = sorted(number for part in parts for number, _ in part)
    if "val_size" not in changes:
        assert numbers == [n for n in range(SIZE) if changes["dataset"] == "pairs" or n not in INVALID]
    np.testing.assert_allclose(pool.column("quality"), [mean_of(part, changes["dataset"]) for part in parts])
    assert max(map(len, parts)) > 2


def test_a_block_of_texts_has_the_mean_over_its_tokens(root: Path) -> None:
    batch, size = 13, 15  # with packing LLaMA-Factory takes one token less
    pool, tokenizer, _ = load(
        root,
        ("quality", "rank"),
        dataset="texts",
        stage="pt",
        packing=True,
        cutoff_len=size + 1,
        preprocessing_batch_size=batch,
    )
    texts = [row["text"] for row in json.loads((root / "data" / "texts.json").read_text())]
    blocks: list[list[tuple[int, int]]] = []
    for begin in range(0, SIZE, batch):
        owners = [
            (token, number)
            for number in range(begin, min(begin + batch, SIZE))
            for token in tokenizer(texts[number] + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
        ]
        blocks += [owners[at : at + size] for at in range(0, len(owners) - size + 1, size)]
    assert [row["input_ids"] for row in pool.dataset] == [[token for token, _ in block] for block in blocks]
    np.testing.assert_allclose(pool.column("rank"), [np.mean([number for _, number in block]) for block in blocks])
    np.testing.assert_allclose(
        pool.column("quality"), [np.nanmean([quality_of(number) for _, number in block]) for block in blocks]
    )


@pytest.mark.parametrize(
    "dataset, column, changes, parts",
    [
        ("pairs,bare", "quality", {}, ["dataflex.columns", "'bare' has no column 'quality'", "'instruction', 'input'"]),
        ("pairs", "qualty", {}, ["'pairs' has no column 'qualty'; did you mean 'quality'?"]),
        ("pairs", "tags", {}, ["'tags' of 'pairs' holds list"]),
        ("pairs,worded", "quality", {}, ["'quality' is text in 'worded' and numbers in 'pairs'"]),
        ("pairs", "note", {"packing": True}, ["'note' holds text, and with packing", "packing: false"]),
    ],
)
def test_a_column_that_cannot_be_stored_is_refused(
    root: Path, dataset: str, column: str, changes: dict[str, Any], parts: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(root, (column,), dataset=dataset, **changes)
    for part in parts:
        assert part in str(caught.value)


def test_a_row_that_cutoff_len_truncates_keeps_its_value(root: Path) -> None:
    """A row longer than ``cutoff_len`` gives a shorter sample, its value is its own."""
    pool, _, _ = load(root, ("rank",), dataset="pairs", cutoff_len=3)
    assert pool.column("rank").tolist() == list(range(SIZE))


def as_trained(
    root: Path, folder: Path, wanted: dict[str, WantedColumn], dataset: str = "pairs", **changes: Any
) -> Pool:
    """Load a pool as a training does."""
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer

    given = tiny.arguments(root / "model", root / "data", folder.parent / "out", template="empty", use_cpu=True)
    given |= {"dataset": dataset, **changes}
    model_args, data_args, training_args, finetuning_args, _ = parse(get_train_args, given)
    module = load_tokenizer(model_args)
    template = get_template_and_fix_tokenizer(module["tokenizer"], data_args)
    load = Loader(get_dataset, template, model_args, training_args, finetuning_args.stage, module)
    return load_noting_rows(load, data_args, tuple(data_args.dataset), None, Wanted(wanted))[0]


def tokenized(root: Path, folder: Path, columns: tuple[str, ...], **changes: Any) -> Pool:
    """Load a pool as a training does that writes the tokenized data."""
    wanted = dict.fromkeys(columns, WantedColumn("dataflex.columns"))
    return as_trained(root, folder, wanted, tokenized_path=str(folder), **changes)


def below_ten(column: str, values: Any) -> tuple[int, str] | None:
    """Refuse numbers from 10 on, as a component does that cannot use them."""
    found = np.flatnonzero(values >= 10)
    return (int(found[0]), f"{column!r} is {values[found[0]]:g}, too much") if found.size else None


@pytest.mark.parametrize(
    "changes",
    [{}, {"packing": True}, {"dataset": "chats"}, {"dataset": "bare,pairs"}, {"max_samples": 20}, {"val_size": 0.25}],
)
def test_a_value_that_cannot_be_used_is_named_with_its_line(
    root: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    rows = json.loads((root / "data" / "bare.json").read_text())
    if changes.get("dataset") == "bare,pairs":
        (root / "data" / "bare.json").write_text(json.dumps([{**row, "rank": 0} for row in rows]))
    wanted = {"rank": WantedColumn("dataflex.columns", (("dataflex.weight", below_ten),))}
    with pytest.raises(ConfigError) as caught:
        as_trained(root, tmp_path / "x", wanted, **changes)
    (root / "data" / "bare.json").write_text(json.dumps(rows))
    file = root / "data" / ("chats.json" if changes.get("dataset") == "chats" else "pairs.json")
    said = str(caught.value)
    assert said.startswith(f"dataflex.weight: {file}, line 1, row ")
    number = int(said.partition("row ")[2].split()[0])
    assert said.endswith(f"(counted from 0): 'rank' is {number}, too much.")
    # The first one, unless a part split off shuffles them; of the chats row 10 is dropped.
    assert number == (11 if changes.get("dataset") == "chats" else 10) or "val_size" in changes
    assert as_trained(root, tmp_path / "x", wanted, max_samples=10).size == 10


@pytest.mark.parametrize("changes", [{"dataset": "chats"}, {"dataset": "pairs,chats"}, {"neat_packing": True}])
def test_columns_lie_beside_tokenized_data(root: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    names = ("quality", "rank", *(() if "neat_packing" in changes else ("note",)))
    first = tokenized(root, tmp_path / "tokens", names, **changes)
    again = tokenized(root, tmp_path / "tokens", names, **changes)
    assert again.rows_of == {}  # it was loaded from there
    for name in names:
        np.testing.assert_array_equal(again.column(name), first.column(name))
    assert again.column_fingerprints == first.column_fingerprints
    assert "rows" not in again.dataset.column_names
    if "chats" in str(changes.get("dataset")):
        assert again.column("rank").tolist() == numbers_in(again)


def test_tokenized_data_without_the_columns_is_refused(root: Path, tmp_path: Path) -> None:
    tokenized(root, tmp_path / "bare", ())
    with pytest.raises(ConfigError, match=r"tokenized samples without raw columns.*'rank'"):
        tokenized(root, tmp_path / "bare", ("rank",))
    tokenized(root, tmp_path / "some", ("rank",))
    with pytest.raises(ConfigError, match=r"holds the raw columns 'rank', not 'quality'"):
        tokenized(root, tmp_path / "some", ("rank", "quality"))
    shutil.copytree(tmp_path / "bare", tmp_path / "other", dirs_exist_ok=True)
    tokenized(root, tmp_path / "shorter", ("rank",), max_samples=20)
    shutil.copy(tmp_path / "shorter" / "dataflex_columns.parquet", tmp_path / "other")
    with pytest.raises(ConfigError, match="was written for other samples"):
        tokenized(root, tmp_path / "other", ("rank",))


def test_a_column_that_was_not_stored_is_named(root: Path) -> None:
    pool, _, _ = load(root, ("quality",), dataset="pairs")
    with pytest.raises(ConfigError, match=r"unknown column 'qualty'; did you mean 'quality'.*columns: \[qualty\]"):
        pool.column("qualty")


def test_means_of_equal_values_are_that_value() -> None:
    packs = Packs(np.array([3, 1, 2]), np.array([0, 1, 2, 3, 0, 4]), np.array([3, 7, 11, 2, 1, 5]))
    values = np.array([0.1, 0.1, 0.1, np.nan, np.nan])
    assert packs.mean(values).tolist()[0] == 0.1
    assert np.isnan(packs.mean(values)[1])
    assert packs.mean(values)[2] == 0.1  # the row without a value does not count
    values = np.array([1.0, 2.0, 4.0, 8.0, 16.0])
    assert packs.mean(values).tolist() == pytest.approx([(3 + 14 + 44) / 21, 8, (1 + 80) / 6])


def test_digests_of_columns_depend_on_their_values() -> None:
    numbers = np.array([1.0, np.nan, 2.0])
    assert column_digest(numbers) == column_digest(np.array([1.0, -np.nan, 2.0]))
    assert column_digest(numbers) != column_digest(np.array([1.0, 0.0, 2.0]))
    texts = [np.array(given, dtype=object) for given in (["a", "b"], ["a", None], ["a", ""], ["ab", ""])]
    assert len({column_digest(given) for given in texts}) == 4
    with pytest.raises(ConfigError, match="text in 'a' and numbers in 'b'"):
        join_columns([("a", texts[0]), ("b", numbers)], "x", "dataflex.columns")
