"""The weighter beta_dpo: golden numbers, the share that is left out, small deviations, and its state."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dataflex.api.context import StepBatch, StepStart
from dataflex.api.schedule import RunOutline, Schedule
from dataflex.config.checks import problems_of
from dataflex.config.loading import split_config
from dataflex.data.rng import derive_rng
from dataflex.weighters.beta_dpo import BetaDpoWeighter, kept_of
from unit.fakes import build

GAPS = np.array([1.0, -2.0, 1.5, 7.0])


def weigh(weighter: BetaDpoWeighter, gaps: np.ndarray, step: int = 0) -> np.ndarray:
    weighter.begin_step(StepStart(step, 100, derive_rng(1, "weighter", step)))
    margins = torch.tensor(gaps, dtype=torch.float32)
    return weighter.weigh(StepBatch(torch.full(margins.shape, 0.5), step=step, margins=margins)).numpy()


def test_the_running_mean_and_deviation_have_the_golden_numbers() -> None:
    weighter = build(BetaDpoWeighter)
    weighter.update(GAPS)
    assert weighter.mean == pytest.approx(0.1875)
    assert weighter.deviation == pytest.approx(0.375)
    weighter.mean, weighter.deviation = 1.0, 4.0
    found = np.exp(weighter.log_weights(GAPS))
    np.testing.assert_allclose(found, [1, 0.754840, 0.992218, 0.324652], atol=1e-6)


def test_a_share_of_the_pairs_is_left_out_and_the_mean_weight_is_one() -> None:
    for size, ratio, kept in [(10, 0.2, 8), (4, 0.2, 3), (15, 0.2, 12), (3, 0.9, 1), (1, 0.5, 1), (100, 0.07, 93)]:
        assert kept_of(size, ratio) == kept
        weights = weigh(build(BetaDpoWeighter, ratio=ratio), np.random.default_rng(0).normal(size=size))
        assert np.count_nonzero(weights) == kept
        np.testing.assert_allclose(weights[weights > 0], size / kept, rtol=1e-6)


def test_pairs_are_drawn_in_proportion_to_the_weights() -> None:
    weighter = build(BetaDpoWeighter, ratio=0.75)
    left = np.zeros(4)
    for step in range(4000):
        weighter.mean, weighter.deviation = 1.0, 4.0
        weighter.update = lambda gaps: None  # type: ignore[method-assign]
        left += weigh(weighter, GAPS, step) / 4  # one pair is kept
    expected = np.array([1, 0.754840, 0.992218, 0.324652])
    np.testing.assert_allclose(left / 4000, expected / expected.sum(), atol=0.025)


def test_the_scale_of_the_gaps_has_no_effect() -> None:
    rng = np.random.default_rng(3)
    raw, rewards = build(BetaDpoWeighter), build(BetaDpoWeighter)
    for step in range(20):
        gaps = rng.normal(2, 3, size=16)
        np.testing.assert_array_equal(weigh(raw, gaps, step), weigh(rewards, 0.125 * gaps, step))
    assert rewards.mean == pytest.approx(0.125 * raw.mean)


def test_a_deviation_that_is_much_too_small_keeps_the_gaps_nearest_to_the_mean() -> None:
    weighter = build(BetaDpoWeighter, ratio=0.5)
    weighter.deviation = 1e-9
    weighter.update = lambda gaps: None  # type: ignore[method-assign]
    weighter.mean = 1.0
    assert np.exp(weighter.log_weights(GAPS + 0.1)).max() == 0  # every weight underflows
    assert np.flatnonzero(weigh(weighter, GAPS + 0.1)).tolist() == [0, 2]


def test_equal_gaps_are_drawn_uniformly() -> None:
    left = np.zeros(5)
    for step in range(2000):
        left += weigh(build(BetaDpoWeighter), np.zeros(5), step) == 0
    np.testing.assert_allclose(left / 2000, 0.2, atol=0.04)


def test_a_single_pair_leaves_the_deviation_as_it_is() -> None:
    weighter = build(BetaDpoWeighter)
    weighter.update(GAPS)
    weighter.update(np.array([3.0]))
    assert weighter.deviation == pytest.approx(0.375)
    assert weighter.mean == pytest.approx(0.9 * 0.1875 + 0.3)


def test_a_resumed_run_draws_the_same_pairs() -> None:
    rng = np.random.default_rng(5)
    steps = [rng.normal(size=8) for _ in range(6)]
    whole, first, second = (build(BetaDpoWeighter) for _ in range(3))
    expected = [weigh(whole, gaps, step) for step, gaps in enumerate(steps)]
    for step in range(3):
        weigh(first, steps[step], step)
    second.load_state_dict(first.state_dict())
    for step in range(3, 6):
        np.testing.assert_array_equal(weigh(second, steps[step], step), expected[step])


def test_needs() -> None:
    weighter = build(BetaDpoWeighter)
    assert weighter.needs(SimpleNamespace(llamafactory={})).step_margins
    assert not weighter.elementwise

    def outline(batch: int) -> RunOutline:
        return RunOutline(Schedule(0, 10, -1, 100), batch)

    assert weighter.cannot_act(outline(8)) is None
    assert weighter.cannot_act(outline(2)) is None
    assert "none is left out" in (weighter.cannot_act(outline(1)) or "")
    assert "none is left out" in (build(BetaDpoWeighter, ratio=0.0).cannot_act(outline(8)) or "")


@pytest.mark.parametrize("stage", ["sft", "pt", "kto"])
def test_a_stage_without_pairs_is_refused_once(stage: str) -> None:
    config = split_config({"stage": stage, "dataflex": {"weight": {"method": "beta_dpo"}}})
    (problem,) = [each for each in problems_of(config) if each.key == "dataflex.weight.method"]
    assert f"stage {stage} has no pairs; use stage dpo or rm" in problem.message
