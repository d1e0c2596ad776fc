"""Selectors for the tests: one draws blindly, after looking at the model where asked; one keeps what it saw."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch

from dataflex import ComponentParams, Selection, Selector, distributed, register
from dataflex.api.probe import GenerationSettings, GradientSettings

LOOKS = {
    "losses": lambda ctx, some: ctx.probe.losses(some),
    "error_norms": lambda ctx, some: ctx.probe.error_norms(some),
    "embeddings": lambda ctx, some: ctx.probe.embeddings(some),
    "norms": lambda ctx, some: ctx.probe.gradient_norms(some, GradientSettings("adam")),
    "gradients": lambda ctx, some: ctx.probe.gradients(some[:7], GradientSettings(dim=64)),
    "similarities": lambda ctx, some: ctx.probe.similarities(
        some, GradientSettings("adam_less", dim=64), np.ones((2, 64), dtype=np.float32)
    ),
    "products": lambda ctx, some: ctx.probe.products(
        [some[:6], some[6:9], some[9:14]], GradientSettings(), some[:2], ctx.pool
    ),
    "generate": lambda ctx, some: ctx.probe.generate(
        [[1, 5, 6], [1, 7]], GenerationSettings(samples=2, max_new_tokens=4), 0
    ),
}


class BlindParams(ComponentParams):
    look: list[str] = []


@register("selector", "test_blind")
class Blind(Selector):
    """Draws at random, after probes where asked."""

    Params = BlindParams

    def choose(self, ctx, candidates, count):
        for look in self.params.look:
            LOOKS[look](ctx, candidates)
        return Selection(candidates[ctx.rng.choice(candidates.size, count, replace=False)])


class KeepParams(ComponentParams):
    file: str
    samples: int = 5
    reduction: Literal["mean", "sum"] = "mean"


@register("selector", "test_keep")
class Keep(Selector):
    """Takes the first samples, and writes what it saw to a file: samples and their whole gradients."""

    Params = KeepParams

    def choose(self, ctx, candidates, count):
        settings = GradientSettings(sketch="identity", reduction=self.params.reduction, normalize=False)
        indices = np.linspace(0, candidates.size - 1, self.params.samples).astype(np.int64)
        gradients = ctx.probe.gradients(indices, settings)
        if distributed.rank() == 0:
            torch.save({"gradients": torch.from_numpy(gradients), "rows": ctx.pool.rows(indices)}, self.params.file)
        return Selection(candidates[:count])
