"""Weighters scale the loss of each sample, or of each token, within a step."""

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
    """Parameters of all weighters.

    Example:
        >>> from pydantic import Field
        >>> from dataflex import WeighterParams
        >>> class RampParams(WeighterParams):
        ...     strength: float = Field(1.0, ge=0, description="Extra weight of hard samples at the end of the run.")
        >>> RampParams(normalization="sample").strength
        1.0
    """

    normalization: Literal["token", "sample"] = Field(
        "token",
        description="token: the Trainer's own token mean, weighted; sample: weighted mean of per-sample means if any "
        "weighter of the run asks for it.",
    )


WeighterParamsT = TypeVar("WeighterParamsT", bound=WeighterParams, covariant=True)


class Weighter(Component[WeighterParamsT]):
    """Base of all weighters: scales the loss of each sample, or of each token, within a step.

    Example:
        >>> import torch
        >>> from dataflex import StepBatch, Weighter, WeighterParams
        >>> class Ramp(Weighter[WeighterParams]):
        ...     def weigh(self, batch):
        ...         return 1 + batch.progress * (batch.losses > batch.losses.median())
        >>> Ramp(WeighterParams()).weigh(StepBatch(torch.tensor([2.0, 4.0, 3.0]), step=10, total_steps=40))
        tensor([1.0000, 1.2500, 1.0000])
    """

    Params: ClassVar[type[ComponentParams]] = WeighterParams
    elementwise: bool = False
    """Whether the weight of a sample depends on this sample alone. The framework then need not gather the batch. Set it
    in the class, or in the constructor if it depends on the parameters."""
    step_reference: ClassVar[bool] = True
    """Whether :meth:`weigh` reads the reference losses of the step's samples, if :meth:`needs` name a reference. False
    for a weighter that reads the reference in :meth:`begin_step` alone."""
    reads_losses: ClassVar[bool] = True
    """Whether the weights depend on the losses of the step. If not, ``batch.losses`` and ``batch.token_losses`` are
    NaN, and a fused loss computes no logits twice."""

    @property
    def decides_within_step(self) -> bool:
        """Whether the weights of a step depend on the losses of all its samples."""
        return not self.elementwise

    def measured_samples(self, measurement: Measurement[Any], run: RunOutline) -> float:
        """Return the number of samples in all steps that are weighted."""
        return float(run.decided_steps * run.global_batch_size)

    def begin_step(self, start: StepStart) -> None:
        """Measure the data that the weights of a step need in addition to its samples, such as validation embeddings.

        Called on all processes together before the forward passes of every step that the weighter weighs. Under ZeRO-3
        and FSDP the model can run here but not in :meth:`weigh`.
        """

    def weigh(self, batch: StepBatch) -> Tensor:
        """Return the factors of the losses. A factor of 1 everywhere is plain training.

        The shape is (n,), one weight per sample, or (n, T), one per token. The weights of trained tokens must be finite
        and not negative. The framework multiplies the weights of several weighters.

        Args:
            batch: the samples of the step with their losses. The batch also holds their token losses if :meth:`needs`
                name ``step_losses="tokens"`` or a reference, and their embeddings if :meth:`needs` name
                ``step_embeddings``.
        """
        raise NotImplementedError(f"weighter {self.name!r} does not define weigh()")
