"""Rounds of a run that plans its data. Each round is decided when training reaches it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from dataflex import distributed
from dataflex.api.components import Components
from dataflex.api.schedule import RoundSlot
from dataflex.data.pool import Pool
from dataflex.data.sampling import IndexArray
from dataflex.errors import CheckpointError, DivergenceError
from dataflex.planning.planner import Plan, Planner
from dataflex.record.schema import Cost
from dataflex.trainer import console
from dataflex.trainer.clock import Clock

if TYPE_CHECKING:
    from dataflex.api.component import State
    from dataflex.probe.model import ModelProbe
    from dataflex.trainer.recording import Recorder


class PlannedRounds:
    """Decides the rounds of a run. Training calls :meth:`plan_for`.

    Args:
        components: components of the run.
        pool: training samples.
        probe: measures samples on the model in training.
        planner: makes the plans.
        clock: clock of the run.
        recorder: writes the run record.
    """

    def __init__(
        self,
        components: Components,
        pool: Pool,
        probe: ModelProbe,
        planner: Planner,
        clock: Clock,
        recorder: Recorder,
    ) -> None:
        self.pool, self.probe, self.planner = pool, probe, planner
        self._components, self._clock, self._recorder = components, clock, recorder
        self.plan: Plan | None = None
        """Plan of the running round; None before the first."""

    def plan_for(self, step: int) -> Plan:
        """Return the plan of the round that contains optimizer step ``step`` (from 0).

        Each plan is made at most once.
        """
        slot = self.planner.schedule.slot_at(step)
        if self.plan is None or self.plan.slot != slot:
            self.plan = self.decide(slot)
        return self.plan

    def samples_of(self, step: int) -> IndexArray:
        """Return the pool indices of the samples of step ``step`` (from 0), in the order of the plan, shape (n,)."""
        plan, batch = self.plan_for(step), self.planner.global_batch_size
        begin = (step - plan.slot.start_step) * batch
        return plan.indices[begin : begin + batch]

    def decide(self, slot: RoundSlot) -> Plan:
        """Make the plan of a round, and write it to the run record.

        Raises:
            DivergenceError: if the model's losses are not finite.
            DataFlexError: on every process, if a component fails on one process.
        """
        with distributed.together():
            return self._decide(slot)

    def _decide(self, slot: RoundSlot) -> Plan:
        """Decide on this process; see :meth:`decide`."""
        before, earlier = replace(self.probe.cost), self._clock.decision_seconds
        with self._clock.deciding(), self._embeddings():
            try:
                plan = self.planner.plan(slot, self.probe)
            except DivergenceError as error:
                where = f"in the decision of round {slot.number}, after step {slot.start_step}"
                raise DivergenceError(f"{where}, {error.what}") from error
            distributed.require_equal(plan.sha256, f"the plan of round {slot.number}")
        for note in self.planner.notes:
            self._recorder.note(note)
        self.planner.notes.clear()
        seconds, after = self._clock.decision_seconds - earlier, self.probe.cost
        self._recorder.round(plan, Cost(seconds, after.samples - before.samples, after.tokens - before.tokens))
        if distributed.rank() == 0:
            console.say(self._line_of(plan, seconds))
        return plan

    @contextmanager
    def _embeddings(self) -> Iterator[None]:
        """Discard the embeddings of the model in training before and after the block.

        The model changes with every step, so one decision must not read the embeddings of another.
        """
        service = self.planner.readings.embeddings
        if service is not None:
            service.forget()
        yield
        if service is not None:
            service.forget()

    def _line_of(self, plan: Plan, seconds: float) -> str:
        """Return the terminal line about a round that has just been decided."""
        slot, mixer, names = plan.slot, self._components.mix, self._components.names()
        weights = None
        if mixer is not None and mixer.weighs_loss and slot.update is not None:
            weights = dict(zip(self.pool.domains, mixer.loss_weights.tolist(), strict=True))
        return console.decision(
            slot,
            dict(zip(self.pool.domains, self.pool.domain_counts(plan.indices).tolist(), strict=True)),
            self.pool.size,
            seconds,
            scored=None if plan.budget is None else plan.budget.scored,
            loss_weights=weights,
            undecided={f"{key} {names[key]}": why for key, why in plan.undecided.items()},
        )

    def state_dict(self) -> State:
        """Return the running round with its plan, and the state of the planner."""
        return {"plan": self._plan_state(), "planner": self.planner.state_dict()}

    def _plan_state(self) -> State | None:
        """Return the plan of the running round for a checkpoint; None before the first round."""
        if self.plan is None:
            return None
        slot = self.plan.slot
        state: State = {
            "number": slot.number,
            "start_step": slot.start_step,
            "steps": slot.steps,
            "update": slot.update,
            "indices": self.plan.indices,
            "proportions": self.plan.proportions,
            "unscored": self.plan.unscored,
        }
        return state if self.plan.scores is None else {**state, "scores": self.plan.scores}

    def load_state_dict(self, state: State) -> None:
        """Restore the state that :meth:`state_dict` returned.

        Args:
            state: state of the checkpoint, including the step it was written at.

        Raises:
            CheckpointError: if the run's total number of steps gives the checkpoint's round another length.
        """
        self.planner.load_state_dict(state["planner"])
        stored, schedule = state["plan"], self.planner.schedule
        if stored is None:
            return
        slot = RoundSlot(stored["number"], stored["start_step"], stored["steps"], stored["update"])
        inside = state["step"] < slot.start_step + slot.steps
        fits = slot.start_step < schedule.total_steps and slot == schedule.slot_at(slot.start_step)
        if inside and not fits:
            raise CheckpointError(
                f"the checkpoint of step {state['step']} is inside a round of {slot.steps} steps that this run's "
                f"total of {schedule.total_steps} steps would cut differently. Keep the total, or resume from "
                "a checkpoint at a round's end."
            )
        self.plan = Plan(slot, stored["indices"], stored.get("scores"), stored["proportions"], int(stored["unscored"]))
