"""Per-sample gradients of a layer's parameters, from the layer's input and the gradient of the layer's output.

The samples of a batch do not meet in a forward pass. So row b of an output's gradient belongs to sample b alone, and a
sample's parameter gradient is a small product of that row and the layer's input. A :class:`Contribution` stores these
two factors. It multiplies them for one block of the parameter's rows at a time, so that the gradients of a whole batch
never exist at once.

Every parameter is treated as a matrix of rows. A vector has one row. A stack of expert matrices is one matrix of all
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
"""Number of columns below which a CPU computes the transposed product.

Rows shorter than a vector register, such as the rows of a LoRA matrix of rank 8, take two to five times as long.
"""


def at_least_float32(values: Tensor) -> Tensor:
    """Return ``values`` in float32; float64 values stay float64."""
    return values if values.dtype == torch.float64 else values.float()


class Contribution(ABC):
    """The part of a parameter's per-sample gradients that comes from one use of the parameter.

    Attributes:
        batch: number of samples, B.
        rows: number of rows of the whole parameter.
        columns: number of columns of the parameter.
        first: index of the first row that this use touches.
        count: number of rows that this use touches.
    """

    batch: int
    rows: int
    columns: int
    first: int = 0
    count: int

    @abstractmethod
    def block(self, begin: int, end: int) -> Tensor:
        """Return rows ``begin`` to ``end`` of the gradients, (B, end - begin, columns).

        The indices count the rows of the whole parameter, and must lie inside the rows that this use touches.
        """


@dataclass(frozen=True)
class Rows:
    """Assignment of rows in any order to the samples of a batch.

    Attributes:
        samples: sample of each row, (R,).
        slots: index of each row among the rows of its sample, (R,).
        batch: number of samples, B.
        most: largest number of rows of a sample, at least 1.
    """

    samples: Tensor
    slots: Tensor
    batch: int
    most: int

    @staticmethod
    def of(samples: Tensor, batch: int) -> Rows:
        """Return the assignment of rows, given the sample of each row, (R,)."""
        counts = (samples.unsqueeze(1) == torch.arange(batch, device=samples.device)).sum(0)
        order = torch.argsort(samples, stable=True)
        slots = torch.empty_like(samples)
        numbers = torch.arange(samples.numel(), device=samples.device)
        slots[order] = numbers - (counts.cumsum(0) - counts)[samples[order]]
        return Rows(samples, slots, batch, max(1, int(counts.max())))

    def apart(self, values: Tensor) -> Tensor:
        """Return values (R, d) as (B, most, d), padded with zeros."""
        out = values.new_zeros(self.batch, self.most, values.shape[-1])
        out[self.samples, self.slots] = values
        return out


class Outer(Contribution):
    """A matrix product: the sum over tokens of (output gradient) x (input).

    Args:
        inputs: (B, T, in), or (R, in) with ``where``.
        gradients: (B, T, out), or (R, out) with ``where``.
        first: first row of the parameter that this product touches. For one expert of several, set ``rows``, too.
        rows: number of rows of the whole parameter; None means ``out``.
        where: samples of the tokens if the tokens are not in order. The wide gradients of a head are assigned to
            samples block by block, because padding all of them at once would take several times their memory.
    """

    def __init__(
        self, inputs: Tensor, gradients: Tensor, first: int = 0, rows: int | None = None, where: Rows | None = None
    ) -> None:
        self.inputs, self.gradients, self.where = inputs, gradients, where
        self.batch, self.columns = inputs.shape[0] if where is None else where.batch, inputs.shape[-1]
        self.first, self.count = first, gradients.shape[-1]
        self.rows = self.count if rows is None else rows

    def apart(self, values: Tensor) -> Tensor:
        """Return values of tokens, sample by sample: (B, T, d)."""
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
        """Return the inner products of all pairs of samples, (B, B), without computing the gradients.

        <sum_t g_t x_t', sum_s h_s y_s'> = sum_ts (g_t . h_s)(x_t . y_s): the "ghost" inner product (GREATS, Wang et al.
        2024).
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
    """An embedding: the output gradient of every token is added to the token's row.

    Args:
        ids: indices of the rows, (B, T).
        gradients: output gradients, (B, T, H).
        rows: number of rows of the table.
        padding_idx: a row that gets no gradient; None means no such row.
    """

    def __init__(self, ids: Tensor, gradients: Tensor, rows: int, padding_idx: int | None) -> None:
        if padding_idx is not None:
            gradients = gradients * (ids != padding_idx).unsqueeze(-1)
        self.ids, self.gradients = ids, gradients
        self.batch, self.columns = gradients.shape[0], gradients.shape[-1]
        self.rows = self.count = rows

    @cached_property
    def _together(self) -> tuple[Tensor, Tensor]:
        """First token of each id in each sample, (B, T), bool, and at these tokens the sums over equal ids, (B, T, H).

        The sums are a matrix product, so that tokens are added in the same order in every run.
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
    """Zero gradients, for a rule that must visit every element of a parameter."""

    def __init__(self, batch: int, rows: int, columns: int, device: torch.device) -> None:
        self.batch, self.rows, self.columns, self.device = batch, rows, columns, device
        self.count = rows

    def block(self, begin: int, end: int) -> Tensor:
        """Return zeros."""
        return torch.zeros(self.batch, end - begin, self.columns, device=self.device)


def product(left: Tensor, right: Tensor) -> Tensor:
    """Return the batched matrix product (B, m, T) x (B, T, n), summed and returned in at least single precision."""
    if left.is_cuda and left.dtype in _LOW and left.dtype == right.dtype:
        return torch.bmm(left, right, out_dtype=torch.float32)
    wide = torch.promote_types(torch.promote_types(left.dtype, right.dtype), torch.float32)
    left, right = left.to(wide), right.to(wide)
    if left.device.type == "cpu" and right.shape[2] < _NARROW <= left.shape[1]:  # see _NARROW
        return torch.bmm(right.transpose(1, 2), left.transpose(1, 2)).transpose(1, 2)
    return torch.bmm(left, right)


def blocks(parts: list[Contribution], elements: int) -> Iterator[tuple[int, Tensor]]:
    """Yield a parameter's per-sample gradients in blocks of whole rows: (index of the first element, (B, n)).

    Rows that no use touches are skipped.

    Args:
        parts: all uses of the parameter; their contributions are summed.
        elements: most elements of a block, over all samples. A block has at least one row.
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
    """Formula for the scaled input of a normalisation layer, which the layer then multiplies by its weight."""

    epsilon: float
    centred: bool
    """Whether the mean is subtracted first (LayerNorm) or not (RMSNorm)."""


def normalized(inputs: Tensor, recipe: NormRecipe) -> Tensor:
    """Return the scaled input that a normalisation layer multiplies by its weight, in the shape of ``inputs``."""
    values = at_least_float32(inputs)
    if recipe.centred:
        values = values - values.mean(-1, keepdim=True)
    return values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + recipe.epsilon)


def norm_recipe(module: nn.Module, inputs: Tensor, output: Tensor) -> NormRecipe | None:
    """Return the recipe that reproduces the layer's output with its weight, or with 1 + weight (Gemma).

    None means that no recipe does.
    """
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if weight is None or weight.dim() != 1 or weight.shape[0] != inputs.shape[-1]:
        return None
    tolerance = 2e-2 if output.dtype in _LOW or inputs.dtype in _LOW else 1e-4  # 16-bit values are rounded
    shift = 0.0 if bias is None else at_least_float32(bias.detach())
    for recipe in (NormRecipe(epsilon, centred) for epsilon in _epsilons(module) for centred in (False, True)):
        scaled = normalized(inputs, recipe)
        for factor in (weight.detach(), weight.detach() + 1):
            expected = scaled * at_least_float32(factor) + shift
            if torch.allclose(expected, at_least_float32(output), rtol=tolerance, atol=tolerance):
                return recipe
    return None


def _epsilons(module: nn.Module) -> list[float]:
    """Return the values that a normalisation layer may add under its root."""
    found = [value for name in ("variance_epsilon", "eps", "epsilon") if (value := module.__dict__.get(name))]
    return [float(value) for value in found] or [1e-6, 1e-5]


def summed_over_tokens(values: Tensor, batch: int, rows: int) -> Tensor:
    """Return values (R * B, ..., n) or (R * B * T, n) summed over the tokens of each sample, (B, n)."""
    return flat_rows(at_least_float32(values), batch, rows).sum(1)


def flat_rows(values: Tensor, batch: int, rows: int) -> Tensor:
    """Return values (R * B, ..., n) or (R * B * T, n) as (B, R * T, n).

    Args:
        values: values of the rows of model inputs.
        batch: number of samples, B.
        rows: rows of a sample, R. Row r belongs to sample r mod B.
    """
    width = values.shape[-1]
    if rows > 1 and batch > 1:
        values = values.reshape(rows, batch, -1, width).transpose(0, 1)
    return values.reshape(batch, -1, width)


def dora_sum(output: Tensor, base_result: Tensor, magnitude: Tensor) -> Tensor:
    """Return the factor of each magnitude's gradient in PEFT's DoRA layer, in the shape of ``output``.

    With s = magnitude / norm (the norm is a constant to autograd), the layer returns (s - 1) base + s lora. The
    derivative with respect to the magnitude is (base + lora) / norm = (output + base) / magnitude.
    """
    return (at_least_float32(output) + at_least_float32(base_result)) / at_least_float32(magnitude)


def is_dora(module: nn.Module) -> bool:
    """Return whether the module holds the DoRA magnitudes of a linear layer of PEFT."""
    return type(module).__name__ == "DoraLinearLayer"


class DoraCalls:
    """Recognises the two calls by which PEFT's DoRA layer computes the norm of the product of its two matrices.

    PEFT first applies both matrices to the identity. The norm has no gradient, so the gradients of these two uses never
    arrive. Waiting for them would store all other contributions of the matrices until the end of the batch.
    """

    _place: Literal["outside", "before the norm", "in the norm", "behind the norm"] = "outside"

    def enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Note that a DoRA layer begins."""
        self._place = "before the norm"

    def leave(self) -> None:
        """Note that a DoRA layer ends."""
        self._place = "outside"

    def is_norm(self, inputs: Tensor, differentiable: bool) -> bool:
        """Return whether the call of a layer, given its input, is one of the two calls of the norm."""
        if self._place == "in the norm":
            self._place = "behind the norm"
            return True
        square = inputs.dim() == 2 and inputs.shape[0] == inputs.shape[1] and not differentiable
        if self._place != "before the norm" or not square:
            return False
        self._place = "in the norm"
        return True


def is_experts(module: nn.Module) -> bool:
    """Return whether the module holds stacked expert matrices and is called with (hidden, index, weights)."""
    return any(parameter is not None and parameter.dim() == 3 for parameter in module._parameters.values())
