"""Token losses of a batch, computed by a forward pass of the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dataflex.data.token_loss import shifted, token_losses
from dataflex.probe.head import chunked_values


def causal_losses(model: torch.nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the shifted labels of a batch and the cross entropy of each predicted token, both (B, T).

    The logits of the whole batch exist at once. The training forward pass of the same batch, which follows, holds them
    and their gradients, so computing in chunks would not lower the peak memory of a step. For a step whose loss is
    fused it would, see :func:`chunked_losses`.
    """
    labels = shifted(inputs["labels"])
    given = {name: value for name, value in inputs.items() if name != "labels"}
    return labels, token_losses(model(**given, use_cache=False).logits, labels)


def chunked_losses(model: torch.nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the same as :func:`causal_losses`, with the head applied in chunks and only to tokens that count."""
    labels = shifted(inputs["labels"])
    given = {name: value for name, value in inputs.items() if name != "labels"}
    rows, columns, values = chunked_values(model, given, labels)
    per_token = values.new_zeros(labels.shape)
    per_token[rows, columns] = values
    return labels, per_token
