"""A mixer: each domain has a share in proportion to its loss."""

from __future__ import annotations

import numpy as np

from dataflex import Losses, Measurement, Mixer, MixerParams, Needs, RoundContext, RunOutline, RunView, register

SAMPLES = 8
"""Samples of each domain that are measured for a decision."""


@register("mixer", "by_loss")
class ByLossMixer(Mixer[MixerParams]):
    """Gives each domain a share in proportion to the mean loss of a few of its samples."""

    def needs(self, run: RunView) -> Needs:
        return Needs(measurements=(Losses(),))

    def measured_samples(self, measurement: Measurement, run: RunOutline) -> float:
        """Return the number of measured samples, for the cost in the plan of the run."""
        return float(SAMPLES * run.domains * run.decisions)

    def mix(self, ctx: RoundContext) -> np.ndarray:
        starts, sizes = ctx.pool.offsets[:-1], ctx.pool.domain_sizes
        drawn = [
            start + ctx.rng.choice(size, min(size, SAMPLES), replace=False)
            for start, size in zip(starts, sizes, strict=True)
        ]
        return np.array([np.nanmean(ctx.probe.measure(Losses(), samples)) for samples in drawn])
