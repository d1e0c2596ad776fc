"""The weighter rho1, which also counts the clean tokens that it keeps: a plug-in of replaced_tokens.py."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from pydantic import Field

from dataflex import InputPath, StepBatch, register
from dataflex.weighters.rho1 import Rho1Params, Rho1Weighter


class CountedRho1Params(Rho1Params):
    """Parameters of rho1, and the files of the counts."""

    clean: InputPath = Field(description="File with a mask of the tokens that were not replaced, (N, T).")
    counts: str = Field(description="Folder that gets one file of counts for each run.")


@register("weighter", "counted_rho1")
class CountedRho1(Rho1Weighter):
    """Trains as rho1, and writes a line of counts for each step."""

    Params = CountedRho1Params
    params: CountedRho1Params  # type: ignore[assignment]

    def weigh(self, batch: StepBatch) -> torch.Tensor:
        """Return the weights of rho1, and write how many tokens are kept and how many of them are clean."""
        weights = super().weigh(batch)
        if batch.step == 0:
            Path(self.params.counts).mkdir(parents=True, exist_ok=True)
            self._clean = torch.from_numpy(np.load(self.params.clean))
            self._file = Path(tempfile.mkstemp(".jsonl", dir=self.params.counts)[1])
        clean = self._clean[batch.indices][:, 1:].to(batch.trained.device)  # column t predicts token t + 1
        trained = batch.trained[:, : clean.shape[1]]
        kept = weights[:, : clean.shape[1]] > 0
        counts = {
            "trained": trained.sum(),
            "clean": (trained & clean).sum(),
            "kept": (trained & kept).sum(),
            "kept_clean": (trained & kept & clean).sum(),
        }
        with self._file.open("a") as lines:
            lines.write(json.dumps({"step": batch.step, **{name: int(value) for name, value in counts.items()}}) + "\n")
        return weights
