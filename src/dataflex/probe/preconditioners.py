"""From the gradient of a sample to the direction the optimizer would take on it."""

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
    """Turns a block of a parameter's gradients into the optimizer's direction."""

    @abstractmethod
    def __call__(self, name: str, start: int, gradients: Tensor) -> Tensor:
        """Return the directions of a block, (B, n); may overwrite ``gradients``."""

    @abstractmethod
    def signed(self, name: str, start: int, gradients: Tensor, signs: Tensor) -> Callable[[Tensor, slice], None]:
        """Return a function that adds a stretch of a block's directions, times signs, to numbers of its shape.

        Args:
            name: the parameter.
            start: number of the block's first element.
            gradients: the block, (B, n); may be overwritten.
            signs: (n,), of the type of ``gradients``.
        """

    def terms(self, name: str) -> AdamTerms | None:
        """Return the terms of a parameter's directions; none: the gradients themselves."""
        return None

    def everywhere(self, name: str, parts: list[Contribution], batch: int, device: torch.device) -> list[Contribution]:
        """Return ``parts``, with zeros added where the direction of a zero gradient is not zero."""
        return parts


class NoPreconditioner(Preconditioner):
    """SGD: the gradient itself."""

    def __call__(self, name: str, start: int, gradients: Tensor) -> Tensor:
        """Return the gradients."""
        return gradients

    def signed(self, name: str, start: int, gradients: Tensor, signs: Tensor) -> Callable[[Tensor, slice], None]:
        """Return a function that adds a stretch of the gradients, times signs."""
        return lambda out, part: out.addcmul_(gradients[:, part], signs[part])


@dataclass(frozen=True)
class AdamTerms:
    """What a gradient g becomes: (a m + b g) / (sqrt(c v + d g^2 + inside) + outside).

    Attributes:
        average: m, of every element of a parameter, (n,).
        square: v, the same.
        average_scale: a.
        gradient_scale: b.
        square_scale: c.
        squared_gradient_scale: d.
        inside: added under the root.
        outside: added to the root.
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
        """The numbers, in the order they are listed in."""
        return (
            self.average_scale,
            self.gradient_scale,
            self.square_scale,
            self.squared_gradient_scale,
            self.inside,
            self.outside,
        )


class AdamPreconditioner(Preconditioner):
    """The direction Adam's next step would take for the sample alone, the learning rate and weight decay left out.

    With m' = b1 m + (1 - b1) g, v' = b2 v + (1 - b2) g^2 and t steps after this one,

        (m' / (1 - b1^t)) / (sqrt(v' / (1 - b2^t)) + eps).

    Args:
        moments: of every trainable parameter, by name.
        less: the variant of LESS's code: m' / sqrt(v' + 1e-8), b = (0.9, 0.999), no bias correction.
    """

    def __init__(self, moments: dict[str, Moments], less: bool) -> None:
        self.moments = moments
        self._terms = {name: _terms(item, less) for name, item in moments.items()}

    def __call__(self, name: str, start: int, gradients: Tensor) -> Tensor:
        """Return the directions, in place of ``gradients``."""
        terms = self._terms[name]
        below = self._below(terms, start, gradients)
        average = _part(terms.average, start, gradients) * terms.average_scale
        return torch.add(average, gradients, alpha=terms.gradient_scale, out=gradients).div_(below)

    def signed(self, name: str, start: int, gradients: Tensor, signs: Tensor) -> Callable[[Tensor, slice], None]:
        """Return a function that adds a stretch of the directions, times signs.

        The signs are given to the moment and to a factor, which all samples share, and the division adds up: each
        sample's numbers are gone over five times.
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
        """Return what a block's directions are divided by, (B, n)."""
        square = _part(terms.square, start, gradients) * terms.square_scale
        if terms.inside:
            square.add_(terms.inside)
        below = torch.addcmul(square, gradients, gradients, value=terms.squared_gradient_scale).sqrt_()
        return below.add_(terms.outside) if terms.outside else below

    def everywhere(self, name: str, parts: list[Contribution], batch: int, device: torch.device) -> list[Contribution]:
        """Return ``parts``, with zeros where they leave out rows: the moments move those too."""
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
    """Return the terms of a parameter; the corrections of its bias are folded into the denominator."""
    first, second = _LESS_BETAS if less else item.betas
    left = 1.0 if less else 1 - first ** (item.step + 1)
    right = 1.0 if less else 1 - second ** (item.step + 1)
    scale = left * left / right
    average, square = (values.detach().reshape(-1) for values in (item.exp_avg, item.exp_avg_sq))
    inside, outside = (_LESS_EPSILON, 0.0) if less else (0.0, item.eps * left)
    return AdamTerms(average, square, first, 1 - first, second * scale, (1 - second) * scale, inside, outside)


def _part(values: Tensor, start: int, gradients: Tensor) -> Tensor:
    """Return the stretch of a parameter's numbers that a block of gradients is for, in its type."""
    return values[start : start + gradients.shape[1]].to(gradients.dtype)


def make_preconditioner(settings: GradientSettings, moments: dict[str, Moments] | None) -> Preconditioner:
    """Return the preconditioner of ``settings``; ``moments`` are needed for Adam's."""
    if settings.preconditioner == "none":
        return NoPreconditioner()
    assert moments is not None
    return AdamPreconditioner(moments, settings.preconditioner == "adam_less")
