"""Neighbours by faiss: distances are measured again, with a stand-in index and with faiss if it is installed."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from dataflex import nearest
from dataflex.embedding import approximate
from dataflex.embedding.approximate import find_neighbours
from dataflex.errors import DataFlexError


def data(size: int = 3000) -> tuple[NDArray[np.float32], NDArray[np.float16]]:
    rng = np.random.default_rng(0)
    base = rng.normal(size=(40, 16))[rng.integers(40, size=size)] + 0.3 * rng.normal(size=(size, 16))
    return base[:30].astype(np.float32), base.astype(np.float16)


class Halved:
    """Finds the nearest among even rows alone, and of the first query nothing but one."""

    def __init__(self, base: NDArray[Any]) -> None:
        self.base = base

    def search(self, queries: NDArray[Any], k: int) -> tuple[None, NDArray[Any]]:
        found = 2 * nearest(queries, self.base[::2], k)[0]
        found[0, 1:] = -1
        return None, found


@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_neighbours_from_an_index_are_measured_again_and_completed(
    metric: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries, base = data()
    monkeypatch.setattr(approximate, "find_spec", lambda name: name)
    monkeypatch.setattr(approximate, "_index", lambda base, metric: Halved(base))
    found = find_neighbours(queries, base, 10, metric=metric, search="faiss")
    exact, distances = nearest(queries, base, 10, metric=metric)
    np.testing.assert_array_equal(found.indices[0], exact[0])
    assert (found.indices[1:] % 2 == 0).all()
    assert (np.diff(found.distances, axis=1) >= 0).all()
    place = np.flatnonzero(np.isin(found.indices[5], exact[5]))
    np.testing.assert_array_equal(np.sort(found.distances[5][place]), distances[5][np.isin(exact[5], found.indices[5])])
    hits = np.mean([np.isin(mine, other).mean() for mine, other in zip(found.indices, exact, strict=True)])
    assert found.recall == pytest.approx(hits)
    assert 0.3 < hits < 0.8


def test_small_pools_are_searched_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, base = data(200)
    monkeypatch.setattr(approximate, "find_spec", lambda name: name)
    found = find_neighbours(queries, base, 5)
    assert found.recall is None
    np.testing.assert_array_equal(found.indices, nearest(queries, base, 5)[0])
    monkeypatch.setattr(approximate, "find_spec", lambda name: None)
    monkeypatch.setattr(approximate, "_LARGE", 10)
    assert find_neighbours(queries, base, 5).recall is None
    with pytest.raises(DataFlexError, match="faiss is not installed"):
        find_neighbours(queries, base, 5, search="faiss")


@pytest.mark.skipif(find_spec("faiss") is None, reason="faiss is not installed")
@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_faiss_finds_most_exact_neighbours(metric: Any) -> None:
    queries, base = data()
    found = find_neighbours(queries, base, 10, metric=metric, search="faiss")
    again = find_neighbours(queries, base, 10, metric=metric, search="faiss")
    assert found.recall is not None
    assert found.recall > 0.9
    np.testing.assert_array_equal(found.indices, again.indices)
    assert find_neighbours(queries[:2], base[:20], 20, metric=metric, search="faiss").recall == 1
