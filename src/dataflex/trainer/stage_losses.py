"""How the losses of a batch are computed, which is a matter of the stage that is trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dataflex.data.token_loss import shifted, token_losses

BatchLosses = Callable[[torch.nn.Module, dict[str, Any]], tuple[Tensor, Tensor]]
"""Given the model and what it is fed, returns the labels and the losses of tokens, both (B, T)."""


def causal_losses(model: torch.nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the labels of a batch, of the tokens that are predicted, and their losses: cross entropies.

    All logits exist at once. The training forward of the same batch, which follows, holds them and their gradients, so
    that chunks would not lower the most memory of a step.
    """
    labels = shifted(inputs["labels"])
    given = {name: value for name, value in inputs.items() if name != "labels"}
    return labels, token_losses(model(**given, use_cache=False).logits, labels)
