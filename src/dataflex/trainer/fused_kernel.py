"""GPU kernels for the softmax of a chunk of logits: the losses, and their gradient in place. Needs Triton.

The kernels read the products with the head in their own number type and compute in float32. PyTorch's operations would
pass over the logits about ten times, and need a copy of them in float32. The kernels read them twice and write them
once. No program adds to the result of another, so the same call gives the same bits.

The kernels are tested in Triton's interpreter, and compiled for CUDA devices of compute capability 9.0. They have not
been run or timed on a device. :func:`~dataflex.trainer.fused_loss.works` compares them with PyTorch's operations before
their first use.

Two packages have kernels of this kind. In cut-cross-entropy 25.1.1, programs add to gradients in 16 bits, in an order
that differs from run to run. It takes no bias, has no backward pass for float32 hidden states, and rounds the products
of the label's logit to 16 bits. Liger 0.8.5 computes the logits again for one weight per token, also behind a frozen
head. Its fused loss takes no factor of the logits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dataflex.probe.head import AfterHead

_BLOCK = 4096
"""Logits that a program handles at a time."""


@triton.jit
def _finished(products: tl.tensor, factor: tl.tensor, cap: tl.tensor, CAPPED: tl.constexpr) -> tl.tensor:
    """Return the logits from the products with the head."""
    values = products.to(tl.float32) * factor
    if CAPPED:
        values = cap * (1 - 2 / (tl.exp(2 * values / cap) + 1))  # tanh
    return values


@triton.jit
def _merged(largest: tl.tensor, total: tl.tensor, others_largest: tl.tensor, others_total: tl.tensor) -> tl.tensor:
    """Merge two pairs of a largest logit and a sum of exponentials of differences from it."""
    higher = tl.maximum(largest, others_largest)
    return higher, total * tl.exp(largest - higher) + others_total * tl.exp(others_largest - higher)


@triton.jit
def _losses(
    products: tl.tensor,
    labels: tl.tensor,
    losses: tl.tensor,
    sums: tl.tensor,
    factor: tl.tensor,
    cap: tl.tensor,
    CAPPED: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Store the loss and the log sum of exponentials of one row."""
    row = tl.program_id(0).to(tl.int64)
    products += row * COLUMNS
    places = tl.arange(0, BLOCK)
    # Finite, because the difference of two infinities is not a number.
    largest = tl.full((BLOCK,), -1.0e38, tl.float32)
    totals = tl.full((BLOCK,), 0.0, tl.float32)
    for begin in range(0, COLUMNS, BLOCK):
        inside = begin + places < COLUMNS
        values = _finished(tl.load(products + begin + places, mask=inside, other=0.0), factor, cap, CAPPED)
        values = tl.where(inside, values, -float("inf"))
        higher = tl.maximum(largest, values)
        totals = totals * tl.exp(largest - higher) + tl.exp(values - higher)
        largest = higher
    top, total = tl.reduce((largest, totals), 0, _merged)
    logs = tl.log(total)
    own = _finished(tl.load(products + tl.load(labels + row)), factor, cap, CAPPED)
    tl.store(losses + row, logs - (own - top))
    tl.store(sums + row, logs + top)


@triton.jit
def _gradient(
    products: tl.tensor,
    labels: tl.tensor,
    sums: tl.tensor,
    scale: tl.tensor,
    factor: tl.tensor,
    cap: tl.tensor,
    CAPPED: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Replace the products of one block of one row by the gradient of the losses times ``scale``."""
    row = tl.program_id(0).to(tl.int64)
    places = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = places < COLUMNS
    products += row * COLUMNS + places
    values = _finished(tl.load(products, mask=inside, other=0.0), factor, cap, CAPPED)
    found = tl.exp(values - tl.load(sums + row))
    found = tl.where(places == tl.load(labels + row), found - 1, found) * (tl.load(scale + row) * factor)
    if CAPPED:
        found *= 1 - (values / cap) * (values / cap)
    tl.store(products, found.to(products.dtype.element_ty), mask=inside)


class RowSoftmax:
    """Softmax of the logits of a chunk.

    Args:
        products: products with the head, float32, float16 or bfloat16, (c, V), contiguous.
        labels: labels, (c,).
        sums: log sums of exponentials, float32, (c,). None means that they are computed, and the losses with them.
        after: operations after the head.

    Attributes:
        losses: loss of each token, (c,), if ``sums`` is None.
        sums: log sums of exponentials, (c,).
    """

    def __init__(self, products: Tensor, labels: Tensor, sums: Tensor | None, after: AfterHead) -> None:
        self._products, self._labels = products, labels.contiguous()
        factor = (1.0 if after.factor is None else after.factor) / (1.0 if after.divisor is None else after.divisor)
        self._after = (
            factor,
            1.0 if after.cap is None else after.cap,
            after.cap is not None,
            products.shape[1],
            _BLOCK,
        )
        if sums is not None:
            self.sums = sums.contiguous()
            return
        rows = products.shape[0]
        self.losses, self.sums = torch.empty(2, rows, dtype=torch.float32, device=products.device)
        with torch.cuda.device_of(products):  # Triton starts its kernels on the current device
            _losses[(rows,)](products, self._labels, self.losses, self.sums, *self._after, num_warps=8)

    def gradient(self, scale: Tensor) -> Tensor:
        """Return the gradient by the head's output of the losses times ``scale``, (c, V), in place of the products."""
        rows, columns = self._products.shape
        scale = scale.float().contiguous()
        with torch.cuda.device_of(self._products):
            _gradient[(rows, triton.cdiv(columns, _BLOCK))](
                self._products, self._labels, self.sums, scale, *self._after, num_warps=8
            )
        return self._products
