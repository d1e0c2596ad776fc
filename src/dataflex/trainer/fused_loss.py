"""Cross entropy of tokens from their hidden states, in chunks, so that the logits of all tokens never exist at once.

For hidden states h (n, H), a head with weight W (V, H) and bias b, and labels y (n,):

    z_t = f(W h_t + b),    l_t = log sum_v exp(z_tv) - z_t,y_t

f stands for the model's operations after the head (:class:`~dataflex.probe.head.AfterHead`). The loss is a weighted sum
of the l_t. There are two ways to its gradient:

- **Coefficients known before** (plain training, weights from data, weights decided in advance): the chunk's gradient
  dz_t = c_t (softmax(z_t) - e_y_t) f'(z_t) is formed beside the chunk's losses. No product is made twice.
- **Coefficients that depend on the losses**: the first pass stores the losses and the log sums, (n,). The backward
  pass computes each chunk's logits again. That is one product with the head in addition to three (two if the head is
  frozen).

Heads other than a plain linear layer, such as one with an adapter, run under activation checkpointing, chunk by chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dataflex.probe.head import AfterHead, wide

Statistic = Callable[[Tensor], Tensor]
"""Function of logits (c, V), float32 or float64, that returns one value per token, (c,), without a gradient."""

CHUNK_BYTES = 1 << 28
"""Size of a chunk's logits."""
_MOST_TOKENS = 4096
"""Most tokens of a chunk. Chunks of fewer logits are not faster when they become longer."""


def chunk_of(vocabulary: int, itemsize: int = 4) -> int:
    """Return the number of tokens of a chunk for a vocabulary size."""
    return max(1, min(_MOST_TOKENS, CHUNK_BYTES // (vocabulary * itemsize)))


@dataclass(frozen=True)
class Chunks:
    """How the logits of a chunk are computed.

    Attributes:
        after: operations after the head.
        dtype: number type of the product with the head; the logits are then converted to float32, or stay float64.
        size: number of tokens of a chunk.
    """

    after: AfterHead
    dtype: torch.dtype
    size: int

    def parts(self, tokens: int) -> list[slice]:
        """Return the chunks of a number of tokens."""
        return [slice(begin, begin + self.size) for begin in range(0, tokens, self.size)]

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the logits of some tokens, (c, V), float32 or float64.

        Args:
            hidden: hidden states, (c, H).
            weight: weight of the head in the number type of the product, (V, H).
            bias: bias of the head, (V,).
        """
        return self.after(wide(F.linear(hidden, weight, bias)))


def _of_labels(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the losses and the log sums of exponentials, both (c,)."""
    sums = torch.logsumexp(logits, 1)
    return sums - logits.gather(1, labels[:, None])[:, 0], sums


def _to_gradient(logits: Tensor, sums: Tensor, labels: Tensor, scale: Tensor, after: AfterHead) -> Tensor:
    """Return the gradient by the head's output of the losses times ``scale``, (c, V). It may overwrite ``logits``."""
    slopes, scale = after.slopes(logits), scale.to(logits)
    gradient = logits.sub_(sums[:, None]).exp_()
    column = labels[:, None]
    gradient.scatter_(1, column, gradient.gather(1, column) - 1)
    if isinstance(slopes, Tensor):
        gradient.mul_(slopes)
    elif slopes != 1:
        scale = scale * slopes
    return gradient.mul_(scale[:, None])


class _HeadGradients:
    """Gradients by the hidden states and by the head, added up chunk by chunk.

    Args:
        hidden: hidden states of all tokens, (n, H).
        weight: weight of the head in the number type of the product, (V, H).
        needed: whether the gradients by the hidden states, the weight and the bias are needed.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, needed: tuple[bool, bool, bool]) -> None:
        self._weight = weight
        self.hidden = torch.empty_like(hidden) if needed[0] else None
        # The sum over chunks is kept in float32 also if the products are in 16 bits.
        sums = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        self.weight = torch.zeros(weight.shape, dtype=sums, device=weight.device) if needed[1] else None
        self.bias = torch.zeros(weight.shape[0], dtype=sums, device=weight.device) if needed[2] else None

    def add(self, part: slice, hidden: Tensor, gradient: Tensor) -> None:
        """Add a chunk.

        Args:
            part: the tokens of the chunk.
            hidden: their hidden states in the number type of the product, (c, H).
            gradient: gradient by the head's output, (c, V).
        """
        if self.bias is not None:
            self.bias += gradient.sum(0)
        gradient = gradient.to(hidden.dtype)
        if self.hidden is not None:
            self.hidden[part] = gradient @ self._weight
        if self.weight is not None and self.weight.dtype == gradient.dtype:
            self.weight.addmm_(gradient.T, hidden)
        elif self.weight is not None:
            self.weight += gradient.T @ hidden

    def results(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the three gradients in the number types of the parameters."""
        return (
            self.hidden,
            None if self.weight is None else self.weight.to(weight.dtype),
            None if self.bias is None or bias is None else self.bias.to(bias.dtype),
        )


class _LaterCoefficients(torch.autograd.Function):
    """Losses of tokens, (n,), whose coefficients are decided afterwards."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        how: Chunks,
        statistic: Statistic | None,
    ) -> tuple[Tensor, Tensor | None]:
        cast, shift = weight.to(how.dtype), None if bias is None else bias.to(how.dtype)
        kind = torch.float64 if how.dtype == torch.float64 else torch.float32
        losses, sums, values = torch.empty(3, labels.numel(), dtype=kind, device=hidden.device)
        for part in how.parts(labels.numel()):
            logits = how.logits(hidden[part].to(how.dtype), cast, shift)
            losses[part], sums[part] = _of_labels(logits, labels[part])
            if statistic is not None:
                values[part] = statistic(logits)
        ctx.save_for_backward(hidden, weight, bias, labels, sums)
        ctx.how = how
        ctx.mark_non_differentiable(values)
        return losses, values

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, sums = ctx.saved_tensors
        how: Chunks = ctx.how
        cast, shift = weight.to(how.dtype), None if bias is None else bias.to(how.dtype)
        found = _HeadGradients(hidden, cast, ctx.needs_input_grad[:3])
        for part in how.parts(labels.numel()):
            chunk = hidden[part].to(how.dtype)
            logits = how.logits(chunk, cast, shift)
            found.add(part, chunk, _to_gradient(logits, sums[part], labels[part], gradient[part], how.after))
        return *found.results(weight, bias), None, None, None


class _KnownCoefficients(torch.autograd.Function):
    """The weighted sum of the losses of tokens, a scalar, and the losses themselves, (n,), without a gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        coefficients: Tensor,
        how: Chunks,
    ) -> tuple[Tensor, Tensor]:
        cast, shift = weight.to(how.dtype), None if bias is None else bias.to(how.dtype)
        kind = torch.float64 if how.dtype == torch.float64 else torch.float32
        losses = torch.empty(labels.numel(), dtype=kind, device=hidden.device)
        found = _HeadGradients(hidden, cast, ctx.needs_input_grad[:3])
        for part in how.parts(labels.numel()):
            chunk = hidden[part].to(how.dtype)
            logits = how.logits(chunk, cast, shift)
            losses[part], sums = _of_labels(logits, labels[part])
            if any(ctx.needs_input_grad):
                found.add(part, chunk, _to_gradient(logits, sums, labels[part], coefficients[part], how.after))
        gradients = found.results(weight, bias)
        ctx.held, ctx.is_spent = [each is not None for each in gradients], False
        ctx.save_for_backward(*(each for each in gradients if each is not None))
        ctx.mark_non_differentiable(losses)
        return (losses * coefficients.to(losses)).sum(), losses

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.is_spent:
            raise RuntimeError("the gradient of a fused loss can be computed only once")
        ctx.is_spent, held = True, iter(ctx.saved_tensors)
        # The loss is divided by a number of tokens outside, so the gradients are multiplied with one factor here. In
        # place, because a second copy of the head's gradient may not fit; they are not needed again.
        return *((next(held).mul_(gradient) if is_held else None) for is_held in ctx.held), None, None, None


def product_dtype(hidden: Tensor) -> torch.dtype:
    """Return the number type of the product of hidden states with the head: that of autocast if it is active."""
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def linear_losses(
    head: torch.nn.Linear,
    hidden: Tensor,
    labels: Tensor,
    after: AfterHead,
    statistic: Statistic | None = None,
    size: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return the loss of each token, (n,), differentiable by the hidden states and the head, and the statistic, (n,).

    Args:
        head: the language-model head.
        hidden: hidden states of the tokens, (n, H).
        labels: labels of the tokens, (n,), all of them counted.
        after: operations after the head.
        statistic: further statistic of the logits, without a gradient. None means that none is computed.
        size: number of tokens of a chunk.
    """
    how = Chunks(after, product_dtype(hidden), size or chunk_of(head.weight.shape[0]))
    losses, values = _LaterCoefficients.apply(hidden, head.weight, head.bias, labels, how, statistic)
    return losses, None if statistic is None else values


def weighted_linear_loss(
    head: torch.nn.Linear,
    hidden: Tensor,
    labels: Tensor,
    coefficients: Tensor,
    after: AfterHead,
    size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the sum of the losses times known coefficients, and the loss of each token, (n,), without a gradient.

    Args:
        head: the language-model head.
        hidden: hidden states of the tokens, (n, H).
        labels: labels of the tokens, (n,), all of them counted.
        coefficients: coefficient of each token, (n,), constant.
        after: operations after the head.
        size: number of tokens of a chunk.
    """
    how = Chunks(after, product_dtype(hidden), size or chunk_of(head.weight.shape[0]))
    total, losses = _KnownCoefficients.apply(hidden, head.weight, head.bias, labels, coefficients, how)
    return total, losses


def checkpointed_losses(
    apply: Callable[[Tensor], Tensor],
    hidden: Tensor,
    labels: Tensor,
    after: AfterHead,
    size: int,
    statistic: Statistic | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return the loss of each token, (n,), of any head that works on each token alone, and the statistic, (n,).

    Args:
        apply: forward of the head, (c, H) -> (c, V).
        hidden: hidden states of the tokens, (n, H).
        labels: labels of the tokens, (n,), all of them counted.
        after: operations after the head.
        size: number of tokens of a chunk.
        statistic: further statistic of the logits, without a gradient. None means that none is computed.
    """

    def of_chunk(part: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = after(wide(apply(part)))
        losses = F.cross_entropy(logits, targets, reduction="none")
        return losses, losses.detach() if statistic is None else statistic(logits.detach())

    # Without tokens there is one empty chunk, so that the result is in the graph.
    parts = zip(hidden.split(size), labels.split(size), strict=True)
    found = [checkpoint(of_chunk, part, targets, use_reentrant=False) for part, targets in parts]
    losses, values = (torch.cat(each) for each in zip(*found, strict=True))
    return losses, None if statistic is None else values
