"""Losses of samples: their token means, and the losses of their tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from dataflex.api.measurement import MeasuredBatch, Measurement, MeasurementRun, register_measurement
from dataflex.data.pool import IGNORE_INDEX

if TYPE_CHECKING:
    from torch import Tensor


class TokenMeans(Measurement):
    """Base of measurements that average a function of each trained token's logits over the tokens of a sample.

    Example:
        The mean entropy of the model's predictions:

        >>> from dataclasses import dataclass
        >>> import torch
        >>> from dataflex import TokenMeans, register_measurement
        >>> @register_measurement("entropies")
        ... @dataclass(frozen=True)
        ... class Entropies(TokenMeans):
        ...     def token_values(self, logits, labels):
        ...         return torch.distributions.Categorical(logits=logits).entropy()
        >>> Entropies().token_values(torch.zeros(1, 4), torch.tensor([0]))
        tensor([1.3863])
    """

    untrained: ClassVar[float | None] = math.nan

    def token_values(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return one value per position, (n,), from logits (n, V), float32, and labels (n,)."""
        raise NotImplementedError

    def measure(self, batch: MeasuredBatch) -> Tensor:
        """Return the token means, (B,)."""
        return batch.token_means(self.token_values)


@register_measurement("losses")
@dataclass(frozen=True)
class Losses(TokenMeans):
    """The loss of each sample, shape (n,).

    In stages pt and sft it is the mean over the tokens; NaN for a sample without a trained token. In stages dpo and rm
    it is the loss of the pair. In stage kto it is the loss of the response, with an estimate of the KL divergence from
    this sample alone.

    Example:
        >>> import torch
        >>> from dataflex import Losses
        >>> Losses().token_values(torch.zeros(1, 4), torch.tensor([0]))
        tensor([1.3863])
    """

    quantity: ClassVar[str] = "loss"
    of_sample_loss: ClassVar[bool] = True

    def token_values(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the cross entropy of every position."""
        from dataflex.probe.head import cross_entropy

        return cross_entropy(logits, labels)

    def measure(self, batch: MeasuredBatch) -> Tensor:
        """Return the losses, (B,)."""
        found = batch.stage_losses()
        return super().measure(batch) if found is None else found.losses


@register_measurement("losses_by_token")
@dataclass(frozen=True)
class LossesByToken(Measurement[list[NDArray[np.float32]]]):
    """The losses of the trained tokens of each sample, in the order of the tokens: one array for each sample.

    A sample without a trained token has an empty array. The values of one call are in memory as a table with a row for
    each sample and a column for each token of the longest one. So measure a large pool in blocks of samples.

    Example:
        A selector that prefers samples whose hardest token has a high loss:

        >>> import numpy as np
        >>> from dataflex import LossesByToken, Needs, Selector, SelectorParams
        >>> class Peaks(Selector[SelectorParams]):
        ...     def needs(self, run):
        ...         return Needs(measurements=(LossesByToken(),))
        ...     def score(self, ctx, candidates):
        ...         found = ctx.probe.measure(LossesByToken(), candidates)
        ...         return np.array([losses.max(initial=0) for losses in found])
    """

    quantity: ClassVar[str] = "loss"

    def run(self, run: MeasurementRun) -> list[NDArray[np.float32]]:
        """Return the losses of each sample, shape (number of its trained tokens,), float32."""
        import torch

        from dataflex.probe.gradient_runs import runner_of
        from dataflex.probe.head import cross_entropy

        columns = int(runner_of(run).samples.lengths[run.indices].max(initial=1))

        def measure(batch: MeasuredBatch) -> Tensor:
            """Return the number of trained tokens of each sample, and then their losses; (B, 1 + columns)."""
            counted = batch.labels != IGNORE_INDEX
            first = (~counted).byte().argsort(dim=1, stable=True)  # the trained tokens before the others
            losses = batch.token_values(cross_entropy).gather(1, first)
            widened = torch.nn.functional.pad(losses, (0, max(0, columns - losses.shape[1])))[:, :columns]
            return torch.cat([counted.sum(1, keepdim=True).float(), widened], dim=1)

        return [row[1 : 1 + int(row[0])].copy() for row in run.each(measure)]
