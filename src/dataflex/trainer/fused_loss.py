"""Cross entropy of tokens from their hidden states, in chunks, so that the logits of all tokens never exist at once.

For hidden states h (n, H), a head with weight W (V, H) and bias b, and labels y (n,):

    z_t = f(W h_t + b),    l_t = log sum_v exp(z_tv) - z_t,y_t

f stands for the model's operations after the head (:class:`~dataflex.probe.head.AfterHead`). The loss is a weighted sum
of the l_t. Its gradient by the head's output is c_t (softmax(z_t) - e_y_t) f'(z_t) for a token with coefficient c_t.
The products with the head take most of the time, each of them 2 n V H operations. There are three ways:

- **Coefficients known before** (plain training, weights from data, weights decided in advance): the gradient is formed
  beside the losses. There are three products, two if the head is frozen.
- **Coefficients that depend on the losses, frozen head**: the gradient by the hidden states is formed for c_t = 1
  beside the losses. The backward pass multiplies that of token t by c_t. There are two products.
- **Coefficients that depend on the losses, trained head**: the gradient by W sums over tokens, so it has to wait for
  the coefficients. The backward pass computes the logits again. There are four products.

Tokens whose coefficient is 0 take no part in the products of a gradient whose coefficients are known.

On a CUDA device, the kernels of :mod:`~dataflex.trainer.fused_kernel` make the losses and the gradient of a chunk.

Heads other than a plain linear layer, such as one with an adapter, run under activation checkpointing, chunk by chunk.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dataflex.probe.head import AfterHead, wide

logger = logging.getLogger(__name__)

Statistic = Callable[[Tensor], Tensor]
"""Function of logits (c, V), float32 or float64, that returns one value per token, (c,), without a gradient."""


class Softmax(Protocol):
    """Softmax of the logits of a chunk.

    Attributes:
        losses: loss of each token, (c,), unless the log sums were given.
        sums: log sums of exponentials, (c,).
    """

    losses: Tensor
    sums: Tensor

    def gradient(self, scale: Tensor) -> Tensor:
        """Return the gradient by the head's output of the losses times ``scale``, (c, V)."""


Kernel = Callable[[Tensor, Tensor, Tensor | None, AfterHead], Softmax]

CHUNK_BYTES = {"cpu": 1 << 27}
"""Size of a chunk's logits by the type of the device. A processor gains nothing from a larger one."""
_CHUNK_BYTES_ELSEWHERE = 1 << 28
_MOST_TOKENS = 4096
"""Most tokens of a chunk. Chunks of fewer logits are not faster when they become longer."""


def chunk_of(vocabulary: int, kind: str = "cuda", itemsize: int = 4) -> int:
    """Return the number of tokens of a chunk for a vocabulary size and a type of device."""
    return max(1, min(_MOST_TOKENS, CHUNK_BYTES.get(kind, _CHUNK_BYTES_ELSEWHERE) // (vocabulary * itemsize)))


@dataclass(frozen=True)
class Chunks:
    """How the logits of a chunk are computed.

    Attributes:
        after: operations after the head.
        dtype: number type of the product with the head; the logits are then converted to float32, or stay float64.
        size: number of tokens of a chunk.
        is_recorded: whether a gradient may be asked for.
        kernel: makes the softmax of a chunk from products, labels, log sums and the operations after the head. None
            means that PyTorch's operations do.
    """

    after: AfterHead
    dtype: torch.dtype
    size: int
    is_recorded: bool
    kernel: Kernel | None = None

    def parts(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Return chunks of the numbers of some tokens."""
        return tokens.split(self.size) if tokens.numel() else ()


class _Head:
    """The product with a head, chunk by chunk, in memory that all chunks share.

    Fresh memory for every chunk costs a processor about as much time as four passes over the logits.

    Args:
        weight: weight of the head, (V, H).
        bias: bias of the head, (V,).
        tokens: number of all tokens.
        how: the chunks.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, tokens: int, how: Chunks) -> None:
        self.weight, self._how = weight.to(how.dtype), how
        self._bias = None if bias is None else bias.to(how.dtype)
        shape = (min(how.size, tokens), weight.shape[0])
        self._products = torch.empty(shape, dtype=how.dtype, device=weight.device)
        self._logits: Tensor | None = None

    def products(self, hidden: Tensor) -> Tensor:
        """Return the head's output for some tokens, (c, V), which the next call overwrites.

        Args:
            hidden: hidden states in the number type of the product, (c, H).
        """
        products = self._products[: hidden.shape[0]]
        if self._bias is None:
            return torch.mm(hidden, self.weight.T, out=products)
        return torch.addmm(self._bias, hidden, self.weight.T, out=products)

    def logits(self, products: Tensor) -> Tensor:
        """Return the logits, (c, V), float32 or float64, from the head's output."""
        if products.dtype == logits_dtype(products.dtype):
            return self._how.after(products)
        if self._logits is None:
            self._logits = torch.empty_like(self._products, dtype=torch.float32)
        return self._how.after(self._logits[: products.shape[0]].copy_(products))

    def softmax(self, products: Tensor, labels: Tensor, sums: Tensor | None, with_gradient: bool) -> Softmax:
        """Return the softmax of the logits; it overwrites the head's output."""
        after = self._how.after
        if self._how.kernel is not None:
            return self._how.kernel(products, labels, sums, after)
        logits = self.logits(products)
        return _Exponentials(logits, labels, sums, after.slopes(logits) if with_gradient else 1.0)

    def in_products(self, gradient: Tensor) -> Tensor:
        """Return a gradient by the head's output, (c, V), in the number type of the product."""
        if gradient.dtype == self._products.dtype:
            return gradient
        return self._products[: gradient.shape[0]].copy_(gradient)


def logits_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the number type of logits for a number type of products: float64 unchanged, and float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class _Exponentials:
    """Exponentials of the logits of a chunk, in place of these logits.

    Args:
        logits: logits, (c, V), which are overwritten.
        labels: labels, (c,).
        sums: log sums of exponentials, (c,). None means that they are computed, and the losses with them.
        slopes: derivative of the logits by the head's output.

    Attributes:
        losses: loss of each token, (c,), if ``sums`` is None.
        sums: log sums of exponentials, (c,).
    """

    def __init__(self, logits: Tensor, labels: Tensor, sums: Tensor | None, slopes: Tensor | float) -> None:
        self._column, self._slopes = labels[:, None], slopes
        if sums is not None:
            self.sums, self._values, self._totals = sums, logits.sub_(sums[:, None]).exp_(), None
            return
        largest = logits.amax(1)
        picked = logits.sub_(largest[:, None]).gather(1, self._column)[:, 0]
        self._values = logits.exp_()
        self._totals = self._values.sum(1)
        logs = self._totals.log()
        self.losses, self.sums = logs - picked, logs + largest

    def gradient(self, scale: Tensor) -> Tensor:
        """Return the gradient by the head's output of the losses times ``scale``, (c, V), in place of the values."""
        scale = scale.to(self._values)
        if not isinstance(self._slopes, Tensor):
            scale = scale * self._slopes
        gradient = self._values.mul_((scale if self._totals is None else scale / self._totals)[:, None])
        gradient.scatter_add_(1, self._column, -scale[:, None])
        return gradient.mul_(self._slopes) if isinstance(self._slopes, Tensor) else gradient


class _HeadGradients:
    """Gradients by the hidden states and by the head, added up chunk by chunk.

    Args:
        hidden: hidden states of all tokens, (n, H).
        head: the head.
        needed: whether the gradients by the hidden states, the weight and the bias are needed.
    """

    def __init__(self, hidden: Tensor, head: _Head, needed: tuple[bool, bool, bool]) -> None:
        self._head, weight = head, head.weight
        self.hidden = torch.zeros_like(hidden) if needed[0] else None
        # The sum over chunks is kept in float32 also if the products are in 16 bits.
        sums = logits_dtype(hidden.dtype)
        self.weight = torch.zeros(weight.shape, dtype=sums, device=weight.device) if needed[1] else None
        self.bias = torch.zeros(weight.shape[0], dtype=sums, device=weight.device) if needed[2] else None

    def add(self, part: Tensor, hidden: Tensor, gradient: Tensor) -> None:
        """Add a chunk.

        Args:
            part: numbers of the tokens of the chunk, (c,).
            hidden: their hidden states in the number type of the product, (c, H).
            gradient: gradient by the head's output, (c, V).
        """
        if self.bias is not None:
            self.bias += gradient.sum(0, dtype=self.bias.dtype)
        gradient = self._head.in_products(gradient)
        if self.hidden is not None:
            self.hidden[part] = (gradient @ self._head.weight).to(self.hidden.dtype)
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
        head = _Head(weight, bias, labels.numel(), how)
        losses, sums, values = torch.empty(3, labels.numel(), dtype=logits_dtype(how.dtype), device=hidden.device)
        ctx.is_frozen = not any(ctx.needs_input_grad[1:3])
        found = _HeadGradients(hidden, head, (ctx.is_frozen and how.is_recorded, False, False))
        for part in how.parts(torch.arange(labels.numel(), device=hidden.device)):
            chunk = hidden[part].to(how.dtype)
            products = head.products(chunk)
            if statistic is not None:
                values[part] = statistic(head.logits(products))
            done = head.softmax(products, labels[part], None, found.hidden is not None)
            losses[part], sums[part] = done.losses, done.sums
            if found.hidden is not None:
                found.add(part, chunk, done.gradient(torch.ones_like(done.losses)))
        if ctx.is_frozen:
            ctx.save_for_backward(found.hidden)
        else:
            ctx.save_for_backward(hidden, weight, bias, labels, sums)
        ctx.how = how
        ctx.mark_non_differentiable(values)
        return losses, values

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.is_frozen:
            (each,) = ctx.saved_tensors
            return (each * gradient[:, None]).to(each.dtype), None, None, None, None, None
        hidden, weight, bias, labels, sums = ctx.saved_tensors
        how: Chunks = ctx.how
        head = _Head(weight, bias, labels.numel(), how)
        found = _HeadGradients(hidden, head, ctx.needs_input_grad[:3])
        for part in how.parts(gradient.nonzero()[:, 0]):
            chunk = hidden[part].to(how.dtype)
            done = head.softmax(head.products(chunk), labels[part], sums[part], True)
            found.add(part, chunk, done.gradient(gradient[part]))
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
        head = _Head(weight, bias, labels.numel(), how)
        losses = torch.empty(labels.numel(), dtype=logits_dtype(how.dtype), device=hidden.device)
        needed = ctx.needs_input_grad[:3] if how.is_recorded else (False, False, False)
        found = _HeadGradients(hidden, head, needed)
        count = (coefficients != 0) & any(needed)
        for is_counted in (True, False):
            for part in how.parts((count == is_counted).nonzero()[:, 0]):
                chunk = hidden[part].to(how.dtype)
                done = head.softmax(head.products(chunk), labels[part], None, is_counted)
                losses[part] = done.losses
                if is_counted:
                    found.add(part, chunk, done.gradient(coefficients[part]))
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


@functools.cache
def softmax_kernel(device: torch.device) -> Kernel | None:
    """Return the kernel that makes the softmax of a chunk on a device; None if it does not work there."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    from dataflex.trainer.fused_kernel import RowSoftmax

    return RowSoftmax if works(RowSoftmax, device) else None


def works(kernel: Kernel, device: torch.device) -> bool:
    """Return whether a kernel compiles on a device and gives the values of PyTorch's operations; log why not."""
    from triton.errors import TritonError

    products = torch.linspace(-5, 5, 3 * 5000, device=device).view(5000, 3).T.contiguous().bfloat16()
    labels, scale = torch.tensor([0, 17, 4999], device=device), torch.tensor([1.0, 0.0, -2.0], device=device)
    after = AfterHead(factor=0.5, cap=2.0)
    logits = after(products.float())
    expected = _Exponentials(logits, labels, None, after.slopes(logits))
    losses, gradient = expected.losses, expected.gradient(scale)
    try:
        found = kernel(products, labels, None, after)
        is_equal = torch.allclose(found.losses, losses, rtol=1e-4, atol=1e-4)
        is_equal &= torch.allclose(found.gradient(scale).float(), gradient, rtol=1e-2, atol=1e-6)
    # Triton compiles its launcher with a C compiler, which may be missing.
    except (TritonError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        reason = str(error)
    else:
        if is_equal:
            return True
        reason = "its results are wrong"
    logger.warning("The fused loss is computed without its kernel, which takes longer: %s", reason)
    return False


def _chunks(head: torch.nn.Linear, hidden: Tensor, after: AfterHead, size: int | None) -> Chunks:
    """Return how the logits of a head are computed."""
    dtype = product_dtype(hidden)
    kernel = None if dtype == torch.float64 else softmax_kernel(hidden.device)
    itemsize = (logits_dtype(dtype) if kernel is None else dtype).itemsize
    size = size or chunk_of(head.weight.shape[0], hidden.device.type, itemsize)
    return Chunks(after, dtype, size, torch.is_grad_enabled(), kernel)


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
    how = _chunks(head, hidden, after, size)
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
    how = _chunks(head, hidden, after, size)
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
