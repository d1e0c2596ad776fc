"""Shares that follow a given timetable: mixtures at given optimizer steps, interpolated between these steps.

The shares of the first point hold before it, and the shares of the last point after it. A round has the shares of the
round's first step, so ``update_steps`` decides how closely the rounds follow a line.

Source: common practice, such as two-stage pre-training and annealing on better data.
Cost: none.
"""

from __future__ import annotations

from itertools import pairwise
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, field_validator

from dataflex import DomainParams, Mixer, RoundContext, RunOutline, Shares, State, register, shares_of, shares_problem


class SchedulePoint(BaseModel):
    """The shares at one optimizer step."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    step: int = Field(ge=0, description="Number of optimizer steps after which the shares hold.")
    proportions: Shares = Field(
        description="Share of each domain, any scale: list, mapping or JSON file.",
        examples=[{"code": 0.7, "docs": 0.3}],
    )


class ScheduleParams(DomainParams):
    """Parameters of the schedule mixer."""

    points: list[SchedulePoint] = Field(
        min_length=1, description="Ascending steps and the shares at each: {step: 0, proportions: ...}."
    )
    interpolation: Literal["linear", "step"] = Field(
        "linear", description="Shares between two points: linear interpolation, or the shares of the earlier point."
    )

    @field_validator("points")
    @classmethod
    def _steps_ascend(cls, points: list[SchedulePoint]) -> list[SchedulePoint]:
        for before, after in pairwise(points):
            if after.step <= before.step:
                raise ValueError(f"the steps of the points must ascend, but {after.step} comes after {before.step}")
        return points


@register("mixer", "schedule")
class ScheduleMixer(Mixer[ScheduleParams]):
    """Follows a given timetable of shares."""

    state_depends_on: ClassVar[frozenset[str]] = frozenset({"points"})

    def __init__(self, params: ScheduleParams) -> None:
        super().__init__(params)
        self._shares: NDArray[np.float64] = np.empty((0, 0))
        """The shares of every point, rows of sum 1. Stored because a file may change during the run."""

    def cannot_learn(self, run: RunOutline) -> str | None:
        """Return which points of the timetable the run never reaches."""
        slot = run.schedule.slot_at(run.total_steps - 1)
        late = [point.step for point in self.params.points[1:] if point.step > slot.start_step]
        if self.params.interpolation == "linear":  # the line to a point is followed before the point is reached
            late = [step for step in late if step > run.total_steps or not slot.start_step]
        if not late:
            return None
        return (
            f"the proportions of step {', '.join(map(str, late))} are never trained on: the run has {run.total_steps} "
            f"steps, and its last round begins at step {slot.start_step}. Move the points, lower dataflex.update_steps "
            "or train longer"
        )

    def initial(self, ctx: RoundContext) -> NDArray[np.float64]:
        """Return the shares of the timetable, which also holds in warm-up rounds."""
        return self.mix(ctx)

    def mix(self, ctx: RoundContext) -> NDArray[np.float64]:
        """Return the shares at the first step of the round, shape (K,), sum 1."""
        points = self.params.points
        if not self._shares.size:
            shares = np.stack([shares_of(point.proportions, ctx.pool.domains) for point in points])
            self._shares = shares / shares.sum(axis=1, keepdims=True)
        steps = [point.step for point in points]
        if self.params.interpolation == "step":
            reached = int(np.searchsorted(steps, ctx.start_step, side="right")) - 1
            return self._shares[max(reached, 0)]
        return np.array([np.interp(ctx.start_step, steps, column) for column in self._shares.T])

    def state_dict(self) -> State:
        """Return the shares of the points."""
        return {"shares": self._shares}

    def load_state_dict(self, state: State) -> None:
        """Restore the state that :meth:`state_dict` returned."""
        self._shares = state["shares"]

    def check_domains(self, names: tuple[str, ...]) -> tuple[str, str] | None:
        """Check the names, number, sign and sum of the shares of every point."""
        for number, point in enumerate(self.params.points):
            problem = shares_problem(point.proportions, names)
            if problem is not None:
                return f"points.{number}.proportions", f"at step {point.step}: {problem}"
        return None
