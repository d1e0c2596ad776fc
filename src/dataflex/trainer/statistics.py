"""Step statistics: per-domain losses of the whole global batch, gathered once per optimizer step."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dataflex import distributed
from dataflex.components import StepStatistics
from dataflex.trainer.loss import BatchLosses


class StepAccumulator:
    """Adds up micro-batches on the device; one reduction over the processes per optimizer step.

    Args:
        offsets: first pool index of each domain and ``N`` last, shape (K + 1,); a single domain where the data path
            is LLaMA-Factory's own and samples carry no index.
        device: where the training runs.
    """

    def __init__(self, offsets: np.ndarray, device: torch.device) -> None:
        self.num_domains = len(offsets) - 1
        self._ends = torch.as_tensor(offsets[1:], device=device)
        dtype = torch.float32 if device.type in ("mps", "npu") else torch.float64
        self._sums = torch.zeros(self.num_domains, 3, dtype=dtype, device=device)
        self._tokens = torch.zeros((), dtype=dtype, device=device)
        self.indices: Tensor | None = None
        """Pool indices of the micro-batch in its forward now, (B,), or None."""

    def add(self, batch: BatchLosses) -> None:
        """Add a micro-batch's losses."""
        if self.indices is None:
            domains = torch.zeros(batch.sums.numel(), dtype=torch.int64, device=self._sums.device)
        else:
            domains = torch.searchsorted(self._ends, self.indices.to(self._ends.device), right=True)
        columns = [batch.sums, batch.counts, torch.ones_like(batch.sums)]
        values = torch.stack([column.to(self._sums) for column in columns], dim=1)
        membership = torch.nn.functional.one_hot(domains, self.num_domains).to(self._sums)
        self._sums += membership.T @ values

    def add_tokens(self, inputs: dict[str, Tensor]) -> None:
        """Count a micro-batch's input tokens, padding left out."""
        mask = inputs.get("attention_mask")
        if mask is not None and mask.dim() == 2:
            self._tokens += (mask != 0).sum()
        else:
            self._tokens += inputs["input_ids"].numel()

    def finish(self, step: int) -> tuple[StepStatistics, int]:
        """Return the statistics of the optimizer step just made and its input tokens; start anew."""
        packed = torch.cat([self._sums.flatten(), self._tokens[None]])
        values = distributed.all_reduce_sum(packed).cpu().numpy().astype(np.float64)
        self._sums.zero_()
        self._tokens.zero_()
        sums, counts, samples = values[:-1].reshape(-1, 3).T
        losses = np.full(self.num_domains, np.nan)
        np.divide(sums, counts, out=losses, where=counts > 0)
        statistics = StepStatistics(step, losses, counts.astype(np.int64), samples.astype(np.int64))
        return statistics, int(values[-1])
