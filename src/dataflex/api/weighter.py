"""Weighters scale the loss of each sample, or of each token, inside a step."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from dataflex.api.component import Component, ParamsT
from dataflex.api.context import StepBatch
from dataflex.api.params import ComponentParams
from dataflex.api.schedule import RunOutline

if TYPE_CHECKING:
    from torch import Tensor


class WeighterParams(ComponentParams):
    """Parameters all weighters have."""

    normalization: Literal["token", "sample"] = Field(
        "token",
        description="token: the Trainer's own token mean, weighted; sample: weighted mean of per-sample means, if any "
        "weighter of the run asks for it.",
    )


class Weighter(Component[ParamsT]):
    """Scales the loss of each sample, or of each token, inside a step.

    Example:
        >>> class Ramp(Weighter[WeighterParams]):
        ...     def weigh(self, batch):
        ...         return 1 + batch.progress * (batch.losses > batch.losses.median())
    """

    Params: ClassVar[type[ComponentParams]] = WeighterParams
    elementwise: ClassVar[bool] = False
    """Whether the weights of a sample depend on nothing but that sample; then no batch has to be gathered first."""

    def expected_forwards(self, run: RunOutline) -> float:
        """Return the samples of all steps where several micro-batches make one, as their weights need all losses."""
        if self.elementwise or run.accumulation == 1:
            return 0.0
        return float(run.decided_steps * run.global_batch_size)

    def weigh(self, batch: StepBatch) -> Tensor:
        """Return what the losses are multiplied by: 1 everywhere is plain training.

        Shape (n,), one weight per sample, or (n, T), one per token; finite and not negative, of the tokens that are
        trained on. The weights of several weighters are multiplied with each other.

        Args:
            batch: the samples of the step, with their losses; the losses of their tokens if :meth:`needs` asks for
                ``step_losses="tokens"`` or for a reference.
        """
        raise NotImplementedError(f"weighter {self.name!r} does not define weigh()")
