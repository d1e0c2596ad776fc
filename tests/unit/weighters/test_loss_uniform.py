"""The weighters loss and uniform: golden numbers, invariances, and the schedule of the temperature."""

from __future__ import annotations

import math

import pytest
import torch

from dataflex.api.context import StepBatch
from dataflex.weighters.loss import LossWeighter
from dataflex.weighters.uniform import UniformWeighter
from unit.fakes import build

LOSSES = torch.tensor([1.0, 2.0, 3.0, 5.0])

GOLDEN = {  # sum 1, for delta 1 and r = .4
    "linupper": [0.0347, 0.1210, 0.4222, 0.4222],
    "quadratic": [0.0483, 0.3150, 0.5884, 0.0483],
    "extremes": [0.4222, 0.1210, 0.0347, 0.4222],
}


@pytest.mark.parametrize("strategy", GOLDEN)
def test_weights_have_the_golden_numbers(strategy: str) -> None:
    weights = build(LossWeighter, strategy=strategy, temperature=0.4).weigh(StepBatch(LOSSES))
    torch.testing.assert_close(weights / 4, torch.tensor(GOLDEN[strategy]), atol=1e-4, rtol=0)
    assert weights.mean().item() == pytest.approx(1, abs=1e-6)


def test_weights_with_a_half_range_of_two_have_the_golden_numbers() -> None:
    # f doubles with delta for linupper, so r = .8 with delta 2 is r = .4 with delta 1
    wide = build(LossWeighter, delta=2.0, temperature=0.8).weigh(StepBatch(LOSSES))
    torch.testing.assert_close(wide / 4, torch.tensor(GOLDEN["linupper"]), atol=1e-4, rtol=0)
    # quadratic is 1 - h^2 / delta^2: its values do not depend on delta
    quadratic = build(LossWeighter, strategy="quadratic", delta=2.0, temperature=0.4).weigh(StepBatch(LOSSES))
    torch.testing.assert_close(quadratic / 4, torch.tensor(GOLDEN["quadratic"]), atol=1e-4, rtol=0)


def test_linupper_has_the_largest_ratio_of_the_paper() -> None:
    for temperature, ratio in [(0.4, 12.2), (1.0, 2.7)]:
        weights = build(LossWeighter, temperature=temperature).weigh(StepBatch(LOSSES))
        assert (weights.max() / weights.min()).item() == pytest.approx(ratio, abs=0.05)


@pytest.mark.parametrize("strategy", [*GOLDEN, "uniform"])
def test_equal_losses_give_weight_one(strategy: str) -> None:
    weighter = build(LossWeighter, strategy=strategy, temperature=0.1)
    for losses in (torch.full((5,), 2.5), torch.tensor([0.3]), torch.zeros(3)):
        torch.testing.assert_close(weighter.weigh(StepBatch(losses)), torch.ones_like(losses))


@pytest.mark.parametrize("strategy", GOLDEN)
def test_weights_do_not_depend_on_the_order_the_scale_or_the_zero_of_losses(strategy: str) -> None:
    weighter = build(LossWeighter, strategy=strategy, temperature=0.3)
    losses = torch.rand(31, generator=torch.Generator().manual_seed(1)) * 4
    order = torch.randperm(31, generator=torch.Generator().manual_seed(2))
    weights = weighter.weigh(StepBatch(losses))
    assert weights.std() > 0.1
    torch.testing.assert_close(weighter.weigh(StepBatch(losses[order])), weights[order])
    torch.testing.assert_close(weighter.weigh(StepBatch(3 * losses + 2)), weights, atol=1e-4, rtol=1e-4)


def test_uniform_ignores_the_losses() -> None:
    for weighter in (build(LossWeighter, strategy="uniform", temperature=0.1), build(UniformWeighter)):
        assert weighter.weigh(StepBatch(LOSSES, step=3)).tolist() == [1, 1, 1, 1]


def ratio(weighter: LossWeighter, step: int) -> float:
    """Return r, read from the weights: max / min of linupper is exp(1 / r)."""
    weights = weighter.weigh(StepBatch(LOSSES.double(), step=step))
    return 1 / math.log(weights.max() / weights.min())


def test_the_temperature_moves_linearly_and_then_stays() -> None:
    weighter = build(LossWeighter, temperature=2.0, temperature_end=0.5, temperature_steps=100)
    for step, expected in [(0, 2.0), (50, 1.25), (99, 0.515), (100, 0.5), (5000, 0.5)]:
        assert ratio(weighter, step) == pytest.approx(expected, rel=1e-6)
    constant = build(LossWeighter, temperature=0.7)
    assert ratio(constant, 0) == pytest.approx(0.7)
    assert ratio(constant, 10**6) == pytest.approx(0.7)
