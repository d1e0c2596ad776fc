"""The components of the README compute what its text says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dataflex.api import registry
from dataflex.config.loading import RunConfig
from unit.fakes import FakeProbe, build, context, group_of, make_pool


@pytest.fixture
def classes(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    own = {key: cls for key, cls in registry._registered.items() if cls.__module__.startswith("dataflex.")}
    monkeypatch.setattr(registry, "_registered", own)
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {"__name__": "readme"}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        if "@register" in block:  # the others are trained in tests/runs/test_any_trainer.py
            exec(block, names)
    return names


def test_the_selector_lowers_its_target_once_in_a_decision(classes: dict[str, Any]) -> None:
    losses = np.linspace(1.0, 3.0, 60).astype(np.float32)
    losses[[7, 41]] = np.nan  # samples without a trained token
    target = np.float32(np.nanquantile(losses, 0.5))
    selector, pool, everyone = build(classes["NearLossSelector"]), make_pool({"a": 60}), np.arange(60)
    ctx = context(pool, probe=FakeProbe(losses), candidates=everyone)
    for factor in (1.0, 0.9):
        selector.begin(ctx)
        for part in (everyone, everyone[:20], everyone):
            expected = -np.abs(losses[part] - target * np.float32(factor))
            np.testing.assert_allclose(selector.score(ctx, part), expected, rtol=1e-5)
    chosen = selector.select(ctx, group_of(pool, 58)).indices
    assert sorted(chosen.tolist()) == [number for number in range(60) if number not in (7, 41)]


def test_the_mixer_gives_shares_by_loss_and_needs_the_losses(classes: dict[str, Any]) -> None:
    mixer = build(classes["ByLossMixer"])
    losses = [1.0] * 10 + [3.0] * 4
    ctx = context(make_pool({"a": 10, "b": 4}), probe=FakeProbe(losses))
    assert mixer.mix(ctx).tolist() == [1.0, 3.0]
    assert [measurement.name for measurement in mixer.needs(RunConfig({}, None)).measurements] == ["losses"]
