"""S2L: trajectories of training losses, clusters, and the even choice from them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dataflex.api.context import StepStatistics
from dataflex.api.schedule import RunOutline, Schedule
from dataflex.record.checkpoint import read_state, write_state
from dataflex.selectors.s2l import S2lSelector, evenly, filled
from unit.fakes import build, context, decided, group_of, make_pool, scores_of


def step(indices: list[int], losses: list[float]) -> StepStatistics:
    one = np.zeros(1)
    samples = np.array(losses, dtype=np.float32)
    return StepStatistics(1, one, one.astype(int), one.astype(int), indices=np.array(indices), sample_losses=samples)


def trained(selector: S2lSelector, curves: np.ndarray) -> S2lSelector:
    """Have every sample trained once for each column of its losses."""
    for losses in curves.T:
        selector.on_step(step(list(range(len(losses))), losses.tolist()))
    return selector


def smallest_first(sizes: list[int], count: int) -> tuple[list[int], int]:
    """The official rule: clusters of more than 2, ascending, each budget // clusters left; and what the others give."""
    taken, order = [0] * len(sizes), sorted((i for i in range(len(sizes)) if sizes[i] > 2), key=lambda i: sizes[i])
    for place, i in enumerate(order):
        taken[i] = min(count // (len(order) - place), sizes[i])
        count -= taken[i]
    return taken, count


def taken_of(sizes: list[int], count: int, seed: int = 0) -> list[int]:
    rng = np.random.default_rng(seed)
    clusters = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    order = evenly(clusters, 2, rng)
    assert sorted(order.tolist()) == list(range(clusters.size))
    return np.bincount(clusters[order[:count]], minlength=len(sizes)).tolist()


def test_counts_of_clusters_have_the_golden_numbers() -> None:
    sizes = [1, 2, 3, 5, 20]
    assert taken_of(sizes, 12) == [0, 0, 3, 4, 5]
    found = taken_of(sizes, 30)
    assert found[2:] == [3, 5, 20]
    assert sum(found[:2]) == 2


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_choice_equals_the_official_code_for_every_count(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(20):
        sizes = rng.integers(1, 12, rng.integers(1, 7)).tolist()
        for count in range(sum(sizes) + 1):
            expected, rest = smallest_first(sizes, count)
            found = taken_of(sizes, count, seed)
            assert [each for each, size in zip(found, sizes, strict=True) if size > 2] == [
                each for each, size in zip(expected, sizes, strict=True) if size > 2
            ]
            assert sum(each for each, size in zip(found, sizes, strict=True) if size <= 2) == rest


def test_members_are_drawn() -> None:
    clusters = np.repeat([0, 1], [10, 30])
    firsts = {tuple(sorted(evenly(clusters, 2, np.random.default_rng(seed))[:8])) for seed in range(20)}
    assert len(firsts) > 15


def test_samples_that_are_learned_alike_are_one_cluster() -> None:
    rng = np.random.default_rng(3)
    shapes = np.array([[3.0, 2.0, 1.0], [3.0, 3.0, 3.0], [1.0, 1.0, 0.9]])
    kinds = rng.permutation(np.repeat([0, 1, 2], [4, 10, 46]))
    curves = shapes[kinds] + rng.normal(0, 0.01, (60, 3))
    selector = trained(build(S2lSelector, points=3, clusters=3), curves)
    chosen = decided(selector, context(make_pool({"a": 60})), group_of(make_pool({"a": 60}), 18))
    assert np.bincount(kinds[chosen.indices]).tolist() == [4, 7, 7]
    assert chosen.undecided is None


def test_trajectories_hold_the_last_losses() -> None:
    selector = build(S2lSelector, points=3)
    for indices, losses in [([0, 1], [9, 8]), ([0, 2], [7, 6]), ([0, 0, 1], [5, 4, 3]), ([4, 1], [np.nan, 2])]:
        selector.on_step(step(indices, losses))
    assert selector._times.tolist()[:3] == [4, 3, 1]
    found = filled(selector._losses[:3], selector._times[:3])
    assert found.tolist() == [[7, 5, 4], [8, 3, 2], [6, 6, 6]]


def test_untrained_samples_form_a_separate_cluster() -> None:
    selector = trained(build(S2lSelector, points=2, clusters=2), np.array([[3.0, 1.0]] * 10 + [[1.0, 1.0]] * 10))
    pool = make_pool({"a": 50})
    ctx = context(pool)
    found = decided(selector, ctx, group_of(pool, 30)).indices
    assert np.histogram(found, [0, 10, 20, 50])[0].tolist() == [10, 10, 10]
    few = build(S2lSelector, clusters=100)  # more clusters than different trajectories
    assert decided(trained(few, np.ones((20, 2))), ctx, group_of(pool, 10)).indices.size == 10


def test_before_anything_was_trained_the_draw_is_random() -> None:
    pool = make_pool({"a": 40})
    draws = [decided(build(S2lSelector), context(pool, seed=seed), group_of(pool, 10)) for seed in range(5)]
    assert len({tuple(draw.indices.tolist()) for draw in draws}) == 5
    assert draws[0].undecided == "no sample was trained on yet, the draw is random"


def test_samples_without_a_token_to_train_on_are_left_out() -> None:
    pool = make_pool({"a": 6})
    pool.trained[[1, 4]] = False
    selector = trained(build(S2lSelector, clusters=2), np.array([[2.0], [np.nan], [2.0], [1.0], [np.nan], [1.0]]))
    scores = scores_of(selector, context(pool), np.arange(6))
    assert np.flatnonzero(np.isnan(scores)).tolist() == [1, 4]
    assert sorted(scores[~np.isnan(scores)].tolist()) == [0.25, 0.5, 0.75, 1.0]


def test_the_order_of_points_does_not_matter_to_clusters() -> None:
    curves = np.random.default_rng(5).normal(size=(40, 4)).astype(np.float32)
    pool = make_pool({"a": 40})
    one = decided(trained(build(S2lSelector, points=4, clusters=5), curves), context(pool), group_of(pool, 12))
    other = trained(build(S2lSelector, points=4, clusters=5), curves[:, ::-1])
    assert np.array_equal(one.indices, decided(other, context(pool), group_of(pool, 12)).indices)


def test_the_state_survives_a_checkpoint(tmp_path: Path) -> None:
    curves = np.random.default_rng(6).normal(size=(30, 5))
    pool = make_pool({"a": 30})
    whole = trained(build(S2lSelector, points=3, clusters=4), curves)
    first = trained(build(S2lSelector, points=3, clusters=4), curves[:, :2])
    write_state(tmp_path, {"version": 5, "select": first.state_dict()})
    second = build(S2lSelector, points=3, clusters=4)
    second.load_state_dict(read_state(tmp_path)["select"])
    trained(second, curves[:, 2:])
    found = [decided(each, context(pool), group_of(pool, 9)).indices.tolist() for each in (whole, second)]
    assert found[0] == found[1]


def test_s2l_says_when_it_cannot_act() -> None:
    def told(warmup: int, steps: int = 5) -> str | None:
        return build(S2lSelector).cannot_act(RunOutline(Schedule(warmup, 5, -1, warmup + steps), 4, 100))

    assert "comes before the first step" in str(told(0))
    assert "trains 40 of about 100 samples" in str(told(10))
    assert told(25) is None
    assert told(0, steps=10) is None  # the second decision has losses to go by
    offline: Any = SimpleNamespace(offline=True)
    assert [key for key, _ in build(S2lSelector).problems(offline)] == ["method"]
    assert build(S2lSelector).needs(offline).step_losses == "samples"
