"""Hidden states of a layer, and the embedding of each sample that is made of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from dataflex.api.measurement import MeasuredBatch, Measurement, register_measurement

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class HiddenStates(Measurement):
    """Base of measurements that are made of one layer's hidden states at every token: define :meth:`reduce`.

    Attributes:
        layer: 0 are the embeddings, 1 the first layer's output and so on; -1 is the last layer behind the final
            normalisation. The numbers are those of Transformers' ``output_hidden_states``.
    """

    layer: int = -1

    quantity: ClassVar[str] = "hidden state"

    def reduce(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Return the values of a batch, (B, ...).

        Args:
            hidden: (B, T, H), float32; anything at padding.
            mask: which positions are tokens and not padding, (B, T), bool. Padding may be on either side.
        """
        raise NotImplementedError

    def measure(self, batch: MeasuredBatch) -> Tensor:
        """Return what :meth:`reduce` makes of the layer's hidden states."""
        return self.reduce(batch.hidden_states(self.layer).float(), batch.mask)


@register_measurement("embeddings")
@dataclass(frozen=True)
class Embeddings(HiddenStates):
    """One vector for each sample: a layer's hidden states pooled over its tokens, shape (n, H).

    Attributes:
        layer: as in :class:`HiddenStates`.
        pooling: ``mean`` of all tokens; ``weighted_mean``, token t of a sample (from 1) with weight t (SGPT,
            Muennighoff 2022); the ``first`` or the ``last`` token. The tokens of a packed row are those of one sample.
        normalize: scale every vector to length 1.
    """

    pooling: Literal["mean", "weighted_mean", "first", "last"] = "mean"
    normalize: bool = True

    def reduce(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Return the pooled hidden states, (B, H)."""
        import torch

        if self.pooling in ("mean", "weighted_mean"):
            weights = mask if self.pooling == "mean" else mask * mask.cumsum(1)
            hidden = hidden.masked_fill(~mask.unsqueeze(-1), 0.0)
            pooled = (hidden * weights.unsqueeze(-1)).sum(1) / weights.sum(1, keepdim=True)
        else:
            numbers = mask.cumsum(1)
            wanted = numbers == (1 if self.pooling == "first" else numbers[:, -1:])
            place = (wanted & mask).int().argmax(1)
            pooled = hidden[torch.arange(len(hidden), device=hidden.device), place]
        return torch.nn.functional.normalize(pooled, dim=-1) if self.normalize else pooled
