"""Preconditioners: from the gradient of a sample to the direction of the optimizer's update on that sample."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dataflex.api.probe import GradientSettings
from dataflex.probe.layers import Contribution, Zeros
from dataflex.probe.moments import Moments

_LESS_BETAS = (0.9, 0.999)
_LESS_EPSILON = 1e-8


class Preconditioner(ABC):
    """Turns a block of a parameter's gradients into the optimizer's directions."""

    @abstractmethod
    def __call__(self, name: str, start: int, gradients: Tensor) -> Tensor:
        """Return the directions of a block, (B, n); may overwrite ``gradients``."""

    @abstractmethod
    def signed(self, name: str, start: int, gradients: Tensor, signs: Tensor) -> Callable[[Tensor, slice], None]:
        """Return a function that adds a slice of a block's directions, times signs, to values of the same shape.

        Args:
            name: the parameter.
            start: index of the block's first element in the flattened parameter.
            gradients: the block, (B, n); may be overwritten.
            signs: signs, (n,), in the type of ``gradients``.
        """

    def terms(self, name: str) -> AdamTerms | None:
        """Return the terms of a parameter's directions; None means that the directions are the gradients themselves."""
        return None

    def everywhere(self, name: str, parts: list[Contribution], batch: int, device: torch.device) -> list[Contribution]:
        """Return ``parts``, with zeros added if the direction of a zero gradient is not zero."""
        return parts


class NoPreconditioner(Preconditioner):
    """SGD: the gradient itself."""

    def __call__(self, name: str, start: int, gradients: Tensor) -> Tensor:
        """Return the gradients."""
        return gradients

    def signed(self, name: str, start: int, gradients: Tensor, signs: Tensor) -> Callable[[Tensor, slice], None]:
        """Return a function that adds a slice of the gradients, times signs."""
        return lambda out, part: out.addcmul_(gradients[:, part], signs[part])


@dataclass(frozen=True)
class AdamTerms:
    """Terms of Adam's direction for a gradient g: (a m + b g) / (sqrt(c v + d g^2 + inside) + outside).

    Attributes:
        average: m, for every element of a parameter, (n,).
        square: v, for every element of a parameter, (n,).
        average_scale: a.
        gradient_scale: b.
        square_scale: c.
        squared_gradient_scale: d.
        inside: term added under the root.
        outside: term added to the root.
    """

    average: Tensor
    square: Tensor
    average_scale: float
    gradient_scale: float
    square_scale: float
    squared_gradient_scale: float
    inside: float
    outside: float

    @property
    def scales(self) -> tuple[float, float, float, float, float, float]:
        """The scalar terms, in the order of the attributes."""
        return (
            self.average_scale,
            self.gradient_scale,
            self.square_scale,
            self.squared_gradient_scale,
            self.inside,
            self.outside,
        )


class AdamPreconditioner(Preconditioner):
    """The direction of Adam's next step on the sample alone, without learning rate and weight decay.

    With m' = b1 m + (1 - b1) g, v' = b2 v + (1 - b2) g^2 and t the number of steps including this one, the direction is

        (m' / (1 - b1^t)) / (sqrt(v' / (1 - b2^t)) + eps).

    Args:
        moments: moments of every trainable parameter, by name.
        less: use the variant of LESS's code: m' / sqrt(v' + 1e-8), b = (0.9, 0.999), no bias correction.
    """

    def __init__(self, moments: dict[str, Moments], less: bool) -> None:
        self.moments = moments
        self._terms = {name: _terms(item, less) for name, item in moments.items()}

    def __call__(self, name: str, start: int, gradients: Tensor) -> Tensor:
        """Return the directions, which overwrite ``gradients``."""
        terms = self._terms[name]
        below = self._below(terms, start, gradients)
        average = _part(terms.average, start, gradients) * terms.average_scale
        return torch.add(average, gradients, alpha=terms.gradient_scale, out=gradients).div_(below)

    def signed(self, name: str, start: int, gradients: Tensor, signs: Tensor) -> Callable[[Tensor, slice], None]:
        """Return a function that adds a slice of the directions, times signs.

        The signs multiply the first moment, which all samples share, and are a factor of the multiply-add of the
        gradients. The division adds to the output. That takes five passes over the elements of each sample.
        """
        terms = self._terms[name]
        below = self._below(terms, start, gradients)
        average = (_part(terms.average, start, gradients) * signs).mul_(terms.average_scale)
        above = torch.addcmul(average, gradients, signs, value=terms.gradient_scale, out=gradients)
        return lambda out, part: out.addcdiv_(above[:, part], below[:, part])

    def terms(self, name: str) -> AdamTerms:
        """Return the terms of a parameter's directions."""
        return self._terms[name]

    def _below(self, terms: AdamTerms, start: int, gradients: Tensor) -> Tensor:
        """Return the denominators of a block's directions, (B, n)."""
        square = _part(terms.square, start, gradients) * terms.square_scale
        if terms.inside:
            square.add_(terms.inside)
        below = torch.addcmul(square, gradients, gradients, value=terms.squared_gradient_scale).sqrt_()
        return below.add_(terms.outside) if terms.outside else below

    def everywhere(self, name: str, parts: list[Contribution], batch: int, device: torch.device) -> list[Contribution]:
        """Return ``parts``, with zeros for the rows that they leave out: the moments move these rows, too."""
        if parts and all(part.count == part.rows for part in parts):
            return parts
        if parts:
            rows, columns = parts[0].rows, parts[0].columns
        else:
            shape = self.moments[name].exp_avg.shape
            columns = shape[-1]
            rows = self.moments[name].exp_avg.numel() // columns
        return [*parts, Zeros(batch, rows, columns, device)]


def _terms(item: Moments, less: bool) -> AdamTerms:
    """Return the terms of a parameter; the bias corrections are folded into the denominator."""
    first, second = _LESS_BETAS if less else item.betas
    # With left = 1 - b1^t and right = 1 - b2^t, numerator and denominator of the direction are multiplied by left:
    # (m' / left) / (sqrt(v' / right) + eps) = m' / (sqrt(v' left^2 / right) + eps left).
    left = 1.0 if less else 1 - first ** (item.step + 1)
    right = 1.0 if less else 1 - second ** (item.step + 1)
    scale = left * left / right
    average, square = (values.detach().reshape(-1) for values in (item.exp_avg, item.exp_avg_sq))
    inside, outside = (_LESS_EPSILON, 0.0) if less else (0.0, item.eps * left)
    return AdamTerms(average, square, first, 1 - first, second * scale, (1 - second) * scale, inside, outside)


def _part(values: Tensor, start: int, gradients: Tensor) -> Tensor:
    """Return the slice of a parameter's values that belongs to a block of gradients, in the block's type."""
    return values[start : start + gradients.shape[1]].to(gradients.dtype)


def make_preconditioner(settings: GradientSettings, moments: dict[str, Moments] | None) -> Preconditioner:
    """Return the preconditioner of ``settings``; Adam's preconditioners need ``moments``."""
    if settings.preconditioner == "none":
        return NoPreconditioner()
    assert moments is not None
    return AdamPreconditioner(moments, settings.preconditioner == "adam_less")
