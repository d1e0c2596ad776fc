"""A selector for the tests: prefers samples of large excess loss, and writes each step's statistics to a file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from dataflex import Losses, Needs, ReferenceParams, Selector, SelectorParams, distributed, register


class ExcessSamplesParams(SelectorParams, ReferenceParams):
    file: str


@register("selector", "test_excess_samples")
class ExcessSamples(Selector[ExcessSamplesParams]):
    def needs(self, run):
        return Needs(reference=self.params, step_losses="tokens")

    def score(self, ctx, candidates):
        theirs = ctx.reference.losses(candidates)
        tokens = ctx.reference.token_losses(candidates[:5])
        np.testing.assert_allclose(theirs[:5], [each.mean() for each in tokens], rtol=1e-5)
        assert [each.size for each in tokens] == ctx.pool.trained_tokens[candidates[:5]].tolist()
        return ctx.probe.measure(Losses(), candidates) - theirs

    def on_step(self, statistics):
        if distributed.rank() == 0:
            line = {
                "step": statistics.step,
                "indices": statistics.indices.tolist(),
                "losses": statistics.sample_losses.tolist(),
                "means": np.nanmean(statistics.token_losses, axis=1).tolist(),
                "tokens": (~np.isnan(statistics.token_losses)).sum(1).tolist(),
                "total": float(np.nansum(statistics.token_losses, dtype=np.float64)),
                "domain": float((statistics.losses * statistics.tokens)[statistics.tokens > 0].sum()),
            }
            with Path(self.params.file).open("a") as stream:
                stream.write(json.dumps(line) + "\n")
