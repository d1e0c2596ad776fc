"""Random linear maps from a gradient of P elements to k elements; they preserve inner products in expectation.

``count`` is a count sketch in blocks. A parameter's gradient is cut into blocks of k elements. Every element gets a
random sign and every block a random rotation, and the blocks are summed. Each element is read once. The variance of an
inner product over seeds is at most

    (|x|^2 |y|^2 + <x, y>^2 - 2 sum_i x_i^2 y_i^2) / k,

which is the variance of a dense Rademacher projection. It can be lower, because two elements of one block never meet.
``rademacher`` is that dense projection, with entries sign / sqrt(k), computed block by block. It takes P x k operations
and serves for comparison with published values. ``kronecker`` makes count sketches of a layer's inputs and output
gradients before it multiplies them (LoGra, Choe et al. 2024, with count sketches instead of dense matrices). It
sketches the two factors of the gradient and so needs the gradient itself, without a preconditioner. ``identity`` keeps
every element.

All randomness is a hash of (seed, parameter name, index in the parameter), independent of batches, processes, sharding
and device. Sums are in float32, or in float64 if the gradients are.
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
"""Number of rows of a dense projection that exist at a time."""

MAP_VERSION = 3
"""Version of the maps that settings stand for; features of different versions are not comparable."""


Sketch = Callable[[Tensor, int, int, int, AdamTerms | None], Tensor]
"""Makes a count sketch of gradients, given their start, a key, the sketch's length and terms; see ``fused.sketch``."""


class Projection(ABC):
    """Adds pieces of per-sample gradients to features.

    Args:
        dim: length of a feature, k.
        seed: seed of the map.
        device: device of the features.
    """

    def __init__(self, dim: int, seed: int, device: torch.device) -> None:
        self.dim, self.seed, self.device = dim, seed, device
        self.width = dim
        """Number of columns of the sums that :meth:`add` changes."""

    def folded(self, sums: Tensor) -> Tensor:
        """Return the features, (B, k), after everything has been added to ``sums``."""
        return sums

    @abstractmethod
    def add(self, out: Tensor, name: str, start: int, values: Tensor, total: int) -> None:
        """Add the map of a piece of one parameter's gradients to ``out``.

        Args:
            out: sums, (B, width), changed in place.
            name: the parameter.
            start: index of the piece's first element in the flattened parameter.
            values: the piece, (B, n); may be overwritten.
            total: number of elements of the parameter.
        """

    def add_directions(
        self, out: Tensor, name: str, start: int, gradients: Tensor, total: int, preconditioner: Preconditioner
    ) -> None:
        """Add the map of a piece of one parameter's directions to ``out``; see :meth:`add`.

        Args:
            out: sums, (B, width), changed in place.
            name: the parameter.
            start: index of the piece's first element in the flattened parameter.
            gradients: the piece before preconditioning, (B, n); may be overwritten.
            total: number of elements of the parameter.
            preconditioner: turns gradients into directions.
        """
        self.add(out, name, start, preconditioner(name, start, gradients), total)


class CountProjection(Projection):
    """Count sketch: signs and rotations of blocks of k elements; see the docstring of the module.

    Args:
        dim: length of a feature, k.
        seed: seed of the map.
        device: device of the features.
        tables: cache of signs on the CPU; None makes a separate cache.
    """

    def __init__(self, dim: int, seed: int, device: torch.device, tables: SignTables | None = None) -> None:
        super().__init__(dim, seed, device)
        self.width = 2 * dim  # a rotated block is added in one piece; `folded` adds the columns from k on
        self._tables = SignTables() if tables is None else tables
        self._rotations: dict[str, Tensor] = {}
        """Rotation of each block of a parameter, by the parameter's name. A cache for the CPU."""
        self._fused = block_sums() if device.type == "cpu" else None

    def add(self, out: Tensor, name: str, start: int, values: Tensor, total: int) -> None:
        """Add a piece."""
        self.add_directions(out, name, start, values, total, NoPreconditioner())

    def add_directions(
        self, out: Tensor, name: str, start: int, gradients: Tensor, total: int, preconditioner: Preconditioner
    ) -> None:
        """Add a piece's directions: on a CPU block by block in its cache, on an accelerator all blocks together."""
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
        """Add a piece's directions on a CPU, with the one-pass kernel if it applies."""
        stop = start + gradients.shape[1]
        first, last, blocks = start // self.dim, -(-stop // self.dim), -(-total // self.dim)
        key = self._key(name)
        if name not in self._rotations:
            self._rotations[name] = random_numbers(key, 0, blocks, self.dim, self.device)
        rotations = self._rotations[name][first:last]
        rows = self._tables.rows(key, first, last - first, self.dim, blocks)
        terms = preconditioner.terms(name)
        # The kernel loops along the rows of a sketch, so it is slow for many short rows.
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
        """Return the sketches of parts of vectors, (..., k).

        Args:
            name: name of the map.
            start: index of the parts' first element in their vectors.
            vectors: float32 or float64, (..., n).
            total: length of a whole vector.
        """
        flat = vectors.reshape(-1, vectors.shape[-1])
        sums = flat.new_zeros(flat.shape[0], self.width)
        # `add` may overwrite its argument on a device, and the vectors may be views of the model's own tensors.
        self.add(sums, name, start, flat if self.device.type == "cpu" else flat.clone(), total)
        return self.folded(sums).view(*vectors.shape[:-1], self.dim)

    def of_units(self, name: str, places: Tensor, total: int) -> Tensor:
        """Return the sketches of unit vectors, each with a 1 at the given index: float32, (..., k).

        Args:
            name: name of the map.
            places: indices of the ones, int64, (...).
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
    """Return the count sketch of a piece of directions, (B, dim), in a number of operations independent of the blocks.

    Args:
        values: the piece, (B, n); overwritten.
        start: index of the piece's first element in the flattened parameter.
        key: key of the parameter's signs and rotations.
        dim: length of a sketch.
    """
    stop, first = start + values.shape[1], start // dim
    number = -(-stop // dim) - first
    signs = random_signs(key, first, number, dim, values.device)
    values *= signs.view(-1)[start - first * dim : stop - first * dim]
    return rotated_sum(values, start - first * dim, random_numbers(key, first, number, dim, values.device), dim)


def rotated_sum(values: Tensor, lead: int, rotations: Tensor, dim: int) -> Tensor:
    """Return the sum of rotated blocks, (B, dim), in a number of operations independent of the number of blocks.

    Args:
        values: signed values, (B, n).
        lead: index of the first value in the first block.
        rotations: rotations of the blocks that hold the values, (J,).
        dim: length of a block.
    """
    number = rotations.shape[0]
    padded = torch.nn.functional.pad(values, (lead, number * dim - lead - values.shape[1]))
    places = torch.arange(dim, device=values.device)
    source = (places - rotations.unsqueeze(1)) % dim
    blocks = padded.view(-1, number, dim)
    return blocks.gather(2, source.expand(blocks.shape)).sum(1)


class RademacherProjection(Projection):
    """A dense projection, whose rows are computed again at every use, because P x k signs would not fit into memory."""

    def add(self, out: Tensor, name: str, start: int, values: Tensor, total: int) -> None:
        """Add a piece, ``4096`` rows of the projection at a time."""
        key = key_of(self.seed, "dense", name)
        for begin in range(0, values.shape[1], _DENSE_ROWS):
            part = values[:, begin : begin + _DENSE_ROWS]
            signs = random_signs(key, start + begin, part.shape[1], self.dim, self.device)
            out.addmm_(part, signs.to(values.dtype), alpha=1 / math.sqrt(self.dim))


class IdentityProjection(Projection):
    """The whole gradient, one parameter after another.

    Args:
        sizes: number of elements of every parameter, by name, in order.
        device: device of the features.
    """

    def __init__(self, sizes: dict[str, int], device: torch.device) -> None:
        super().__init__(sum(sizes.values()), 0, device)
        ends = np.cumsum(list(sizes.values())).tolist()
        self._begin = {name: end - size for (name, size), end in zip(sizes.items(), ends, strict=True)}

    def add(self, out: Tensor, name: str, start: int, values: Tensor, total: int) -> None:
        """Add a piece to its columns."""
        begin = self._begin[name] + start
        out[:, begin : begin + values.shape[1]] += values


class KroneckerProjection:
    """Sketches a layer's inputs to a elements and its output gradients to b elements, with a b = k.

    Both sketches are count sketches; see the docstring of the module. The variance of an inner product of count
    sketches of a elements is at most that of a dense projection to a elements. A count sketch reads its argument once,
    a dense projection a times.

    Args:
        dim: length of a feature, k.
        seed: seed of the map.
        device: device of the features.
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
            # One expert of a stack covers a part of the parameter's rows, from row ``first`` on.
            left = part.apart(self._rows.of(rows, part.first, gradients, part.rows))
            right = part.apart(self._columns.of(columns, 0, at_least_float32(part.inputs), part.columns))
        else:
            left = self._rows.of_units(rows, part.ids, part.rows).to(gradients.dtype)
            right = self._columns.of(columns, 0, gradients, part.columns)
        out += product(left.transpose(1, 2), right).reshape(out.shape[0], -1)


def block_sums() -> BlockSums | None:
    """Return the kernel that adds sketches in one pass on a CPU; None without Numba."""
    if importlib.util.find_spec("numba") is None:
        return None
    from dataflex.probe.fused_cpu import BlockSums

    return BlockSums(torch.get_num_threads())


@cache  # the compilation and the comparison run once per device
def fused_sketch(device: torch.device) -> Sketch | None:
    """Return the kernel that makes a sketch in one pass on a device; None if it does not work there."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    from dataflex.probe.fused import sketch

    return sketch if works(sketch, device) else None


def works(sketch: Sketch, device: torch.device) -> bool:
    """Return whether a kernel compiles on a device and gives the values of :func:`plain_sketch`; log why not."""
    from triton.errors import TritonError

    values = torch.linspace(-1, 1, 300, device=device).view(3, 100)
    moments = Moments(values[1], values[2].square(), 1, (0.9, 0.99), 1e-8)
    adam = AdamPreconditioner({"": moments}, less=False)
    try:
        found = sketch(values[:, 7:], 7, 1, 32, adam.terms(""))
    # Triton compiles its launcher with a C compiler, which may be missing.
    except (TritonError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        reason = str(error)
    else:
        expected = plain_sketch(adam("", 7, values[:, 7:].clone()), 7, 1, 32)
        if torch.allclose(found, expected, rtol=1e-4, atol=1e-4):
            return True
        reason = "its results are wrong"
    logger.warning("Gradient features are computed without the fused kernel, which takes longer: %s", reason)
    return False


def make_projection(
    settings: GradientSettings, sizes: dict[str, int], device: torch.device, tables: SignTables | None = None
) -> Projection | KroneckerProjection:
    """Return the projection of ``settings`` for parameters of the given sizes.

    Args:
        settings: settings of the gradients.
        sizes: number of elements of every parameter, by name.
        device: device of the features.
        tables: cache of the signs of ``count`` on the CPU; None makes a cache for this projection alone.

    Raises:
        ComponentError: if the feature would be longer than the gradient, or if the projection cannot be combined with
            the preconditioner.
    """
    total = sum(sizes.values())
    if settings.projection == "identity":
        return IdentityProjection(sizes, device)
    if settings.dim > total:
        raise ComponentError(
            f"proj_dim: a feature of {settings.dim} elements is longer than the gradient, which has {total} (one per "
            "trainable parameter). Use a smaller proj_dim, or projection: identity."
        )
    if settings.projection == "kronecker":
        if settings.preconditioner != "none":
            raise ComponentError("projection: kronecker works on the gradient itself; it needs preconditioner: none.")
        return KroneckerProjection(settings.dim, settings.seed, device)
    if settings.projection == "rademacher":
        return RademacherProjection(settings.dim, settings.seed, device)
    return CountProjection(settings.dim, settings.seed, device, tables)
