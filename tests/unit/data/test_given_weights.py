"""Weights of tokens in one byte or four, and their digest."""

from __future__ import annotations

import numpy as np
import pytest

from dataflex.data.given_weights import GivenWeights, joined


@pytest.mark.parametrize("distinct", [1, 3, 256, 257, 2000])
def test_every_weight_is_stored_exactly(distinct: int) -> None:
    rng = np.random.default_rng(distinct)
    levels = rng.random(distinct).astype(np.float32) * 3
    counts = rng.integers(0, 9, 700)
    values = np.concatenate([levels, levels[rng.integers(0, distinct, 10_000)]])[: counts.sum()]
    weights = GivenWeights.of(values, counts)
    assert weights.codes.itemsize == (1 if distinct <= 256 else 4)
    rows = np.split(values, np.cumsum(counts)[:-1])
    chosen = rng.permutation(700)
    for index, row in zip(chosen, weights.rows(chosen), strict=True):
        assert row.dtype == np.float32
        assert row.tolist() == rows[index].tolist()
    scaled = GivenWeights.of(values, counts, normalized=True)
    np.testing.assert_allclose(np.concatenate(scaled.rows(np.arange(700))).mean(dtype=np.float64), 1, rtol=1e-6)
    assert scaled.digest == weights.digest


def test_the_digest_depends_on_weights_and_counts() -> None:
    values, counts = np.array([1, 0.5, 1], np.float32), np.array([1, 2])
    digests = {
        GivenWeights.of(values, counts).digest,
        GivenWeights.of(values, counts[::-1]).digest,
        GivenWeights.of(values[::-1], counts).digest,
        GivenWeights.of(np.array([1, 0.25, 1], np.float32), counts).digest,
    }
    assert len(digests) == 3  # [1, 0.5, 1] is the same in reverse
    assert GivenWeights.of(values.copy(), counts.copy()).digest in digests


def test_weights_of_several_loads_are_joined() -> None:
    first, second = np.array([1, 2], np.float32), np.array([3], np.float32)
    values, counts = joined([(first, np.array([2, 0])), (second, np.array([1]))])
    assert (values.tolist(), counts.tolist()) == ([1, 2, 3], [2, 0, 1])
