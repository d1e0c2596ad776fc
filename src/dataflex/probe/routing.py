"""The experts that the tokens of each sample are routed to, read at the input of the experts' modules.

Transformers stores the experts of a layer in one module of stacked matrices. The module is called with the hidden
states of all positions and the indices of the experts chosen for each. These indices are counted. They are the routing
itself, however the router computes it (softmax, sigmoid, a bias per expert, limited groups).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dataflex.errors import ComponentError
from dataflex.probe.head import head_of, replaced_forward


def stacked_experts(model: nn.Module) -> dict[nn.Module, int]:
    """Return the modules of stacked matrices, in order of layers, with their numbers of experts; sharded or not."""
    found = {}
    for module in model.modules():
        shapes = [
            getattr(parameter, "ds_shape", parameter.shape)  # under ZeRO-3 `shape` is the shape of an empty tensor
            for parameter in module._parameters.values()
            if parameter is not None
        ]
        numbers = [int(shape[0]) for shape in shapes if len(shape) == 3]
        if numbers:
            found[module] = numbers[0]
    return found


def real_tokens(inputs: dict[str, Any], labels: Tensor) -> Tensor:
    """Return the mask of the positions of a batch that are not padding, in the shape of the labels, (B, T).

    Attention masks are (B, T), or (B, 1, T, T) with 0 if a position sees another position. Tokens see themselves;
    padding does not.
    """
    mask = inputs.get("attention_mask")
    if mask is None:
        return torch.ones_like(labels, dtype=torch.bool)
    if mask.dim() == 4:
        return torch.diagonal(mask[:, 0], dim1=1, dim2=2) == 0
    return mask != 0


def expert_shares(model: nn.Module, experts: dict[nn.Module, int], inputs: dict[str, Any], real: Tensor) -> Tensor:
    """Return the share of each sample's routing slots that each expert got, (B, E), float32.

    A slot is one token at one of its chosen experts. The shares sum to 1 over the experts of a module that routes. They
    are 0 for a module that was not called with chosen experts. They are NaN for a sample whose last hidden states are
    not finite, because its routing means nothing.

    Args:
        model: the model; its forward runs once, without the head.
        experts: from :func:`stacked_experts`; E is the sum of their numbers of experts.
        inputs: inputs of the model.
        real: mask of the positions that count, (B, T).

    Raises:
        ComponentError: if a module is called with other positions than those of the batch, or with an expert that it
            does not have.
    """
    counts = {module: real.new_zeros(real.shape[0], number, dtype=torch.float32) for module, number in experts.items()}
    handles = [
        module.register_forward_pre_hook(partial(_count, found, real), with_kwargs=True)
        for module, found in counts.items()
    ]
    broken = torch.zeros_like(real[:, 0])

    def keep(apply: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        broken.logical_or_((~torch.isfinite(hidden).all(-1) & real).any(1))
        return hidden[..., :1]

    try:
        with replaced_forward(head_of(model), keep):
            model(**inputs, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    shares = torch.cat([found / found.sum(1, keepdim=True).clamp(min=1) for found in counts.values()], dim=1)
    return shares.masked_fill(broken.unsqueeze(1), torch.nan)


def _count(counts: Tensor, real: Tensor, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Add the slots that each expert got, if a module is called with chosen experts, (B * T, k)."""
    chosen = args[1] if len(args) > 1 else kwargs.get("top_k_index")
    if not isinstance(chosen, Tensor) or chosen.is_floating_point() or chosen.dim() != 2:
        return
    samples, number = counts.shape
    name = type(module).__name__
    if len(chosen) != real.numel():
        raise ComponentError(
            f"the routing of {name} cannot be counted: it covers {len(chosen)} positions, but the batch has "
            f"{real.numel()}."
        )
    chosen = chosen.reshape(samples, -1, chosen.shape[-1])[real]
    if chosen.numel() and int(chosen.max()) >= number:
        raise ComponentError(
            f"the routing of {name} cannot be counted: expert {int(chosen.max())} is chosen, but the module has "
            f"{number} experts (from 0)."
        )
    owner = real.nonzero()[:, :1].expand_as(chosen)
    places = torch.bincount((owner * number + chosen).flatten(), minlength=counts.numel())
    counts += places.view_as(counts)


def class_name(model: nn.Module) -> str:
    """Return the name of a model's class; if the model has adapters, the name of the inner model's class."""
    from peft import PeftModel

    return type(model.get_base_model() if isinstance(model, PeftModel) else model).__name__
