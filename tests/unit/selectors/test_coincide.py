"""COINCIDE: golden numbers, a full greedy search, and properties of its parts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from dataflex.selectors import coincide
from dataflex.selectors.coincide import (
    CoincideSelector,
    allocated,
    cluster_shares,
    density,
    standing_for,
    transferability,
)
from unit.fakes import build, decided, embedded, group_of


def at(*degrees: float) -> NDArray[np.float64]:
    angles = np.radians(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


CLUSTERS = [at(0, 10, 30), at(35, 40), at(110, 130)]
CENTRES = np.stack([each.sum(axis=0) / np.linalg.norm(each.sum(axis=0)) for each in CLUSTERS])
SIZES = np.array([3, 2, 2])


def test_clusters_have_the_golden_numbers() -> None:
    transfer = transferability(CENTRES, 0.9)
    np.testing.assert_allclose(transfer, (-0.287443, 0.130526, -0.078459), atol=1e-6)
    np.testing.assert_allclose(transferability(CENTRES, 1.0), (0.312321, 0.521305, -0.078459), atol=1e-6)
    densities = np.array([density(each, 1.0) for each in CLUSTERS])
    np.testing.assert_allclose(densities, (0.955780, 0.998101, 0.970738), atol=1e-6)
    shares = cluster_shares(transfer, densities, 0.1)
    np.testing.assert_allclose(shares, (0.011786, 0.881928, 0.106285), atol=1e-6)
    assert allocated(shares, SIZES, 4).tolist() == [0, 2, 2]
    assert allocated(cluster_shares(transfer, densities, 1.0), SIZES, 4).tolist() == [1, 2, 1]


def discrepancies(vectors: NDArray[Any], chosen: list[int], gamma: float) -> list[float]:
    squares = ((vectors[:, None] - vectors[None]) ** 2).sum(-1)
    k = np.exp(-squares / (2 * gamma**2))
    parts = [chosen[: end + 1] for end in range(len(chosen))]
    return [float(k.mean() + k[np.ix_(part, part)].mean() - 2 * k[:, part].mean()) for part in parts]


def test_a_choice_inside_a_cluster_has_the_golden_numbers() -> None:
    points = np.array([0.0, 0.2, 0.5, 1.5, 1.6])[:, None]
    for gamma, order, values in (
        (1.0, [2, 3, 0, 4], (0.113470, 0.043804, 0.004651, 0.013343)),
        (np.sqrt(0.5), [2, 4, 0, 3], (0.241895, 0.061473, 0.003595, 0.019086)),
    ):
        found = standing_for(points, 4, gamma).tolist()
        assert found == order
        np.testing.assert_allclose(discrepancies(points, found, gamma), values, atol=1e-6)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_choice_equals_a_full_greedy_search(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coincide, "_ROWS", 4)
    rng = np.random.default_rng(seed)
    for _ in range(20):
        vectors = rng.normal(size=(int(rng.integers(1, 15)), 3))
        vectors[rng.random(len(vectors)) < 0.3] = vectors[0]
        gamma, chosen = float(rng.uniform(0.3, 2)), list[int]()
        for _ in range(len(vectors)):
            left = [each for each in range(len(vectors)) if each not in chosen]
            values = {each: round(discrepancies(vectors, [*chosen, each], gamma)[-1], 9) for each in left}
            chosen.append(min(left, key=lambda each: (values[each], each)))
        assert standing_for(vectors, len(vectors), gamma).tolist() == chosen
        assert discrepancies(vectors, chosen, gamma)[-1] == pytest.approx(0, abs=1e-12)
        turn, _ = np.linalg.qr(rng.normal(size=(3, 3)))
        assert standing_for(vectors @ turn, len(vectors), gamma).tolist() == chosen


def test_shares_of_clusters_hold_for_any_sizes() -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        sizes = rng.integers(1, 9, size=int(rng.integers(1, 12)))
        shares = cluster_shares(rng.normal(size=sizes.size), rng.uniform(0.05, 1, size=sizes.size), 0.1)
        count = int(rng.integers(1, sizes.sum() + 1))
        given = allocated(shares, sizes, count)
        assert given.sum() == count
        assert ((given >= 0) & (given <= sizes)).all()


def test_clusters_of_one_sample_and_similar_clusters_are_handled() -> None:
    assert density(at(12), 0.1) == 1.0
    assert transferability(at(0, 1, 2), 0.9).tolist() == [0, 0, 0]
    assert transferability(at(0), 0.9).tolist() == [0]
    shares = cluster_shares(np.zeros(3), np.ones(3), 0.1)
    assert allocated(shares, np.array([1, 1, 1]), 2).sum() == 2
    huge = cluster_shares(np.array([1.0, -1.0, 0.5]), np.array([1e-4, 1.0, 1.0]), 0.1)  # exp(10^5) would overflow
    assert np.isfinite(huge).all()
    assert allocated(huge, np.array([2, 2, 2]), 5).sum() == 5


@pytest.mark.parametrize("clusters", [None, 1, 7, 1000])
def test_samples_are_chosen_from_clusters(clusters: int | None) -> None:
    ctx = embedded(size=60)
    ctx.pool.trained[20:25] = False
    ctx.embeddings()[30:40] = ctx.embeddings()[30]
    selector = build(CoincideSelector, clusters=clusters, encoder="some")
    chosen = decided(selector, ctx, group_of(ctx.pool, 20, 20, 60))
    assert np.unique(chosen.indices).size == 20
    assert chosen.indices.min() >= 25
    assert chosen.unscored == 5
    resumed = build(CoincideSelector, clusters=clusters, encoder="some")
    resumed.load_state_dict(selector.state_dict())
    same = decided(resumed, ctx, group_of(ctx.pool, 20, 20, 60))  # later numbers of the same stream, not needed
    np.testing.assert_array_equal(same.indices, chosen.indices)
    assert decided(selector, ctx, group_of(ctx.pool, 1, 4, 5)).indices.tolist() == [4]


def test_clusters_depend_on_direction_and_chosen_samples_represent_them() -> None:
    ctx = embedded(size=60, width=4)
    groups = np.repeat(np.eye(4, dtype=np.float32), 15, axis=0)
    ctx.embeddings()[:] = groups + 0.01 * ctx.embeddings()
    chosen = decided(build(CoincideSelector, clusters=4, tau=10.0), ctx, group_of(ctx.pool, 8)).indices
    assert np.bincount(chosen // 15, minlength=4).tolist() == [2, 2, 2, 2]
