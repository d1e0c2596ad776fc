"""When decisions are made: rounds as pure functions of the optimizer step.

A cycle is one warm-up round of ``warmup_steps`` and ``updates`` rounds of ``update_steps``; cycles repeat until
``total_steps``. With ``updates = -1`` the update rounds go on until training ends.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class RoundSlot:
    """One round's place in the run."""

    number: int
    """Position among all rounds, from 0."""
    start_step: int
    """Optimizer steps done before the round begins."""
    steps: int
    """Optimizer steps in the round; the last one of a run may be cut short."""
    update: int | None
    """Which decision this round is trained on, counted from 0 over the whole run; None in a warm-up round."""


@dataclass(frozen=True)
class Schedule:
    """The rounds of a run.

    Attributes:
        warmup_steps: length of a cycle's warm-up round, >= 0.
        update_steps: length of an update round, >= 1.
        updates: update rounds in a cycle, >= 1, or -1 for "until training ends".
        total_steps: optimizer steps of the run, >= 1.
    """

    warmup_steps: int
    update_steps: int
    updates: int
    total_steps: int

    @property
    def cycle_steps(self) -> int:
        """Steps after which the warm-up begins again (the whole run where ``updates`` is -1)."""
        if self.updates < 0:
            return max(self.total_steps, 1)
        return self.warmup_steps + self.update_steps * self.updates

    @property
    def rounds_per_cycle(self) -> int:
        """Rounds in one full cycle."""
        return self._rounds_within(self.cycle_steps)

    @property
    def num_updates(self) -> int:
        """Decisions made in the whole run."""
        full, rest = divmod(self.total_steps, self.cycle_steps)
        return full * self._updates_within(self.cycle_steps) + self._updates_within(rest)

    def _updates_within(self, steps: int) -> int:
        return math.ceil(max(0, steps - self.warmup_steps) / self.update_steps)

    def _rounds_within(self, steps: int) -> int:
        return (1 if self.warmup_steps and steps else 0) + self._updates_within(steps)

    def slot_at(self, step: int) -> RoundSlot:
        """Return the round in which the optimizer step number ``step`` (from 0) is trained.

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
    """Optimizer steps in which every sample of the pool is trained once (the last one may begin a second pass)."""
    return math.ceil(num_samples / global_batch_size)


def total_steps(
    *,
    train_steps: int | None,
    max_steps: int,
    epochs: float,
    warmup_steps: int,
    update_steps: int,
    updates: int,
    num_samples: int,
    global_batch_size: int,
) -> int:
    """Return the optimizer steps of a run.

    ``train_steps`` wins, then LLaMA-Factory's ``max_steps``; else ``epochs`` times the cycle where ``updates`` > 0;
    else what ``epochs`` passes over the pool give.
    """
    if train_steps is not None:
        return train_steps
    if max_steps > 0:
        return max_steps
    if updates > 0:
        return max(1, math.ceil(epochs * (warmup_steps + update_steps * updates)))
    return max(1, math.ceil(epochs * num_samples / global_batch_size))
