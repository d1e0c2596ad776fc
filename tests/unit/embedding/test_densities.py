"""Densities against sums over all pairs, directly and by cells."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from dataflex import kernel_densities
from dataflex.embedding import densities, neighbours


def data(seed: int, size: int = 600) -> NDArray[np.float32]:
    """Return vectors of length 1 in groups, some of which are duplicates."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(20, 24))[rng.integers(20, size=size)] + 0.6 * rng.normal(size=(size, 24))
    rows[50:130] = rows[50]
    rows[200:230] = rows[200] + 0.05 * rng.normal(size=(30, 24))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def by_pairs(vectors: NDArray[Any], rows: NDArray[Any], bandwidth: float, k: int) -> NDArray[Any]:
    exact = vectors.astype(np.float64)
    squares = np.sort(((exact[rows, None] - exact[None]) ** 2).sum(-1), axis=1)[:, :k]
    return np.asarray(np.maximum(0, 1 - squares / bandwidth**2).sum(axis=1))


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("k", [1, 5, 60, 600])
def test_densities_equal_sums_over_all_pairs(seed: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, rows = data(seed), np.random.default_rng(seed).permutation(600)[:170]
    expected = by_pairs(vectors, rows, 0.75, k)
    monkeypatch.setattr(neighbours, "QUERIES", 64)
    np.testing.assert_allclose(kernel_densities(vectors, rows, 0.75, k), expected, rtol=1e-5)
    monkeypatch.setattr(densities, "_EXACT", 0)
    np.testing.assert_allclose(kernel_densities(vectors, rows, 0.75, k), expected, rtol=1e-5)


def test_a_vector_without_neighbours_has_density_1() -> None:
    assert kernel_densities(np.eye(5, dtype=np.float32), np.arange(5), 0.75, 3).tolist() == [1] * 5


def test_neighbours_that_cells_miss_are_found_and_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    vectors, rows = data(0), np.arange(600)
    monkeypatch.setattr(densities, "_EXACT", 0)
    monkeypatch.setattr(densities, "_PROBES", 1)
    with caplog.at_level(logging.INFO):
        found = kernel_densities(vectors, rows, 1.3, 600)
    np.testing.assert_allclose(found, by_pairs(vectors, rows, 1.3, 600), rtol=1e-5)
    assert "cells miss neighbours of" in caplog.text
