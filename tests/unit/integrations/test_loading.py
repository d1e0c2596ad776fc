"""Pools of preference stages: the samples of LLaMA-Factory's own load, their rows, columns and notes."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
import vision
from dataflex.config.loading import RunConfig
from dataflex.data.columns import WantedColumn, unusable_score
from dataflex.data.pool import Pool
from dataflex.data.stages import STAGES
from dataflex.errors import ConfigError
from dataflex.explain.samples import Part, Texts
from dataflex.integrations.llamafactory.loading import Loader, Wanted, load_noting_rows
from dataflex.integrations.llamafactory.parsing import parse
from dataflex.integrations.llamafactory.pool_only import pool_of
from dataflex.record.selected import write_selected

SIZE = 60
LEFT_OUT = [number for number in range(SIZE) if number % 7 == 3]
"""Rows without a rejected response or without a tag."""
KINDS = ("easy", "hard", "odd")
SIDES = {"chosen": "chosen", "rejected": "rejected"}


def words_of(number: int) -> str:
    """Return two words that no other number below 484 has."""
    return f"{tiny.WORDS[number // len(tiny.WORDS)]} {tiny.WORDS[number % len(tiny.WORDS)]}"


def answers_of(number: int) -> tuple[str, str]:
    """Return a chosen and a rejected answer of different lengths."""
    return " ".join(["cat"] * (1 + number % 5)), " ".join(["dog"] * (1 + number % 3))


def rows() -> dict[str, list[dict[str, Any]]]:
    """Return the raw rows by data set: pairs, pairs of messages, and single answers with a tag."""
    found: dict[str, list[dict[str, Any]]] = {"duels": [], "talks": [], "likes": []}
    for number in range(SIZE):
        chosen, rejected = answers_of(number)
        beside = {"kind": KINDS[number * 2 % 3], "margin": None if number == 5 else number / 4}
        lost = number in LEFT_OUT
        sides = {"chosen": chosen, "rejected": None if lost else rejected}
        messages = {name: None if text is None else {"from": "gpt", "value": text} for name, text in sides.items()}
        found["duels"].append({"instruction": words_of(number), **sides, **beside})
        asked = [{"from": "human", "value": words_of(number)}]
        found["talks"].append({"conversations": asked, **messages, **beside})
        tag = None if lost else number % 3 > 0
        found["likes"].append({"instruction": words_of(number), "output": chosen, "liked": tag, **beside})
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("preferences")
    tiny.make_model(root / "model")
    data = root / "data"
    data.mkdir()
    entries: dict[str, Any] = {
        "duels": {"ranking": True, "columns": {"prompt": "instruction", **SIDES}},
        "talks": {"ranking": True, "formatting": "sharegpt", "columns": {"messages": "conversations", **SIDES}},
        "likes": {"columns": {"prompt": "instruction", "response": "output", "kto_tag": "liked"}},
    }
    for name, own in rows().items():
        tiny.add_data(data, name, own, **entries[name])
    for kind in KINDS:
        tiny.add_data(
            data, f"likes_{kind}", [row for row in rows()["likes"] if row["kind"] == kind], **entries["likes"]
        )
    tiny.add_entries(data, {"drawn": {**entries["duels"], "file_name": "duels.json", "num_samples": 25}})
    same = [{"instruction": "the sun", "chosen": "cat", "rejected": "cat" if i % 2 else ""} for i in range(4)]
    tiny.add_data(data, "same", same, **entries["duels"])
    good = [{"instruction": "the sun", "output": "cat" if i else "", "liked": True} for i in range(4)]
    tiny.add_data(data, "good", good, **entries["likes"])
    return root


def arguments(root: Path, **changes: Any) -> dict[str, Any]:
    return tiny.arguments(root / "model", root / "data", root / "out", template="empty", **changes)


def loader_of(given: dict[str, Any]) -> tuple[Loader, Any]:
    """Return a loader and LLaMA-Factory's data arguments."""
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer

    model_args, data_args, training_args, finetuning_args, _ = parse(get_train_args, given)
    module = load_tokenizer(model_args)
    template = get_template_and_fix_tokenizer(module["tokenizer"], data_args)
    stage = STAGES[finetuning_args.stage].loads_as
    return Loader(get_dataset, template, model_args, training_args, stage, module), data_args


def load(root: Path, column: str | None = None, columns: tuple[str, ...] = (), **changes: Any) -> Pool:
    return pool_of(RunConfig(arguments(root, **changes), None), column, columns)[0]


def number_of(text: str) -> int:
    return next(number for number in range(SIZE) if text.startswith(words_of(number)))


DPO, KTO = {"stage": "dpo", "dataset": "duels"}, {"stage": "kto", "dataset": "likes"}
CASES: dict[str, tuple[str | None, dict[str, Any]]] = {
    "pairs": (None, DPO),
    "of a reward model": (None, {**DPO, "stage": "rm", "max_samples": 20}),
    "a part split off": (None, {**DPO, "val_size": 0.25}),
    "messages, split": (None, {**DPO, "dataset": "talks", "val_size": 0.2}),
    "drawn": (None, {**DPO, "dataset": "drawn", "val_size": 5}),
    "two data sets": (None, {**DPO, "dataset": "talks,duels"}),
    "divided": ("kind", DPO),
    "divided and split": ("kind", {**DPO, "dataset": "talks", "val_size": 0.2}),
    "feedback": (None, KTO),
    "feedback, split": (None, {**KTO, "val_size": 0.25, "preprocessing_batch_size": 8}),
    "feedback, divided": ("kind", {**KTO, "preprocessing_batch_size": 8}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_sample_is_traced_to_its_row(root: Path, name: str) -> None:
    column, changes = CASES[name]
    pool = load(root, column, ("margin", "kind"), **changes)
    everyone = np.arange(pool.size)
    numbers = [number_of(pool.text(index)) for index in range(pool.size)]
    found = pool.row_numbers(everyone)
    assert found is not None
    assert found.tolist() == numbers
    assert not {*numbers} & {*LEFT_OUT}
    expected = [np.nan if number == 5 else number / 4 for number in numbers]
    np.testing.assert_array_equal(pool.column("margin"), expected)
    assert pool.column("kind").tolist() == [KINDS[number * 2 % 3] for number in numbers]
    sizes = [len(answers_of(number)[0].split()) for number in numbers]
    if changes["stage"] != "kto":
        # The prompt of two tokens twice, and both answers.
        sizes = [4 + size + len(answers_of(number)[1].split()) for size, number in zip(sizes, numbers, strict=True)]
        assert pool.lengths.tolist() == sizes
        assert pool.trained_tokens.tolist() == [size - 4 for size in sizes]
    else:
        assert pool.lengths.tolist() == [2 + size for size in sizes]
        tags = pool.dataset["kto_tags"]
        assert list(tags) == [number % 3 > 0 for number in numbers]


@pytest.mark.parametrize("changes", [DPO, {**DPO, "stage": "rm", "val_size": 0.2}, KTO, {**KTO, "val_size": 0.2}])
@pytest.mark.parametrize("workers", [None, 2])
def test_samples_are_those_of_llamafactory(root: Path, changes: dict[str, Any], workers: int | None) -> None:
    """In stage kto the other response of a sample comes from the row before it in its preprocessing batch."""
    given = arguments(root, **changes, preprocessing_batch_size=8, preprocessing_num_workers=workers)
    load, data_args = loader_of(given)
    plain = load.get_dataset(
        load.template, load.model_args, data_args, load.training_args, load.stage, **load.tokenizer_module
    )["train_dataset"]
    pool, _ = pool_of(RunConfig(given, None), columns=("margin",))
    assert pool.dataset.column_names == plain.column_names
    assert pool.dataset.to_dict() == plain.to_dict()
    if changes["stage"] == "kto":
        assert plain["kl_input_ids"] != plain["input_ids"]


def test_feedback_of_a_value_is_that_of_a_separate_data_set(root: Path) -> None:
    """The other response of a sample is from a row with the same value."""
    divided = load(root, "kind", **KTO, preprocessing_batch_size=8)
    names = ",".join(f"likes_{kind}" for kind in sorted(KINDS))
    separate = load(root, stage="kto", dataset=names, preprocessing_batch_size=8)
    assert divided.dataset.to_dict() == separate.dataset.to_dict()
    assert divided.domain_sizes.tolist() == separate.domain_sizes.tolist()


def test_columns_of_pairs_are_kept_beside_tokenized_samples(root: Path, tmp_path: Path) -> None:
    given = arguments(root, **DPO, tokenized_path=str(tmp_path / "tokens"))
    wanted = Wanted({"margin": WantedColumn("dataflex.columns")})
    pools = [load_noting_rows(*loader_of(given), ("duels",), None, wanted)[0] for _ in range(2)]
    assert (pools[0].rows_of != {}, pools[1].rows_of != {}) == (True, False)  # the second is read from the folder
    np.testing.assert_array_equal(pools[1].column("margin"), pools[0].column("margin"))
    for stage in ("sft", "kto"):
        load, data_args = loader_of({**given, "stage": stage})
        with pytest.raises(ConfigError, match=r"tokenized_path: the samples .* chosen_input_ids.* another stage"):
            load(data_args)


def test_an_infinite_margin_is_named_with_its_row(root: Path, tmp_path: Path) -> None:
    own = rows()["duels"]
    own[8]["margin"] = float("inf")
    entry = json.loads((root / "data" / "dataset_info.json").read_text())["duels"]
    (tmp_path / "duels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    (tmp_path / "dataset_info.json").write_text(json.dumps({"duels": {**entry, "file_name": "duels.jsonl"}}))
    wanted = WantedColumn("dataflex.select", (("dataflex.select", unusable_score),))
    given = arguments(root, **DPO) | {"dataset_dir": str(tmp_path)}
    with pytest.raises(ConfigError, match=r"dataflex.select: .*duels\.jsonl, line 9: 'margin' is inf"):
        load_noting_rows(*loader_of(given), ("duels",), None, Wanted({"margin": wanted}))


@pytest.mark.parametrize(
    "changes, texts",
    [
        (DPO, ["9 of 60 rows of 'duels' give no sample", "duels.json, line 1, row 3", "'rejected' is empty; a pair"]),
        (KTO, ["9 of 60 rows of 'likes' give no sample", "row 3", "'liked' (kto_tag) is empty"]),
        ({**DPO, "dataset": "same"}, ["2 of 4 rows of 'same' have a response without text; the first", "row 0"]),
        ({**KTO, "dataset": "good"}, ["1 of 4 rows of 'good' has a response without text", "for an undesired one"]),
    ],
)
def test_rows_without_a_sample_or_a_text_are_noted(
    root: Path, caplog: pytest.LogCaptureFixture, changes: dict[str, Any], texts: list[str]
) -> None:
    logger = logging.getLogger("dataflex")
    logger.addHandler(caplog.handler)
    try:
        load_noting_rows(*loader_of(arguments(root, **changes)), (changes["dataset"],), None, Wanted())
    finally:
        logger.removeHandler(caplog.handler)
    (note,) = {record.getMessage() for record in caplog.records if record.name.startswith("dataflex")}
    for text in texts:
        assert text in note


def test_texts_show_both_responses_and_are_searched_in_both(root: Path) -> None:
    pool, tokenizer = pool_of(RunConfig(arguments(root, **DPO), None))
    texts = Texts(pool, tokenizer, full=False)
    chosen, rejected = answers_of(1)
    expected = [Part("prompt", words_of(1)), Part("chosen", chosen), Part("rejected", rejected)]
    assert texts.parts(1) == expected
    numbers = [number_of(pool.text(index)) for index in range(pool.size)]
    expected_in = [i for i, n in enumerate(numbers) if "dog dog dog" in f"{words_of(n)} {answers_of(n)[1]}"]
    assert texts.containing("dog dog dog") == expected_in
    assert 10 < len(expected_in) < 40
    full = Texts(pool, tokenizer, full=True).parts(1)
    assert [part.kind for part in full] == ["prompt", "chosen", "rejected"]
    assert full[2].text == rejected
    pool, tokenizer = pool_of(RunConfig(arguments(root, **KTO), None))
    kinds = [Texts(pool, tokenizer, full=False).parts(index)[1].kind for index in (0, 1)]
    assert kinds == ["undesired", "desired"]


def test_chosen_pairs_are_written_as_rows_that_load_again(root: Path, tmp_path: Path) -> None:
    pool = load(root, "kind", dataset="duels", stage="dpo")
    chosen = np.flatnonzero(np.arange(pool.size) % 4 == 1)
    written = write_selected(pool, chosen, tmp_path / "new", arguments(root, **DPO))
    assert written.tokenized is None
    again = load(root, stage="dpo", dataset="duels", dataset_dir=str(tmp_path / "new"))
    assert sorted(again.text(i) for i in range(again.size)) == sorted(pool.texts(chosen))


def test_a_relative_folder_of_images_gives_the_same_fingerprint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The record names the folder by its absolute path, and `explain` compares the fingerprint with the run's.
    model, data = vision.make_llava(tmp_path / "llava"), vision.make_data(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    keys = {"model_name_or_path": str(model), "stage": "sft", "template": "llava", "dataset": "mixed"}
    pools = [pool_of(RunConfig({**keys, "dataset_dir": folder}, None))[0] for folder in ("data", str(data))]
    assert pools[0].fingerprint == pools[1].fingerprint
    assert pools[0].content_digest == pools[1].content_digest
