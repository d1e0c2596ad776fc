"""Recompute layers in a gradient batch, so that it stores no more activations than a training step.

Transformers recomputes layers in training mode only, but a probe runs the model in evaluation mode. Reentrant
checkpointing, LLaMA-Factory's default, does not support ``torch.autograd.grad`` for layer outputs. So this module
replaces the forward of every layer that the training recomputes. The forward pass runs the layer without a graph and
stores the layer's inputs. The backward pass runs the layer again with a graph, and differentiates that graph at once.
Hooks inside a layer see both runs. They act in the second run, the only one with gradients, so the tensors that they
store exist for one layer at a time.

Only the ``forward`` of a layer is replaced, not its ``__call__``. The hooks by which FSDP and ZeRO-3 gather a layer's
parameters therefore stay outside. The hooks of modules inside the layer run in both runs, as under any other activation
checkpointing.
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
"""Runs a layer with a graph and returns the outputs that have a gradient."""

Differentiate = Callable[[nn.Module, Run, list[Tensor], list[Tensor]], list[Tensor | None]]
"""Returns the gradients of a layer's inputs, given the layer, its run, its inputs and the gradients of its outputs."""


def recomputed_layers(model: nn.Module) -> list[nn.Module]:
    """Return the outermost layers of a model that its training recomputes.

    The list is empty if the training stores all activations, or if the model recomputes by other code than that of
    Transformers' ``GradientCheckpointingLayer`` or PyTorch's ``CheckpointWrapper``. A layer that contains FSDP modules
    is left out: FSDP frees gathered parameters at the end of the backward pass that uses them, and a recomputation is a
    backward pass inside another one.
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
    """Recompute layers in the backward pass while the context is open.

    Args:
        model: the model that holds the layers.
        layers: the layers, from :func:`recomputed_layers`.
        begin: called before the first run of a layer.
        differentiate: called in the backward pass of a layer.
    """
    # CheckpointWrapper, which FSDP uses, recomputes in evaluation mode, too, and would run each layer a third time. So
    # its forward calls the wrapped layer directly.
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
    """Return a forward for the layer that stores the inputs alone and runs the layer again in the backward pass."""
    original = layer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        values, names = [*args, *kwargs.values()], list(kwargs)
        places = [place for place, value in enumerate(values) if isinstance(value, Tensor) and value.requires_grad]
        # Without an input that requires a gradient, the outputs of the autograd function would require none. A
        # dictionary or list may carry states and their gradients to other layers past the outputs (Gemma 3n's shared
        # keys and values). Such layers run as they are.
        shares = any(isinstance(value, (dict, list)) or _has_gradients(value) for value in values)
        if not torch.is_grad_enabled() or not places or shares:
            return original(*args, **kwargs)
        begin(layer)
        inputs = [values[place] for place in places]
        for place in places:
            values[place] = None  # save_for_backward stores these inputs; the call must not hold them, too
        autocast = _autocast_like_now(inputs[0].device.type)
        call = _Call(layer, original, values, names, places, differentiate, autocast)
        outputs = _Recomputed.apply(call, *inputs)
        assert call.shape is not None
        return tree_unflatten(list(outputs), call.shape)

    return forward


def _has_gradients(value: Any) -> bool:
    """Return whether a tuple holds, at any depth, tensors that require a gradient."""
    return isinstance(value, tuple) and any(
        isinstance(each, Tensor) and each.requires_grad for each in tree_flatten(value)[0]
    )


def _autocast_like_now(device: str) -> Callable[[], AbstractContextManager[Any]]:
    """Return a function that restores the current autocast state: a device runs backward passes in another thread."""
    dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
    cached = torch.is_autocast_cache_enabled()
    return lambda: torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=cached)


@dataclass
class _Call:
    """One call of a layer.

    Attributes:
        layer: the layer.
        forward: the layer's original forward.
        values: all arguments, with None instead of the tensors that require a gradient.
        names: names of the keyword arguments, which are the last of ``values``.
        places: indices in ``values`` of the tensors that require a gradient.
        differentiate: function that the backward pass calls.
        autocast: restores the precision of the call.
        shape: nesting of the outputs of the last run.
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
        """Return the outputs of the layer as a flat list."""
        values = list(self.values)
        for place, value in zip(self.places, inputs, strict=True):
            values[place] = value
        named = len(values) - len(self.names)
        kwargs = dict(zip(self.names, values[named:], strict=True))
        outputs, self.shape = tree_flatten(self.forward(*values[:named], **kwargs))
        return outputs


class _Recomputed(torch.autograd.Function):
    """Layer that runs again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *inputs: Tensor) -> tuple[Any, ...]:
        ctx.call = call
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)  # an output without a gradient gives None, and is left out of the backward
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
