"""Nearest neighbours against a search by sorting all distances."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dataflex import nearest
from dataflex.embedding import neighbours


def sorted_distances(queries: NDArray[Any], base: NDArray[Any], metric: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return all base rows by distance and index, and the distances, in double precision."""
    queries, base = queries.astype(np.float64), base.astype(np.float64)
    if metric == "l2":
        distances = np.sqrt(((queries[:, None] - base[None]) ** 2).sum(-1))
    else:
        lengths = np.outer(np.linalg.norm(queries, axis=1), np.linalg.norm(base, axis=1))
        distances = 1 - (queries @ base.T) / np.where(lengths, lengths, 1)
    numbers = np.broadcast_to(np.arange(len(base)), distances.shape)
    order = np.lexsort((numbers, np.round(distances, 12)))
    return order, np.take_along_axis(distances, order, 1)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "QUERIES", 20)
    monkeypatch.setattr(neighbours.Queries, "device_cells", 300 * 20)


@pytest.mark.parametrize("metric", ["cosine", "l2"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_neighbours_equal_a_full_sort(metric: Any, dtype: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for size, k in ((1000, 1), (1000, 40), (900, 300), (50, 60), (1, 1)):
        base = rng.standard_normal((size, 9)).astype(dtype)
        queries = rng.standard_normal((33, 9)).astype(dtype)
        if size > 100:
            base[5:300], base[400], queries[3] = base[5], 0, 0  # ties by the hundred, and rows without a direction
            queries[0] = base[5]
        indices, distances = nearest(queries, base, k, metric=metric)
        order, expected = sorted_distances(queries, base, metric)
        assert indices.dtype == np.int64
        assert distances.dtype == np.float32
        np.testing.assert_array_equal(indices, order[:, :k])
        np.testing.assert_allclose(distances, expected[:, :k], atol=1e-6)


def test_a_query_is_not_its_own_neighbour_but_its_duplicate_is() -> None:
    base = np.random.default_rng(0).standard_normal((300, 5)).astype(np.float32)
    base[17] = base[250]
    indices, distances = nearest(base, base, 299, exclude_self=True, metric="l2")
    assert indices.shape == (300, 299)
    assert not (indices == np.arange(300)[:, None]).any()
    assert (indices[17, 0], indices[250, 0]) == (250, 17)
    assert distances[17, 0] == 0
    assert nearest(base[:1], base[:1], 3, exclude_self=True)[0].shape == (1, 0)


def test_block_sizes_and_numbers_of_neighbours_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    base, queries = (rng.standard_normal((size, 130)).astype(np.float32) for size in (2000, 41))
    base[1000:1500] = base[:500]
    indices, distances = nearest(queries, base, 25)
    monkeypatch.setattr(neighbours, "QUERIES", 7)
    monkeypatch.setattr(neighbours, "_PAIR_CELLS", 512)
    monkeypatch.setattr(neighbours.Queries, "device_cells", 130 * 333)
    again, equal = nearest(queries, base, 25)
    np.testing.assert_array_equal(again, indices)
    assert distances.tobytes() == equal.tobytes()
    alone, one = nearest(queries[40:], base, 25)
    np.testing.assert_array_equal(alone[0], indices[40])
    assert one[0].tobytes() == distances[40].tobytes()


def test_the_number_of_threads_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    base, queries = (rng.standard_normal((size, 20)).astype(np.float32) for size in (900, 5))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    one = nearest(queries, base, 30, metric="l2")
    for threads in (2, 7):  # of seven, some have no query
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        indices, distances = nearest(queries, base, 30, metric="l2")
        np.testing.assert_array_equal(indices, one[0])
        assert distances.tobytes() == one[1].tobytes()


@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_both_libraries_of_products_find_the_same(metric: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    base = np.random.default_rng(5).standard_normal((3000, 40)).astype(np.float32)
    base[2000:2500] = base[:500]  # equal distances
    found = []
    for is_intel in (True, False):
        monkeypatch.setattr(neighbours, "_is_intel", lambda value=is_intel: value)
        found.append(nearest(base[:200], base, 12, metric=metric, device="cpu"))
    np.testing.assert_array_equal(found[0][0], found[1][0])
    np.testing.assert_array_equal(found[0][1], found[1][1])


def test_the_precision_of_products_that_training_set_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "_is_intel", lambda: True)  # torch multiplies
    matmul = torch.backends.cuda.matmul
    was = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"  # as transformers sets it under tf32: true
        nearest(np.eye(3, dtype=np.float32), np.eye(3, dtype=np.float32), 2)
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = was


def test_products_of_a_device_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(4)
    base = rng.standard_normal((1500, 40)).astype(np.float16)
    base[100:900] = base[100]
    queries = base[[100, 3, 1200]]
    asked: list[Any] = [{"metric": "cosine"}, {"metric": "l2", "exclude_self": True}]
    expected = [nearest(queries, base, 50, **how) for how in asked]
    engine = neighbours._DeviceQueries
    monkeypatch.setattr(neighbours, "engine_of", lambda q, b, metric, device, first: engine(q, b, metric, first, "cpu"))
    found = [nearest(queries, base, 50, **how) for how in asked]
    for (indices, distances), (same, equal) in zip(found, expected, strict=True):
        np.testing.assert_array_equal(indices, same)
        assert distances.tobytes() == equal.tobytes()


@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_distances_that_are_not_recomputed_are_right_up_to_rounding(metric: Any) -> None:
    rng = np.random.default_rng(6)
    base, queries = (rng.standard_normal((size, 9)).astype(np.float32) for size in (1500, 30))
    indices, distances = nearest(queries, base, 400, metric=metric)
    first, near = nearest(queries, base, 400, metric=metric, measured=20)
    np.testing.assert_array_equal(first[:, :20], indices[:, :20])
    assert near[:, :20].tobytes() == distances[:, :20].tobytes()
    np.testing.assert_allclose(near, distances, atol=2e-6)
    assert np.mean(first != indices) < 0.01
    assert (np.diff(near, axis=1) >= 0).all()


def test_a_memory_map_is_read(tmp_path: Path) -> None:
    base = np.random.default_rng(5).standard_normal((700, 8)).astype(np.float16)
    np.save(tmp_path / "base.npy", base)
    stored = np.load(tmp_path / "base.npy", mmap_mode="r")
    indices, _ = nearest(stored[:3], stored, 5)
    np.testing.assert_array_equal(indices, sorted_distances(base[:3], base, "cosine")[0][:, :5])


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="same width"):
        nearest(np.zeros((2, 3)), np.zeros((2, 4)), 1)
    with pytest.raises(ValueError, match="at least 1"):
        nearest(np.zeros((2, 3)), np.zeros((2, 3)), 0)
    with pytest.raises(ValueError, match="each be one of"):
        nearest(np.zeros((3, 3)), np.zeros((2, 3)), 1, exclude_self=True)
