"""DEITA: complexity times quality, and the filter of samples that are similar to a better one."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from dataflex.errors import ComponentError
from dataflex.selectors import deita
from dataflex.selectors.deita import DeitaSelector, unlike
from unit.fakes import build, context, decided, group_of, make_pool, scores_of


def directions(degrees: list[float]) -> np.ndarray:
    angles = np.deg2rad(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def ctx_of(quality: Any, vectors: np.ndarray, complexity: Any = None) -> Any:
    pool = make_pool({"a": len(vectors)})
    pool.keep_column("q", np.array(quality, dtype=np.float64))
    if complexity is not None:
        pool.keep_column("c", np.array(complexity, dtype=np.float64))
    return dataclasses.replace(context(pool), embedding_source=lambda samples: vectors)


def chosen(ctx: Any, count: int, **params: Any) -> list[int]:
    selector = build(DeitaSelector, **{"quality": "q", **params})
    return decided(selector, ctx, group_of(ctx.pool, count)).indices.tolist()


def test_the_filter_has_the_golden_numbers() -> None:
    ctx = ctx_of([22, 20, 18, 19.5], directions([0, 20, 90, 10]))
    assert chosen(ctx, 2) == [0, 2]
    scores = scores_of(build(DeitaSelector, quality="q"), ctx, np.arange(4))
    assert np.flatnonzero(scores > 0).tolist() == [0, 2]
    assert np.argsort(-scores).tolist() == [0, 2, 1, 3]


def by_hand(values: np.ndarray, vectors: np.ndarray, threshold: float, count: int) -> list[int]:
    kept: list[int] = []
    for index in sorted(range(len(values)), key=lambda i: (-values[i], i)):
        if len(kept) < count and all(vectors[index] @ vectors[other] <= threshold for other in kept):
            kept.append(index)
    return kept


@pytest.mark.parametrize("block, kept", [(512, 8192), (4, 3), (1, 1)])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_filter_equals_a_computation_by_hand(
    seed: int, block: int, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deita, "_BLOCK", block)
    monkeypatch.setattr(deita, "_KEPT", kept)
    rng = np.random.default_rng(seed)
    for _ in range(20):
        vectors = rng.normal(size=(30, 3))
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        values = rng.integers(0, 9, 30).astype(float)  # with ties
        order = np.argsort(-values, kind="stable")
        for threshold, count in ((0.9, 30), (0.5, 30), (0.0, 4), (-1.0, 30)):
            found = order[unlike(vectors, order, threshold, count)].tolist()
            assert found == by_hand(values, vectors.astype(np.float32), threshold, count)


def test_the_score_is_complexity_times_quality() -> None:
    spread = directions([0, 60, 120, 180])
    ctx = ctx_of([9, 5, 36, 5], spread, complexity=[2.5, 4, 0.5, 3.9])
    found = decided(build(DeitaSelector, quality="q", complexity="c"), ctx, group_of(ctx.pool, 2))
    assert found.indices.tolist() == [0, 1]
    assert found.scores is not None
    assert found.scores.tolist() == [22.5, 20]
    assert found.ranks is not None
    assert (found.ranks.tolist(), found.ranked) == ([1, 2], 4)
    needs = build(DeitaSelector, quality="q", complexity="c", encoder="e").needs(None)
    assert (needs.columns, needs.embeddings.encoder) == (("q", "c"), "e")


def test_a_threshold_of_one_and_a_turned_space_change_nothing() -> None:
    rng = np.random.default_rng(4)
    vectors = rng.normal(size=(40, 8))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    values = rng.random(40)
    ctx = ctx_of(values, vectors)
    turned = ctx_of(values * 3 + 1, vectors @ np.linalg.qr(rng.normal(size=(8, 8)))[0])
    assert chosen(ctx, 12, threshold=0.4) == chosen(turned, 12, threshold=0.4)
    assert chosen(ctx, 12, threshold=1.0) == sorted(np.argsort(-values)[:12].tolist())


def test_duplicates_count_once_until_nothing_else_is_left(caplog: pytest.LogCaptureFixture) -> None:
    ctx = ctx_of([9, 9, 8, 8, 7, 1], directions([0, 0, 90, 90, 0, 45]))
    assert chosen(ctx, 3) == [0, 2, 5]
    assert not caplog.records
    assert chosen(ctx, 4) == [0, 1, 2, 5]
    assert "4 samples are wanted, but the filter accepts only 3" in caplog.text


def test_memory_maps_in_half_precision_are_read() -> None:
    rng = np.random.default_rng(5)
    vectors = rng.normal(size=(20, 6))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    half = vectors.astype(np.float16)
    half.flags.writeable = False
    assert chosen(ctx_of(range(20), half), 5, threshold=0.3) == chosen(ctx_of(range(20), vectors), 5, threshold=0.3)


def test_samples_without_a_number_or_a_trained_token_are_not_chosen() -> None:
    ctx = ctx_of([np.nan, 5, 4, 3], directions([0, 60, 120, 180]))
    ctx.pool.trained[1] = False
    found = decided(build(DeitaSelector, quality="q"), ctx, group_of(ctx.pool, 2))
    assert (found.indices.tolist(), found.unscored) == ([2, 3], 2)
    with pytest.raises(ComponentError, match="3 samples are wanted but only 2 of 4"):
        chosen(ctx, 3)
