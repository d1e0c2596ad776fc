"""Weights of the domains in the loss of one optimizer step: how they are decided and applied.

The loss of a step is sum_i weight_i * (token-mean loss of domain i). The means are computed over the step's whole
global batch: all micro-batches of all processes. So a token of domain i has the coefficient weight_i / tokens_i. The
number tokens_i is counted from the labels before the first forward pass.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dataflex import distributed
from dataflex.api.context import StepContext, StepStatistics
from dataflex.api.mixer import Mixer
from dataflex.api.needs import Needs
from dataflex.api.source import label_of
from dataflex.data.sums import row_sums, sum_dtype
from dataflex.data.token_loss import IGNORE_INDEX
from dataflex.errors import ComponentError, DivergenceError
from dataflex.trainer.statistics import check_losses, domain_sums

Floats = NDArray[np.float64]
MakeContext = Callable[[NDArray[np.int64], Floats, Floats], StepContext]
"""Makes the mixer's step context from the tokens, losses and excess losses of the domains, each (K,)."""


class DomainLoss:
    """Decides and applies the weights of the domains, step after step.

    Args:
        mixer: the mixer that weights the domains in the loss.
        needs: the needs that the mixer declared.
        domains: names of the domains.
        device: device of the training.
        make_context: makes the mixer's context from a step's losses.
    """

    def __init__(
        self, mixer: Mixer, needs: Needs, domains: tuple[str, ...], device: torch.device, make_context: MakeContext
    ) -> None:
        self.mixer, self.needs, self.domains = mixer, needs, domains
        self.device, self.make_context = device, make_context
        self.dtype = sum_dtype(device)
        self._tokens = torch.zeros(len(domains), dtype=self.dtype, device=device)
        """Number of tokens of each domain in the current step that count in the loss, (K,)."""
        self._weights: Tensor | None = None
        """Weights of the current step on the device, (K,). None before they are decided."""
        self.used: Floats = np.empty(0)
        """The weights that the last step used, (K,)."""

    @property
    def uses_reference(self) -> bool:
        """Whether the mixer compares losses with a reference."""
        return self.needs.reference is not None

    @property
    def follows(self) -> bool:
        """Whether the weights of a step are decided from the losses of the step before it."""
        return self.needs.step_losses != "nothing" and not self.mixer.decides_within_step

    @property
    def decided(self) -> bool:
        """Whether the weights of the current step are decided."""
        return self._weights is not None

    def begin(self, tokens: Tensor) -> None:
        """Begin a step.

        Args:
            tokens: number of tokens of each domain that count in the loss, in this process's micro-batches, (K,).
        """
        self._tokens = distributed.all_reduce_sum(tokens.to(self._tokens))
        self._weights = None
        if self.follows:
            self._take()
        elif self.needs.step_losses == "nothing":  # the mixer decides from its own measurements, not from step losses
            self._update(self._tokens.cpu().numpy().astype(np.int64), np.empty(0), np.empty(0))

    @property
    def num_tokens(self) -> Tensor:
        """Number of tokens of the step that count in the loss, over all processes."""
        return self._tokens.sum()

    def excess_sums(self, per_token: Tensor, labels: Tensor, reference: Tensor | None) -> Tensor | None:
        """Return each sample's sum of max(loss - reference loss, 0), (B,); None without a reference.

        Args:
            per_token: token losses, (B, T).
            labels: shifted labels, (B, T).
            reference: reference loss at each counted position, (c,), row after row. None means that no reference is
                used.
        """
        if reference is None:
            return None
        rows, columns = torch.nonzero(labels != IGNORE_INDEX, as_tuple=True)
        above = (per_token.detach()[rows, columns] - reference).clamp(min=0)
        # Clamping would turn the difference to an infinite reference loss into 0. NaN keeps the fault visible, and
        # `_check_excess` reports it.
        return row_sums(torch.where(torch.isfinite(reference), above, torch.nan), rows, columns, labels.shape)

    def decide(self, domains: Tensor, sums: Tensor, excess: Tensor | None) -> None:
        """Decide the step's weights from the losses of all samples of the step on this process.

        Args:
            domains: domain of each sample, (n,).
            sums: summed token losses of each sample, (n,).
            excess: summed excess losses of each sample, (n,), if the mixer needs them.
        """
        columns = torch.stack([sums, torch.zeros_like(sums) if excess is None else excess], dim=1).to(self.dtype)
        totals = domain_sums(domains, columns, len(self.domains))
        counts = self._tokens.unsqueeze(1)
        # Losses and token counts are copied together, so that the step waits for the device only once.
        known = torch.cat([distributed.all_reduce_sum(totals) / counts, counts], dim=1).cpu()
        losses, excesses, tokens = known.numpy().astype(np.float64).T
        self._update(tokens.astype(np.int64), losses, excesses if self.uses_reference else np.empty(0))

    def _update(self, tokens: NDArray[np.int64], losses: Floats, excess: Floats) -> None:
        """Check the losses, and decide and fetch the weights of the current step."""
        ctx = self.make_context(tokens, losses, excess)
        check_losses(self.domains, tokens, losses, ctx.step + 1)
        self._check_excess(tokens, excess, ctx.step + 1)
        self._ask_mixer(ctx)
        self._take()

    def _check_excess(self, tokens: NDArray[np.int64], excess: Floats, step: int) -> None:
        """Raise an error if the excess loss of a domain with tokens in the step is not finite."""
        if not excess.size:
            return
        bad = np.flatnonzero((tokens > 0) & ~np.isfinite(excess))
        if bad.size:
            raise ComponentError(
                f"the reference's loss on domain {self.domains[bad[0]]!r} in step {step} is not finite: the reference "
                "model overflows in this precision, or the table of its losses is damaged."
            )

    def learn(self, statistics: StepStatistics) -> None:
        """Decide the weights of the next step from the losses of the step that has just ended; see :attr:`follows`."""
        excess = statistics.excess if self.uses_reference else np.empty(0)
        self._check_excess(statistics.tokens, excess, statistics.step)
        self._ask_mixer(self.make_context(statistics.tokens, statistics.losses, excess))

    def _ask_mixer(self, ctx: StepContext) -> None:
        """Have the mixer decide its weights."""
        try:
            self.mixer.update_weights(ctx)
        except DivergenceError as error:
            raise DivergenceError(f"in the loss weights of step {ctx.step + 1}, {error.what}") from error

    def _take(self) -> None:
        """Fetch the mixer's weights, check them, and copy them to the device."""
        label = label_of(self.mixer, ("update_weights", "loss_weights"))
        weights = self.mixer.loss_weights
        try:
            given = np.asarray(weights, dtype=np.float64)
        except (TypeError, ValueError) as error:
            kind = type(weights).__name__
            raise ComponentError(
                f"{label} gave loss weights that are no array of numbers but a {kind}; they must be an array of "
                f"{len(self.domains)} numbers, one for each domain."
            ) from error
        if given.shape != (len(self.domains),) or not np.isfinite(given).all() or (given < 0).any() or given.sum() <= 0:
            raise ComponentError(
                f"{label} gave loss weights {given.tolist()}; they must be {len(self.domains)} finite, "
                "non-negative numbers with a positive sum, one for each domain."
            )
        self.used = given
        self._weights = torch.as_tensor(given, dtype=self.dtype, device=self.device)

    def coefficients(self, domains: Tensor) -> Tensor:
        """Return the coefficient of each sample's token losses, (B,): its domain's weight over the domain's tokens."""
        assert self._weights is not None
        return (self._weights / self._tokens.clamp(min=1))[domains]
