"""The schedule of decisions: rounds as pure functions of the optimizer step.

A cycle is one warm-up round of ``warmup_steps`` and ``updates`` rounds of ``update_steps``. Cycles repeat until
``total_steps``. With ``updates = -1`` the update rounds continue until training ends.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class RoundSlot:
    """One round of a run, with its position and length."""

    number: int
    """Position among all rounds, from 0."""
    start_step: int
    """Number of completed optimizer steps before the round begins."""
    steps: int
    """Number of optimizer steps in the round. The last round of a run may be shorter than the others."""
    update: int | None
    """The decision that this round is trained on, counted from 0 over the whole run. None in a warm-up round."""


@dataclass(frozen=True)
class Schedule:
    """The rounds of a run.

    Attributes:
        warmup_steps: length of a cycle's warm-up round, >= 0.
        update_steps: length of an update round, >= 1.
        updates: update rounds in a cycle, >= 1, or -1 for "until training ends".
        total_steps: optimizer steps of the run, >= 1.

    Example:
        >>> from dataflex.api.schedule import Schedule
        >>> schedule = Schedule(warmup_steps=10, update_steps=20, updates=-1, total_steps=100)
        >>> schedule.num_updates, schedule.slot_at(35)
        (5, RoundSlot(number=2, start_step=30, steps=20, update=1))
    """

    warmup_steps: int
    update_steps: int
    updates: int
    total_steps: int

    @property
    def cycle_steps(self) -> int:
        """Number of steps after which the warm-up begins again (the whole run if ``updates`` is -1)."""
        if self.updates < 0:
            return max(self.total_steps, 1)
        return self.warmup_steps + self.update_steps * self.updates

    @property
    def rounds_per_cycle(self) -> int:
        """Number of rounds in one full cycle."""
        return self._rounds_within(self.cycle_steps)

    @property
    def num_updates(self) -> int:
        """Number of decisions in the whole run."""
        full, rest = divmod(self.total_steps, self.cycle_steps)
        return full * self._updates_within(self.cycle_steps) + self._updates_within(rest)

    def _updates_within(self, steps: int) -> int:
        return math.ceil(max(0, steps - self.warmup_steps) / self.update_steps)

    def _rounds_within(self, steps: int) -> int:
        return (1 if self.warmup_steps and steps else 0) + self._updates_within(steps)

    @property
    def num_rounds(self) -> int:
        """Number of rounds in the whole run, including warm-up rounds."""
        full, rest = divmod(self.total_steps, self.cycle_steps)
        return full * self._rounds_within(self.cycle_steps) + self._rounds_within(rest)

    @property
    def last_decision(self) -> int | None:
        """Number of completed optimizer steps before the last decision of the run. None if the run has no decision."""
        slot = self.slot_at(self.total_steps - 1)
        if slot.update is None:  # A run may end in the warm-up of a further cycle.
            if slot.start_step == 0:
                return None
            slot = self.slot_at(slot.start_step - 1)
        return slot.start_step

    def slot_at(self, step: int) -> RoundSlot:
        """Return the round that contains the optimizer step number ``step`` (from 0).

        Raises:
            ValueError: if ``step`` is outside ``[0, total_steps)``.
        """
        if not 0 <= step < self.total_steps:
            raise ValueError(f"step must be in [0, {self.total_steps}), got {step}")
        cycle, offset = divmod(step, self.cycle_steps)
        begin = cycle * self.cycle_steps
        number = cycle * self.rounds_per_cycle
        if offset < self.warmup_steps:
            return RoundSlot(number, begin, min(self.warmup_steps, self.total_steps - begin), None)
        in_cycle = (offset - self.warmup_steps) // self.update_steps
        start = begin + self.warmup_steps + in_cycle * self.update_steps
        end = min(start + self.update_steps, self.total_steps)
        update = cycle * self._updates_within(self.cycle_steps) + in_cycle
        return RoundSlot(number + bool(self.warmup_steps) + in_cycle, start, end - start, update)


def steps_per_pass(num_samples: int, global_batch_size: int) -> int:
    """Return the optimizer steps that train every sample of the pool once. The last may begin a second pass."""
    return math.ceil(num_samples / global_batch_size)


def default_update_steps(*, rounds: int, num_samples: int, global_batch_size: int, run_steps: int | None) -> int:
    """Return the default length of a round in optimizer steps.

    With ``rounds`` = 1 a round is one pass over the pool. Otherwise a round is the ``rounds``-th part of one pass or of
    the run, whichever is shorter. A round of the whole pool would leave a selector nothing to choose. A run of one
    round would give a mixer that learns no second decision to use its result.

    Args:
        rounds: the number of parts that the components want, at least 1.
        num_samples: samples in the pool.
        global_batch_size: samples of an optimizer step.
        run_steps: optimizer steps of the run after its warm-up. None if they follow from the length of a round.
    """
    if rounds == 1:
        return steps_per_pass(num_samples, global_batch_size)
    span = num_samples // global_batch_size
    return max(1, (span if run_steps is None else min(span, run_steps)) // rounds)


@dataclass(frozen=True)
class RunOutline:
    """The outline of a run before its model is loaded. A component reads it to find out whether it can have an effect.

    Attributes:
        schedule: the rounds. If a budget of tokens or seconds ends the run, the total is the expected one.
        global_batch_size: samples of an optimizer step.
        pool_size: samples in the pool; None if nothing is planned.
        domains: number of domains.
        accumulation: micro-batches of an optimizer step on one process.
        validation: number of validation samples of the component that receives the outline, or 0.
        every: the component acts at every ``every``-th decision.
        sizes: samples of each domain; None if unknown.

    Example:
        >>> from dataflex import RunOutline
        >>> from dataflex.api.schedule import Schedule
        >>> schedule = Schedule(warmup_steps=10, update_steps=20, updates=-1, total_steps=100)
        >>> run = RunOutline(schedule, global_batch_size=8, pool_size=1000)
        >>> run.decisions, run.decided_steps, run.round_samples
        (5, 90, 160)
    """

    schedule: Schedule
    global_batch_size: int
    pool_size: int | None = None
    domains: int = 1
    accumulation: int = 1
    validation: int = 0
    every: int = 1
    sizes: Mapping[str, int] | None = None

    @property
    def total_steps(self) -> int:
        """Number of optimizer steps of the run."""
        return self.schedule.total_steps

    @property
    def decisions(self) -> int:
        """Number of decisions of the component that receives the outline."""
        return math.ceil(self.schedule.num_updates / self.every)

    @property
    def decided_steps(self) -> int:
        """Number of optimizer steps outside warm-up rounds."""
        full, rest = divmod(self.total_steps, self.schedule.cycle_steps)
        warmup = self.schedule.warmup_steps
        return self.total_steps - full * min(warmup, self.schedule.cycle_steps) - min(warmup, rest)

    @property
    def round_samples(self) -> int:
        """Number of samples in a round of full length."""
        return min(self.schedule.update_steps, self.decided_steps) * self.global_batch_size
