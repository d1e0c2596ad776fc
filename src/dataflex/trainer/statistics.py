"""Step statistics: losses per domain over the whole global batch, gathered once per optimizer step."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dataflex import distributed
from dataflex.api.context import StepStatistics
from dataflex.data.sampling import IndexArray
from dataflex.data.sums import sum_dtype
from dataflex.data.token_loss import IGNORE_INDEX
from dataflex.errors import ComponentError, DataFlexError, DivergenceError
from dataflex.record.schema import WEIGHT_EDGES
from dataflex.trainer.sample_losses import SampleLosses
from dataflex.trainer.token_samples import FirstBatch
from dataflex.trainer.weight_statistics import COLUMNS, weight_columns


@dataclass
class BatchLosses:
    """Losses of one micro-batch: sums of token losses and numbers of tokens of its samples, (B,), detached."""

    sums: Tensor
    counts: Tensor
    excess: Tensor | None = None
    """Sums of max(loss - reference loss, 0) of the samples, (B,), if a reference is used."""
    coefficients: Tensor | None = None
    """Sum of the loss coefficients of all tokens, if a weighter acts in the step; a scalar."""
    per_token: Tensor | None = None
    """Loss of every position, (B, T); 0 at positions that do not count in the loss."""
    labels: Tensor | None = None
    """Shifted labels, (B, T)."""
    weights: Tensor | None = None
    """Weights of the weighters, (B,) or (B, T), if one acts in the step."""
    places: Tensor | None = None
    """Pool index of each sample, (B,); None if the data is streamed."""


@dataclass(frozen=True)
class StepTotals:
    """Totals of an optimizer step over all processes."""

    tokens: int
    """Number of input tokens, without padding."""
    labels: int
    """Number of labels that count in the loss."""
    loss: float
    """Sum of the losses of the micro-batches; not finite if any of these losses is not."""
    coefficients: float | None = None
    """Sum of the loss coefficients of all tokens; None if no weighter acted in the step."""
    weights: NDArray[np.float64] | None = None
    """Values of ``weight_statistics.weight_columns`` by domain, (K, COLUMNS); None if no weighter acted in the step."""


def domain_sums(domains: Tensor, values: Tensor, num_domains: int) -> Tensor:
    """Return the sums of rows (n, C) by their domain (n,), shape (K, C); NaN if a row of the domain is not finite.

    The sums are a matrix product. Unlike a scattered addition, it adds in a fixed order on every device.
    """
    # Values that are not finite are replaced by 0 first: in the product, 0 * inf would spread NaN to all domains.
    membership = torch.nn.functional.one_hot(domains, num_domains).to(values).T
    finite = torch.isfinite(values)
    sums = membership @ torch.where(finite, values, 0.0)
    return torch.where(membership @ (~finite).to(values) > 0, torch.nan, sums)


class StepAccumulator:
    """Adds up micro-batches on the device, with one reduction over the processes per optimizer step.

    Args:
        offsets: first pool index of each domain, followed by the pool's size, shape (K + 1,). A single domain is used
            if LLaMA-Factory draws the samples and they carry no index.
        device: device of the training.
        sample_losses: stores losses of samples or tokens, if a component needs them.
        weighs: whether the run has a weighter.
    """

    def __init__(
        self,
        offsets: np.ndarray,
        device: torch.device,
        sample_losses: SampleLosses | None = None,
        weighs: bool = False,
    ) -> None:
        self.sample_losses = sample_losses
        self.first_batch = FirstBatch() if weighs else None
        """Tokens of the first micro-batch of the step, if the run has a weighter."""
        self.num_domains = len(offsets) - 1
        self._ends = torch.as_tensor(offsets[1:], device=device)
        dtype = sum_dtype(device)
        self._sums = torch.zeros(self.num_domains, 4, dtype=dtype, device=device)
        self._totals = torch.zeros(4, dtype=dtype, device=device)
        self._weighed = False
        self._weights = torch.zeros(self.num_domains, COLUMNS if weighs else 0, dtype=dtype, device=device)
        self._edges = torch.tensor(WEIGHT_EDGES, dtype=dtype, device=device)
        self._has_weights = False
        self.indices: Tensor | None = None
        """Pool indices of the micro-batch whose forward pass runs, (B,), or None."""

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
        if batch.coefficients is not None:
            self._totals[3] += batch.coefficients.to(self._totals)
            self._weighed = True
        if batch.weights is not None:
            assert batch.labels is not None
            of_samples = weight_columns(batch.weights, batch.labels, self._edges)
            self._weights += domain_sums(domains, of_samples, self.num_domains)
            self._has_weights = True
            if self.first_batch is not None:
                self.first_batch.add(batch)
        if self.sample_losses is not None:
            assert batch.per_token is not None
            assert batch.labels is not None
            self.sample_losses.add(batch.sums, batch.counts, batch.per_token, batch.labels)

    def domains_of(self, indices: Tensor) -> Tensor:
        """Return the domain of each sample, (B,), on the training device."""
        return torch.searchsorted(self._ends, indices.to(self._ends.device), right=True)

    def add_loss(self, loss: Tensor) -> None:
        """Add the loss of a micro-batch that the Trainer trains on, whichever loss function computed it."""
        self._totals[2] += loss.detach().to(self._totals)

    def add_tokens(self, inputs: dict[str, Tensor]) -> None:
        """Count a micro-batch's input tokens, without padding, and its labels that count in the loss."""
        labels = inputs.get("labels")
        if labels is not None:
            self._totals[1] += (labels[..., 1:] != IGNORE_INDEX).sum()
        mask = inputs.get("attention_mask")
        if mask is not None and mask.dim() == 2:
            self._totals[0] += (mask != 0).sum()
        else:
            self._totals[0] += inputs["input_ids"].numel()

    def finish(
        self, step: int, indices: IndexArray | None = None, lengths: NDArray[np.int32] | None = None
    ) -> tuple[StepStatistics, StepTotals]:
        """Return the statistics of the optimizer step that has just ended, over all processes, and reset the sums.

        Args:
            step: number of optimizer steps done, including this one.
            indices: pool indices of the step's samples, in the order of the plan, (n,), if losses of samples are
                stored.
            lengths: number of tokens of each sample, (n,).
        """
        parts = [self._sums.flatten(), self._totals, self._weights.flatten()]
        if self.sample_losses is not None:
            assert lengths is not None
            parts.append(self.sample_losses.packed(int(lengths.max()), self._totals))
        reduced = distributed.all_reduce_sum(torch.cat(parts)).cpu().numpy().astype(np.float64)
        ends = np.cumsum([part.numel() for part in parts[:3]])
        by_domain, of_step, weights, kept = np.split(reduced, ends)
        for each in (self._sums, self._totals, self._weights):
            each.zero_()
        if self.first_batch is not None:
            self.first_batch.finish()
        sums, counts, samples, excess_sums = by_domain.reshape(-1, 4).T
        losses, excess = np.full((2, self.num_domains), np.nan)
        np.divide(sums, counts, out=losses, where=counts > 0)
        np.divide(excess_sums, counts, out=excess, where=counts > 0)
        statistics = StepStatistics(step, losses, counts.astype(np.int64), samples.astype(np.int64), excess=excess)
        if self.sample_losses is not None and indices is not None and lengths is not None:
            means, of_tokens = self.sample_losses.unpacked(kept, indices.size, int(counts.sum()), step)
            statistics = replace(
                statistics, indices=indices, lengths=lengths, sample_losses=means, token_losses=of_tokens
            )
        tokens, labels, loss, coefficients = of_step.tolist()
        weighed, self._weighed = self._weighed, False
        has_weights, self._has_weights = self._has_weights, False
        return statistics, StepTotals(
            int(tokens),
            int(labels),
            loss,
            coefficients if weighed else None,
            weights.reshape(self.num_domains, -1) if has_weights else None,
        )


class MeanLosses:
    """Mean loss of each domain over several steps, weighted so that it is part of the mean loss of the steps.

    The Trainer's ``loss`` is the mean, over the steps since the last log, of each step's token-mean loss. So a token of
    a step with n tokens counts 1/n. With the same weights, the mean of domain d is sum_s q_sd l_sd / sum_s q_sd. Here
    l_sd is the domain's token-mean loss in step s, and q_sd its share of the step's tokens. With one domain this equals
    ``loss``. With several, ``loss`` is the mean of the domains' means, weighted with their mean shares.
    """

    def __init__(self) -> None:
        self._losses: NDArray[np.float64] = np.zeros(0)
        """sum_s q_sd l_sd of each domain since the last log, (K,). Empty before the first step."""
        self._shares: NDArray[np.float64] = np.zeros(0)
        """sum_s q_sd of each domain since the last log, (K,)."""

    def add(self, step: StepStatistics) -> None:
        """Add a step. A step whose loss is not finite is left out, as the Trainer leaves it out of ``loss``."""
        trained = step.tokens > 0
        if not trained.any() or not np.isfinite(step.losses[trained]).all():
            return
        shares = step.tokens / step.tokens.sum()
        if not self._shares.size:
            self._losses, self._shares = np.zeros((2, shares.size))
        self._losses = self._losses + shares * np.where(trained, step.losses, 0.0)
        self._shares = self._shares + shares

    def take(self) -> NDArray[np.float64]:
        """Return the means, (K,), and reset them.

        A domain without a token has NaN. The shape is (0,) if no step was added.
        """
        means = np.full(self._shares.size, np.nan)
        np.divide(self._losses, self._shares, out=means, where=self._shares > 0)
        self._losses = self._shares = np.zeros(0)
        return means


def check_step(domains: tuple[str, ...], statistics: StepStatistics, totals: StepTotals) -> None:
    """Check that an optimizer step had tokens to train on and a finite loss. The result is the same on every process.

    Raises:
        DataFlexError: if no token of the step counts in the loss, or all of them have the coefficient 0.
        DivergenceError: if the loss of the step or of a domain is not finite.
    """
    check_losses(domains, statistics.tokens, statistics.losses, statistics.step)
    if totals.coefficients == 0 and totals.labels:
        raise ComponentError(
            f"weight: the loss coefficients of every token of step {statistics.step} are 0 (the product of the "
            "weighters' weights and, if a mixer weighs the domains, of theirs), so the step trained nothing; give at "
            "least one sample a coefficient above 0."
        )
    if math.isfinite(totals.loss):
        return
    if not totals.labels:
        raise DataFlexError(
            f"step {statistics.step} has no token that is trained on (every label of its samples is masked), so it has "
            "no loss. Check the template, cutoff_len and train_on_prompt, or raise the batch size."
        )
    raise DivergenceError(f"the training loss of step {statistics.step} is {totals.loss}")


def check_losses(domains: tuple[str, ...], tokens: NDArray[np.int64], losses: NDArray[np.float64], step: int) -> None:
    """Check that every domain with tokens in a step has a finite loss.

    Raises:
        DivergenceError: naming the domain and the step.
    """
    if not losses.size:
        return
    bad = np.flatnonzero((tokens > 0) & ~np.isfinite(losses))
    if bad.size:
        of = f"the loss of domain {domains[bad[0]]!r} in step" if len(domains) > 1 else "the training loss of step"
        raise DivergenceError(f"{of} {step} is {losses[bad[0]]}")
