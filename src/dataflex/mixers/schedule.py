"""Proportions that follow a given timetable: named mixtures at named optimizer steps, and a line between them.

Before the first point its proportions hold, after the last point those of the last. A round has the proportions of its
first step, so ``update_steps`` is how finely a line is followed.

Source: common practice; two-stage pre-training and annealing on better data are such timetables.
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
class ScheduleMixer(Mixer[ScheduleParams]):
    """Follows given proportions over the run."""

    state_depends_on: ClassVar[frozenset[str]] = frozenset({"points"})

    def __init__(self, params: ScheduleParams) -> None:
        super().__init__(params)
        self._shares: NDArray[np.float64] = np.empty((0, 0))
        """The proportions of every point as they were when training began, rows of sum 1: a file may change."""

    def cannot_learn(self, run: RunOutline) -> str | None:
        """Return which points of the timetable the run never comes to."""
        slot = run.schedule.slot_at(run.total_steps - 1)
        late = [point.step for point in self.params.points[1:] if point.step > slot.start_step]
        if self.params.interpolation == "linear":  # the line to a point is followed before it is reached
            late = [step for step in late if step > run.total_steps or not slot.start_step]
        if not late:
            return None
        return (
            f"the proportions of step {', '.join(map(str, late))} are never trained on: the run has {run.total_steps} "
            f"steps, and its last round begins at step {slot.start_step}. Move the points, lower dataflex.update_steps "
            "or train longer"
        )

    def initial(self, ctx: RoundContext) -> NDArray[np.float64]:
        """Return the timetable's proportions: it holds in warm-up rounds too."""
        return self.mix(ctx)

    def mix(self, ctx: RoundContext) -> NDArray[np.float64]:
        """Return the proportions of the round's first step, shape (K,), sum 1."""
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
        """Return the proportions of the points."""
        return {"shares": self._shares}

    def load_state_dict(self, state: State) -> None:
        """Take back what :meth:`state_dict` returned."""
        self._shares = state["shares"]

    def check_domains(self, names: tuple[str, ...]) -> tuple[str, str] | None:
        """Check names or length, sign and sum of the proportions of every point."""
        for number, point in enumerate(self.params.points):
            problem = shares_problem(point.proportions, names)
            if problem is not None:
                return f"points.{number}.proportions", f"at step {point.step}: {problem}"
        return None
