"""Token-mean losses of samples."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from dataflex.api.measurement import MeasuredBatch, Measurement, register_measurement

if TYPE_CHECKING:
    from torch import Tensor


class TokenMeans(Measurement):
    """Base of measurements that average a function of each trained token's logits over the tokens of a sample.

    Example:
        The mean entropy of the model's predictions:

        >>> from dataclasses import dataclass
        >>> import torch
        >>> from dataflex import TokenMeans, register_measurement
        >>> @register_measurement("entropies")
        ... @dataclass(frozen=True)
        ... class Entropies(TokenMeans):
        ...     def token_values(self, logits, labels):
        ...         return torch.distributions.Categorical(logits=logits).entropy()
        >>> Entropies().token_values(torch.zeros(1, 4), torch.tensor([0]))
        tensor([1.3863])
    """

    untrained: ClassVar[float | None] = math.nan

    def token_values(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return one value per position, (n,), from logits (n, V), float32, and labels (n,)."""
        raise NotImplementedError

    def measure(self, batch: MeasuredBatch) -> Tensor:
        """Return the token means, (B,)."""
        return batch.token_means(self.token_values)


@register_measurement("losses")
@dataclass(frozen=True)
class Losses(TokenMeans):
    """The token-mean loss of each sample, shape (n,); NaN for a sample without a trained token.

    Example:
        >>> import torch
        >>> from dataflex import Losses
        >>> Losses().token_values(torch.zeros(1, 4), torch.tensor([0]))
        tensor([1.3863])
    """

    quantity: ClassVar[str] = "loss"

    def token_values(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the cross entropy of every position."""
        from dataflex.probe.head import cross_entropy

        return cross_entropy(logits, labels)
