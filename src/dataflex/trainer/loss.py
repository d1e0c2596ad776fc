"""The training loss: token losses times loss coefficients, inside the model's own forward.

    L = (1 / N) sum over the tokens of c_bt l_bt,      N: the Trainer's own count of the step's tokens

The coefficient of a token is a product. Plain training is c = 1; a weighter gives w_b or w_bt; the mean over samples of
their token means gives N / (n N_b), with n samples in the step and N_b tokens in sample b; weights of the domains give
w_i N / N_i, with N_i tokens of domain i in the step.

While a training step's forward runs, the model's ``loss_function`` is ours. Everything around it (auxiliary losses,
the scaling by processes, gradient accumulation) stays the Trainer's, so weight 1 everywhere is the plain run: the
token losses are the same cross entropy, summed and divided by the same ``num_items_in_batch``.
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
from dataflex.trainer.step_weights import MicroBatch, StepWeights

MIX = "mix"
"""Configuration key of the mixer, under which its reference is kept."""


@dataclass
class WeightedLoss:
    """A ``loss_function`` for Hugging Face causal language models.

    Attributes:
        samples_per_step: samples of one optimizer step, on all processes or on one, whatever the Trainer's own scaling
            leaves to be divided by.
        observe: called with each micro-batch's losses.
        weights: the weighters, or None.
        domain_loss: weighs the domains, or None.
        global_batch_size: samples of one optimizer step on all processes.
    """

    samples_per_step: int
    observe: Callable[[BatchLosses], None]
    weights: StepWeights | None = None
    domain_loss: DomainLoss | None = None
    global_batch_size: int = 1
    places: Tensor | None = None
    """Where the samples of the micro-batch in its forward now are in the pool, (B,); None in a stream."""
    domains: Tensor | None = None
    """Domain of each of them, (B,), if the domains are weighed."""
    references: Mapping[str, Tensor] = field(default_factory=dict)
    """Configuration key -> the losses of its reference at each of their tokens that counts, (c,)."""
    pooled: dict[str, Tensor] = field(default_factory=dict)
    """Configuration key -> a vector of each sample's hidden states, (B, H), filled in while the forward runs."""
    step: int = 0
    """Optimizer steps done so far."""
    active: bool = True
    """False in warm-up rounds: every coefficient is 1."""
    decided: deque[Tensor] = field(default_factory=deque)
    """Weights of the step's micro-batches on this process, if they were decided before the forward."""
    calls: int = 0

    # Under torch_compile this part stays as it is written: it holds numbers of the step, each of which would be
    # compiled into a graph of its own.
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
        """Return the micro-batch's loss, as ``transformers.loss.loss_utils.ForCausalLMLoss`` would with weights."""
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
        shown = MicroBatch(labels, per_token.detach(), means, self.places, self.references, self.pooled)
        weights = self._weights(shown)
        weighted = _weighted(per_token, sums, weights)
        if self.weights is not None:
            counted = _weighted((labels != ignore_index).to(sums), counts.to(sums), weights)
            seen.coefficients = self._of_domains(counted).sum().detach()
        self.observe(seen)
        return self._total(weighted, counts, num_items_in_batch)

    def _weights(self, batch: MicroBatch) -> Tensor | None:
        """Return the weighters' weights of the micro-batch, (B,) or (B, T); None: 1 everywhere."""
        if self.weights is None:
            return None
        if self.decided:
            return self.decided.popleft()
        found = self.weights.decide([batch], self.step)
        return None if found is None else found[0]

    def _total(self, weighted: Tensor, counts: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
        """Return the loss of the weighted sums of samples (B,).

        The Trainer's N cancels in the mean over samples and in weights of domains, and so it is left out there, but for
        one factor N if both are in use.
        """
        by_sample = self.weights is not None and self.weights.by_sample
        if by_sample:
            weighted = weighted / counts.clamp(min=1)
        if self.domain_loss is None and not by_sample:
            return _divide(weighted.sum(), counts.sum(), num_items_in_batch)
        # The sum over a step of what is divided by this is, after the Trainer's scaling, a mean over its samples.
        samples = counts.numel() if num_items_in_batch is None else self.samples_per_step
        if self.domain_loss is None:
            return weighted.sum() / samples
        total = self._of_domains(weighted).sum()
        if by_sample:
            return total * (self.domain_loss.num_tokens.to(total) / samples)
        return total * (self.global_batch_size / samples)

    def _of_domains(self, values: Tensor) -> Tensor:
        """Return values of samples, (B,), times the coefficients of their domains, if those are weighed."""
        if self.domain_loss is None:
            return values
        assert self.domains is not None
        return self.domain_loss.coefficients(self.domains).to(values) * values


def _weighted(per_token: Tensor, sums: Tensor, weights: Tensor | None) -> Tensor:
    """Return the weighted sums of samples, (B,).

    Args:
        per_token: (B, T).
        sums: of its rows, (B,).
        weights: (B,), (B, T), or None for 1.
    """
    if weights is None:
        return sums
    return weights * sums if weights.dim() == 1 else (weights * per_token).sum(1)


def _divide(total: Tensor, tokens: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
    if num_items_in_batch is None:
        return total / tokens
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch


@contextmanager
def loss_function(model: torch.nn.Module, function: WeightedLoss) -> Iterator[None]:
    """Make ``function`` the loss function of a Hugging Face model for the time of a forward.

    Raises:
        ComponentError: if the loss is weighed and the model's forward did not call it.
    """
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
            f"{type(model).__name__} computes its loss without its loss_function, so no weight can reach it; "
            "remove weight: (or the mix: that weighs the loss) or use a model class of transformers."
        )


_ABSENT: Literal["absent"] = "absent"
