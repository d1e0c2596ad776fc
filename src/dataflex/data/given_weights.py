"""Token weights that the data gives: one value for each trained token of each sample, in little memory."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dataflex.data.sampling import IndexArray

_CODES = 256
"""Number of distinct weights up to which a weight takes one byte."""


@dataclass(frozen=True)
class GivenWeights:
    """Weights of the trained tokens of N samples.

    The trained tokens of a sample are the positions whose shifted label counts, from left to right.

    Attributes:
        codes: the number in ``levels`` of each weight, or the weights themselves, sample after sample, shape (m,).
        levels: the distinct weights, float32; None if ``codes`` holds the weights.
        ends: for each sample, the index after its last weight, shape (N,).
        scale: factor of all weights.
        source: the parameters that the weights depend on, as JSON.

    Example:
        >>> import numpy as np
        >>> from dataflex.data.given_weights import GivenWeights
        >>> weights = GivenWeights.of(np.array([1, 0.5, 0.5], np.float32), np.array([1, 2]))
        >>> [row.tolist() for row in weights.rows(np.array([1, 0]))]
        [[0.5, 0.5], [1.0]]
    """

    codes: NDArray[np.uint8] | NDArray[np.float32]
    levels: NDArray[np.float32] | None
    ends: IndexArray
    scale: float = 1.0
    source: str = ""

    @classmethod
    def of(
        cls, values: NDArray[np.float32], counts: IndexArray, normalized: bool = False, source: str = ""
    ) -> GivenWeights:
        """Return the weights.

        Args:
            values: the weights of all trained tokens, sample after sample, shape (m,). If normalized, some are above 0.
            counts: number of trained tokens of each sample, shape (N,), with sum m.
            normalized: whether the weights are divided by their mean.
            source: the parameters that the weights depend on, as JSON.
        """
        ends = np.cumsum(counts, dtype=np.int64)
        assert values.size == (ends[-1] if ends.size else 0)
        scale = 1.0 / float(values.mean(dtype=np.float64)) if normalized else 1.0
        levels = np.unique(values)
        if levels.size > _CODES:
            return cls(values, None, ends, scale, source)
        return cls(np.searchsorted(levels, values).astype(np.uint8), levels, ends, scale, source)

    @property
    def digest(self) -> str:
        """A digest of all weights, before they are scaled."""
        digest = hashlib.sha256(np.ascontiguousarray(self.ends).data)
        for part in (self.codes, self.levels):
            digest.update(b"" if part is None else np.ascontiguousarray(part).data)
        return digest.hexdigest()

    def rows(self, indices: IndexArray) -> list[NDArray[np.float32]]:
        """Return the weights of the trained tokens of each sample."""
        return [self._part(int(self.ends[i - 1]) if i else 0, int(self.ends[i])) for i in indices.tolist()]

    def _part(self, begin: int, end: int) -> NDArray[np.float32]:
        part = self.codes[begin:end]
        values = part if self.levels is None else self.levels[part]
        return (values * np.float32(self.scale)).astype(np.float32, copy=False)


def joined(parts: Sequence[tuple[NDArray[np.float32], IndexArray]]) -> tuple[NDArray[np.float32], IndexArray]:
    """Return the concatenation of pairs of weights and numbers of trained tokens."""
    return np.concatenate([values for values, _ in parts]), np.concatenate([counts for _, counts in parts])
