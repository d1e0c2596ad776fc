"""Distance between the model's predicted distribution and the token, for each token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from dataflex.api.measurement import register_measurement
from dataflex.probe.losses import TokenMeans

if TYPE_CHECKING:
    from torch import Tensor


@register_measurement("error_norms")
@dataclass(frozen=True)
class ErrorNorms(TokenMeans):
    """Each sample's token mean of ||softmax - one-hot||_2, shape (n,); NaN for a sample without a trained token.

    Example:
        Two equally likely tokens, of which the first is the label:

        >>> import torch
        >>> from dataflex import ErrorNorms
        >>> ErrorNorms().token_values(torch.tensor([[0.0, 0.0]]), torch.tensor([0]))
        tensor([0.7071])
    """

    quantity: ClassVar[str] = "error norm"

    def token_values(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return ||softmax - one-hot||_2 of every position."""
        from dataflex.probe.head import error_norm

        return error_norm(logits, labels)
