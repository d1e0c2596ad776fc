"""The head of a model while a training forward pass runs: it computes token losses in place of logits.

The head's own ``forward`` is replaced, so everything around it stays the model's: hooks of ZeRO-3 and FSDP, the module
with the trained weights of an adapter, auxiliary losses. The model receives a column of zeros in place of its logits,
and its loss function receives the token losses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dataflex.data.token_loss import IGNORE_INDEX
from dataflex.errors import ComponentError, ConfigError
from dataflex.probe.head import behind_head
from dataflex.trainer.fused_loss import (
    Statistic,
    checkpointed_losses,
    chunk_of,
    linear_losses,
    weighted_linear_loss,
)

Coefficients = Callable[[Tensor], Tensor | None]
"""Returns the coefficient of every token, (B, T), from the shifted labels, (B, T).

None if the coefficients depend on the losses.
"""


@dataclass(frozen=True)
class FusedLosses:
    """Losses of a micro-batch.

    Attributes:
        per_token: loss of every position, (B, T); 0 at positions that do not count. It has a gradient if ``total`` is
            None.
        total: sum of the losses times the coefficients, differentiable, if the coefficients were known before.
        statistic: value of the asked statistic at every position, (B, T), if one is asked for.
    """

    per_token: Tensor
    total: Tensor | None = None
    statistic: Tensor | None = None


class FusedHead:
    """Computes token losses in the forward of a model's head.

    Args:
        model: Hugging Face model with a language-model head.
        statistic: further statistic of each token's logits that the loss needs.

    Raises:
        ConfigError: if the model names no head.
    """

    def __init__(self, model: torch.nn.Module, statistic: Statistic | None = None) -> None:
        from peft.utils import ModulesToSaveWrapper

        named: Any = model
        head: Any = named.get_output_embeddings()
        if head is None:
            raise ConfigError(
                f"fused_loss: {type(model).__name__} names no head (get_output_embeddings() returns None), so its loss "
                "cannot be computed in chunks. Set dataflex.fused_loss: false."
            )
        # An adapter may train a copy of the head. The wrapper calls the copy.
        while isinstance(head, ModulesToSaveWrapper):
            head = head.modules_to_save[head.active_adapter]
        self.head: torch.nn.Module = head
        self.after, self.statistic = behind_head(model), statistic
        self._chunk = chunk_of(int(named.config.get_text_config().vocab_size))
        self._forward = self._losses_of
        """The replaced forward, one object for all steps: torch.compile would trace the model again for another one."""
        self._labels: Tensor | None = None
        self._counted: Tensor | None = None
        """Numbers of the tokens that count among those of the micro-batch, (c,)."""
        self._coefficients: Coefficients | None = None
        self._found: FusedLosses | None = None

    @contextmanager
    def active(self, labels: Tensor, coefficients: Coefficients) -> Iterator[None]:
        """Compute losses in place of logits during a forward pass.

        Args:
            labels: shifted labels, (B, T).
            coefficients: called once, before the losses are computed.
        """
        own = self.head.__dict__.get("forward")
        self._original: Callable[[Tensor], Tensor] = self.head.forward
        # Before the forward pass, because the number of counted tokens is read from the device.
        self._counted = (labels != IGNORE_INDEX).flatten().nonzero()[:, 0]
        self._labels, self._coefficients, self._found = labels, coefficients, None
        self.head.forward = self._forward
        try:
            yield
        finally:
            if own is None:
                del self.head.forward
            else:
                self.head.forward = own
            self._labels = self._counted = self._coefficients = self._found = None

    def take(self) -> FusedLosses:
        """Return the losses of the forward pass that is running.

        Raises:
            ComponentError: if the forward pass has not called the head.
        """
        found, self._found = self._found, None
        if found is None:
            raise ComponentError(
                "fused_loss: the model computed its loss without a call of its head, so the loss cannot be computed in "
                "chunks. Set dataflex.fused_loss: false."
            )
        return found

    # Excluded from torch_compile: the number of counted tokens differs in every batch.
    @torch.compiler.disable
    def _losses_of(self, hidden: Tensor) -> Tensor:
        """Compute the losses, and return zeros, (B, T, 1), that carry the graph of the losses.

        ZeRO-3 gathers the head for the backward pass when the gradient of the head's output arrives. The zeros are that
        output, so they must depend on the losses and get a gradient, which is 0.
        """
        assert self._labels is not None
        assert self._counted is not None
        assert self._coefficients is not None
        labels, counted = self._labels.to(hidden.device), self._counted.to(hidden.device)
        if hidden.shape[:2] != labels.shape:
            raise ComponentError(
                f"fused_loss: the head received hidden states of shape {tuple(hidden.shape)} for labels of shape "
                f"{tuple(labels.shape)}. Set dataflex.fused_loss: false."
            )
        states, targets = hidden.flatten(0, 1)[counted], labels.flatten()[counted]
        coefficients, total, values = self._coefficients(labels), None, None
        if type(self.head) is not torch.nn.Linear:
            losses, values = checkpointed_losses(
                self._original, states, targets, self.after, self._chunk, self.statistic
            )
        elif coefficients is None or self.statistic is not None:
            losses, values = linear_losses(self.head, states, targets, self.after, self.statistic)
        else:
            given = coefficients.flatten()[counted]
            total, losses = weighted_linear_loss(self.head, states, targets, given, self.after)
        placed = _placed(losses, counted, labels)
        self._found = FusedLosses(placed, total, None if values is None else _placed(values, counted, labels))
        zero = (placed.sum() if total is None else total) * 0
        return zero.to(hidden.dtype).expand(*labels.shape, 1)


def _placed(values: Tensor, counted: Tensor, labels: Tensor) -> Tensor:
    """Return the values of counted positions at their places, (B, T); 0 elsewhere."""
    return values.new_zeros(labels.numel()).index_copy(0, counted, values).view(labels.shape)
