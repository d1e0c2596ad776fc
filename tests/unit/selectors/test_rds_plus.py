"""RDS+: its three rules and the turns of sub-tasks, compared with golden numbers and a reading by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from dataflex import Embeddings
from dataflex.selectors import rds_plus
from dataflex.selectors.base_neighbours import scanned
from dataflex.selectors.rds_plus import RdsPlusParams, RdsPlusSelector, best, listed, repopped
from unit.fakes import build, context, decided, embedded, group_of, make_pool, scores_of

SIMILARITIES = np.array([(0.9, 0.8, 0.7, 0.1, 0.2, 0.3), (0.95, 0.6, 0.3, 0.85, 0.2, 0.5)])


def table_of(similarities: NDArray[Any]) -> NDArray[Any]:
    return np.argsort(-similarities, axis=1, kind="stable")


def test_one_task_has_the_golden_numbers() -> None:
    table = table_of(SIMILARITIES)
    assert scanned(table)[0][:4].tolist() == [0, 1, 3, 2]
    assert scanned(table)[0][:3].tolist() == [0, 1, 3]
    assert repopped(table, 4).tolist() == [0, 3, 1, 5]
    assert best(SIMILARITIES.max(axis=0), 4).tolist() == [0, 3, 1, 2]


def test_two_tasks_have_the_golden_numbers() -> None:
    first = np.array([(0.9, 0.2, 0.8, 0.1), (0.95, 0.85, 0.3, 0.2)]).max(axis=0)
    lists = np.stack([best(first, 4), best(np.array([0.1, 0.6, 0.2, 0.7]), 4)])
    assert scanned(lists)[0][:3].tolist() == [0, 3, 1]
    assert scanned(lists)[0][:4].tolist() == [0, 3, 1, 2]


def test_the_pooling_has_the_golden_numbers() -> None:
    import torch

    hidden = torch.tensor([[(1.0, 0), (0, 1), (1, 1), (9, 9), (9, 9)]])
    mask = torch.tensor([[True, True, True, False, False]])
    found = Embeddings(pooling="weighted_mean").reduce(hidden, mask)
    np.testing.assert_allclose(found[0].numpy(), (0.624695, 0.780869), atol=1e-6)
    assert RdsPlusParams().pooling == "weighted_mean"
    assert RdsPlusParams().layer == -1


def by_hand(similarities: NDArray[Any], count: int, rule: str) -> list[int]:
    """Return what one sub-task lists, turn by turn."""
    number, size = similarities.shape
    if rule == "max":
        return sorted(range(size), key=lambda x: (-similarities[:, x].max(), x))[:count]
    lists = [sorted(range(size), key=lambda x: (-row[x], x)) for row in similarities]
    found: list[int] = []
    turn = 0
    while len(found) < count:
        row = lists[turn % number]
        if rule == "round_robin_repop":
            found.append(next(each for each in row if each not in found))
        elif row[0] not in found:
            found.append(row[0])
        if rule == "round_robin":
            del row[0]
        turn += 1
    return found


@pytest.mark.parametrize("rule", ["round_robin", "round_robin_repop", "max"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_rules_equal_a_reading_by_hand(rule: Any, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rds_plus, "_LENGTH", 2)
    for number in range(20):
        ctx = embedded(size=30, queries=4, seed=1000 * seed + number)
        base, queries = ctx.embeddings(), ctx.embeddings(ctx.validation)
        similarities = queries.astype(np.float64) @ base.T.astype(np.float64)
        for count in (1, 7, 30):
            assert listed(queries, base, count, rule).tolist() == by_hand(similarities, count, rule)
        tasks = [by_hand(similarities[:2], 30, rule), by_hand(similarities[2:], 30, rule)]
        taken: list[int] = []
        for pair in zip(*tasks, strict=True):
            taken += [each for each in dict.fromkeys(pair) if each not in taken]
        chosen = decided(build(RdsPlusSelector, rule=rule), ctx, group_of(ctx.pool, 11))
        assert chosen.indices.tolist() == taken[:11]
        np.testing.assert_allclose(chosen.scores, similarities.max(axis=0)[chosen.indices], atol=1e-6)


def test_the_order_of_validation_samples_changes_no_whole_pass() -> None:
    table = table_of(np.random.default_rng(0).normal(size=(5, 40)))
    for columns in (1, 3, 9):
        assert set(scanned(table[:, :columns])[0]) == set(scanned(table[::-1, :columns])[0])


def test_offline_scores_are_cosines_with_the_nearest() -> None:
    ctx = embedded()
    ctx.pool.trained[3] = False
    scores = scores_of(build(RdsPlusSelector), ctx, np.arange(60))
    expected = (ctx.embeddings() @ ctx.embeddings(ctx.validation).T).max(axis=1)
    expected[3] = np.nan
    np.testing.assert_allclose(scores, expected, atol=1e-6)


def test_groups_duplicates_one_candidate_and_samples_without_a_token_are_handled() -> None:
    ctx = embedded(size=60)
    ctx.pool.trained[20:25] = False
    ctx.embeddings()[30:40] = ctx.embeddings()[30]
    chosen = decided(build(RdsPlusSelector), ctx, group_of(ctx.pool, 35, 20, 60))
    assert chosen.unscored == 5
    assert sorted(chosen.indices.tolist()) == list(range(25, 60))
    duplicates = [each for each in chosen.indices.tolist() if 30 <= each < 40]
    assert duplicates == list(range(30, 40))
    assert decided(build(RdsPlusSelector), ctx, group_of(ctx.pool, 1, 4, 5)).indices.tolist() == [4]
    pool, held = make_pool({"a": 3}), make_pool({"x": 1})
    same = np.eye(3, dtype=np.float32)
    one = context(pool, validation_pool=held, embedding_source=lambda samples: same if samples is None else same[1:2])
    assert decided(build(RdsPlusSelector), one, group_of(pool, 2)).indices.tolist() == [1, 0]
