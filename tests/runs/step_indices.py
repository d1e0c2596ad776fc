"""A weighter for the tests that writes the indices of each step to a file, as it reads them before the step."""

from __future__ import annotations

import json
from pathlib import Path

from dataflex import Weighter, WeighterParams, distributed, register


class StepIndicesParams(WeighterParams):
    file: str


@register("weighter", "test_step_indices")
class StepIndices(Weighter[StepIndicesParams]):
    elementwise = True

    def begin_step(self, start):
        assert start.indices is start.indices  # gathered once
        with Path(f"{self.params.file}-{distributed.rank()}").open("a") as stream:
            stream.write(json.dumps([start.step, start.indices.tolist()]) + "\n")

    def weigh(self, batch):
        return batch.losses.new_ones(batch.losses.shape)
