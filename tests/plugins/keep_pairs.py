"""A selector that writes what the probe measures of some samples of a preference stage to a file."""

from __future__ import annotations

import numpy as np
import torch

from dataflex import (
    ComponentParams,
    Embeddings,
    GradientFeatures,
    GradientSettings,
    Losses,
    Margins,
    Selection,
    Selector,
    distributed,
    register,
)

WHOLE = GradientSettings(projection="identity", normalize=False)


class KeepPairsParams(ComponentParams):
    file: str
    samples: int = 5


@register("selector", "keep_pairs")
class KeepPairs(Selector):
    """Chooses the first samples, and writes losses, margins and gradients of some samples to a file."""

    Params = KeepPairsParams

    def choose(self, ctx, candidates, count):
        indices = np.linspace(0, candidates.size - 1, self.params.samples).astype(np.int64)
        found = {
            "losses": ctx.probe.measure(Losses(), indices),
            "gradients": ctx.probe.measure(GradientFeatures(WHOLE), indices),
            "embeddings": ctx.probe.measure(Embeddings(), indices),
        }
        if ctx.probe.stage_loss.has_margins:
            found["margins"] = ctx.probe.measure(Margins(), indices)
        if distributed.rank() == 0:
            kept = {name: torch.from_numpy(values) for name, values in found.items()}
            names = list(ctx.probe.parameter_sizes())
            torch.save({**kept, "rows": ctx.pool.rows(indices), "names": names}, self.params.file)
        return Selection(candidates[:count])
