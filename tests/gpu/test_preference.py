"""Losses, margins and gradients of preference samples on an accelerator: equal to float64 on the CPU, one at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from dataflex.api.probe import GradientSettings
from dataflex.probe.gradient_features import GradientFeatures
from dataflex.probe.losses import Losses
from dataflex.probe.margins import Margins
from unit.probe.models import MODELS, Model, make
from unit.probe.pairs import Dpo, Kto, Reward, feedback, one_by_one, pairs, probe_of, with_value_head

EVERYONE = np.arange(6)
EXACT = GradientFeatures(GradientSettings("none", "identity", 64))
STAGES: dict[str, tuple[Callable[[], Model], Callable[[], Any], Callable[[], list[dict[str, Any]]]]] = {
    "dpo": (MODELS["lora"], Dpo, pairs),
    "rm": (lambda: with_value_head(MODELS["llama"]()), Reward, pairs),
    "kto": (MODELS["lora"], Kto, feedback),
}


@pytest.mark.parametrize("stage", STAGES)
def test_values_are_those_of_float64_on_the_cpu(stage: str, device: torch.device) -> None:
    maker, loss, samples = STAGES[stage]
    model, rows = make(maker), samples()
    losses, margins, gradients = one_by_one(model, loss(), rows)
    gradients = gradients / np.linalg.norm(gradients, axis=1, keepdims=True)
    moved = copy.deepcopy(model).float().to(device)
    probe = probe_of(moved, loss(), rows, device=device)
    np.testing.assert_allclose(probe.measure(Losses(), EVERYONE), losses, rtol=2e-4, atol=2e-4)
    if margins is not None:
        np.testing.assert_allclose(probe.measure(Margins(), EVERYONE), margins, rtol=2e-3, atol=2e-4)
    found = probe.measure(EXACT, EVERYONE)
    found = found / np.linalg.norm(found, axis=1, keepdims=True)
    assert np.abs((found * gradients).sum(1) - 1).max() < 1e-4
    again = probe.measure(EXACT, EVERYONE)
    np.testing.assert_array_equal(again / np.linalg.norm(again, axis=1, keepdims=True), found)
