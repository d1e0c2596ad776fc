"""Components for the tests: selectors that measure and then draw at random or store gradients, and a weighter."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch

from dataflex import (
    ComponentParams,
    EmbeddingParams,
    Needs,
    Selection,
    Selector,
    ValidationParams,
    Weighter,
    WeighterParams,
    distributed,
    register,
)
from dataflex.api.probe import GenerationSettings, GradientSettings
from dataflex.probe.checkpointing import recomputed_layers
from dataflex.probe.embeddings import Embeddings
from dataflex.probe.error_norms import ErrorNorms
from dataflex.probe.generations import Generations
from dataflex.probe.gradient_features import GradientFeatures, GradientSimilarities
from dataflex.probe.gradient_norms import GradientNorms
from dataflex.probe.gradient_products import GradientProducts
from dataflex.probe.losses import Losses

LOOKS = {
    "losses": lambda ctx, some: ctx.probe.measure(Losses(), some),
    "error_norms": lambda ctx, some: ctx.probe.measure(ErrorNorms(), some),
    "embeddings": lambda ctx, some: ctx.probe.measure(Embeddings(), some),
    "norms": lambda ctx, some: ctx.probe.measure(GradientNorms(GradientSettings("adam")), some),
    "gradients": lambda ctx, some: ctx.probe.measure(GradientFeatures(GradientSettings(dim=64)), some[:7]),
    "similarities": lambda ctx, some: ctx.probe.measure(
        GradientSimilarities(GradientSettings("adam_less", dim=64), np.ones((2, 64), dtype=np.float32)), some
    ),
    "products": lambda ctx, some: ctx.probe.measure(
        GradientProducts(GradientSettings(), (6, 3, 5), ctx.pool, some[:2]), some[:14]
    ),
    "generate": lambda ctx, some: ctx.probe.measure(
        Generations(GenerationSettings(samples=2, max_new_tokens=4)),
        np.arange(2),
        [{"input_ids": [1, 5, 6]}, {"input_ids": [1, 7]}],
    ),
}


class BlindParams(ComponentParams):
    look: list[str] = []


@register("selector", "test_blind")
class Blind(Selector):
    """Draws at random, after the measurements named in ``look``."""

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
    """Chooses the first samples, and writes some samples and their whole gradients to a file."""

    Params = KeepParams

    def choose(self, ctx, candidates, count):
        settings = GradientSettings(projection="identity", reduction=self.params.reduction, normalize=False)
        indices = np.linspace(0, candidates.size - 1, self.params.samples).astype(np.int64)
        gradients = ctx.probe.measure(GradientFeatures(settings), indices)
        if distributed.rank() == 0:
            recomputed = len(recomputed_layers(ctx.probe.model()))
            kept = {"gradients": torch.from_numpy(gradients), "rows": ctx.pool.rows(indices), "recomputed": recomputed}
            torch.save(kept, self.params.file)
        return Selection(candidates[:count])


class TiltParams(WeighterParams, ValidationParams, EmbeddingParams):
    pass


@register("weighter", "test_tilt")
class Tilt(Weighter[TiltParams]):
    """Weighs a sample by 1 plus its mean cosine with the validation samples."""

    def needs(self, run):
        return Needs(validation=self.params, embeddings=self.params)

    def weigh(self, batch):
        own, held = batch.embeddings(), batch.embeddings(batch.validation)
        assert (len(own), len(held)) == (batch.losses.numel(), batch.validation.size)
        return torch.from_numpy(1 + own.astype(np.float32) @ held.astype(np.float32).mean(0)).to(batch.losses)
