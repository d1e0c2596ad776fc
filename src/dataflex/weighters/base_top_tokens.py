"""Shared part of the weighters that keep the tokens with the largest scores."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dataflex import exactly

if TYPE_CHECKING:
    from torch import Tensor


def top_weights(scores: Tensor, trained: Tensor, share: float, *, rounded_up: bool = False) -> Tensor:
    """Return N / K for the K tokens of the largest scores in each row, and 0 for the others, (m, T).

    Of equal scores the first are kept. K is the share of N, in whole tokens, and at least 1.

    Args:
        scores: scores of the tokens, finite, (m, T).
        trained: mask of the trained tokens, (m, T). N counts them in each row.
        share: share of the trained tokens that are kept.
        rounded_up: whether K is rounded up instead of down.
    """
    import torch

    counts = trained.sum(1, keepdim=True)
    # Whole numbers, because products of floating-point numbers are rounded: 0.07 * 100 is above 7. A denominator of at
    # most 1e9 keeps the products below 2^63. A share of up to nine decimals stays exact.
    part = exactly(share).limit_denominator(10**9)
    products = counts * part.numerator + (part.denominator - 1 if rounded_up else 0)
    kept = products.div(part.denominator, rounding_mode="floor").clamp(min=1)
    order = scores.masked_fill(~trained, -torch.inf).argsort(dim=1, descending=True, stable=True)
    places = torch.arange(scores.shape[1], device=scores.device)
    first = (places < kept.minimum(counts)).to(scores.dtype)
    return torch.zeros_like(scores).scatter_(1, order, first) * (counts.to(scores.dtype) / kept)
