"""The training loss with per-sample weights, inside the model's own forward.

While a training step's forward runs, the model's ``loss_function`` is ours. Everything around it (auxiliary losses,
the scaling by processes, gradient accumulation) stays the Trainer's, so weight 1 everywhere is the plain run: the
token losses are the same cross entropy, summed and divided by the same ``num_items_in_batch``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from dataflex import distributed
from dataflex.api.source import label_of
from dataflex.api.weighter import Weighter
from dataflex.data.token_loss import IGNORE_INDEX, sample_means, shifted, token_losses
from dataflex.errors import ComponentError
from dataflex.trainer.domain_loss import DomainLoss
from dataflex.trainer.statistics import BatchLosses


@dataclass
class WeightedLoss:
    """A ``loss_function`` for Hugging Face causal language models.

    Attributes:
        weighter: scales the samples, or None.
        domain_loss: weighs the domains, or None; there is never a weighter beside it.
        samples_per_step: samples of one optimizer step on all processes, for ``normalization: sample``.
        observe: called with each micro-batch's losses.
    """

    weighter: Weighter | None
    samples_per_step: int
    observe: Callable[[BatchLosses], None]
    global_batch_size: int = 1
    """Samples of one optimizer step on all processes."""
    domain_loss: DomainLoss | None = None
    domains: Tensor | None = None
    """Domain of each sample of the micro-batch in its forward now, (B,), where the domains are weighed."""
    step: int = 0
    """Optimizer steps done so far."""
    active: bool = True
    """False in warm-up rounds: every weight is 1."""
    decided: deque[Tensor] = field(default_factory=deque)
    """Weights of the step's micro-batches on this process, each (B,), where they were decided before the forward."""
    last_weights: Tensor | None = None
    """The weights decided last, (n,)."""
    calls: int = 0

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
        targets = (shifted(labels) if shift_labels is None else shift_labels).to(logits.device)
        per_token = token_losses(logits, targets)
        counts = (targets != ignore_index).sum(1)
        sums = per_token.sum(1)
        weighs = self.domain_loss if self.active else None
        excess = None if weighs is None else weighs.excess_sums(per_token, targets)
        self.observe(BatchLosses(sums.detach(), counts, excess))
        if weighs is not None:
            assert self.domains is not None
            if not weighs.decided:
                weighs.decide(self.domains, sums.detach(), excess)
            # What the Trainer and the mean over processes divide by afterwards, taken back.
            after = counts.numel() if num_items_in_batch is None else self.samples_per_step
            return (weighs.coefficients(self.domains).to(sums) * sums).sum() * (self.global_batch_size / after)
        if self.weighter is None or not self.active:
            return _divide(per_token.sum(), counts.sum(), num_items_in_batch)
        means = sample_means(sums.detach(), counts)
        weights = self.decided.popleft() if self.decided else self.decide(self.weighter, means)
        if self.weighter.params.normalization == "token":
            return _divide((weights * sums).sum(), counts.sum(), num_items_in_batch)
        weighted = (weights * sums / counts.clamp(min=1)).sum()
        return weighted / (means.numel() if num_items_in_batch is None else self.samples_per_step)

    def decide(self, weighter: Weighter, means: Tensor) -> Tensor:
        """Return the weights of this process's samples, (B,), decided over all processes; 1 where nothing is trained.

        Args:
            weighter: the run's weighter.
            means: this process's token-mean losses, (B,), NaN where no token is trained on.
        """
        everyone = means if weighter.elementwise else distributed.all_gather(means)
        # A loss that is not finite is nothing to weigh by; the statistics of the step end the run on all processes.
        scored = torch.isfinite(everyone)
        weights = torch.ones_like(everyone)
        if scored.any():
            given = weighter.weigh(everyone[scored], self.step)
            check_weights(weighter, given, int(scored.sum()))
            if not weighter.elementwise and not bool((given > 0).any()):
                raise ComponentError(
                    f"{label_of(weighter, ('weigh',))} returned weight 0 for every sample of step {self.step + 1}, "
                    "which would train nothing; give at least one a weight above 0."
                )
            weights[scored] = given.to(weights)
        self.last_weights = weights
        begin = 0 if weighter.elementwise else distributed.rank() * means.numel()
        return weights[begin : begin + means.numel()]


def _divide(total: Tensor, tokens: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
    if num_items_in_batch is None:
        return total / tokens
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch


def check_weights(weighter: Weighter, weights: Tensor, count: int) -> None:
    """Check one finite, non-negative weight per sample.

    Raises:
        ComponentError: naming the weighter and what it returned.
    """
    label = label_of(weighter, ("weigh",))
    if not isinstance(weights, torch.Tensor):
        raise ComponentError(f"{label} returned a {type(weights).__name__}; needed is a tensor of {count} weights.")
    if weights.shape != (count,):
        raise ComponentError(f"{label} returned weights of shape {tuple(weights.shape)} for {count} samples.")
    if not bool((torch.isfinite(weights) & (weights >= 0)).all()):
        raise ComponentError(f"{label} returned weights that are NaN, infinite or negative: {weights.tolist()}")


@contextmanager
def loss_function(model: torch.nn.Module, function: WeightedLoss) -> Iterator[None]:
    """Make ``function`` the loss function of a Hugging Face model for the time of a forward.

    Raises:
        ComponentError: if a weighter is set and the model's forward did not call it.
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
    weighs = function.weighter is not None or function.domain_loss is not None
    if weighs and function.calls == before:
        raise ComponentError(
            f"{type(model).__name__} computes its loss without its loss_function, so no weight can reach it; "
            "remove weight: (or the mix: that weighs the loss) or use a model class of transformers."
        )


_ABSENT: Literal["absent"] = "absent"
