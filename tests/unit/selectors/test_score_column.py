"""Selectors, orders and weighters that read a column of the raw data."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dataflex.api.context import StepBatch
from dataflex.api.selection import Selection
from dataflex.config.loading import split_config
from dataflex.data.pool import Pool
from dataflex.errors import ConfigError
from dataflex.orders.score_column import ScoreColumnOrder
from dataflex.selectors.score_column import ScoreColumnSelector
from dataflex.weighters.score_column import ScoreColumnWeighter
from unit.fakes import build, context, make_planner, make_pool, plans

VALUES = np.random.default_rng(1).permutation(40) / 4.0
UNSCORED = [3, 7, 30]


def scored_pool(values: Any = VALUES) -> Pool:
    pool = make_pool({"a": 25, "b": 15})
    pool.keep_column("quality", np.array(values, dtype=np.float64))
    return pool


def with_holes() -> np.ndarray:
    values = VALUES.copy()
    values[UNSCORED] = np.nan
    return values


@pytest.mark.parametrize("direction", ["high", "low"])
def test_the_best_values_are_chosen(direction: str) -> None:
    values = with_holes()
    selector = build(ScoreColumnSelector, column="quality", direction=direction)
    candidates = np.arange(0, 40, 2)
    found = selector.choose(context(scored_pool(values)), candidates, 6)
    inside = [index for index in candidates if not np.isnan(values[index])]
    best = sorted(inside, key=lambda index: values[index], reverse=direction == "high")[:6]
    assert sorted(found.indices.tolist()) == sorted(best)


def test_a_draw_prefers_good_values() -> None:
    selector = build(ScoreColumnSelector, column="quality", rule="sample", temperature=0.5)
    drawn = [selector.choose(context(scored_pool(), seed=seed), np.arange(40), 8).indices for seed in range(200)]
    counts = np.bincount(np.concatenate(drawn), minlength=40)
    halves = counts[np.median(VALUES) <= VALUES].sum(), counts[np.median(VALUES) > VALUES].sum()
    assert halves[0] > 3 * halves[1] > 0


def test_every_round_chooses_the_best_values() -> None:
    planner = make_planner(scored_pool(), select=build(ScoreColumnSelector, column="quality"), rounds=3)
    for plan in plans(planner, 3):
        best = set(np.argsort(-VALUES)[:8].tolist())
        assert set(plan.indices.tolist()) == best


@pytest.mark.parametrize("descending", [False, True])
def test_the_order_is_that_of_the_values(descending: bool) -> None:
    values = with_holes()
    chosen = np.array([5, 3, 9, 5, 30, 12, 0, 39, 22])
    order = build(ScoreColumnOrder, column="quality", descending=descending)
    positions = order.arrange(context(scored_pool(values)), Selection(chosen))
    assert np.array_equal(np.sort(positions), np.arange(9))
    arranged = values[chosen[positions]]
    assert np.isnan(arranged[-2:]).all()
    assert arranged[:-2].tolist() == sorted(values[[5, 9, 5, 12, 0, 39, 22]].tolist(), reverse=descending)


def test_weights_equal_the_column_values_of_the_samples() -> None:
    places = torch.tensor([39, 0, 7, 7])
    batch = StepBatch(torch.rand(4), pool=scored_pool(), places=places)
    plain = build(ScoreColumnWeighter, column="quality").weigh(batch)
    assert plain.dtype == torch.float32
    assert plain.tolist() == VALUES[[39, 0, 7, 7]].tolist()
    scaled = build(ScoreColumnWeighter, column="quality", normalized=True).weigh(batch)
    np.testing.assert_allclose(scaled.numpy(), VALUES[[39, 0, 7, 7]] / VALUES.mean(), rtol=1e-6)
    assert VALUES.mean() != 1


COMPONENTS = [ScoreColumnSelector, ScoreColumnOrder, ScoreColumnWeighter]


@pytest.mark.parametrize("kind", COMPONENTS)
@pytest.mark.parametrize(
    "values, row, said",
    [
        ([1.0, 2.0], None, None),
        (np.array(["a", "b"], dtype=object), None, "'quality' holds text"),
        ([1.0, np.inf], 1, "'quality' is inf; a score must be finite"),
        ([np.nan, np.nan], None, "'quality' has no value in any row"),
    ],
)
def test_values_that_are_no_score_are_refused(kind: Any, values: Any, row: int | None, said: str | None) -> None:
    found = build(kind, column="quality").column_problem("quality", np.asarray(values))
    if said is None:
        assert found is None
    else:
        assert found is not None
        assert found[0] == row
        assert said in found[1]


@pytest.mark.parametrize(
    "values, row, said",
    [
        ([1.0, 0.0, -0.5], 2, "is -0.5; every row needs a weight of 0 or more"),
        ([1.0, np.nan, -1.0], 1, "has no value; every row needs a weight"),
        ([0.0, 0.0, 0.0], None, "is 0 in every row"),
    ],
)
def test_values_that_are_no_weight_are_refused(values: list[float], row: int | None, said: str) -> None:
    weighter = build(ScoreColumnWeighter, column="quality")
    found = weighter.column_problem("quality", np.array(values))
    assert found is not None
    assert found[0] == row
    assert said in found[1]
    if "0 in every" not in said:
        assert build(ScoreColumnSelector, column="quality").column_problem("quality", np.array(values)) is None


def test_components_need_their_columns() -> None:
    section = {
        "columns": ["note", "quality"],
        "select": {"method": "score_column", "column": "quality"},
        "order": {"method": "score_column", "column": "level"},
        "weight": {"method": "score_column", "column": "quality"},
    }
    wanted = split_config({"dataflex": section}).wanted_columns()
    assert {name: each.key for name, each in wanted.items()} == {
        "note": "dataflex.columns",
        "quality": "dataflex.columns",
        "level": "dataflex.order",
    }
    assert [key for key, _ in wanted["quality"].checks] == ["dataflex.select", "dataflex.weight"]


def test_a_column_of_text_is_refused() -> None:
    pool = make_pool({"a": 2})
    pool.keep_column("note", np.array(["x", "y"], dtype=object))
    with pytest.raises(ConfigError, match="'note' of the raw data holds text"):
        pool.numbers("note")
