"""Attention of each token to its prompt in the last layer, read during the model's own forward pass.

With A the attention probabilities of the layer, H its heads and P the tokens of the sample that are not trained on:

    a_t = (1 / H) sum over the heads h of sum over the columns c in P of A_htc

The attention is causal, so only the tokens of P before t add to the sum. For one head, the sum is the output of the
attention for values that are 1 at the columns of P and 0 elsewhere. So the last layer's attention function runs one
more time, without gradients. It gets the queries, keys, mask and settings of its own run, and these values. The sum
therefore has the masks, sliding windows, caps and sinks of the model. It needs no matrix of probabilities that the
attention function does not store itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from dataflex.data.token_loss import IGNORE_INDEX, shifted
from dataflex.errors import ComponentError
from dataflex.probe.hidden_states import layers_of

Attention = Callable[..., tuple[Tensor, Any]]
"""An attention function of Transformers. Its first output has the shape (B, T, H, D)."""


class PromptAttention:
    """Reads the attention of tokens to their prompts in the forward passes of a model.

    Args:
        model: a Hugging Face causal language model.

    Raises:
        ComponentError: if the layers of the model are not found.
    """

    def __init__(self, model: nn.Module) -> None:
        layers = layers_of(model, int(model.config.get_text_config().num_hidden_layers))
        if layers is None:
            raise _unreadable(model, "its layers are not found")
        self.was_read = False
        """Whether a forward pass has been read."""
        self._layer = layers[-1]
        self._forward: Callable[..., Any] = self._layer.forward
        """The layer's forward, without the reading."""
        self._labels: Tensor | None = None
        self._see: Callable[[Tensor], None] = lambda found: None

    @contextmanager
    def read(self, labels: Tensor, see: Callable[[Tensor], None]) -> Iterator[None]:
        """Pass the attention to a function as soon as the last layer has run. The model's output does not change.

        The layer is not read again if a backward pass after the context recomputes it.

        Args:
            labels: labels of the batch before the shift, (B, T). A token with the label -100 belongs to the prompt.
            see: called with the attention, (B, T), float32, without gradients, in [0, 1] up to rounding. Column t is
                that of token t + 1, as in shifted labels. It is 0 for a token that is not trained on.

        Raises:
            ComponentError: if the last layer does not call exactly one attention function of Transformers.
        """
        layer, self._forward = self._layer, self._layer.forward
        own = "forward" in layer.__dict__
        self._labels, self._see = labels, see
        layer.forward = self._read_forward
        try:
            yield
        finally:
            if own:
                layer.forward = self._forward
            else:
                del layer.forward
            self._labels = None

    # Excluded from torch_compile, because attention functions are replaced only while the layer runs.
    @torch.compiler.disable
    def _read_forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer's own forward, and read its attention."""
        assert self._labels is not None
        prompt, trained = self._labels == IGNORE_INDEX, shifted(self._labels) != IGNORE_INDEX
        found: list[Tensor] = []
        with _changed_attention(lambda function: partial(self._attend, function, prompt, found)):
            output = self._forward(*args, **kwargs)
        if len(found) != 1:
            count = len(found) or "no"
            raise _unreadable(self._layer, f"it calls {count} attention functions of Transformers instead of one")
        self.was_read = True
        self._see(nn.functional.pad(found[0][:, 1:], (0, 1)).masked_fill(~trained, 0.0))
        return output

    def _attend(self, function: Attention, prompt: Tensor, found: list[Tensor], *args: Any, **kwargs: Any) -> Any:
        """Return the outputs of an attention function, and add the attention of each row to the prompt to ``found``.

        Args:
            function: the attention function.
            prompt: mask of the prompt, (B, T).
            found: filled with the attention, (B, T), float32.
            args: arguments of the function: module, queries, keys, values (B, heads, T, D), and the rest.
            kwargs: named arguments of the function.
        """
        module, query, key, value, *rest = args
        if value.shape[-2] != prompt.shape[1]:
            why = f"it attends to {value.shape[-2]} positions, and the batch has {prompt.shape[1]}"
            raise _unreadable(self._layer, why)
        marks = prompt.to(value)[:, None, :, None].expand_as(value).contiguous()
        options = {**kwargs, "dropout": 0.0} if "dropout" in kwargs else kwargs
        with torch.no_grad():
            sums = function(module, query, key, marks, *rest, **options)[0]
        found.append(sums[..., 0].float().mean(-1))
        return function(*args, **kwargs)


@contextmanager
def _changed_attention(change: Callable[[Attention], Attention]) -> Iterator[None]:
    """Change the attention functions that the layers of Transformers' models look up while the context is open."""
    original = AttentionInterface.get_interface

    def get_interface(interface: AttentionInterface, name: str, default: Attention) -> Attention:
        return change(original(interface, name, default))

    AttentionInterface.get_interface = get_interface
    try:
        yield
    finally:
        AttentionInterface.get_interface = original


def _unreadable(module: nn.Module, why: str) -> ComponentError:
    """Return the error for a model, or a last layer, whose attention cannot be read."""
    return ComponentError(
        f"the attention to the prompt cannot be read in {type(module).__name__}: {why}. Remove the weighter that reads "
        "it, or train another model."
    )
