"""Diversity: greedy choices equal a full search and reach their guarantees."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from dataflex.selectors import diversity
from dataflex.selectors.diversity import DiversitySelector, best_facilities, farthest_first
from unit.fakes import build, decided, embedded, group_of


def unit(rows: NDArray[Any]) -> NDArray[np.float32]:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def farthest_by_hand(vectors: NDArray[Any], count: int, first: int) -> list[int]:
    distances = np.round(1 - vectors.astype(np.float64) @ vectors.T.astype(np.float64), 6)
    chosen = [first]
    while len(chosen) < count:
        left = [each for each in range(len(vectors)) if each not in chosen]
        chosen.append(max(left, key=lambda x: (distances[x, chosen].min(), -x)))
    return chosen


def facilities_by_hand(vectors: NDArray[Any], covered: NDArray[Any], count: int) -> list[int]:
    near = 1 + vectors.astype(np.float64) @ covered.T.astype(np.float64)
    reach, chosen = np.zeros(len(covered)), list[int]()
    for _ in range(count):
        gains = np.maximum(near - reach, 0).mean(axis=1)
        gains[chosen] = -1
        chosen.append(int(np.flatnonzero(gains >= gains.max() - 1e-6)[0]))
        reach = np.maximum(reach, near[chosen[-1]])
    return chosen


@pytest.mark.parametrize("batch", [16, 256])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_choice_equals_a_full_greedy_search(batch: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diversity, "_BATCH", batch)
    monkeypatch.setattr(diversity, "_ROWS", 11)
    rng = np.random.default_rng(seed)
    for _ in range(20):
        vectors = unit(rng.normal(size=(int(rng.integers(2, 40)), 4)))
        vectors[rng.random(len(vectors)) < 0.2] = vectors[0]  # duplicates
        count = int(rng.integers(1, len(vectors) + 1))
        first = int(rng.integers(len(vectors)))
        places, found = farthest_first(vectors, count, first)
        assert places.tolist() == farthest_by_hand(vectors, count, first)
        assert (np.diff(found) <= 1e-6).all()
        covered = vectors[: max(1, len(vectors) // 2)]
        places, gains = best_facilities(vectors, covered, count)
        assert places.tolist() == facilities_by_hand(vectors, covered, count)
        reached = np.maximum.reduce([1 + vectors[each] @ covered.T for each in places]).mean()
        assert gains.sum() == pytest.approx(reached, abs=1e-5)


def test_greedy_choices_reach_their_guaranteed_share_of_the_optimum() -> None:
    for seed in range(20):
        vectors = unit(np.random.default_rng(seed).normal(size=(12, 3)))
        near = 1 + vectors @ vectors.T
        sets = [list(each) for each in combinations(range(12), 3)]
        places, gains = best_facilities(vectors, vectors, 3)
        assert gains.sum() >= (1 - 1 / np.e) * max(near[each].max(axis=0).mean() for each in sets)
        far = np.sqrt(np.maximum(4 - 2 * near, 0))
        places, _ = farthest_first(vectors, 3, 0)
        assert far[places].min(axis=0).max() <= 2 * min(far[each].min(axis=0).max() for each in sets) + 1e-6


@pytest.mark.parametrize("criterion", ["k_center", "facility_location"])
def test_near_duplicates_are_not_chosen_twice(criterion: str) -> None:
    ctx = embedded(size=60, width=30)
    ctx.embeddings()[10:60] = np.repeat(ctx.embeddings()[:10], 5, axis=0)
    for _ in range(3):
        chosen = decided(build(DiversitySelector, criterion=criterion), ctx, group_of(ctx.pool, 10))
        originals = [each if each < 10 else (each - 10) // 5 for each in chosen.indices.tolist()]
        assert sorted(originals) == list(range(10))
        assert chosen.ranks.tolist() == list(range(1, 11))


@pytest.mark.parametrize("criterion", ["k_center", "facility_location"])
def test_groups_of_one_candidate_and_samples_without_a_token_are_handled(criterion: str) -> None:
    ctx, selector = embedded(size=60), build(DiversitySelector, criterion=criterion, covered=13)
    ctx.pool.trained[20:25] = False
    chosen = decided(selector, ctx, group_of(ctx.pool, 35, 20, 60))
    assert sorted(chosen.indices.tolist()) == list(range(25, 60))
    assert chosen.unscored == 5
    assert decided(selector, ctx, group_of(ctx.pool, 1, 4, 5)).indices.tolist() == [4]
    again = [decided(selector, embedded(size=60), group_of(ctx.pool, 9)).indices.tolist() for _ in range(2)]
    assert again[0] == again[1]
    ctx.embeddings()[:] = 0
    assert decided(selector, ctx, group_of(ctx.pool, 9, 25, 60)).indices.size == 9
