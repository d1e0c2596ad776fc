"""Spherical k-means: properties of the clusters, and recovery of separate groups."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from dataflex import spherical_kmeans
from dataflex.embedding import clusters


def unit(rows: NDArray[Any]) -> NDArray[np.float32]:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_vector_is_with_its_nearest_centre(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for size, count in ((200, 9), (40, 40), (5, 1), (1, 1)):
        vectors = unit(rng.normal(size=(size, 5)))
        labels, centres = spherical_kmeans(vectors, count, 100, rng)
        assert len(centres) <= count
        np.testing.assert_array_equal(np.unique(labels), np.arange(len(centres)))
        sums = np.stack([vectors[labels == each].sum(axis=0) for each in range(len(centres))])
        np.testing.assert_allclose(centres, unit(sums), atol=1e-6)
        cosines = vectors @ centres.T
        assert (cosines[np.arange(size), labels] >= cosines.max(axis=1) - 1e-6).all()


def test_groups_are_found_and_an_empty_cluster_begins_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters, "_ROWS", 7)
    rng = np.random.default_rng(1)
    vectors = unit(np.repeat(np.eye(4), 10, axis=0) + 0.05 * rng.normal(size=(40, 4)))

    class First:  # two of the first centres lie in one group, none in the last two
        def choice(self, size: int, count: int, replace: bool) -> NDArray[np.int64]:
            return np.array([0, 1, 2, 11])

    labels, centres = spherical_kmeans(vectors, 4, 50, First())  # type: ignore[arg-type]
    groups = labels.reshape(4, 10)
    assert (groups == groups[:, :1]).all()
    assert np.unique(groups[:, 0]).size == len(centres) == 4


def test_duplicates_share_a_cluster() -> None:
    vectors = unit(np.ones((20, 3)))
    labels, centres = spherical_kmeans(vectors.astype(np.float16), 5, 10, np.random.default_rng(0))
    assert not labels.any()
    assert centres.shape == (1, 3)
