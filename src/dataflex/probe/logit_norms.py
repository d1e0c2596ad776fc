"""Richness of the predictions over a sample: the nuclear norm of the logits, and their distance to other logits.

The logits of a sample are a matrix of T tokens by V words of the vocabulary. The nuclear norm is the sum of the
matrix's singular values. These are the roots of the eigenvalues of a Gram matrix, so the smaller Gram matrix (T x T, if
T < V) is computed from one part of the vocabulary after another. It is in double precision, or in single precision on a
device without float64. That costs T^2 V operations; a singular value decomposition takes several times as many.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from dataflex.api.measurement import MeasuredBatch, Measurement, MeasurementRun, register_measurement
from dataflex.data.rng import derive_rng
from dataflex.data.rules import ScoreArray

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_PART = 8192
"""Number of columns of the longer side that are multiplied at a time."""


@register_measurement("logit_projections")
@dataclass(frozen=True)
class LogitProjections(Measurement):
    """A random projection of each sample's logits (tokens x vocabulary), shape (n, rows * columns).

    Both sides go through a subsampled Fourier transform: random signs, then the real part of the discrete transform at
    ``columns`` frequencies of the vocabulary and ``rows`` frequencies of the tokens, drawn with replacement. Samples of
    different lengths are projected by the same signs and the same relative frequencies of the tokens.

    Attributes:
        rows: number of frequencies of the tokens.
        columns: number of frequencies of the vocabulary.
        seed: seed of the signs and frequencies; projections are comparable only under one seed.

    Example:
        A selector that measures the distance of each candidate's logits from their mean:

        >>> from dataflex import LogitProjections, Needs, Selector, SelectorParams
        >>> class Unusual(Selector[SelectorParams]):
        ...     def needs(self, run):
        ...         return Needs(measurements=(LogitProjections(),))
        ...     def score(self, ctx, candidates):
        ...         found = ctx.probe.measure(LogitProjections(), candidates)
        ...         return ((found - found.mean(axis=0)) ** 2).sum(axis=1)
    """

    rows: int = 8
    columns: int = 128
    seed: int = 0

    quantity: ClassVar[str] = "logits"

    def run(self, run: MeasurementRun) -> ScoreArray:
        """Return the projections."""
        projector = _Projector(self)
        return run.each(partial(_of_each_sample, projector, _chunked(run)))


@register_measurement("logit_norms")
@dataclass(frozen=True, eq=False)
class LogitNorms(Measurement):
    """The nuclear norm of each sample's logits, and the mean distance of their projection to others, shape (n, 2).

    The logits of all tokens count, including those of the prompt. A sample without a trained token gives NaN.

    Attributes:
        projection: settings of the projection.
        others: projections to compare with, shape (M, rows * columns). If None, the distance is 0.

    Example:
        A selector that prefers samples with a large nuclear norm of their logits:

        >>> from dataflex import LogitNorms, Needs, Selector, SelectorParams
        >>> class Varied(Selector[SelectorParams]):
        ...     def needs(self, run):
        ...         return Needs(measurements=(LogitNorms(),))
        ...     def score(self, ctx, candidates):
        ...         return ctx.probe.measure(LogitNorms(), candidates)[:, 0]
    """

    projection: LogitProjections = field(default_factory=LogitProjections)
    others: ScoreArray | None = None

    quantity: ClassVar[str] = "nuclear norm"
    untrained: ClassVar[float | None] = math.nan

    def run(self, run: MeasurementRun) -> ScoreArray:
        """Return norms and distances."""
        norms = partial(_norm, _Projector(self.projection), self.others)
        return run.each(partial(_of_each_sample, norms, _chunked(run)))


def _chunked(run: MeasurementRun) -> bool:
    """Return whether the head may be applied in chunks; False if no sample is measured."""
    from dataflex.probe.gradient_runs import runner_of

    return bool(run.indices.size) and runner_of(run).chunked_head


def _of_each_sample(use: Callable[[Tensor], Tensor], chunked: bool, batch: MeasuredBatch) -> Tensor:
    """Return a function's value for each sample's logits, (T, V), float32, without padding; the values are stacked.

    Args:
        use: the function.
        chunked: whether the head may be applied to one sample after another, so that the logits of one sample exist at
            a time.
        batch: the samples.
    """
    import torch

    from dataflex.probe.head import behind_head, head_of, logits_of, replaced_forward

    found: list[Tensor] = []
    if not chunked:
        logits = logits_of(batch.model, batch.inputs)
        return torch.stack([use(row[mask].float()) for row, mask in zip(logits, batch.mask, strict=True)])
    finish = behind_head(batch.model)

    def run(apply: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        found.extend(use(finish(apply(row[mask])).float()) for row, mask in zip(hidden, batch.mask, strict=True))
        return hidden[..., :1]  # instead of logits, which nobody reads

    with replaced_forward(head_of(batch.model), run):
        batch.model(**batch.inputs, use_cache=False)
    return torch.stack(found)


def _norm(projector: _Projector, others: ScoreArray | None, logits: Tensor) -> Tensor:
    """Return the nuclear norm of a sample's logits and the mean distance of their projection to the others, (2,)."""
    import torch

    distance = logits.new_zeros(())
    if others is not None:
        known = torch.from_numpy(others).to(logits.device)
        distance = torch.linalg.vector_norm(known - projector(logits), dim=1).mean()
    return torch.stack([nuclear_norm(logits), distance])


def nuclear_norm(matrix: Tensor) -> Tensor:
    """Return the sum of a matrix's singular values, a float32 scalar."""
    import torch

    from dataflex.data.sums import sum_dtype

    if matrix.shape[0] > matrix.shape[1]:
        matrix = matrix.T
    gram = matrix.new_zeros((matrix.shape[0], matrix.shape[0]), dtype=sum_dtype(matrix.device))
    for part in matrix.split(_PART, dim=1):
        wide = part.to(gram.dtype)
        gram.addmm_(wide, wide.T)
    if gram.dtype != torch.float64:  # a device without float64 has no function for eigenvalues either
        gram = gram.cpu()
    return torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().sum().float().to(matrix.device)


class _Projector:
    """Projects logits; the transform of the vocabulary is computed at the first use, when its size is known."""

    def __init__(self, settings: LogitProjections) -> None:
        self.settings = settings
        self._columns: Tensor | None = None
        """The transform of the vocabulary, (V, columns). None before the first use."""
        rng = derive_rng(settings.seed, "logit_projections", "rows")
        self._frequencies = rng.random(settings.rows)

    def __call__(self, logits: Tensor) -> Tensor:
        """Return the projection of logits (T, V), shape (rows * columns,)."""
        if self._columns is None:
            self._columns = self._transform(logits.shape[1], logits.device)
        tokens, device = logits.shape[0], logits.device
        signs = self._signs(tokens, "tokens", device)
        chosen = [int(share * tokens) for share in self._frequencies]
        rows = _cosines(tokens, chosen, device).T * signs
        scale = math.sqrt(self.settings.rows * self.settings.columns)
        return (rows @ (logits @ self._columns)).flatten() / scale

    def _transform(self, width: int, device: torch.device) -> Tensor:
        """Return signs times cosines, (V, columns)."""
        rng = derive_rng(self.settings.seed, "logit_projections", "columns")
        chosen = rng.integers(width, size=self.settings.columns).tolist()
        return _cosines(width, chosen, device) * self._signs(width, "words", device)[:, None]

    def _signs(self, count: int, of: str, device: torch.device) -> Tensor:
        """Return random signs, (count,); the first signs are the same for every ``count``."""
        import torch

        drawn = derive_rng(self.settings.seed, "logit_projections", of).random(count)
        return torch.from_numpy((drawn < 0.5) * 2.0 - 1.0).float().to(device)


def _cosines(size: int, frequencies: list[int], device: torch.device) -> Tensor:
    """Return the real part of the discrete Fourier transform at some frequencies, (size, frequencies)."""
    import torch

    from dataflex.data.sums import sum_dtype

    places = torch.arange(size, device=device)[:, None] * torch.tensor(frequencies, device=device)[None, :] % size
    return torch.cos(places.to(sum_dtype(device)) * (2 * math.pi / size)).float()
