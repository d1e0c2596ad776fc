"""Curriculum patterns equal the official code's permutations and brute force, and depend on the ranking alone."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from dataflex.api.order import Order
from dataflex.api.schedule import RunOutline, Schedule
from dataflex.api.selection import Selection
from dataflex.config.loading import split_config
from dataflex.errors import ConfigError
from dataflex.orders import base_curriculum
from dataflex.orders.base_patterns import (
    folded,
    segment_sizes,
    segmented,
    shuffled_in_windows,
    with_transitions,
    zigzagged,
)
from dataflex.orders.fold import FoldOrder
from dataflex.orders.saw import SawOrder
from dataflex.orders.segment import SegmentOrder
from dataflex.orders.sort import SortOrder
from dataflex.orders.stair import StairOrder
from dataflex.orders.zigzag import ZigzagOrder
from unit.fakes import ScoreSelector, build, context, make_planner, make_pool, plans

PATTERNS: dict[str, tuple[type[Order], dict[str, Any]]] = {
    "sort": (SortOrder, {"ties": "input"}),
    "fold": (FoldOrder, {"layers": 3}),
    "zigzag": (ZigzagOrder, {"layers": 3}),
    "stair": (StairOrder, {}),
    "saw": (SawOrder, {"sections": 2, "radius": 0.25}),
    "segment": (SegmentOrder, {"front": 30, "back": 20}),
}


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split()]


def official_shuffle(seed: int) -> Any:
    """Return what shuffles parts one after another with the generator of the official code."""
    generator = random.Random(seed)

    def shuffle(part: np.ndarray) -> np.ndarray:
        values = part.tolist()
        generator.shuffle(values)
        return np.array(values, dtype=np.int64)

    return shuffle


GOLDEN = [
    (lambda n: folded(n, 2), "0 2 4 6 8 1 3 5 7 9", "0 2 4 6 8 10 1 3 5 7 9"),
    (lambda n: zigzagged(n, 2), "0 2 4 6 8 9 7 5 3 1", "0 2 4 6 8 10 9 7 5 3 1"),
    (lambda n: folded(n, 3), "0 3 6 9 1 4 7 2 5 8", "0 3 6 9 1 4 7 10 2 5 8"),
    (lambda n: zigzagged(n, 3), "0 3 6 9 7 4 1 2 5 8", "0 3 6 9 10 7 4 1 2 5 8"),
    (lambda n: folded(n, 5), "0 5 1 6 2 7 3 8 4 9", "0 5 10 1 6 2 7 3 8 4 9"),
    (lambda n: zigzagged(n, 5), "0 5 6 1 2 7 8 3 4 9", "0 5 10 6 1 2 7 8 3 4 9"),
    (lambda n: with_transitions(n, 2, 0.225, 3, folded), "0 1 2 3 6 4 5 7 8 9", "0 1 2 3 4 7 5 6 8 9 10"),
    (lambda n: with_transitions(n, 3, 0.15, 2, zigzagged), "0 1 3 4 2 5 7 8 6 9", "0 1 2 4 5 3 6 8 7 9 10"),
    (lambda n: with_transitions(n, 3, 0.15, 2, folded), "0 1 3 2 4 5 7 6 8 9", "0 1 2 4 3 5 6 8 7 9 10"),
    (lambda n: with_transitions(n, 3, 0.3, 2, folded), "0 2 4 1 3 5 6 8 7 9", "0 1 3 5 2 4 6 7 9 8 10"),
    (lambda n: with_transitions(n, 3, 0.3, 2, zigzagged), "0 2 4 5 3 1 6 8 9 7", "0 1 3 5 6 4 2 7 9 8 10"),
    (lambda n: with_transitions(n, 3, 0.075, 2, zigzagged), "0 1 2 3 4 5 6 7 8 9", "0 1 2 3 4 5 6 7 8 9 10"),
    (
        lambda n: segmented((*_parts(n, 10, 10),), (False, True), official_shuffle(42)),
        "0 4 5 7 8 3 6 1 2 9",
        "0 4 7 8 5 9 3 6 1 2 10",
    ),
    (
        lambda n: segmented((*_parts(n, 20, 20),), (True, True), official_shuffle(42)),
        "7 8 4 3 2 0 5 1 9 6",
        "8 9 3 5 2 4 0 6 1 7 10",
    ),
    (
        lambda n: shuffled_in_windows(np.arange(n), 4, np.random.default_rng(42)),
        "3 2 1 0 7 6 4 5 8 9",
        "3 2 1 0 7 6 4 5 10 8 9",
    ),
    (
        lambda n: shuffled_in_windows(folded(n, 3), 4, np.random.default_rng(42)),
        "9 6 3 0 2 7 1 4 5 8",
        "9 6 3 0 10 7 1 4 8 2 5",
    ),
]


def _parts(size: int, front: float, back: float) -> tuple[int, int, int]:
    first, last = segment_sizes(size, front, back)
    return first, size - first - last, last


@pytest.mark.parametrize("pattern, ten, eleven", GOLDEN)
def test_patterns_equal_the_official_permutations(pattern: Any, ten: str, eleven: str) -> None:
    assert pattern(10).tolist() == numbers(ten)
    assert pattern(11).tolist() == numbers(eleven)


def test_parts_above_the_whole_are_scaled_as_in_the_official_code() -> None:
    assert _parts(10, 80, 60) == (5, 0, 5)
    assert _parts(11, 80, 60) == (6, 0, 5)


def swept(items: Sequence[int], layers: int, turns: bool) -> list[int]:
    """Sweeps through a list by its definition, one item at a time."""
    found: list[int] = []
    for layer in range(layers):
        sweep = [item for place, item in enumerate(items) if place % layers == layer]
        found += reversed(sweep) if turns and layer % 2 else sweep
    return found


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_patterns_equal_their_definitions(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(20):
        size, layers, sections = int(rng.integers(0, 60)), int(rng.integers(1, 8)), int(rng.integers(1, 6))
        radius = float(rng.integers(0, 50)) / 100
        for function, turns in ((folded, False), (zigzagged, True)):
            assert function(size, layers).tolist() == swept(range(size), layers, turns)
            expected, end = [], 0
            for section in range(1, sections):
                border, half = round(size * section / sections), round(size * radius)
                begin = max(end, border - half)
                expected += range(end, begin)
                end = min(size, border + half)
                expected += swept(range(begin, end), layers, turns)
            expected += range(end, size)
            assert with_transitions(size, sections, radius, layers, function).tolist() == expected


@pytest.mark.parametrize("high", [(False, True), (True, False), (False, False), (True, True)])
def test_segments_take_samples_from_the_named_ends(high: tuple[bool, bool]) -> None:
    ranks = segmented((3, 10, 4), high, np.random.default_rng(1).permutation)
    assert np.array_equal(np.sort(ranks), np.arange(17))
    front, back = set(ranks[:3].tolist()), set(ranks[13:].tolist())
    if high[0] == high[1]:
        assert front | back == set(range(10, 17) if high[0] else range(7))
    else:
        assert front == set(range(14, 17) if high[0] else range(3))
        assert back == set(range(13, 17) if high[1] else range(4))


@pytest.mark.parametrize("name", PATTERNS)
def test_an_order_depends_only_on_the_ranking_of_the_scores(name: str) -> None:
    cls, params = PATTERNS[name]
    rng = np.random.default_rng(4)
    pool = make_pool({"a": 50})
    for _ in range(20):
        size = int(rng.integers(1, 50))
        scores = rng.integers(-9, 9, size).astype(np.float32)
        scores[rng.random(size) < 0.1] = np.nan
        order = build(cls, by="selection", **params)
        found = order.arrange(context(pool), Selection(np.arange(size), scores))
        assert np.array_equal(np.sort(found), np.arange(size))
        cubed = order.arrange(context(pool), Selection(np.arange(size), scores**3))
        assert np.array_equal(found, cubed)
        unscored = int(np.isnan(scores).sum())
        assert np.isnan(scores[found[size - unscored :]]).all()  # last, whatever the pattern


def test_one_layer_is_sorting_and_two_layers_of_a_zigzag_go_up_and_down() -> None:
    scores = np.random.default_rng(0).random(31).astype(np.float32)
    pool, selection = make_pool({"a": 31}), Selection(np.arange(31), scores)
    ascending = np.argsort(scores)
    for cls in (FoldOrder, ZigzagOrder, StairOrder, SawOrder):
        assert build(cls, by="selection", layers=1).arrange(context(pool), selection).tolist() == ascending.tolist()
    twice = scores[build(ZigzagOrder, by="selection", layers=2).arrange(context(pool), selection)]
    assert (np.diff(twice[:16]) > 0).all()
    assert (np.diff(twice[16:]) < 0).all()


def test_samples_of_equal_scores_keep_their_order() -> None:
    selection = Selection(np.arange(4), np.array([2, 1, 2, 1], dtype=np.float32))
    for descending, expected in ((True, [0, 2, 1, 3]), (False, [1, 3, 0, 2])):
        for cls in (SortOrder, FoldOrder, ZigzagOrder):
            layers = {} if cls is SortOrder else {"layers": 1}
            order = build(cls, by="selection", descending=descending, ties="input", **layers)
            assert order.arrange(context(make_pool({"a": 4})), selection).tolist() == expected
    constant = Selection(np.arange(40), np.ones(40, dtype=np.float32))
    drawn = build(FoldOrder, by="selection", ties="random", layers=1).arrange(context(make_pool({"a": 40})), constant)
    assert drawn.tolist() != list(range(40))


@pytest.mark.parametrize("name", PATTERNS)
def test_samples_are_shuffled_within_windows_only(name: str) -> None:
    cls, params = PATTERNS[name]
    pool, selection = make_pool({"a": 103}), Selection(np.arange(103), np.arange(103, dtype=np.float32))

    def arranged(window: int, number: int = 0) -> np.ndarray:
        order = build(cls, by="selection", jit=window, **params)
        return order.arrange(context(pool, round=number), selection)

    plain = arranged(0)
    assert np.array_equal(arranged(1), plain)
    jittered = arranged(10)
    assert not np.array_equal(jittered, plain)
    for begin in range(0, 103, 10):
        assert sorted(jittered[begin : begin + 10]) == sorted(plain[begin : begin + 10])
    assert np.array_equal(jittered, arranged(10))
    assert not np.array_equal(jittered, arranged(10, number=1))
    assert np.array_equal(arranged(103), arranged(5000))  # one shuffle


def test_scores_come_from_losses_lengths_and_columns() -> None:
    rng = np.random.default_rng(2)
    losses, quality, lengths = rng.random(30), rng.permutation(30) * 1.0, rng.permutation(30) + 1
    pool = make_pool({"a": 30}, lengths=lengths)
    pool.keep_column("quality", quality)
    indices = rng.permutation(30)
    for by, values in (("loss", losses), ("length", lengths), ("column", quality)):
        order = build(FoldOrder, by=by, layers=4, column="quality" if by == "column" else None)
        found = order.arrange(context(pool, losses), Selection(indices))
        ranked = sorted(range(30), key=lambda place, v=values: v[indices[place]])
        assert found.tolist() == swept(ranked, 4, turns=False)
    assert build(FoldOrder, by="column", column="quality").needs(None).columns == ("quality",)
    assert not build(FoldOrder, by="length").needs(None).measurements


def test_a_plan_follows_a_pattern() -> None:
    selector = ScoreSelector(lambda candidates: candidates.astype(np.float32))
    order = build(ZigzagOrder, by="selection", layers=2)
    (plan,) = plans(make_planner(make_pool({"a": 40}), steps=3, batch=4, select=selector, order=order), 1)
    assert plan.indices.tolist() == [28, 30, 32, 34, 36, 38, 39, 37, 35, 33, 31, 29]


@pytest.mark.parametrize(
    "order, text",
    [
        ({"method": "stair", "sections": 3, "radius": 0.3}, "windows of radius 0.3 overlap.*at most 0.1666"),
        ({"method": "saw", "sections": 8}, "windows of radius 0.075 overlap"),
        ({"method": "segment", "front": 80, "back": 60}, "80 and 60 per cent, 140 together"),
        ({"method": "segment", "front": 0, "back": 0}, "both 0, which is a shuffle"),
        ({"method": "segment", "descending": True}, "descending"),
        ({"method": "fold", "layers": 0}, "layers"),
        ({"method": "fold", "by": "column"}, "by: column needs the parameter column"),
        ({"method": "fold", "column": "quality"}, "used with by: column only"),
        ({"method": "fold", "jit": -1}, "jit"),
    ],
)
def test_bad_parameters_of_patterns_are_refused(order: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        split_config({"dataflex": {"order": order}})


def test_windows_that_touch_are_allowed() -> None:
    for order in ({"sections": 2, "radius": 0.25}, {"sections": 3, "radius": 0.3, "overlap": "clamp"}):
        assert split_config({"dataflex": {"order": {"method": "stair", **order}}}).params


def test_a_window_of_the_whole_plan_is_refused_and_patterns_without_effect_are_noted() -> None:
    order = build(FoldOrder, by="length", jit=40)

    def run(steps: int) -> RunOutline:
        return RunOutline(Schedule(0, steps, -1, 100), 1, 60)

    assert order.unfit(run(41)) is None
    found = order.unfit(run(40))
    assert found is not None
    assert found[0] == "jit"
    assert "a window of 40 samples is too large: 40 samples" in found[1]
    assert build(FoldOrder).unfit(run(1)) is None
    walking = build(FoldOrder, by="length", jit=60, scope="run")
    assert "60 samples are arranged" in str(walking.unfit(run(1)))
    assert build(FoldOrder, by="length", jit=59, scope="run").unfit(run(1)) is None
    assert build(FoldOrder, layers=5).moves_nothing(6) is None
    assert "layers: 5 of 5 samples" in str(build(FoldOrder, layers=5).moves_nothing(5))
    assert "a window has 2 of 10 samples and layers is 2" in str(build(SawOrder).moves_nothing(10))
    assert build(SawOrder).moves_nothing(40) is None
    assert "of 9 samples are none" in str(build(SegmentOrder).moves_nothing(9))
    assert build(SegmentOrder).moves_nothing(10) is None


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("to", ["validation", "pool"])
def test_scores_can_be_distances_of_embeddings(to: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(seed)
    monkeypatch.setattr(base_curriculum, "_BLOCK", 7)
    for _ in range(20):
        size = int(rng.integers(2, 60))
        pool, held = make_pool({"a": size}), make_pool({"held": 9})
        vectors, others = rng.normal(size=(size, 5)), rng.normal(size=(9, 5))
        vectors[rng.random(size) < 0.1] = 0  # samples without text
        others[0] = 0
        given = [each / np.maximum(np.linalg.norm(each, axis=1, keepdims=True), 1e-9) for each in (vectors, others)]
        vectors, others = (each.astype(np.float16 if seed else np.float32) for each in given)
        ctx = context(pool, validation_pool=held)
        ctx = dataclasses.replace(ctx, embedding_source=lambda who, v=vectors, o=others: v if who is None else o)
        center = [row.astype(float) for row in (others if to == "validation" else vectors) if row.any()]
        mean = sum(center) / max(len(center), 1)
        indices = rng.permutation(size)[: int(rng.integers(1, size + 1))]
        far = {i: float(np.sqrt(((vectors[i].astype(float) - mean) ** 2).sum())) for i in range(size)}
        expected = sorted(
            range(indices.size), key=lambda place: (not vectors[indices[place]].any(), far[int(indices[place])])
        )
        order = build(SortOrder, by="embedding", distance_to=to)
        found = order.arrange(ctx, Selection(indices))
        whole = [place for place in expected if vectors[indices[place]].any()]
        sorted_far = [far[int(indices[place])] for place in whole]
        np.testing.assert_allclose([far[int(each)] for each in indices[found[: len(whole)]]], sorted_far, rtol=1e-6)
        assert sorted(found[len(whole) :].tolist()) == sorted(set(expected) - set(whole))


def test_distances_need_embeddings() -> None:
    order = build(FoldOrder, by="embedding", encoder="asset:all-minilm-l6-v2", validation="held")
    needs = order.needs(None)
    assert needs.embeddings is order.params
    assert needs.validation is order.params
    assert build(FoldOrder, by="embedding", distance_to="pool").needs(None).validation is None
    assert build(FoldOrder).needs(None).embeddings is None
    for params, text in (
        ({"encoder": "x"}, "encoder: used with by: embedding only, and by is loss"),
        ({"distance_to": "pool", "layer": 2}, "distance_to, layer|layer, distance_to"),
        ({"by": "embedding", "distance_to": "pool", "validation": "held"}, "not used with distance_to: pool"),
    ):
        with pytest.raises(ConfigError, match=text):
            split_config({"dataflex": {"order": {"method": "fold", **params}}})
