"""A mixer: each domain has a share in proportion to its loss."""

from __future__ import annotations

import numpy as np

from dataflex import Losses, Mixer, MixerParams, Needs, RoundContext, RunView, register


@register("mixer", "by_loss")
class ByLossMixer(Mixer[MixerParams]):
    """Gives each domain a share in proportion to the mean loss of up to eight of its samples."""

    def needs(self, run: RunView) -> Needs:
        return Needs(measurements=(Losses(),))

    def mix(self, ctx: RoundContext) -> np.ndarray:
        starts, sizes = ctx.pool.offsets[:-1], ctx.pool.domain_sizes
        drawn = [
            start + ctx.rng.choice(size, min(size, 8), replace=False) for start, size in zip(starts, sizes, strict=True)
        ]
        return np.array([np.nanmean(ctx.probe.measure(Losses(), samples)) for samples in drawn])
