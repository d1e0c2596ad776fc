"""Batches from Arrow's buffers equal those of LLaMA-Factory's collators."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, concatenate_datasets
from transformers import AutoTokenizer, DataCollatorForLanguageModeling, DataCollatorForSeq2Seq, PreTrainedTokenizerBase

from dataflex import assets
from dataflex.data.pool import Pool
from dataflex.data.samples import RowList
from dataflex.probe.collation import Collation

pytestmark = pytest.mark.launch

MEDIA = {"images": None, "videos": None, "audios": None}
PAD = 2


@pytest.fixture(scope="module")
def sft() -> Any:
    from llamafactory.data import SFTDataCollatorWith4DAttentionMask

    return SFTDataCollatorWith4DAttentionMask


@pytest.fixture(scope="module")
def template() -> Any:
    from llamafactory.data.template import TEMPLATES

    return TEMPLATES["default"]


def tokenizer_of(side: str = "right") -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(assets.resolve("asset:smollm2-135m-instruct"))
    tokenizer.pad_token_id, tokenizer.padding_side = PAD, side
    return tokenizer


def rows_of(seed: int, **more: Any) -> list[dict[str, Any]]:
    """Return rows of 1 to 40 tokens, in which the token that pads is one of the tokens, and some masks have zeros."""
    rng, rows = np.random.default_rng(seed), []
    for length in [1, 8, 16, 40, *rng.integers(1, 41, 60).tolist()]:
        tokens = rng.integers(0, 9, length)
        mask = rng.integers(0, 2, length) if seed % 2 else np.ones(length, dtype=int)
        labels = np.where(rng.random(length) < 0.4, -100, tokens)
        row = {"input_ids": tokens.tolist(), "attention_mask": mask.tolist(), "labels": labels.tolist()}
        rows.append({**row, **more})
    return rows


class Samples(Pool):
    """Counts the rows that were made."""

    made = 0

    def rows(self, indices: np.ndarray) -> list[dict[str, Any]]:
        self.made += indices.size
        return super().rows(indices)


def pool_of(*parts: Dataset) -> Samples:
    data = concatenate_datasets(list(parts)) if len(parts) > 1 else parts[0]
    return Samples(data, ("a",), np.array([len(data)]))


def dataset_of(rows: list[dict[str, Any]]) -> Dataset:
    """Return rows in the number types in which a processed data set has them, in several batches."""
    return Dataset.from_list(rows).map(lambda batch: batch, batched=True, batch_size=10)


def compare(collate: Any, pool: Samples, plain: tuple[type, ...] = (), *, reads: bool) -> None:
    """Check batches against the collator's, and whether they were read without making rows."""
    collation = Collation(collate, plain)
    collation.of(pool, np.array([0]))
    rng, before, asked = np.random.default_rng(7), pool.made, 0
    batches = [np.array([0]), np.array([5, 5]), np.arange(pool.size)]
    batches += [rng.choice(pool.size, int(rng.integers(1, 9)), replace=False) for _ in range(20)]
    found = [collation.of(pool, batch) for batch in batches]
    asked = pool.made - before
    assert (asked == 0) if reads else (asked == sum(batch.size for batch in batches))
    for batch, given in zip(batches, found, strict=True):
        wanted = collate(pool.rows(batch))
        assert list(given) == list(wanted)
        for name, value in wanted.items():
            assert given[name].dtype == value.dtype, name
            assert torch.equal(given[name], value), name


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("multiple", [None, 8])
@pytest.mark.parametrize("seed", [0, 1])
def test_batches_of_conversations_equal_the_collators(
    sft: Any, template: Any, side: str, multiple: int | None, seed: int
) -> None:
    given = {"tokenizer": tokenizer_of(side), "pad_to_multiple_of": multiple, "label_pad_token_id": -100 + 103 * seed}
    rows = dataset_of(rows_of(seed, **MEDIA))
    drawn = rows.shuffle(seed=3).select(range(50))  # by way of a table of indices
    for data in ([rows], [drawn], [rows, drawn]):
        compare(sft(template=template, **given), pool_of(*data), (sft,), reads=True)
    plain = rows.remove_columns(list(MEDIA))
    compare(DataCollatorForSeq2Seq(**given), pool_of(plain), reads=True)


@pytest.mark.parametrize("side", ["right", "left"])
def test_batches_of_texts_equal_the_collators(side: str) -> None:
    rows = dataset_of(rows_of(0)).remove_columns("labels")
    compare(DataCollatorForLanguageModeling(tokenizer_of(side), mlm=False), pool_of(rows), reads=True)


def test_the_collator_is_called_if_it_does_more_than_padding(sft: Any, template: Any) -> None:
    tokenizer, rows = tokenizer_of(), dataset_of(rows_of(0, **MEDIA))
    given = {"tokenizer": tokenizer, "template": template}
    four = sft(**given, block_diag_attn=True, attn_implementation="sdpa", compute_dtype=torch.float16)
    compare(four, pool_of(rows), (sft,), reads=False)

    class Own(sft):
        """Looks like what is known, and may do anything."""

    compare(Own(**given), pool_of(rows), (sft,), reads=False)
    compare(sft(**given), pool_of(rows), (), reads=False)
    compare(lambda each: sft(**given)(each), pool_of(rows), (sft,), reads=False)
    plain = pool_of(rows.remove_columns(list(MEDIA)))
    compare(DataCollatorForSeq2Seq(tokenizer, padding="max_length", max_length=64), plain, reads=False)


def test_the_collator_is_called_if_a_column_is_more_than_tokens(
    sft: Any, template: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    collate = sft(tokenizer=tokenizer_of(), template=template)
    seen: list[int] = []
    plugin = type(template.mm_plugin)
    original = plugin.get_mm_inputs

    def note(self: Any, images: list[Any], *others: Any) -> Any:
        seen.append(len(images))
        return original(self, [], *others)

    monkeypatch.setattr(plugin, "get_mm_inputs", note)
    with_images = rows_of(0, **MEDIA)
    for number, row in enumerate(with_images):
        row["images"] = ["a.png"] if number == 5 else []
    pool = pool_of(dataset_of(with_images))
    compare(collate, pool, (sft,), reads=False)
    assert sum(seen) > 0  # what a sample has beside its tokens comes to the collator
    names = ("input_ids", "attention_mask", "labels", "position_ids")  # all of one length, as packed samples are
    positions = [dict.fromkeys(names, (row["input_ids"] * 40)[:40]) for row in rows_of(0)]
    compare(DataCollatorForSeq2Seq(tokenizer_of()), pool_of(dataset_of(positions)), reads=False)
    texts = pool_of(dataset_of(rows_of(0)).remove_columns(["labels", "attention_mask"]))
    compare(DataCollatorForLanguageModeling(tokenizer_of(), mlm=False), texts, reads=False)


def test_the_padding_side_may_change_between_batches() -> None:
    tokenizer, pool = tokenizer_of(), pool_of(dataset_of(rows_of(0)))
    collate = DataCollatorForSeq2Seq(tokenizer)
    collation = Collation(collate)
    for side in ("right", "left", "right"):
        tokenizer.padding_side = side
        found = collation.of(pool, np.arange(9))
        assert all(torch.equal(found[name], value) for name, value in collate(pool.rows(np.arange(9))).items())


def test_rows_in_a_list_go_through_the_collator() -> None:
    collate = DataCollatorForSeq2Seq(tokenizer_of())
    rows = rows_of(0)
    found = Collation(collate).of(RowList(rows), np.array([3, 1]))
    assert all(torch.equal(found[name], value) for name, value in collate([rows[3], rows[1]]).items())


def test_a_batch_that_is_not_plain_goes_through_the_collator() -> None:
    rows = rows_of(0)
    rows[7]["labels"] = rows[7]["labels"] + [1, 1]  # longer than its tokens, which the collator pads apart
    pool, collate = pool_of(dataset_of(rows)), DataCollatorForSeq2Seq(tokenizer_of())
    collation = Collation(collate)
    for batch, made in ((np.array([0, 3]), 0), (np.array([0, 7]), 2)):
        found, before = collation.of(pool, batch), pool.made
        again = collation.of(pool, batch)
        assert pool.made - before == made
        for name, value in collate([dict(rows[number]) for number in batch]).items():
            assert torch.equal(found[name], value)
            assert torch.equal(again[name], value)
