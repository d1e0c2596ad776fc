"""From the gradient of a sample to the direction the optimizer would take on it."""

from __future__ import annotations

from abc import ABC, abstractmethod

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

    def everywhere(self, name: str, parts: list[Contribution], batch: int, device: torch.device) -> list[Contribution]:
        """Return ``parts``, with zeros added where the direction of a zero gradient is not zero."""
        return parts


class NoPreconditioner(Preconditioner):
    """SGD: the gradient itself."""

    def __call__(self, name: str, start: int, gradients: Tensor) -> Tensor:
        """Return the gradients."""
        return gradients


class AdamPreconditioner(Preconditioner):
    """The direction Adam's next step would take for the sample alone, the learning rate and weight decay left out.

    With m' = b1 m + (1 - b1) g, v' = b2 v + (1 - b2) g^2 and t steps after this one,

        (m' / (1 - b1^t)) / (sqrt(v' / (1 - b2^t)) + eps).

    Args:
        moments: of every trainable parameter, by name.
        less: the variant of LESS's code: m' / sqrt(v' + 1e-8), b = (0.9, 0.999), no bias correction.
    """

    def __init__(self, moments: dict[str, Moments], less: bool) -> None:
        self.less = less
        self.moments = moments
        self._flat = {
            name: (_flattened(item.exp_avg), _flattened(item.exp_avg_sq), item) for name, item in moments.items()
        }

    def __call__(self, name: str, start: int, gradients: Tensor) -> Tensor:
        """Return the directions, in place of ``gradients``."""
        average, square, item = self._flat[name]
        part = slice(start, start + gradients.shape[1])
        first, second = (_LESS_BETAS) if self.less else item.betas
        average, square = (values[part].to(gradients.dtype) for values in (average, square))
        # The corrections are folded into the denominator, so that the numbers are gone over as few times as possible.
        left = 1.0 if self.less else 1 - first ** (item.step + 1)
        right = 1.0 if self.less else 1 - second ** (item.step + 1)
        scale = left * left / right
        below = torch.addcmul(square * (second * scale), gradients, gradients, value=(1 - second) * scale)
        if self.less:
            below.add_(_LESS_EPSILON).sqrt_()
        else:
            below.sqrt_().add_(item.eps * left)
        return torch.lerp(average, gradients, 1 - first, out=gradients).div_(below)

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


def _flattened(values: Tensor) -> Tensor:
    return values.detach().reshape(-1)


def make_preconditioner(settings: GradientSettings, moments: dict[str, Moments] | None) -> Preconditioner:
    """Return the preconditioner of ``settings``; ``moments`` are needed for Adam's."""
    if settings.preconditioner == "none":
        return NoPreconditioner()
    assert moments is not None
    return AdamPreconditioner(moments, settings.preconditioner == "adam_less")
