"""Rows of each packed sample, recorded while LLaMA-Factory's own processors pack.

A processor returns samples without their rows. So it runs unchanged, and the functions that it calls are wrapped to
record the tokens of each row and the way the rows are packed.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any

import numpy as np

from dataflex.integrations.llamafactory.parsing import replaced

RowsOfSamples = tuple[list[list[int]], list[list[int]]]
"""Rows of each sample, and the number of tokens that each of these rows has in the sample."""


def pack_conversations(processor: Any, rows: dict[str, list[Any]]) -> tuple[dict[str, list[Any]], RowsOfSamples]:
    """Run LLaMA-Factory's packing processor of stage sft on rows, and return the samples and the rows of each."""
    from llamafactory.data.processor import supervised

    noting, knapsack = copy.copy(processor), supervised.greedy_knapsack
    encoded: list[list[int]] = []
    sacks: list[list[int]] = []

    def encode(**given: Any) -> Any:
        tokens, labels = processor._encode_data_example(**given)
        encoded.append(tokens)
        return tokens, labels

    def share_out(lengths: list[int], capacity: int) -> list[list[int]]:
        sacks.extend(list(sack) for sack in knapsack(lengths, capacity))
        return sacks

    noting._encode_data_example = encode
    with replaced(supervised, "greedy_knapsack", share_out):
        samples = noting.preprocess_dataset(rows)
    used = [
        number
        for number, (prompt, response) in enumerate(zip(rows["_prompt"], rows["_response"], strict=True))
        if len(prompt) % 2 == 1 and len(response) == 1
    ]
    of_length: dict[int, list[int]] = defaultdict(list)
    for number, tokens in enumerate(encoded):
        if len(tokens) <= processor.data_args.cutoff_len:
            of_length[len(tokens)].append(number)
    # LLaMA-Factory takes the last unused row of a length in the same way. The tokens are compared below, so that a
    # release that does it differently raises an error.
    packed = [[of_length[length].pop() for length in sack] for sack in sacks]
    for sample, numbers in zip(samples["input_ids"] if packed else [], packed, strict=True):
        together = [token for number in numbers for token in encoded[number]]
        if len(used) != len(encoded) or sample[: len(together)] != together:
            raise RuntimeError("this release of LLaMA-Factory packs rows in an unknown way; use a supported release")
    return samples, ([[used[number] for number in numbers] for numbers in packed], sacks)


def pack_texts(processor: Any, rows: dict[str, list[Any]]) -> tuple[dict[str, list[Any]], RowsOfSamples]:
    """Run LLaMA-Factory's packing processor of stage pt on rows, and return the samples and the rows of each."""
    noting = copy.copy(processor)
    noting.tokenizer = tokenizer = _Counting(processor.tokenizer)
    samples = noting.preprocess_dataset(rows)
    # The processor joins the tokens of all texts and cuts them into blocks of `cutoff_len`.
    bounds = np.concatenate([[0], np.cumsum(tokenizer.lengths)])
    size = processor.data_args.cutoff_len
    numbers, tokens = list[list[int]](), list[list[int]]()
    for start in range(0, len(samples["input_ids"]) * size, size):
        low, high = np.searchsorted(bounds, start, "right") - 1, np.searchsorted(bounds, start + size)
        there = np.minimum(bounds[low + 1 : high + 1], start + size) - np.maximum(bounds[low:high], start)
        numbers.append((low + np.flatnonzero(there)).tolist())
        tokens.append(there[there > 0].tolist())
    return samples, (numbers, tokens)


class _Counting:
    """Wrapper of a tokenizer that stores the number of tokens of each text of the last call."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.lengths: list[int] = []
        """Number of tokens of each text of the last call."""

    def __call__(self, texts: list[str], **given: Any) -> Any:
        found = self.tokenizer(texts, **given)
        self.lengths = [len(tokens) for tokens in found["input_ids"]]
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)
