"""Components for the tests that fail on the second of two processes, each in another way."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from dataflex import (
    ComponentParams,
    Measurement,
    Selection,
    Selector,
    Weighter,
    distributed,
    register,
    register_measurement,
)
from dataflex.api.probe import GradientSettings
from dataflex.errors import DivergenceError
from dataflex.probe.gradient_norms import GradientNorms
from dataflex.probe.losses import Losses
from dataflex.probe.store import FeatureStore

Fault = Literal["gradient", "file", "exception", "late exception", "batch", "shape"]


@register_measurement("test_broken")
@dataclass(frozen=True)
class Broken(Measurement):
    """Losses, with a fault in the first batch of the second process, behind its forward."""

    fault: Fault

    def measure(self, batch):
        values = batch.token_means(Losses().token_values)
        if distributed.rank() == 1:
            if self.fault == "shape":
                return values[:-1]
            raise DivergenceError(f"a number of a sample of {batch.indices.size} is not finite")
        return values


class FaultParams(ComponentParams):
    fault: Fault


@register("selector", "test_fault")
class Faulty(Selector[FaultParams]):
    """Measures on all processes, after a fault on the second process."""

    def choose(self, ctx, candidates, count):
        fault, is_second = self.params.fault, distributed.rank() == 1
        if fault == "gradient":
            if is_second:
                weight = next(value for value in ctx.probe.model().parameters() if value.requires_grad)
                weight.data.view(-1)[0] = torch.nan
            ctx.probe.measure(GradientNorms(GradientSettings()), candidates)
        elif fault in ("batch", "shape"):
            ctx.probe.measure(Broken(fault), candidates)
        elif fault == "late exception":
            ctx.probe.measure(Losses(), candidates)
            if is_second:
                raise KeyError("weight")
        else:
            if is_second and fault == "file":
                FeatureStore.load(Path("nowhere"))
            if is_second and fault == "exception":
                Path("nowhere").read_bytes()
            ctx.probe.measure(Losses(), candidates)
        return Selection(np.sort(candidates)[:count])


@register("weighter", "test_stumble")
class Stumble(Weighter):
    """Fails in the second step of the second process, while the other process reaches its backward pass."""

    def weigh(self, batch):
        if distributed.rank() == 1 and batch.step == 1:
            raise KeyError("no such weight")
        return torch.ones_like(batch.losses)
