"""Random linear maps from a gradient of P numbers to k: inner products are kept in expectation.

``count`` is a count sketch in blocks: a parameter's gradient is cut into blocks of k, every number gets a random sign,
every block a random rotation, and the blocks are added up. Each number is touched once. The variance of an inner
product over seeds is

    (|x|^2 |y|^2 + <x, y>^2 - 2 sum_i x_i^2 y_i^2) / k,

that of a dense Rademacher projection, or less (two numbers of one block never meet).
``rademacher`` is that dense projection, entries of sign / sqrt(k), made block by block: P x k operations, for
comparison with published numbers. ``kronecker`` projects a layer's input and output gradient before they are multiplied
(LoGra, Choe et al. 2024), which is linear in the gradient, so it serves only without a preconditioner. ``identity``
keeps everything.

All randomness is a function of (seed, parameter name, place in the parameter): independent of batches, processes and
sharding. Sums are in float32 (float64 where the gradients are).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import Tensor

from dataflex.api.probe import GradientSettings
from dataflex.data.rng import key_of
from dataflex.errors import ComponentError
from dataflex.probe.layers import Contribution, Lookup, Outer, Whole, at_least_float32, product

_DENSE_BLOCK = 4096


class Projection(ABC):
    """Adds pieces of per-sample gradients to features.

    Args:
        dim: length of a feature, k.
        seed: of the map.
        device: where the features are.
    """

    def __init__(self, dim: int, seed: int, device: torch.device) -> None:
        self.dim, self.seed, self.device = dim, seed, device
        self.width = dim
        """Columns of what :meth:`add` adds to."""

    def folded(self, sums: Tensor) -> Tensor:
        """Return the features, (B, k), when everything has been added to ``sums``."""
        return sums

    @abstractmethod
    def add(self, out: Tensor, name: str, start: int, values: Tensor, total: int) -> None:
        """Add the map of a piece of one parameter's gradients to ``out``.

        Args:
            out: (B, width), changed in place.
            name: the parameter.
            start: number of the piece's first element in the parameter, flattened.
            values: the piece, (B, n); may be overwritten.
            total: elements of the parameter.
        """


class CountProjection(Projection):
    """Signs and rotations of blocks of k; see the module's text."""

    def __init__(self, dim: int, seed: int, device: torch.device) -> None:
        super().__init__(dim, seed, device)
        self.width = 2 * dim  # a rotated block is added in one piece, and what runs over the end is folded back
        self._tables: dict[str, tuple[Tensor, Tensor, list[int]]] = {}

    def add(self, out: Tensor, name: str, start: int, values: Tensor, total: int) -> None:
        """Add a piece: block by block in the processor's cache, all blocks together on an accelerator."""
        signs, rotations, numbers = self._table(name, total)
        first, stop = start // self.dim, start + values.shape[1]
        if self.device.type != "cpu":
            blocks = slice(first, -(-stop // self.dim))
            values *= signs[start:stop]
            out[:, : self.dim] += rotated_sum(values, start - first * self.dim, rotations[blocks], self.dim)
            return
        values *= signs[start:stop]
        for block in range(first, -(-stop // self.dim)):
            low, high = max(start, block * self.dim), min(stop, (block + 1) * self.dim)
            begin = (low - block * self.dim + numbers[block]) % self.dim
            out[:, begin : begin + high - low] += values[:, low - start : high - start]

    def folded(self, sums: Tensor) -> Tensor:
        """Return the features, (B, k)."""
        return sums[:, : self.dim] + sums[:, self.dim :]

    def _table(self, name: str, total: int) -> tuple[Tensor, Tensor, list[int]]:
        """Return a parameter's signs (int8, one byte for each of its elements) and its blocks' rotations, twice."""
        if name not in self._tables:
            signs = random_signs(total, key_of(self.seed, "sign", name), self.device)
            generator = np.random.Generator(np.random.Philox(key=key_of(self.seed, "rotation", name)))
            rotations = generator.integers(self.dim, size=-(-total // self.dim))
            self._tables[name] = signs, torch.from_numpy(rotations).to(self.device), rotations.tolist()
        return self._tables[name]


def rotated_sum(values: Tensor, lead: int, rotations: Tensor, dim: int) -> Tensor:
    """Return the sum of blocks after rotating each, (B, dim), in a few operations whatever their number.

    Args:
        values: (B, n), already signed.
        lead: place of the first value in the first block.
        rotations: of the blocks the values lie in, (J,).
        dim: length of a block.
    """
    number = rotations.shape[0]
    padded = torch.nn.functional.pad(values, (lead, number * dim - lead - values.shape[1]))
    places = torch.arange(dim, device=values.device)
    source = (places - rotations.unsqueeze(1)) % dim
    blocks = padded.view(-1, number, dim)
    return blocks.gather(2, source.expand(blocks.shape)).sum(1)


class RademacherProjection(Projection):
    """A dense projection; its blocks are drawn again at every use, as P x k signs cannot be kept."""

    def add(self, out: Tensor, name: str, start: int, values: Tensor, total: int) -> None:
        """Add a piece, ``4096`` rows of the projection at a time."""
        stop = start + values.shape[1]
        for block in range(start // _DENSE_BLOCK, -(-stop // _DENSE_BLOCK)):
            low, high = max(start, block * _DENSE_BLOCK), min(stop, (block + 1) * _DENSE_BLOCK)
            signs = self._signs(name, block)[low - block * _DENSE_BLOCK : high - block * _DENSE_BLOCK]
            out.addmm_(values[:, low - start : high - start], signs.to(values.dtype), alpha=1 / math.sqrt(self.dim))

    def _signs(self, name: str, block: int) -> Tensor:
        key = key_of(self.seed, "dense", name, block)
        return random_signs(_DENSE_BLOCK * self.dim, key, self.device).view(_DENSE_BLOCK, self.dim)


class IdentityProjection(Projection):
    """The whole gradient, parameter after parameter.

    Args:
        sizes: elements of every parameter, by name, in order.
        device: where the features are.
    """

    def __init__(self, sizes: dict[str, int], device: torch.device) -> None:
        super().__init__(sum(sizes.values()), 0, device)
        ends = np.cumsum(list(sizes.values())).tolist()
        self._begin = {name: end - size for (name, size), end in zip(sizes.items(), ends, strict=True)}

    def add(self, out: Tensor, name: str, start: int, values: Tensor, total: int) -> None:
        """Copy a piece to its place."""
        begin = self._begin[name] + start
        out[:, begin : begin + values.shape[1]] += values


class KroneckerProjection:
    """Projects a layer's inputs to a numbers and its output gradients to b, with a b = k; see the module's text.

    Args:
        dim: length of a feature, k.
        seed: of the map.
        device: where the features are.
    """

    def __init__(self, dim: int, seed: int, device: torch.device) -> None:
        self.dim, self.seed, self.device = dim, seed, device
        self.width = dim
        self.inner = max(size for size in range(1, math.isqrt(dim) + 1) if dim % size == 0)
        self.outer = dim // self.inner
        self._count = CountProjection(dim, seed, device)
        self._drawn: dict[tuple[str, int], Tensor] = {}

    def folded(self, sums: Tensor) -> Tensor:
        """Return the features: what was added up."""
        return sums

    def add_part(self, out: Tensor, name: str, part: Contribution) -> None:
        """Add one use of a parameter to ``out``, (B, k); vectors are count-sketched."""
        if isinstance(part, Whole):
            sums = part.values.new_zeros(part.batch, self._count.width, dtype=out.dtype)
            self._count.add(sums, name, 0, at_least_float32(part.values).clone(), part.columns)
            out += self._count.folded(sums)
            return
        assert isinstance(part, Outer | Lookup)
        gradients = at_least_float32(part.gradients)
        rows = self._projection(f"{name}/rows", part.rows, self.outer)
        columns = self._projection(f"{name}/columns", part.columns, self.inner)
        if isinstance(part, Outer):
            inputs = at_least_float32(part.inputs)
            # One expert of several has a stretch of all the rows.
            left = part.apart(gradients @ rows[part.first : part.first + part.count].to(gradients.dtype))
            right = part.apart(inputs @ columns.to(inputs.dtype))
        else:
            left = rows[part.ids].to(gradients.dtype)
            right = gradients @ columns.to(gradients.dtype)
        out += product(left.transpose(1, 2), right).reshape(out.shape[0], -1)

    def _projection(self, name: str, size: int, dim: int) -> Tensor:
        """Return a (size, dim) matrix of signs / sqrt(dim)."""
        if (name, size) not in self._drawn:
            drawn = random_signs(size * dim, key_of(self.seed, "kronecker", name), self.device)
            self._drawn[name, size] = drawn.view(size, dim).float() / math.sqrt(dim)
        return self._drawn[name, size]


def random_signs(count: int, key: int, device: torch.device) -> Tensor:
    """Return random signs, (count,), int8: a function of ``key`` and ``count`` alone."""
    generator = np.random.Generator(np.random.Philox(key=key))
    bits = np.unpackbits(np.frombuffer(generator.bytes(-(-count // 8)), dtype=np.uint8), count=count)
    return torch.from_numpy(bits.view(np.int8)).to(device).mul_(2).sub_(1)


def make_projection(
    settings: GradientSettings, sizes: dict[str, int], device: torch.device
) -> Projection | KroneckerProjection:
    """Return the projection of ``settings`` for parameters of the given sizes.

    Raises:
        ComponentError: if the feature would be longer than the gradient, or the projection does not go with the
            preconditioner.
    """
    total = sum(sizes.values())
    if settings.projection == "identity":
        return IdentityProjection(sizes, device)
    if settings.dim > total:
        raise ComponentError(
            f"proj_dim: a feature of {settings.dim} numbers is longer than the gradient it stands for ({total} "
            "trainable parameters). Use a smaller proj_dim, or projection: identity."
        )
    if settings.projection == "kronecker":
        if settings.preconditioner != "none":
            raise ComponentError("projection: kronecker works on the gradient itself; it needs preconditioner: none.")
        return KroneckerProjection(settings.dim, settings.seed, device)
    kind = CountProjection if settings.projection == "count" else RademacherProjection
    return kind(settings.dim, settings.seed, device)
