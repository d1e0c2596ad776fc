"""Recomputing layers in a gradient batch, so that it keeps no more activations than a training step does.

Transformers recomputes layers in training mode alone, which a probe is not in, and the reentrant way, LLaMA-Factory's
default, refuses to be asked for the gradients of layer outputs. So the layers that the training recomputes are run here
by a function of our own: its forward makes no graph and keeps the layer's input; its backward runs the layer again with
a graph, and differentiates that at once. Hooks inside a layer see both runs and act in the second one, the only one
with gradients: what they keep exists for one layer at a time.

Only the forward of a layer is replaced, not its call: the hooks by which FSDP and ZeRO-3 fetch a layer's parameters
stay outside, and those of the modules inside run in both runs, as under any other recomputation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from transformers.modeling_layers import GradientCheckpointingLayer

Run = Callable[[], list[Tensor]]
"""Runs a layer with a graph and returns its outputs that have one."""

Differentiate = Callable[[nn.Module, Run, list[Tensor], list[Tensor]], list[Tensor | None]]
"""Given a layer, its run, its inputs and the gradients of the outputs, returns the gradients of the inputs."""


def recomputed_layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers of a model that its training recomputes, the outermost ones.

    There are none where the training keeps all activations, or where the model recomputes by code of its own. A layer
    with FSDP's modules inside is none either: their gathering ends with the backward they are used in, and that of a
    recomputation is one inside another.
    """
    found: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in model.modules():  # outer modules come before inner ones
        layer = module._checkpoint_wrapped_module if isinstance(module, CheckpointWrapper) else module
        is_own = isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing
        if layer in inside or not (is_own or layer is not module):
            continue
        within = [each for each in layer.modules() if each is not layer]
        inside.update((layer, *within))
        if not any(isinstance(each, (FSDPModule, FullyShardedDataParallel)) for each in within):
            found.append(layer)
    return found


@contextmanager
def recomputing(
    model: nn.Module, layers: list[nn.Module], begin: Callable[[nn.Module], None], differentiate: Differentiate
) -> Iterator[None]:
    """Have layers recomputed in the backward for a while.

    Args:
        model: that holds them.
        layers: from :func:`recomputed_layers`.
        begin: called before each first run of a layer.
        differentiate: called in each backward of a layer.
    """
    # FSDP's own checkpointing is active in evaluation mode, too; it would run a layer a third time.
    replaced: dict[nn.Module, Callable[..., Any]] = {
        module: module._checkpoint_wrapped_module.__call__
        for module in model.modules()
        if isinstance(module, CheckpointWrapper)
    }
    for layer in layers:
        replaced[layer] = _recomputed_forward(layer, begin, differentiate)
    own = {module: module.__dict__.get("forward") for module in replaced}
    try:
        for module, forward in replaced.items():
            module.forward = forward
        yield
    finally:
        for module, forward in own.items():
            if forward is not None:
                module.forward = forward
            else:
                module.__dict__.pop("forward", None)


def _recomputed_forward(
    layer: nn.Module, begin: Callable[[nn.Module], None], differentiate: Differentiate
) -> Callable[..., Any]:
    original = layer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        values, names = [*args, *kwargs.values()], list(kwargs)
        places = [place for place, value in enumerate(values) if isinstance(value, Tensor) and value.requires_grad]
        # Without an input that has a gradient, outputs would have none; a dictionary or list may take states, and their
        # gradients, past the outputs to other layers (Gemma 3n's shared keys and values).
        shares = any(isinstance(value, (dict, list)) or _has_gradients(value) for value in values)
        if not torch.is_grad_enabled() or not places or shares:
            return original(*args, **kwargs)
        begin(layer)
        inputs = [values[place] for place in places]
        for place in places:
            values[place] = None
        autocast = _autocast_like_now(inputs[0].device.type)
        call = _Call(layer, original, values, names, places, differentiate, autocast)
        outputs = _Recomputed.apply(call, *inputs)
        assert call.shape is not None
        return tree_unflatten(list(outputs), call.shape)

    return forward


def _has_gradients(value: Any) -> bool:
    """Return whether a nested argument holds tensors that have gradients."""
    return isinstance(value, tuple) and any(
        isinstance(each, Tensor) and each.requires_grad for each in tree_flatten(value)[0]
    )


def _autocast_like_now(device: str) -> Callable[[], AbstractContextManager[Any]]:
    """Return what brings back the precision in force now: a backward on a device has a thread of its own."""
    dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
    cached = torch.is_autocast_cache_enabled()
    return lambda: torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=cached)


@dataclass
class _Call:
    """A call of a layer.

    Attributes:
        layer: the layer.
        forward: its own.
        values: all arguments, None in place of those that have a gradient.
        names: of the last ones, which are given by name.
        places: of those that have a gradient.
        differentiate: what the backward calls.
        autocast: the precision of the call.
        shape: how the outputs of its last run were nested.
    """

    layer: nn.Module
    forward: Callable[..., Any]
    values: list[Any]
    names: list[str]
    places: list[int]
    differentiate: Differentiate
    autocast: Callable[[], AbstractContextManager[Any]]
    shape: TreeSpec | None = None

    def run(self, inputs: Sequence[Tensor]) -> list[Any]:
        """Return the outputs of the layer, not nested."""
        values = list(self.values)
        for place, value in zip(self.places, inputs, strict=True):
            values[place] = value
        named = len(values) - len(self.names)
        kwargs = dict(zip(self.names, values[named:], strict=True))
        outputs, self.shape = tree_flatten(self.forward(*values[:named], **kwargs))
        return outputs


class _Recomputed(torch.autograd.Function):
    """A layer that is run again in the backward."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *inputs: Tensor) -> tuple[Any, ...]:
        ctx.call = call
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)
        return tuple(call.run(inputs))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        inputs = [value.detach().requires_grad_() for value in ctx.saved_tensors]
        wanted = [place for place, gradient in enumerate(gradients) if gradient is not None]
        if not wanted:
            return (None, *[None] * len(inputs))

        def run() -> list[Tensor]:
            with torch.enable_grad(), call.autocast():
                outputs = call.run(inputs)
            return [outputs[place] for place in wanted]

        given = [gradient for gradient in gradients if gradient is not None]
        return (None, *call.differentiate(call.layer, run, inputs, given))
