"""Weighters scale the loss of each sample inside a step."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from dataflex.api.component import Component, ParamsT
from dataflex.api.params import ComponentParams
from dataflex.api.schedule import RunOutline

if TYPE_CHECKING:
    from torch import Tensor


class WeighterParams(ComponentParams):
    """Parameters all weighters have."""

    normalization: Literal["token", "sample"] = Field(
        "token",
        description="token: the Trainer's own token mean, weighted; sample: weighted mean of per-sample means.",
    )


class Weighter(Component[ParamsT]):
    """Scales the loss of each sample inside a step."""

    Params: ClassVar[type[ComponentParams]] = WeighterParams
    elementwise: ClassVar[bool] = False
    """Whether a sample's weight depends on nothing but its own loss; then no batch has to be gathered first."""

    def expected_forwards(self, run: RunOutline) -> float:
        """Return the samples of all steps where several micro-batches make one, as their weights need all losses."""
        if self.elementwise or run.accumulation == 1:
            return 0.0
        return float(run.decided_steps * run.global_batch_size)

    def weigh(self, losses: Tensor, step: int) -> Tensor:
        """Return one weight per sample, shape (n,), non-negative; 1 everywhere is plain training.

        Args:
            losses: token-mean losses of the step's whole global batch (all micro-batches, all ranks), shape (n,),
                float32, detached. Any part of it where the weighter is elementwise.
            step: optimizer steps done so far.
        """
        raise NotImplementedError(f"weighter {self.name!r} does not define weigh()")
