"""Reducers of per-sample gradients: to a projection of the update direction, its length, or inner products.

A reducer receives the gradients of a batch parameter by parameter, in blocks, which on a CPU stay in the cache. Only
the reduced values are stored.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from dataflex.probe.layers import Contribution, Outer, blocks
from dataflex.probe.preconditioners import NoPreconditioner, Preconditioner
from dataflex.probe.projections import KroneckerProjection, Projection

_CPU_BLOCK = 1 << 21
_DEVICE_BLOCK = 1 << 26
"""Number of elements in a block of gradients, over all samples of a batch.

On a CPU a block stays in the outer cache. Smaller blocks, for the inner caches, lose more than they gain: the product
of each block reads all inputs of its layer again.
"""


class Reducer(ABC):
    """Reduces the gradients of a batch: call :meth:`begin`, :meth:`add` per parameter, then read :attr:`result`."""

    def __init__(self, preconditioner: Preconditioner, device: torch.device) -> None:
        self.preconditioner, self.device = preconditioner, device
        self.batch = 0
        self.block_elements = _CPU_BLOCK if device.type == "cpu" else _DEVICE_BLOCK

    @property
    @abstractmethod
    def result(self) -> Tensor:
        """The result of the batch, (B, ...)."""

    @abstractmethod
    def begin(self, batch: int, dtype: torch.dtype) -> None:
        """Start a batch of ``batch`` samples, with sums in ``dtype``: float32 or float64."""

    @abstractmethod
    def add(self, name: str, parts: list[Contribution]) -> None:
        """Add all uses of one parameter."""

    def gradients(self, name: str, parts: list[Contribution]) -> Iterator[tuple[int, Tensor, int]]:
        """Yield a parameter's gradients in blocks: (index of the first element, (B, n), elements of the parameter)."""
        parts = self.preconditioner.everywhere(name, parts, self.batch, self.device)
        if not parts:
            return
        total = parts[0].rows * parts[0].columns
        for start, gradients in blocks(parts, self.block_elements):
            yield start, gradients, total

    def update_directions(self, name: str, parts: list[Contribution]) -> Iterator[Tensor]:
        """Yield a parameter's directions in blocks, (B, n)."""
        for start, gradients, _ in self.gradients(name, parts):
            yield self.preconditioner(name, start, gradients)


class ProjectionReducer(Reducer):
    """Projected directions; the result is (B, k)."""

    def __init__(
        self, preconditioner: Preconditioner, projection: Projection | KroneckerProjection, device: torch.device
    ) -> None:
        super().__init__(preconditioner, device)
        self.projection = projection

    def begin(self, batch: int, dtype: torch.dtype) -> None:
        """Start with zero features."""
        self.batch = batch
        self._sums = torch.zeros(batch, self.projection.width, dtype=dtype, device=self.device)

    @property
    def result(self) -> Tensor:
        """The features of the batch, (B, k)."""
        return self.projection.folded(self._sums)

    def add(self, name: str, parts: list[Contribution]) -> None:
        """Add a parameter's directions to the features."""
        if isinstance(self.projection, KroneckerProjection):
            for part in parts:
                self.projection.add_part(self._sums, name, part)
            return
        for start, gradients, total in self.gradients(name, parts):
            self.projection.add_directions(self._sums, name, start, gradients, total, self.preconditioner)


class NormReducer(Reducer):
    """Exact squared lengths of the directions; the result is (B,)."""

    def begin(self, batch: int, dtype: torch.dtype) -> None:
        """Start with zero sums."""
        self.batch = batch
        self._squares = torch.zeros(batch, dtype=dtype, device=self.device)

    @property
    def result(self) -> Tensor:
        """The squared lengths, (B,)."""
        return self._squares

    def add(self, name: str, parts: list[Contribution]) -> None:
        """Add a parameter's squares."""
        for values in self.update_directions(name, parts):
            self._squares += values.square().sum(1)


class ProductReducer(Reducer):
    """Exact inner products of the directions of all pairs of samples in a batch; the result is (B, B).

    Without a preconditioner, the products of a matrix product's gradients are computed over tokens if that costs less.
    """

    def begin(self, batch: int, dtype: torch.dtype) -> None:
        """Start with zero sums."""
        self.batch = batch
        self._products = torch.zeros(batch, batch, dtype=dtype, device=self.device)

    @property
    def result(self) -> Tensor:
        """The inner products, (B, B)."""
        return self._products

    def add(self, name: str, parts: list[Contribution]) -> None:
        """Add a parameter's inner products."""
        plain = isinstance(self.preconditioner, NoPreconditioner)
        if plain and len(parts) == 1 and isinstance(parts[0], Outer) and parts[0].small:
            self._products += parts[0].gram()
            return
        for values in self.update_directions(name, parts):
            self._products += values @ values.T
