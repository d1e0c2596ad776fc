"""Orders arrange the samples of a plan."""

from __future__ import annotations

from typing import Any, ClassVar

from dataflex.api.component import Component, ParamsT
from dataflex.api.context import RoundContext
from dataflex.api.measurement import Measurement
from dataflex.api.schedule import RunOutline
from dataflex.api.selection import Selection
from dataflex.data.sampling import IndexArray


class Order(Component[ParamsT]):
    """Arranges the samples of a plan."""

    def cannot_act(self, run: RunOutline) -> str | None:
        """Return that rounds of one step leave nothing to arrange: a step's gradient does not depend on the order."""
        if min(run.schedule.update_steps, run.decided_steps) > 1:
            return None
        return (
            "every round is one optimizer step, and the order of samples inside a step changes nothing; raise "
            "dataflex.update_steps"
        )

    def measured_samples(self, measurement: Measurement[Any], run: RunOutline) -> float:
        """Return the samples of all plans."""
        return float(run.decided_steps * run.global_batch_size)

    def unfit(self, samples: int) -> tuple[str, str] | None:
        """Return a parameter and why it does not fit so many samples arranged at a time, or None.

        Asked before the model is loaded; the text is an error.
        """
        return None

    @property
    def reads_scores(self) -> bool:
        """Whether :meth:`arrange` reads ``selection.scores``, which not every selector gives."""
        return False

    keeps_passes: ClassVar[bool] = False
    """Whether the samples of a domain come in passes whatever :meth:`arrange` returns: of one domain, those of an
    earlier pass then take the places before those of a later one."""

    def arrange(self, ctx: RoundContext, selection: Selection) -> IndexArray:
        """Return the positions of ``selection.indices`` in training order: a permutation of ``range(n)``."""
        raise NotImplementedError(f"order {self.name!r} does not define arrange()")
