"""The orders sort and shuffle: permutations of a plan, sorted by the scores."""

from __future__ import annotations

import numpy as np
import pytest

from dataflex.api.order import Order
from dataflex.api.params import ComponentParams
from dataflex.api.selection import Selection
from dataflex.errors import ComponentError
from dataflex.orders.shuffle import ShuffleOrder
from dataflex.orders.sort import SortOrder
from unit.fakes import FakeProbe, ScoreSelector, build, context, make_planner, make_pool, plans

RNG = np.random.default_rng(0)
LOSSES = RNG.permutation(40).astype(np.float32)
POOL = make_pool({"a": 25, "b": 15}, lengths=RNG.permutation(40) + 1)
SELECTION = Selection(RNG.integers(0, 40, 60))  # samples may come more than once


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("by", ["loss", "length", "selection"])
def test_sort_puts_the_score_in_order(by: str, descending: bool) -> None:
    scores = RNG.random(60).astype(np.float32)
    selection = Selection(SELECTION.indices, scores)
    order = build(SortOrder, by=by, descending=descending)
    positions = order.arrange(context(POOL, LOSSES), selection)
    assert np.array_equal(np.sort(positions), np.arange(60))
    values = {"loss": LOSSES[selection.indices], "length": POOL.lengths[selection.indices], "selection": scores}[by]
    arranged = values[positions].astype(float)
    assert np.all(np.diff(arranged) <= 0 if descending else np.diff(arranged) >= 0)


def test_sort_by_loss_scores_each_sample_once() -> None:
    probe = FakeProbe(LOSSES)
    build(SortOrder).arrange(context(POOL, probe=probe), SELECTION)
    assert [asked.tolist() for asked in probe.asked] == [sorted(set(SELECTION.indices.tolist()))]


@pytest.mark.parametrize("descending", [False, True])
def test_ties_are_broken_at_random_in_every_round(descending: bool) -> None:
    selection = Selection(np.arange(40), np.repeat([1.0, 2.0], 20))
    order = build(SortOrder, by="selection", descending=descending)
    first, second = (order.arrange(context(POOL, round=number), selection) for number in (0, 1))
    for positions in (first, second):
        assert (positions[:20] >= 20).all() == descending
        assert not np.array_equal(np.sort(positions[:20]), positions[:20])
    assert not np.array_equal(first, second)
    assert np.array_equal(first, order.arrange(context(POOL, round=0), selection))


def test_sort_by_selection_needs_scores() -> None:
    with pytest.raises(ComponentError, match=r"order\.by: selection needs a selector that scores"):
        build(SortOrder, by="selection").arrange(context(POOL), SELECTION)


@pytest.mark.parametrize("descending", [False, True])
def test_samples_without_a_loss_come_last(descending: bool) -> None:
    losses = LOSSES.copy()
    losses[SELECTION.indices[[3, 5]]] = np.nan
    positions = build(SortOrder, descending=descending).arrange(context(POOL, losses), SELECTION)
    arranged = losses[SELECTION.indices[positions]]
    missing = int(np.isnan(arranged).sum())
    assert missing >= 2
    assert np.isnan(arranged[-missing:]).all()
    known = arranged[:-missing]
    assert (np.diff(known) <= 0).all() if descending else (np.diff(known) >= 0).all()


def test_shuffle_is_a_fresh_permutation_every_round() -> None:
    order = build(ShuffleOrder)
    drawn = [order.arrange(context(POOL, round=number), SELECTION) for number in range(4)]
    for positions in drawn:
        assert np.array_equal(np.sort(positions), np.arange(60))
    assert len({positions.tobytes() for positions in drawn}) == 4
    assert np.array_equal(drawn[2], order.arrange(context(POOL, round=2), SELECTION))


def test_a_plan_is_sorted() -> None:
    selector = ScoreSelector(lambda candidates: LOSSES[candidates])
    planner = make_planner(POOL, steps=3, batch=4, select=selector, order=build(SortOrder, by="selection"))
    (plan,) = plans(planner, 1)
    assert plan.scores.tolist() == list(range(28, 40))
    assert plan.scores.tolist() == LOSSES[plan.indices].tolist()


@pytest.mark.parametrize("positions", [[0] * 8, list(range(7)), list(range(1, 9)), [0.5] * 8])
def test_an_order_that_is_no_permutation_is_refused(positions: list[float]) -> None:
    class Broken(Order):
        family, name = "order", "broken"
        Params = ComponentParams

        def arrange(self, ctx, selection):
            return np.array(positions)

    with pytest.raises(ComponentError, match=r"order 'broken' .*8 positions"):
        plans(make_planner(POOL, order=build(Broken)), 1)
