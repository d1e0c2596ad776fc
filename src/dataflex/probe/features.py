"""What is made of per-sample gradients: the optimizer's direction, then a sketch, a length or inner products.

A sink takes the gradients of a batch parameter by parameter, in blocks that stay in the processor's cache, and keeps
only what it is for.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from dataflex.api.probe import GradientSettings
from dataflex.errors import ComponentError
from dataflex.probe.layers import Contribution, Outer, Zeros, blocks
from dataflex.probe.moments import Moments
from dataflex.probe.sketch import CountSketch, IdentitySketch, KroneckerSketch, RademacherSketch, Sketch

_CPU_BLOCK = 1 << 18
_DEVICE_BLOCK = 1 << 26
"""Numbers in a block of gradients, of all samples of a batch together."""
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


class Sink(ABC):
    """Takes the gradients of a batch; :meth:`begin`, then :meth:`take` per parameter, then :attr:`result`."""

    def __init__(self, preconditioner: Preconditioner, device: torch.device) -> None:
        self.preconditioner, self.device = preconditioner, device
        self.batch = 0
        self.block_elements = _CPU_BLOCK if device.type == "cpu" else _DEVICE_BLOCK

    @property
    @abstractmethod
    def result(self) -> Tensor:
        """What was made of the batch, (B, ...)."""

    @abstractmethod
    def begin(self, batch: int, dtype: torch.dtype) -> None:
        """Start a batch of so many samples; ``dtype`` is float32 or float64."""

    @abstractmethod
    def take(self, name: str, parts: list[Contribution]) -> None:
        """Take all uses of one parameter."""

    def directions(self, name: str, parts: list[Contribution]) -> Iterator[tuple[int, Tensor, int]]:
        """Yield a parameter's directions block by block: (first element, (B, n), elements of the parameter)."""
        parts = self.preconditioner.everywhere(name, parts, self.batch, self.device)
        if not parts:
            return
        total = parts[0].rows * parts[0].columns
        for start, gradients in blocks(parts, self.block_elements):
            yield start, self.preconditioner(name, start, gradients), total


class SketchSink(Sink):
    """Sketched directions: result (B, k)."""

    def __init__(self, preconditioner: Preconditioner, sketch: Sketch | KroneckerSketch, device: torch.device) -> None:
        super().__init__(preconditioner, device)
        self.sketch = sketch

    def begin(self, batch: int, dtype: torch.dtype) -> None:
        """Start with zero features."""
        self.batch = batch
        self._sums = torch.zeros(batch, self.sketch.width, dtype=dtype, device=self.device)

    @property
    def result(self) -> Tensor:
        """The features of the batch, (B, k)."""
        return self.sketch.folded(self._sums)

    def take(self, name: str, parts: list[Contribution]) -> None:
        """Add a parameter to the features."""
        if isinstance(self.sketch, KroneckerSketch):
            for part in parts:
                self.sketch.add_part(self._sums, name, part)
            return
        for start, values, total in self.directions(name, parts):
            self.sketch.add(self._sums, name, start, values, total)


class NormSink(Sink):
    """Exact squared lengths of the directions: result (B,)."""

    def begin(self, batch: int, dtype: torch.dtype) -> None:
        """Start with zero."""
        self.batch = batch
        self._squares = torch.zeros(batch, dtype=dtype, device=self.device)

    @property
    def result(self) -> Tensor:
        """The squared lengths, (B,)."""
        return self._squares

    def take(self, name: str, parts: list[Contribution]) -> None:
        """Add a parameter's squares."""
        for _, values, _ in self.directions(name, parts):
            self._squares += values.square().sum(1)


class GramSink(Sink):
    """Exact inner products of the directions of all pairs of a batch: result (B, B).

    Without a preconditioner, a matrix product's share is taken over tokens where that is cheaper.
    """

    def begin(self, batch: int, dtype: torch.dtype) -> None:
        """Start with zero."""
        self.batch = batch
        self._products = torch.zeros(batch, batch, dtype=dtype, device=self.device)

    @property
    def result(self) -> Tensor:
        """The inner products, (B, B)."""
        return self._products

    def take(self, name: str, parts: list[Contribution]) -> None:
        """Add a parameter's inner products."""
        plain = isinstance(self.preconditioner, NoPreconditioner)
        if plain and len(parts) == 1 and isinstance(parts[0], Outer) and parts[0].small:
            self._products += parts[0].gram()
            return
        for _, values, _ in self.directions(name, parts):
            self._products += values @ values.T


def make_sketch(settings: GradientSettings, sizes: dict[str, int], device: torch.device) -> Sketch | KroneckerSketch:
    """Return the sketch of ``settings`` for parameters of the given sizes.

    Raises:
        ComponentError: if the feature would be longer than the gradient, or the sketch does not go with the
            preconditioner.
    """
    total = sum(sizes.values())
    if settings.sketch == "identity":
        return IdentitySketch(sizes, device)
    if settings.dim > total:
        raise ComponentError(
            f"proj_dim: a feature of {settings.dim} numbers is longer than the gradient it is a sketch of ({total} "
            "trainable parameters). Use a smaller proj_dim, or sketch: identity."
        )
    if settings.sketch == "kronecker":
        if settings.preconditioner != "none":
            raise ComponentError("sketch: kronecker works on the gradient itself; it needs preconditioner: none.")
        return KroneckerSketch(settings.dim, settings.seed, device)
    kind = CountSketch if settings.sketch == "count" else RademacherSketch
    return kind(settings.dim, settings.seed, device)
