"""Proportions that follow a given timetable: named mixtures at named optimizer steps, and a line between them.

Before the first point its proportions hold, after the last point those of the last. A round has the proportions of its
first step, so ``update_steps`` is how finely a line is followed.

Source: common practice; two-stage pre-training and annealing on better data are such timetables.
Cost: none.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, field_validator

from dataflex.components import DomainParams, Mixer, RoundContext, Shares, shares_of, shares_problem
from dataflex.registry import register


class SchedulePoint(BaseModel):
    """The proportions at one optimizer step."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    step: int = Field(ge=0, description="Optimizer steps done when they hold.")
    proportions: Shares = Field(description="Share of each domain, any scale: list, mapping or JSON file.")


class ScheduleParams(DomainParams):
    """Parameters of the schedule mixer."""

    points: list[SchedulePoint] = Field(
        min_length=1, description="Steps, ascending, and the proportions at each: {step: 0, proportions: ...}."
    )
    interpolation: Literal["linear", "step"] = Field(
        "linear", description="Between two points: a line, or the proportions of the earlier one."
    )

    @field_validator("points")
    @classmethod
    def _steps_ascend(cls, points: list[SchedulePoint]) -> list[SchedulePoint]:
        for before, after in pairwise(points):
            if after.step <= before.step:
                raise ValueError(f"steps must ascend, but {after.step} comes after {before.step}")
        return points


@register("mixer", "schedule")
class ScheduleMixer(Mixer):
    """Follows given proportions over the run."""

    Params = ScheduleParams

    def initial(self, ctx: RoundContext) -> NDArray[np.float64]:
        """Return the timetable's proportions: it holds in warm-up rounds too."""
        return self.mix(ctx)

    def mix(self, ctx: RoundContext) -> NDArray[np.float64]:
        """Return the proportions of the round's first step, shape (K,), sum 1."""
        points = self.params.points
        steps = [point.step for point in points]
        if self.params.interpolation == "step":
            reached = int(np.searchsorted(steps, ctx.start_step, side="right")) - 1
            points = [points[max(reached, 0)]]
            steps = [points[0].step]
        shares = np.stack([shares_of(point.proportions, ctx.pool.domains) for point in points])
        shares /= shares.sum(axis=1, keepdims=True)
        return np.array([np.interp(ctx.start_step, steps, column) for column in shares.T])

    def check_domains(self, names: tuple[str, ...]) -> tuple[str, str] | None:
        """Check names or length, sign and sum of the proportions of every point."""
        for number, point in enumerate(self.params.points):
            problem = shares_problem(point.proportions, names)
            if problem is not None:
                return f"points.{number}.proportions", f"at step {point.step}: {problem}"
        return None
