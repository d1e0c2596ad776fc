"""Statistics of the weights that the weighters give the trained tokens, by domain and between two logs.

A weight is the product that multiplies a token's loss: the weighters' weights of the sample and of the token. Neither
the coefficients of the domains nor the factors of the mean over samples are part of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dataflex.data.token_loss import IGNORE_INDEX
from dataflex.record.schema import WEIGHT_EDGES, TokenWeights

if TYPE_CHECKING:
    from dataflex.api.component import State

BINS = len(WEIGHT_EDGES) + 1
"""Number of bins of token weights."""
COLUMNS = 2 + BINS
"""Number of values of :func:`weight_columns`."""


def weight_columns(weights: Tensor, labels: Tensor, edges: Tensor) -> Tensor:
    """Return the sum of the weights, of the squared weights, and the number of weights in each bin, of every sample.

    Args:
        weights: weights of the samples, (B,), or of the tokens, (B, T).
        labels: shifted labels, (B, T). Only tokens with a label are counted.
        edges: :data:`WEIGHT_EDGES` on the device of the weights, in the type of the sums.

    Returns:
        Shape (B, :data:`COLUMNS`).
    """
    trained, wide, dtype = labels != IGNORE_INDEX, weights.to(edges), edges.dtype
    members = torch.bucketize(wide, edges).unsqueeze(-1) == torch.arange(BINS, device=edges.device)
    if weights.dim() == 1:
        counts = trained.sum(1, dtype=dtype)
        return torch.stack([wide, wide * wide, *members.to(dtype).unbind(1)], dim=1) * counts.unsqueeze(1)
    wide = torch.where(trained, wide, 0.0)
    bins = (members & trained.unsqueeze(-1)).sum(1, dtype=dtype)
    return torch.cat([wide.sum(1, keepdim=True), (wide * wide).sum(1, keepdim=True), bins], dim=1)


class WeightTotals:
    """Statistics of the token weights of the steps since the last log.

    Args:
        domains: names of the domains.
    """

    def __init__(self, domains: tuple[str, ...]) -> None:
        self._domains = domains
        self._reset()

    def _reset(self) -> None:
        self._steps, self._effective = 0, 0.0
        self._sums: NDArray[np.float64] = np.zeros((len(self._domains), COLUMNS))
        """Sum over the steps of the values of :func:`weight_columns`, by domain."""
        self._of_domains: NDArray[np.float64] = np.zeros(len(self._domains))
        """Sum over the steps of the effective tokens of each domain, (K,)."""

    def add(self, sums: NDArray[np.float64]) -> None:
        """Add an optimizer step in which a weighter acted.

        Args:
            sums: the values of :func:`weight_columns`, summed over the samples of each domain on all processes,
                (K, :data:`COLUMNS`).
        """
        self._steps += 1
        self._sums = self._sums + sums
        self._of_domains = self._of_domains + effective(sums[:, 0], sums[:, 1])
        self._effective += float(effective(*sums[:, :2].sum(0, keepdims=True).T)[0])

    def take(self, step: int) -> TokenWeights | None:
        """Return the statistics, and reset them; None if no weighter acted since the last call.

        Args:
            step: number of optimizer steps done.
        """
        if not self._steps:
            return None
        sums, squares, bins = self._sums[:, 0], self._sums[:, 1], self._sums[:, 2:].astype(np.int64)
        line = TokenWeights(
            step=step,
            steps=self._steps,
            effective_tokens=self._effective,
            tokens=self._named(bins.sum(1)),
            counting=self._named(bins[:, 1:].sum(1)),
            sums=self._named(sums),
            squares=self._named(squares),
            effective=self._named(self._of_domains),
            bins=self._named(bins),
        )
        self._reset()
        return line

    def _named(self, values: NDArray[Any]) -> dict[str, Any]:
        """Return the value of each domain by its name."""
        return dict(zip(self._domains, values.tolist(), strict=True))

    def state_dict(self) -> State:
        """Return the statistics so far, for a checkpoint."""
        return {
            "steps": self._steps,
            "effective": self._effective,
            "sums": self._sums,
            "of_domains": self._of_domains,
        }

    def load_state_dict(self, state: State) -> None:
        """Restore the statistics that :meth:`state_dict` returned."""
        self._steps, self._effective = state["steps"], state["effective"]
        self._sums, self._of_domains = state["sums"], state["of_domains"]


def effective(sums: NDArray[np.float64], squares: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return (sum of weights)^2 / (sum of squared weights), elementwise; 0 if every weight is 0."""
    return np.divide(sums**2, squares, out=np.zeros_like(squares), where=squares > 0)
