"""Random linear maps from a gradient of P numbers to k: inner products are kept in expectation.

``count`` is a count sketch in blocks: a parameter's gradient is cut into blocks of k, every number gets a random sign,
every block a random rotation, and the blocks are added up. Each number is touched once. The variance of an inner
product over seeds is

    (|x|^2 |y|^2 + <x, y>^2 - 2 sum_i x_i^2 y_i^2) / k,

that of a dense Rademacher projection, or less (two numbers of one block never meet).
``rademacher`` is that dense projection, entries of sign / sqrt(k), made block by block: P x k operations, for
comparison with published numbers. ``kronecker`` makes count sketches of a layer's inputs and output gradients before it
multiplies them (LoGra, Choe et al. 2024, with count sketches instead of dense matrices). The result is linear in the
gradient, so it serves only without a preconditioner. ``identity`` keeps every element.

All randomness is a hash of (seed, parameter name, place in the parameter): independent of batches, processes, sharding
and device. Sums are in float32 (float64 where the gradients are).
"""

from __future__ import annotations

import importlib.util
import logging
import math
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dataflex.api.probe import GradientSettings
from dataflex.data.rng import key_of
from dataflex.errors import ComponentError
from dataflex.probe.layers import Contribution, Lookup, Outer, Whole, at_least_float32, product
from dataflex.probe.moments import Moments
from dataflex.probe.preconditioners import AdamPreconditioner, AdamTerms, NoPreconditioner, Preconditioner
from dataflex.probe.signs import SignTables, random_numbers, random_signs

if TYPE_CHECKING:  # needs Numba, which not every environment has
    from dataflex.probe.fused_cpu import BlockSums

logger = logging.getLogger(__name__)

_DENSE_ROWS = 4096

MAP_VERSION = 3
"""Of the maps that settings stand for; features of two versions are not compared."""


Sketch = Callable[[Tensor, int, int, int, AdamTerms | None], Tensor]
"""Makes a count sketch of gradients, given their start, a key, its length and terms; see ``fused.sketch``."""


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

    def add_directions(
        self, out: Tensor, name: str, start: int, gradients: Tensor, total: int, preconditioner: Preconditioner
    ) -> None:
        """Add the map of a piece of one parameter's directions to ``out``; see :meth:`add`.

        Args:
            out: (B, width), changed in place.
            name: the parameter.
            start: number of the piece's first element in the parameter, flattened.
            gradients: the piece before it is preconditioned, (B, n); may be overwritten.
            total: elements of the parameter.
            preconditioner: makes directions of gradients.
        """
        self.add(out, name, start, preconditioner(name, start, gradients), total)


class CountProjection(Projection):
    """Signs and rotations of blocks of k; see the module's text.

    Args:
        dim: length of a feature, k.
        seed: of the map.
        device: where the features are.
        tables: where signs are kept on the CPU.
    """

    def __init__(self, dim: int, seed: int, device: torch.device, tables: SignTables | None = None) -> None:
        super().__init__(dim, seed, device)
        self.width = 2 * dim  # a rotated block is added in one piece, and what runs over the end is folded back
        self._tables = SignTables() if tables is None else tables
        self._rotations: dict[str, Tensor] = {}
        self._fused = block_sums() if device.type == "cpu" else None

    def add(self, out: Tensor, name: str, start: int, values: Tensor, total: int) -> None:
        """Add a piece."""
        self.add_directions(out, name, start, values, total, NoPreconditioner())

    def add_directions(
        self, out: Tensor, name: str, start: int, gradients: Tensor, total: int, preconditioner: Preconditioner
    ) -> None:
        """Add a piece's directions: block by block in the processor's cache, all blocks together on an accelerator."""
        if self.device.type == "cpu":
            self._add_blocks(out, name, start, gradients, total, preconditioner)
            return
        key = self._key(name)
        kernel = fused_sketch(self.device) if gradients.dtype != torch.float64 else None
        if kernel is not None:
            out[:, : self.dim] += kernel(gradients, start, key, self.dim, preconditioner.terms(name))
        else:
            directions = preconditioner(name, start, gradients)
            out[:, : self.dim] += plain_sketch(directions, start, key, self.dim)

    def _add_blocks(
        self, out: Tensor, name: str, start: int, gradients: Tensor, total: int, preconditioner: Preconditioner
    ) -> None:
        stop = start + gradients.shape[1]
        first, last, blocks = start // self.dim, -(-stop // self.dim), -(-total // self.dim)
        key = self._key(name)
        if name not in self._rotations:
            self._rotations[name] = random_numbers(key, 0, blocks, self.dim, self.device)
        rotations = self._rotations[name][first:last]
        rows = self._tables.rows(key, first, last - first, self.dim, blocks)
        terms = preconditioner.terms(name)
        # The kernel goes along the rows of a sketch, so it is slow for many short rows.
        if self._fused is not None and self._fused.serves(gradients, terms) and gradients.shape[0] < self.dim:
            self._fused.add(out, gradients, start, rows, rotations, terms)
            return
        signs = rows.reshape(-1)[start - first * self.dim : stop - first * self.dim].to(gradients.dtype)
        add = preconditioner.signed(name, start, gradients, signs)
        for block, rotation in zip(range(first, last), rotations.tolist(), strict=True):
            low, high = max(start, block * self.dim), min(stop, (block + 1) * self.dim)
            begin = (low - block * self.dim + rotation) % self.dim
            add(out[:, begin : begin + high - low], slice(low - start, high - start))

    def folded(self, sums: Tensor) -> Tensor:
        """Return the features, (B, k)."""
        return sums[:, : self.dim] + sums[:, self.dim :]

    def of(self, name: str, start: int, vectors: Tensor, total: int) -> Tensor:
        """Return the sketches of parts of vectors: (..., k).

        Args:
            name: of the map.
            start: number of the parts' first element in their vectors.
            vectors: float32 or float64, (..., n).
            total: length of a whole vector.
        """
        flat = vectors.reshape(-1, vectors.shape[-1])
        sums = flat.new_zeros(flat.shape[0], self.width)
        # Adding may overwrite its argument, and a model's own tensors are behind the vectors.
        self.add(sums, name, start, flat if self.device.type == "cpu" else flat.clone(), total)
        return self.folded(sums).view(*vectors.shape[:-1], self.dim)

    def of_units(self, name: str, places: Tensor, total: int) -> Tensor:
        """Return the sketches of the unit vectors with 1 at the given places: float32, (..., k).

        Args:
            name: of the map.
            places: int64, (...).
            total: length of a vector.
        """
        key, blocks = self._key(name), -(-total // self.dim)
        signs = random_signs(key, 0, blocks, self.dim, self.device).view(-1)
        rotations = random_numbers(key, 0, blocks, self.dim, self.device)
        out = torch.zeros(*places.shape, self.dim, device=self.device)
        targets = (places + rotations[places // self.dim]) % self.dim
        return out.scatter_(-1, targets.unsqueeze(-1), signs[places].float().unsqueeze(-1))

    def _key(self, name: str) -> int:
        return key_of(self.seed, "count", name)


def plain_sketch(values: Tensor, start: int, key: int, dim: int) -> Tensor:
    """Return the count sketch of a piece of directions in a few operations, whatever the number of blocks: (B, dim).

    Args:
        values: the piece, (B, n); overwritten.
        start: number of its first element in the parameter.
        key: of the parameter's signs and rotations.
        dim: length of a sketch.
    """
    stop, first = start + values.shape[1], start // dim
    number = -(-stop // dim) - first
    signs = random_signs(key, first, number, dim, values.device)
    values *= signs.view(-1)[start - first * dim : stop - first * dim]
    return rotated_sum(values, start - first * dim, random_numbers(key, first, number, dim, values.device), dim)


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
    """A dense projection; its rows are made again at every use, as P x k signs cannot be kept."""

    def add(self, out: Tensor, name: str, start: int, values: Tensor, total: int) -> None:
        """Add a piece, ``4096`` rows of the projection at a time."""
        key = key_of(self.seed, "dense", name)
        for begin in range(0, values.shape[1], _DENSE_ROWS):
            part = values[:, begin : begin + _DENSE_ROWS]
            signs = random_signs(key, start + begin, part.shape[1], self.dim, self.device)
            out.addmm_(part, signs.to(values.dtype), alpha=1 / math.sqrt(self.dim))


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
    """Sketches a layer's inputs to a elements and its output gradients to b, with a b = k; see the module's text.

    Both sketches are count sketches. The variance of an inner product of sketches of a elements is at most that of a
    dense projection to a elements, and a count sketch goes over its argument once instead of a times.

    Args:
        dim: length of a feature, k.
        seed: of the map.
        device: where the features are.
    """

    def __init__(self, dim: int, seed: int, device: torch.device) -> None:
        self.dim = dim
        self.width = dim
        self.inner = max(size for size in range(1, math.isqrt(dim) + 1) if dim % size == 0)
        self.outer = dim // self.inner
        self._whole, self._columns, self._rows = (
            CountProjection(size, seed, device) for size in (dim, self.inner, self.outer)
        )

    def folded(self, sums: Tensor) -> Tensor:
        """Return the features, which are the sums themselves."""
        return sums

    def add_part(self, out: Tensor, name: str, part: Contribution) -> None:
        """Add one use of a parameter to ``out``, (B, k). The gradient of a vector is count-sketched to k elements."""
        if isinstance(part, Whole):
            out += self._whole.of(name, 0, at_least_float32(part.values), part.columns)
            return
        assert isinstance(part, Outer | Lookup)
        rows, columns = f"{name}/rows", f"{name}/columns"
        gradients = at_least_float32(part.gradients)
        if isinstance(part, Outer):
            # One expert of several has a part of the rows, which starts at the row ``first``.
            left = part.apart(self._rows.of(rows, part.first, gradients, part.rows))
            right = part.apart(self._columns.of(columns, 0, at_least_float32(part.inputs), part.columns))
        else:
            left = self._rows.of_units(rows, part.ids, part.rows).to(gradients.dtype)
            right = self._columns.of(columns, 0, gradients, part.columns)
        out += product(left.transpose(1, 2), right).reshape(out.shape[0], -1)


def block_sums() -> BlockSums | None:
    """Return the kernel that adds sketches in one pass on a processor, or None without Numba."""
    if importlib.util.find_spec("numba") is None:
        return None
    from dataflex.probe.fused_cpu import BlockSums

    return BlockSums(torch.get_num_threads())


@cache
def fused_sketch(device: torch.device) -> Sketch | None:
    """Return the kernel that makes a sketch in one pass on a device, or None if it does not work there."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    from dataflex.probe.fused import sketch

    return sketch if works(sketch, device) else None


def works(sketch: Sketch, device: torch.device) -> bool:
    """Say whether a kernel can be compiled on a device and gives the numbers of :func:`plain_sketch`; log why not."""
    from triton.errors import TritonError

    values = torch.linspace(-1, 1, 300, device=device).view(3, 100)
    moments = Moments(values[1], values[2].square(), 1, (0.9, 0.99), 1e-8)
    adam = AdamPreconditioner({"": moments}, less=False)
    try:
        found = sketch(values[:, 7:], 7, 1, 32, adam.terms(""))
    except (TritonError, OSError, RuntimeError, subprocess.SubprocessError) as error:  # no compiler for its launcher
        reason = str(error)
    else:
        expected = plain_sketch(adam("", 7, values[:, 7:].clone()), 7, 1, 32)
        if torch.allclose(found, expected, rtol=1e-4, atol=1e-4):
            return True
        reason = "its numbers are wrong"
    logger.warning("Gradient features are made without the fused kernel, which is slower: %s", reason)
    return False


def make_projection(
    settings: GradientSettings, sizes: dict[str, int], device: torch.device, tables: SignTables | None = None
) -> Projection | KroneckerProjection:
    """Return the projection of ``settings`` for parameters of the given sizes.

    Args:
        settings: of the gradients.
        sizes: elements of every parameter, by name.
        device: where the features are.
        tables: where ``count`` keeps signs on the CPU; none: for this projection alone.

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
    if settings.projection == "rademacher":
        return RademacherProjection(settings.dim, settings.seed, device)
    return CountProjection(settings.dim, settings.seed, device, tables)
