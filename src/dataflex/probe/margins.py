"""Reward margins of pairs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from dataflex.api.measurement import MeasuredBatch, Measurement, register_measurement
from dataflex.errors import ComponentError

if TYPE_CHECKING:
    from torch import Tensor

    from dataflex.api.needs import RunView

_STAGES = ("dpo", "rm")
"""Stages whose samples are pairs with rewards."""


@register_measurement("margins")
@dataclass(frozen=True)
class Margins(Measurement):
    """The reward of the chosen response minus the reward of the rejected one, for each pair, shape (n,).

    Rewards are those of the stage's trainer: in stage dpo the implicit rewards, beta times the log ratio of the model
    and the reference (DPO, Rafailov et al. 2023, equation 5); in stage rm the scores of the reward model.

    Example:
        A selector that prefers pairs whose responses the model confuses:

        >>> from dataflex import Margins, Needs, Selector, SelectorParams
        >>> class Confused(Selector[SelectorParams]):
        ...     def needs(self, run):
        ...         return Needs(measurements=(Margins(),))
        ...     def score(self, ctx, candidates):
        ...         return -ctx.probe.measure(Margins(), candidates)
    """

    quantity: ClassVar[str] = "reward margin"
    of_sample_loss: ClassVar[bool] = True

    def measure(self, batch: MeasuredBatch) -> Tensor:
        """Return the margins, (B,).

        Raises:
            ComponentError: if the samples have no rewards of two responses.
        """
        found = batch.stage_losses()
        if found is None or found.margins is None:
            raise ComponentError(f"reward margins need pairs of responses, which stages {' and '.join(_STAGES)} have.")
        return found.margins

    def problems(self, run: RunView) -> Iterator[tuple[str, str]]:
        """Yield why a run has no margins."""
        stage = str(run.llamafactory.get("stage", "sft"))
        if stage not in _STAGES:
            yield (
                "method",
                "needs the reward margins of pairs of responses, which only the stages dpo and rm have, but the stage "
                f"is {stage}. Set stage: dpo or stage: rm, or use a method that needs no margins.",
            )
