"""Liger's kernels without Liger's loss, in a run whose loss DataFlex computes in chunks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def without_loss(
    original: Callable[..., None], config: Any, model_args: Any, is_trainable: bool, require_logits: bool
) -> None:
    """Apply LLaMA-Factory's choice of Liger's kernels, with the forward that calls the model's own loss function.

    Liger's fused head and loss has one coefficient for all tokens, and its forward bypasses the loss function.

    Args:
        original: LLaMA-Factory's ``apply_liger_kernel``.
        config: configuration of the model.
        model_args: LLaMA-Factory's arguments of the model.
        is_trainable: whether the model is trained.
        require_logits: whether LLaMA-Factory's stage reads the logits; DataFlex always asks for the plain forward.
    """
    own = torch.nn.functional.cross_entropy
    try:
        original(config, model_args, is_trainable, require_logits=True)
    finally:
        # For a stage that reads logits, LLaMA-Factory lets Liger replace this function for the whole process.
        torch.nn.functional.cross_entropy = own
