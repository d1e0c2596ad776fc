"""Hidden states of one layer, caught during the model's own forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dataflex.errors import ComponentError
from dataflex.probe.head import head_of, language_model, replaced_forward


def hidden_states(model: nn.Module, inputs: dict[str, Any], layer: int) -> Tensor:
    """Return the hidden states of one layer, (B, T, H), numbered as in ``output_hidden_states``.

    The head is skipped, and the states of other layers are not stored.

    Args:
        model: the model; its forward runs once.
        inputs: inputs of the model.
        layer: 0 for the token embeddings, 1 for the first layer's output and so on. -1 is the last layer after the
            final normalisation.

    Raises:
        ComponentError: if the model has no such layer.
    """
    number, count = _number_of(model, layer)
    layers = None if number == count else layers_of(model, count)
    found: list[Tensor] = []

    def behind_the_last(apply: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        if number == count:
            found.append(hidden)
        return hidden[..., :1]  # instead of logits, which nobody reads

    def before_the_next(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(args[0] if args else kwargs["hidden_states"])

    with replaced_forward(head_of(model), behind_the_last):
        if layers is None and number < count:  # no single list of layers was found: use the model's own output
            model = language_model(model)  # a value head returns no hidden states
            return model(**inputs, use_cache=False, output_hidden_states=True).hidden_states[number]
        if layers is None:
            model(**inputs, use_cache=False)
            return found[0]
        handle = layers[number].register_forward_pre_hook(before_the_next, with_kwargs=True)
        try:
            model(**inputs, use_cache=False)
        finally:
            handle.remove()
    return found[0]


def _number_of(model: nn.Module, layer: int) -> tuple[int, int]:
    """Return the index of a layer, counted from 0, and the number of layers of the model.

    Raises:
        ComponentError: if the model has no such layer.
    """
    count = int(model.config.get_text_config().num_hidden_layers)
    number = layer if layer >= 0 else count + 1 + layer
    if not 0 <= number <= count:
        raise ComponentError(
            f"layer: the model has {count} layers, so its hidden states are numbered 0 (the embeddings) to {count}, or "
            f"{-count - 1} to -1; got {layer}."
        )
    return number, count


def consumer_of(model: nn.Module, layer: int) -> nn.Module:
    """Return the module of a model whose input is the hidden states of one layer.

    Raises:
        ComponentError: if the model has no such layer, or its list of layers is not found.
    """
    number, count = _number_of(model, layer)
    if number == count:
        return head_of(model)
    layers = layers_of(model, count)
    if layers is None:
        raise ComponentError(
            f"layer: the layers of {type(model).__name__} are not found, so a training step can read only the last "
            f"hidden states (layer: -1); got {layer}."
        )
    return layers[number]


@contextmanager
def watched(consumers: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Pass the hidden states that enter modules to a function, detached; the model's run itself does not change.

    Args:
        consumers: name -> module, from :func:`consumer_of`.
        see: called with the name and the states, (B, T, H), without gradients.
    """

    def shown(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            with torch.no_grad():
                see(name, (args[0] if args else kwargs["hidden_states"]).detach())

        return hook

    with ExitStack() as stack:
        for name, module in consumers.items():
            handle = module.register_forward_pre_hook(shown(name), with_kwargs=True)
            stack.callback(handle.remove)
        yield


def layers_of(model: nn.Module, count: int) -> nn.ModuleList | None:
    """Return the list of a model's ``count`` layers; None if no list or more than one list has that length."""
    named = dict(language_model(model).get_decoder().named_modules())
    lists = [name for name, module in named.items() if isinstance(module, nn.ModuleList) and len(module) == count]
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    return named[outer[0]] if len(outer) == 1 else None
