"""Which rows LLaMA-Factory packs into each sample, noted while its own processors pack them.

A processor returns samples without their rows. Here it is run as it is, and what it hands to the functions it calls is
kept: the tokens of each row, and how they are shared out.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any

import numpy as np

from dataflex.integrations.llamafactory.parsing import replaced

RowsOfSamples = tuple[list[list[int]], list[list[int]]]
"""Of each sample: its rows, and how many tokens each of them has in it."""


def pack_conversations(processor: Any, rows: dict[str, list[Any]]) -> tuple[dict[str, list[Any]], RowsOfSamples]:
    """Return what LLaMA-Factory's packing processor of sft makes of rows, and the rows of each sample."""
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
    packed = [[of_length[length].pop() for length in sack] for sack in sacks]
    for sample, numbers in zip(samples["input_ids"] if packed else [], packed, strict=True):
        together = [token for number in numbers for token in encoded[number]]
        if len(used) != len(encoded) or sample[: len(together)] != together:
            raise RuntimeError("which rows LLaMA-Factory packs into a sample cannot be followed in this release")
    return samples, ([[used[number] for number in numbers] for numbers in packed], sacks)


def pack_texts(processor: Any, rows: dict[str, list[Any]]) -> tuple[dict[str, list[Any]], RowsOfSamples]:
    """Return what LLaMA-Factory's packing processor of pt makes of rows, and the rows of each sample."""
    noting = copy.copy(processor)
    noting.tokenizer = tokenizer = _Counting(processor.tokenizer)
    samples = noting.preprocess_dataset(rows)
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
    """A tokenizer that keeps how many tokens each text of its last call has."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.lengths: list[int] = []

    def __call__(self, texts: list[str], **given: Any) -> Any:
        found = self.tokenizer(texts, **given)
        self.lengths = [len(tokens) for tokens in found["input_ids"]]
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)
