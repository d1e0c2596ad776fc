"""Step statistics: per-domain losses of the whole global batch, gathered once per optimizer step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dataflex import distributed
from dataflex.components import StepStatistics


@dataclass
class BatchLosses:
    """What one micro-batch showed: token-loss sums and token counts of its samples, (B,), detached."""

    sums: Tensor
    counts: Tensor
    excess: Tensor | None = None
    """Sums of max(loss - reference loss, 0), where a reference is looked at."""


def domain_sums(domains: Tensor, values: Tensor, num_domains: int) -> Tensor:
    """Return the sums of rows (n, C) by their domain (n,), shape (K, C); NaN where one of a domain's is not finite.

    A product, which unlike a scattered addition has one order of adding on every device.
    """
    membership = torch.nn.functional.one_hot(domains, num_domains).to(values).T
    finite = torch.isfinite(values)
    sums = membership @ torch.where(finite, values, 0.0)
    return torch.where(membership @ (~finite).to(values) > 0, torch.nan, sums)


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
        self._sums = torch.zeros(self.num_domains, 4, dtype=dtype, device=device)
        self._tokens = torch.zeros((), dtype=dtype, device=device)
        self.indices: Tensor | None = None
        """Pool indices of the micro-batch in its forward now, (B,), or None."""

    def add(self, batch: BatchLosses) -> None:
        """Add a micro-batch's losses."""
        if self.indices is None:
            domains = torch.zeros(batch.sums.numel(), dtype=torch.int64, device=self._sums.device)
        else:
            domains = self.domains_of(self.indices)
        excess = torch.zeros_like(batch.sums) if batch.excess is None else batch.excess
        columns = [batch.sums, batch.counts, torch.ones_like(batch.sums), excess]
        values = torch.stack([column.to(self._sums) for column in columns], dim=1)
        self._sums += domain_sums(domains, values, self.num_domains)

    def domains_of(self, indices: Tensor) -> Tensor:
        """Return the domain of each sample, (B,), on the training device."""
        return torch.searchsorted(self._ends, indices.to(self._ends.device), right=True)

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
        sums, counts, samples, excess_sums = values[:-1].reshape(-1, 4).T
        losses, excess = np.full((2, self.num_domains), np.nan)
        np.divide(sums, counts, out=losses, where=counts > 0)
        np.divide(excess_sums, counts, out=excess, where=counts > 0)
        statistics = StepStatistics(step, losses, counts.astype(np.int64), samples.astype(np.int64), excess=excess)
        return statistics, int(values[-1])


class MeanLosses:
    """The mean loss of each domain over several steps, weighted so that it is part of the mean loss of the steps.

    The Trainer's ``loss`` is the mean over the steps since the last log of each step's token-mean loss, so a token of a
    step with n tokens counts 1/n. The same weights give domain d sum_s q_sd l_sd / sum_s q_sd, of its token-mean loss
    l_sd in step s and its share q_sd of the step's tokens. With one domain that is ``loss``; with several, ``loss`` is
    the mean of the domains' means with their mean shares.
    """

    def __init__(self) -> None:
        self._losses: NDArray[np.float64] = np.zeros(0)
        self._shares: NDArray[np.float64] = np.zeros(0)

    def add(self, step: StepStatistics) -> None:
        """Add a step; one whose loss is not finite is left out, as it is of ``loss``."""
        trained = step.tokens > 0
        if not trained.any() or not np.isfinite(step.losses[trained]).all():
            return
        shares = step.tokens / step.tokens.sum()
        if not self._shares.size:
            self._losses, self._shares = np.zeros((2, shares.size))
        self._losses = self._losses + shares * np.where(trained, step.losses, 0.0)
        self._shares = self._shares + shares

    def take(self) -> NDArray[np.float64]:
        """Return the means, (K,), NaN for a domain without a token, and start anew; (0,) if no step was added."""
        means = np.full(self._shares.size, np.nan)
        np.divide(self._losses, self._shares, out=means, where=self._shares > 0)
        self._losses = self._shares = np.zeros(0)
        return means
