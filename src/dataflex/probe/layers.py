"""Per-sample gradients of a layer's parameters, from what went into the layer and the gradient of what came out.

The samples of a batch do not meet in a forward pass, so row b of an output's gradient belongs to sample b alone, and a
sample's parameter gradient is a small product of that row and the layer's input. A :class:`Contribution` holds these
two factors and multiplies them out for a block of the parameter's rows at a time, so that the gradients of a whole
batch never exist at once.

Every parameter is seen as a matrix of rows: a vector has one row, a stack of expert matrices is one matrix of all
their rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

_LOW = (torch.float16, torch.bfloat16)
_NARROW = 16
"""Columns below which a CPU's product is made the other way round: rows shorter than a vector register, as those of a
LoRA matrix of rank 8, take it two to five times as long."""


def at_least_float32(values: Tensor) -> Tensor:
    """Return ``values`` in float32, or as they are where they are float64."""
    return values if values.dtype == torch.float64 else values.float()


class Contribution(ABC):
    """What one use of a parameter adds to its per-sample gradients.

    Attributes:
        batch: samples, B.
        rows: rows of the whole parameter.
        columns: its columns.
        first: the first row this use touches.
        count: how many rows it touches.
    """

    batch: int
    rows: int
    columns: int
    first: int = 0
    count: int

    @abstractmethod
    def block(self, begin: int, end: int) -> Tensor:
        """Return rows ``begin`` to ``end`` (absolute, inside its own) of the gradients, (B, end - begin, columns)."""


@dataclass(frozen=True)
class Rows:
    """Where rows of several samples, in any order, go when the samples are told apart.

    Attributes:
        samples: the sample of each row, (R,).
        slots: its place among the rows of the sample, (R,).
        batch: number of samples, B.
        most: rows of the sample that has most, at least 1.
    """

    samples: Tensor
    slots: Tensor
    batch: int
    most: int

    @staticmethod
    def of(samples: Tensor, batch: int) -> Rows:
        """Return the places of rows whose samples are given, (R,)."""
        counts = (samples.unsqueeze(1) == torch.arange(batch, device=samples.device)).sum(0)
        order = torch.argsort(samples, stable=True)
        slots = torch.empty_like(samples)
        numbers = torch.arange(samples.numel(), device=samples.device)
        slots[order] = numbers - (counts.cumsum(0) - counts)[samples[order]]
        return Rows(samples, slots, batch, max(1, int(counts.max())))

    def apart(self, values: Tensor) -> Tensor:
        """Return (R, d) as (B, most, d), padded with zeros."""
        out = values.new_zeros(self.batch, self.most, values.shape[-1])
        out[self.samples, self.slots] = values
        return out


class Outer(Contribution):
    """A matrix product: sum over tokens of (output gradient) x (input).

    Args:
        inputs: (B, T, in), or (R, in) with ``where``.
        gradients: (B, T, out), or (R, out) with ``where``.
        first: first row of the parameter this product touches; with ``rows``, for one expert of several.
        rows: rows of the whole parameter; none: out.
        where: the samples of the tokens, where they are not in order; a head's wide gradients are told apart block by
            block, since padding all of them would take several times their memory.
    """

    def __init__(
        self, inputs: Tensor, gradients: Tensor, first: int = 0, rows: int | None = None, where: Rows | None = None
    ) -> None:
        self.inputs, self.gradients, self.where = inputs, gradients, where
        self.batch, self.columns = inputs.shape[0] if where is None else where.batch, inputs.shape[-1]
        self.first, self.count = first, gradients.shape[-1]
        self.rows = self.count if rows is None else rows

    def apart(self, values: Tensor) -> Tensor:
        """Return one number or more of every token, sample by sample: (B, T, d)."""
        return values if self.where is None else self.where.apart(values)

    @cached_property
    def _inputs_apart(self) -> Tensor:
        return self.apart(self.inputs)

    @property
    def small(self) -> bool:
        """Whether Gram matrices over tokens cost less than the products themselves."""
        tokens = self.inputs.shape[:-1].numel()
        return tokens * (self.columns + self.count) < self.columns * self.count

    def gram(self) -> Tensor:
        """Return the inner products of all pairs of samples, (B, B), without making the gradients.

        <sum_t g_t x_t', sum_s h_s y_s'> = sum_ts (g_t . h_s)(x_t . y_s): the "ghost" inner product (GREATS, Wang et
        al. 2024).
        """
        batch, tokens = self._inputs_apart.shape[:2]
        parts = (self._inputs_apart, self.apart(self.gradients))
        inputs, gradients = (at_least_float32(part).flatten(0, 1) for part in parts)
        both = (inputs @ inputs.T) * (gradients @ gradients.T)
        return both.view(batch, tokens, batch, tokens).sum((1, 3))

    def block(self, begin: int, end: int) -> Tensor:
        """Return rows ``begin`` to ``end`` of the products."""
        part = self.apart(self.gradients[..., begin - self.first : end - self.first])
        return product(part.transpose(1, 2), self._inputs_apart)


class Lookup(Contribution):
    """An embedding: the output gradient of every token, added to its row.

    Args:
        ids: (B, T), the rows looked up.
        gradients: (B, T, H).
        rows: rows of the table.
        padding_idx: a row that gets no gradient.
    """

    def __init__(self, ids: Tensor, gradients: Tensor, rows: int, padding_idx: int | None) -> None:
        if padding_idx is not None:
            gradients = gradients * (ids != padding_idx).unsqueeze(-1)
        self.ids, self.gradients = ids, gradients
        self.batch, self.columns = gradients.shape[0], gradients.shape[-1]
        self.rows = self.count = rows

    @cached_property
    def _together(self) -> tuple[Tensor, Tensor]:
        """The first token of each row in each sample, (B, T), bool, and there the sum over its like, (B, T, H).

        A product, so that tokens are added in the same order in every run.
        """
        same = self.ids.unsqueeze(2) == self.ids.unsqueeze(1)
        values = at_least_float32(self.gradients)
        return ~same.tril(-1).any(2), torch.bmm(same.to(values), values)

    def block(self, begin: int, end: int) -> Tensor:
        """Return rows ``begin`` to ``end`` of the table's gradients."""
        first, sums = self._together
        out = sums.new_zeros(self.batch, end - begin, self.columns)
        sample, position = torch.nonzero(first & (self.ids >= begin) & (self.ids < end), as_tuple=True)
        out[sample, self.ids[sample, position] - begin] = sums[sample, position]
        return out


class Whole(Contribution):
    """A vector's gradients, already summed over tokens: (B, n)."""

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self.batch, self.columns = values.shape
        self.rows = self.count = 1

    def block(self, begin: int, end: int) -> Tensor:
        """Return the gradients as one row, (B, 1, n)."""
        return at_least_float32(self.values).unsqueeze(1)


class Zeros(Contribution):
    """Nothing, where a rule needs every element of a parameter to be visited."""

    def __init__(self, batch: int, rows: int, columns: int, device: torch.device) -> None:
        self.batch, self.rows, self.columns, self.device = batch, rows, columns, device
        self.count = rows

    def block(self, begin: int, end: int) -> Tensor:
        """Return zeros."""
        return torch.zeros(self.batch, end - begin, self.columns, device=self.device)


def product(left: Tensor, right: Tensor) -> Tensor:
    """Return the batched matrix product with single-precision accumulation and result, (B, m, T) x (B, T, n)."""
    if left.is_cuda and left.dtype in _LOW and left.dtype == right.dtype:
        return torch.bmm(left, right, out_dtype=torch.float32)
    wide = torch.promote_types(torch.promote_types(left.dtype, right.dtype), torch.float32)
    left, right = left.to(wide), right.to(wide)
    if left.device.type == "cpu" and right.shape[2] < _NARROW <= left.shape[1]:
        return torch.bmm(right.transpose(1, 2), left.transpose(1, 2)).transpose(1, 2)
    return torch.bmm(left, right)


def blocks(parts: list[Contribution], elements: int) -> Iterator[tuple[int, Tensor]]:
    """Yield a parameter's per-sample gradients in blocks of whole rows: (first element, (B, n)).

    Rows no part touches are skipped.

    Args:
        parts: every use of the parameter; what they add is summed.
        elements: numbers in a block, of all samples together; at least one row is yielded at a time.
    """
    batch, rows, columns = parts[0].batch, parts[0].rows, parts[0].columns
    step = max(1, elements // (batch * columns))
    edges = sorted({edge for part in parts for edge in (part.first, part.first + part.count)})
    for low, high in pairwise(edges):
        inside = [part for part in parts if part.first <= low and high <= part.first + part.count]
        for begin in range(low, high if inside else low, step):
            end = min(begin + step, high)
            total = inside[0].block(begin, end)
            for part in inside[1:]:
                total = total + part.block(begin, end)
            yield begin * columns, total.reshape(batch, -1)
    assert edges[-1] <= rows


@dataclass(frozen=True)
class NormRecipe:
    """How a normalisation layer scales its input before it multiplies it with its weight."""

    epsilon: float
    centred: bool
    """Whether the mean is taken off first (LayerNorm) or not (RMSNorm)."""


def normalized(inputs: Tensor, recipe: NormRecipe) -> Tensor:
    """Return what a normalisation layer multiplies its weight with, same shape as ``inputs``."""
    values = at_least_float32(inputs)
    if recipe.centred:
        values = values - values.mean(-1, keepdim=True)
    return values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + recipe.epsilon)


def norm_recipe(module: nn.Module, inputs: Tensor, output: Tensor) -> NormRecipe | None:
    """Return the recipe that gives the layer's own output, with its weight or 1 plus it (Gemma); None if none does."""
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if weight is None or weight.dim() != 1 or weight.shape[0] != inputs.shape[-1]:
        return None
    tolerance = 2e-2 if output.dtype in _LOW or inputs.dtype in _LOW else 1e-4
    shift = 0.0 if bias is None else at_least_float32(bias.detach())
    for recipe in (NormRecipe(epsilon, centred) for epsilon in _epsilons(module) for centred in (False, True)):
        scaled = normalized(inputs, recipe)
        for factor in (weight.detach(), weight.detach() + 1):
            expected = scaled * at_least_float32(factor) + shift
            if torch.allclose(expected, at_least_float32(output), rtol=tolerance, atol=tolerance):
                return recipe
    return None


def _epsilons(module: nn.Module) -> list[float]:
    """Return the numbers a normalisation layer may add under its root."""
    found = [value for name in ("variance_epsilon", "eps", "epsilon") if (value := module.__dict__.get(name))]
    return [float(value) for value in found] or [1e-6, 1e-5]


def summed_over_tokens(values: Tensor, batch: int) -> Tensor:
    """Return (B * T or B, ..., n) summed to (B, n)."""
    return at_least_float32(values).reshape(batch, -1, values.shape[-1]).sum(1)


def flat_rows(values: Tensor, batch: int) -> Tensor:
    """Return (B, ..., n) or (B * T, n) as (B, T, n)."""
    return values.reshape(batch, -1, values.shape[-1])


def dora_sum(output: Tensor, base_result: Tensor, magnitude: Tensor) -> Tensor:
    """Return what PEFT's DoRA layer multiplies each magnitude's gradient with, same shape as ``output``.

    With s = magnitude / norm (the norm is a constant to autograd) the layer returns (s - 1) base + s lora, whose
    derivative in the magnitude is (base + lora) / norm = (output + base) / magnitude.
    """
    return (at_least_float32(output) + at_least_float32(base_result)) / at_least_float32(magnitude)


def is_dora(module: nn.Module) -> bool:
    """Return whether the module holds PEFT's DoRA magnitudes of a linear layer."""
    return type(module).__name__ == "DoraLinearLayer"


class DoraCalls:
    """Tells apart the two calls of its matrices by which PEFT's DoRA layer takes the norm of their product.

    It calls both on the identity first, and the norm has no gradient: uses whose gradients never arrive would keep all
    others of these matrices until the end of the batch.
    """

    _place: Literal["outside", "before the norm", "in the norm", "behind the norm"] = "outside"

    def enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Note that a DoRA layer begins."""
        self._place = "before the norm"

    def leave(self) -> None:
        """Note that it ends."""
        self._place = "outside"

    def is_norm(self, inputs: Tensor, differentiable: bool) -> bool:
        """Return whether the call of a layer, given its inputs, is one of the two."""
        if self._place == "in the norm":
            self._place = "behind the norm"
            return True
        square = inputs.dim() == 2 and inputs.shape[0] == inputs.shape[1] and not differentiable
        if self._place != "before the norm" or not square:
            return False
        self._place = "in the norm"
        return True


def is_experts(module: nn.Module) -> bool:
    """Return whether the module holds stacked expert matrices, routed by (hidden, index, weights)."""
    return any(parameter is not None and parameter.dim() == 3 for parameter in module._parameters.values())
