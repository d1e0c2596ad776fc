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
from dataflex.trainer.domain_loss import DomainLoss
from dataflex.trainer.statistics import BatchLosses
from dataflex.trainer.step_weights import MicroBatch, StepWeights, Watched

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
        per_token = token_losses(logits, labels)
        counts = (labels != ignore_index).sum(1)
        sums = per_token.sum(1)
        weighs = self.domain_loss if self.active else None
        excess = None if weighs is None else weighs.excess_sums(per_token, labels, self.references.get(MIX))
        seen = BatchLosses(sums.detach(), counts, excess, per_token=per_token.detach(), labels=labels)
        if not self.active or (self.weights is None and weighs is None):
            self.observe(seen)
            return _divide(per_token.sum(), counts.sum(), num_items_in_batch)
        if weighs is not None and not weighs.decided:
            assert self.domains is not None
            weighs.decide(self.domains, sums.detach(), excess)
        means = sample_means(sums.detach(), counts)
        watched = self.watched
        shown = MicroBatch(
            labels, per_token.detach(), means, self.places, self.references, watched.pooled, watched.attention
        )
        weights = self._weights(shown)
        weighted = _weighted(per_token, sums, weights)
        if self.weights is not None:
            counted = _weighted((labels != ignore_index).to(sums), counts.to(sums), weights)
            seen.coefficients = self._of_domains(counted).sum().detach()
        self.observe(seen)
        return self._total(weighted, counts, num_items_in_batch)

    def _weights(self, batch: MicroBatch) -> Tensor | None:
        """Return the weighters' weights of the micro-batch, (B,) or (B, T); None means 1 everywhere."""
        if self.weights is None:
            return None
        if self.decided:
            return self.decided.popleft()
        found = self.weights.decide([batch], self.step)
        return None if found is None else found[0]

    def _total(self, weighted: Tensor, counts: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
        """Return the loss of the weighted token-loss sums of samples, (B,).

        The Trainer's N cancels in the mean over samples and in domain weights, so it is left out there. If both are in
        use, one factor N remains.
        """
        by_sample = self.weights is not None and self.weights.by_sample
        if by_sample:
            weighted = weighted / counts.clamp(min=1)
        if self.domain_loss is None and not by_sample:
            return _divide(weighted.sum(), counts.sum(), num_items_in_batch)
        # After the Trainer's scaling, a sum over the step that is divided by this number is a mean over its samples.
        samples = counts.numel() if num_items_in_batch is None else self.samples_per_step
        if self.domain_loss is None:
            return weighted.sum() / samples
        total = self._of_domains(weighted).sum()
        if by_sample:
            return total * (self.domain_loss.num_tokens.to(total) / samples)
        return total * (self.global_batch_size / samples)

    def _of_domains(self, values: Tensor) -> Tensor:
        """Return values of samples, (B,), times the coefficients of their domains, if the run has domain weights."""
        if self.domain_loss is None:
            return values
        assert self.domains is not None
        return self.domain_loss.coefficients(self.domains).to(values) * values


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
