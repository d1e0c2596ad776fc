"""Batches are halved until they fit into memory, and the size that fitted is remembered."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dataflex.data.sampling import IndexArray
from dataflex.errors import ComponentError
from dataflex.probe.memory import BatchLimit

SINGLE = "Shorten cutoff_len."


class Device:
    """Computes a row's number times ten, if a batch, padding counted, is no larger than its room."""

    def __init__(self, room: int, lengths: np.ndarray) -> None:
        self.room, self.lengths = room, lengths
        self.tried: list[int] = []

    def __call__(self, rows: IndexArray) -> IndexArray:
        self.tried.append(rows.size * int(self.lengths[rows].max()))
        if self.tried[-1] > self.room:
            raise torch.OutOfMemoryError
        return rows * 10


@pytest.mark.parametrize("seed", range(5))
def test_every_row_is_computed_once_in_order(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 30, 60)
    device, limit = Device(100, lengths), BatchLimit("measure lengths", SINGLE)
    for _ in range(2):
        rows = rng.permutation(60)[:50]
        device.tried.clear()
        parts = limit.parts(device, rows, lengths)
        np.testing.assert_array_equal(np.concatenate([part for part, _ in parts]), rows)
        np.testing.assert_array_equal(np.concatenate([values for _, values in parts]), rows * 10)
    assert max(device.tried) <= 100  # it is remembered


def test_a_batch_that_fits_is_not_cut() -> None:
    lengths = np.full(8, 10)
    device, limit = Device(80, lengths), BatchLimit("measure lengths", SINGLE)
    assert len(limit.parts(device, np.arange(8), lengths)) == 1
    assert limit.tokens is None


def test_a_sample_that_does_not_fit_names_the_setting_to_change() -> None:
    lengths = np.array([50, 4, 4])
    device = Device(40, lengths)
    with pytest.raises(ComponentError, match=rf"to measure lengths of 1 sample of 50 tokens\. {SINGLE}$"):
        BatchLimit("measure lengths", SINGLE).parts(device, np.arange(3), lengths)
    together = BatchLimit("make embeddings", SINGLE, "texts", "characters", collective=True)
    with pytest.raises(ComponentError, match=r"of 3 texts of 50 characters\. Set dataflex.probe_batch_tokens to less"):
        together.parts(device, np.arange(3), lengths)
    assert device.tried[-1] == 150  # no process halves its batch while the others wait
