"""Weighters scale the loss of each sample, or of each token, inside a step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from pydantic import Field

from dataflex.api.component import Component
from dataflex.api.context import StepBatch, StepStart
from dataflex.api.measurement import Measurement
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


WeighterParamsT = TypeVar("WeighterParamsT", bound=WeighterParams, covariant=True)


class Weighter(Component[WeighterParamsT]):
    """Scales the loss of each sample, or of each token, inside a step.

    Example:
        >>> class Ramp(Weighter[WeighterParams]):
        ...     def weigh(self, batch):
        ...         return 1 + batch.progress * (batch.losses > batch.losses.median())
    """

    Params: ClassVar[type[ComponentParams]] = WeighterParams
    elementwise: ClassVar[bool] = False
    """Whether the weights of a sample depend on nothing but that sample; then no batch has to be gathered first."""

    @property
    def decides_within_step(self) -> bool:
        """Whether the weights of a step depend on the losses of all its samples."""
        return not self.elementwise

    def measured_samples(self, measurement: Measurement[Any], run: RunOutline) -> float:
        """Return the samples of all steps that are weighted."""
        return float(run.decided_steps * run.global_batch_size)

    def begin_step(self, start: StepStart) -> None:
        """Measure what the weights of a step need beside its samples, as the embeddings of validation samples.

        Called on all processes together before the forwards of every step that it weighs. Under ZeRO-3 and FSDP the
        model can be run here, and not in :meth:`weigh`.
        """

    def weigh(self, batch: StepBatch) -> Tensor:
        """Return what the losses are multiplied by: 1 everywhere is plain training.

        Shape (n,), one weight per sample, or (n, T), one per token; finite and not negative, of the tokens that are
        trained on. The weights of several weighters are multiplied with each other.

        Args:
            batch: the samples of the step, with their losses; the losses of their tokens if :meth:`needs` asks for
                ``step_losses="tokens"`` or for a reference, their embeddings if it asks for ``step_embeddings``.
        """
        raise NotImplementedError(f"weighter {self.name!r} does not define weigh()")
