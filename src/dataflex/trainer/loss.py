"""Training loss: token losses times loss coefficients, computed inside the model's own forward pass.

    L = (1 / N) sum over the tokens of c_bt l_bt,      N: the Trainer's own count of the step's tokens

The coefficient of a token is a product of three factors. Plain training has c = 1.
- A weighter gives w_b or w_bt.
- The mean over samples of their token means gives N / (n N_b), with n samples in the step and N_b tokens in sample b.
- Domain weights give w_i N / N_i, with N_i tokens of domain i in the step.

While the forward pass of a training step runs, DataFlex's loss function replaces the model's ``loss_function``.
Everything around it (auxiliary losses, the scaling by processes, gradient accumulation) stays the Trainer's. So weight
1 everywhere is the plain run: the token losses are the same cross entropy, summed and divided by the same
``num_items_in_batch``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from dataflex.data.token_loss import IGNORE_INDEX, sample_means, shifted, token_losses
from dataflex.errors import ComponentError
from dataflex.probe.head import wide
from dataflex.probe.stage_loss import StageLosses
from dataflex.trainer.domain_loss import DomainLoss
from dataflex.trainer.fused_head import FusedHead, FusedLosses
from dataflex.trainer.special_losses import SpecialLoss
from dataflex.trainer.statistics import BatchLosses
from dataflex.trainer.step_weights import MicroBatch, StepWeights, Watched, times

MIX = "mix"
"""Configuration key of the mixer. Its reference losses are stored under this key."""


@dataclass
class WeightedLoss:
    """Loss function for Hugging Face causal language models that multiplies token losses with coefficients.

    Attributes:
        samples_per_step: samples of one optimizer step that the loss is divided by; of all processes if the Trainer
            averages tokens over devices, otherwise of one process, because the Trainer then averages the losses of the
            processes.
        observe: called with the losses of each micro-batch.
        weights: the weighters, or None.
        domain_loss: the domain weights, or None.
        global_batch_size: samples of one optimizer step on all processes.
    """

    samples_per_step: int
    observe: Callable[[BatchLosses], None]
    weights: StepWeights | None = None
    domain_loss: DomainLoss | None = None
    global_batch_size: int = 1
    places: Tensor | None = None
    """Pool index of each sample of the micro-batch whose forward pass runs, (B,); None if the data is streamed."""
    domains: Tensor | None = None
    """Domain of each sample of the micro-batch, (B,), if the run has domain weights."""
    references: Mapping[str, Tensor] = field(default_factory=dict)
    """Configuration key -> the reference losses of the micro-batch at each position that counts, (c,)."""
    watched: Watched = field(default_factory=Watched)
    """Values of the micro-batch that weighters read in its forward pass, which fills them in."""
    step: int = 0
    """Number of optimizer steps done so far."""
    active: bool = True
    """False in warm-up rounds, where every coefficient is 1."""
    decided: deque[Tensor] = field(default_factory=deque)
    """Weights of the step's micro-batches on this process, if they were decided before the forward passes."""
    calls: int = 0
    """Number of calls so far. Shows whether a model's forward pass has used this function."""
    fused: FusedHead | None = None
    """The head of the model, if it computes token losses in place of logits."""
    special: SpecialLoss | None = None
    """LLaMA-Factory's own token weights, which multiply those of the weighters."""
    _taken: tuple[Tensor | None] | None = None
    """Weights of the micro-batch whose forward pass runs, if they were decided before its losses were known."""

    # Excluded from torch_compile: this part reads values that differ in every step, and each value would compile
    # another graph.
    @torch.compiler.disable
    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = IGNORE_INDEX,
        shift_labels: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """Return the micro-batch's loss: ``transformers.loss.loss_utils.ForCausalLMLoss`` with loss coefficients."""
        self.calls += 1
        labels = (shifted(labels) if shift_labels is None else shift_labels).to(logits.device)
        found = self._losses(logits, labels)
        per_token, counts = found.per_token, (labels != ignore_index).sum(1)
        sums = per_token.sum(1)
        weights = self._observed(labels, per_token, sums, counts)
        if found.total is not None:
            # The zeros carry the graph of the head's output, see `FusedHead`.
            return self._scaled(found.total, counts, num_items_in_batch) + logits.sum() * 0
        if self.special is not None:
            factors = self.special.factors(per_token.detach(), found.statistic)
            weights = factors if weights is None else times(factors, weights)
        loss = self._scaled(self._sum(per_token, sums, counts, weights), counts, num_items_in_batch)
        return loss if self.fused is None else loss + logits.sum() * 0

    def of_samples(self, mean: Tensor, found: StageLosses) -> Tensor:
        """Return the loss of a micro-batch whose samples have one loss each. A sample counts as one token.

        The Trainer averages the micro-batches of a step. They all have the same number of samples, so the loss of the
        step is the mean over its samples.

        Args:
            mean: mean loss of the samples, which is returned if nothing weighs it.
            found: losses of the samples.
        """
        self.watched.clear()
        self.watched.margins = found.margins
        labels, per_token = as_tokens(found.losses)
        sums, counts = found.losses, labels.new_ones(labels.shape[0])
        weights = self._observed(labels, per_token, sums, counts)
        if self._weighs is None and (self.weights is None or not self.active):
            return mean
        return self._scaled(self._sum(per_token, sums, counts, weights), counts, None)

    def _observed(self, labels: Tensor, per_token: Tensor, sums: Tensor, counts: Tensor) -> Tensor | None:
        """Return the weighters' weights of the micro-batch, and pass its losses to the statistics of the step.

        Domain weights that depend on these losses are decided.

        Args:
            labels: shifted labels, (B, T).
            per_token: token losses, (B, T).
            sums: sums of the rows of ``per_token``, (B,).
            counts: number of counted tokens of each sample, (B,).
        """
        weighs = self._weighs
        excess = None if weighs is None else weighs.excess_sums(per_token, labels, self.references.get(MIX))
        seen = BatchLosses(sums.detach(), counts, excess, per_token=per_token.detach(), labels=labels)
        if weighs is not None and not weighs.decided:
            assert self.domains is not None
            weighs.decide(self.domains, sums.detach(), excess)
        weights = self._weights(labels, per_token.detach(), counts)
        if self.weights is not None and self.active:
            counted = _weighted((labels != IGNORE_INDEX).to(sums), counts.to(sums), weights)
            seen.coefficients = self._of_domains(counted).sum().detach()
            seen.weights, seen.places = weights, self.places
        self.observe(seen)
        return weights

    def _losses(self, logits: Tensor, labels: Tensor) -> FusedLosses:
        """Return the losses of the micro-batch: those that its head has computed, or those of its logits."""
        if self.fused is not None:
            return self.fused.take()
        statistic = None
        if self.special is not None and self.special.statistic is not None:
            statistic = self.special.statistic(wide(logits.detach()).flatten(0, 1)).view(labels.shape)
        return FusedLosses(token_losses(logits, labels), statistic=statistic)

    @property
    def _weighs(self) -> DomainLoss | None:
        """The domain weights if they act in the step."""
        return self.domain_loss if self.active else None

    @torch.no_grad()
    def coefficients_before(self, labels: Tensor) -> Tensor | None:
        """Return the coefficients of the micro-batch's tokens, (B, T), up to a factor that all tokens share.

        None if they depend on the losses of the forward pass that runs.

        Args:
            labels: shifted labels, (B, T).
        """
        self._taken, weighs = None, self._weighs
        if self.special is not None or (weighs is not None and not weighs.decided):
            return None
        if self.active and self.weights is not None and not (self.decided or self.weights.known_before(self.step)):
            return None
        counts = (labels != IGNORE_INDEX).sum(1)
        unknown = torch.zeros(labels.shape, device=labels.device)
        self._taken = (self._weights(labels, unknown, counts),)
        # The sum is linear in the losses, so its gradient is the coefficients whatever the losses are.
        losses = torch.zeros(labels.shape, device=labels.device, requires_grad=True)
        with torch.enable_grad():
            total = self._sum(losses, losses.sum(1), counts, self._taken[0])
            return torch.autograd.grad(total, losses)[0]

    def _weights(self, labels: Tensor, per_token: Tensor, counts: Tensor) -> Tensor | None:
        """Return the weighters' weights of the micro-batch, (B,) or (B, T); None means 1 everywhere.

        Args:
            labels: shifted labels, (B, T).
            per_token: token losses, (B, T), detached; 0 while they are not known.
            counts: number of counted tokens of each sample, (B,).
        """
        if self._taken is not None:
            (weights,), self._taken = self._taken, None
            return weights
        if self.weights is None or not self.active:
            return None
        if self.decided:
            return self.decided.popleft()
        means = sample_means(per_token.sum(1), counts)
        pooled, attention, margins = self.watched.pooled, self.watched.attention, self.watched.margins
        batch = MicroBatch(labels, per_token, means, self.places, self.references, pooled, attention, margins)
        found = self.weights.decide([batch], self.step)
        return None if found is None else found[0]

    @property
    def _by_sample(self) -> bool:
        """Whether the loss of the step is the mean over samples of their token means."""
        return self.active and self.weights is not None and self.weights.by_sample

    def _sum(self, per_token: Tensor, sums: Tensor, counts: Tensor, weights: Tensor | None) -> Tensor:
        """Return the sum of the token losses times their coefficients, before the factor that all tokens share.

        Args:
            per_token: token losses, (B, T).
            sums: sums of the rows of ``per_token``, (B,).
            counts: number of counted tokens of each sample, (B,).
            weights: weights of shape (B,) or (B, T). None means 1 everywhere.
        """
        if weights is None and self._weighs is None and not self._by_sample:
            # As Transformers adds them, so that the loss of a run without weights has the same bits.
            return per_token.sum() if not self.active or self.weights is None else sums.sum()
        weighted = _weighted(per_token, sums, weights)
        if self._by_sample:
            weighted = weighted / counts.clamp(min=1)
        return (weighted if self._weighs is None else self._of_domains(weighted)).sum()

    def _scaled(self, total: Tensor, counts: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
        """Return a sum of losses times the factor that all tokens share.

        The Trainer's N cancels in the mean over samples and in domain weights, so it is left out there. If both are in
        use, one factor N remains.
        """
        weighs = self._weighs
        if weighs is None and not self._by_sample:
            return _divide(total, counts.sum(), num_items_in_batch)
        # After the Trainer's scaling, a sum over the step that is divided by this number is a mean over its samples.
        samples = counts.numel() if num_items_in_batch is None else self.samples_per_step
        if weighs is None:
            return total / samples
        if self._by_sample:
            return total * (weighs.num_tokens.to(total) / samples)
        return total * (self.global_batch_size / samples)

    def _of_domains(self, values: Tensor) -> Tensor:
        """Return values of samples, (B,), times the coefficients of their domains, if the run has domain weights."""
        if self._weighs is None:
            return values
        assert self.domains is not None
        return self._weighs.coefficients(self.domains).to(values) * values


def as_tokens(losses: Tensor) -> tuple[Tensor, Tensor]:
    """Return the labels and the losses, (B, 1) both, of samples whose only token has the sample's loss, (B,)."""
    return torch.zeros(losses.shape[0], 1, dtype=torch.int64, device=losses.device), losses.unsqueeze(1)


def _weighted(per_token: Tensor, sums: Tensor, weights: Tensor | None) -> Tensor:
    """Return the weighted token-loss sums of samples, (B,).

    Args:
        per_token: token losses, (B, T).
        sums: sums of the rows of ``per_token``, (B,).
        weights: weights of shape (B,) or (B, T). None means 1 everywhere.
    """
    if weights is None:
        return sums
    return weights * sums if weights.dim() == 1 else (weights * per_token).sum(1)


def _divide(total: Tensor, tokens: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
    """Return the total divided by the Trainer's token count, or by the micro-batch's own count without one."""
    if num_items_in_batch is None:
        return total / tokens
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch


@contextmanager
def loss_function(model: torch.nn.Module, function: WeightedLoss) -> Iterator[None]:
    """Replace the loss function of a Hugging Face model by ``function`` during a forward pass.

    Raises:
        ComponentError: if the loss is weighted and the model's forward pass did not call ``function``.
    """
    # `loss_function` is a property of the class, and its setter stores the instance attribute `_loss_function`. A model
    # that had no such attribute must lose it again, to return to the default of its class.
    own = model.__dict__.get("_loss_function", _ABSENT)
    before = function.calls
    model.loss_function = function
    try:
        yield
    finally:
        if own is _ABSENT:
            del model._loss_function
        else:
            model.loss_function = own
    weighs = function.weights is not None or function.domain_loss is not None
    if weighs and function.calls == before:
        raise ComponentError(
            f"{type(model).__name__} computes its loss without its loss_function, so weights cannot be applied to it; "
            "remove weight: (or the mix: that weights the loss), or use a model class of transformers."
        )


_ABSENT: Literal["absent"] = "absent"
"""Marks an attribute that does not exist. None could be a stored value."""
