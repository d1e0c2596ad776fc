"""Clock of a run: its seconds, its tokens, and the share of its budget that is spent."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from dataflex import distributed
from dataflex.planning.overhead import Spent

if TYPE_CHECKING:
    from dataflex.api.component import State
    from dataflex.config.loading import DataFlexConfig


@dataclass(frozen=True)
class Budget:
    """Number of tokens or seconds that ends a run. If both are None, the number of steps ends it.

    Attributes:
        tokens: number of tokens to train on.
        seconds: seconds of training and decisions together.
    """

    tokens: int | None = None
    seconds: float | None = None

    @classmethod
    def of(cls, settings: DataFlexConfig) -> Budget:
        """Return the budget that the ``dataflex:`` section sets."""
        return cls(settings.train_tokens, settings.train_seconds)

    @property
    def is_set(self) -> bool:
        """Whether a number of tokens or seconds ends the run, instead of a number of steps."""
        return self.tokens is not None or self.seconds is not None

    def share(self, tokens: int, seconds: float) -> float:
        """Return the share of the budget that is spent, 0 or more. The run ends at 1."""
        if self.tokens is not None:
            return tokens / self.tokens
        return seconds / self.seconds if self.seconds is not None else 0.0

    def is_spent(self, state: State) -> bool:
        """Return whether the state of a checkpoint has spent the whole budget."""
        return self.share(int(state["tokens"]), float(state["train_seconds"]) + float(state["decision_seconds"])) >= 1


class Clock:
    """Counts the seconds of training steps, decisions and evaluations, and the tokens trained on.

    Args:
        budget: the tokens or seconds that end the run.
    """

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.train_seconds = self.decision_seconds = self.evaluate_seconds = 0.0
        self.tokens = 0
        self.progress = 0.0
        """Share of the budget that is spent; 0 without a budget."""
        self._step_began = 0.0
        self._decision_began: float | None = None
        """Start of the running decision. None if no decision is running."""
        self._evaluation_began: float | None = None
        """Start of the running evaluation. None if no evaluation is running."""

    @contextmanager
    def deciding(self, *, inside_step: bool = False) -> Iterator[None]:
        """Count the seconds of the block as a decision's.

        Args:
            inside_step: whether the block runs inside a training step. Its seconds are then subtracted from the step's.
        """
        began = self._decision_began = time.perf_counter()
        yield
        seconds = time.perf_counter() - began
        self._decision_began = None
        self.decision_seconds += seconds
        if inside_step:
            self.train_seconds -= seconds

    @property
    def spent(self) -> Spent:
        """The seconds so far, including those of a running decision."""
        running = 0.0 if self._decision_began is None else time.perf_counter() - self._decision_began
        return Spent(self.train_seconds, self.decision_seconds + running)

    @property
    def is_evaluating(self) -> bool:
        """Whether an evaluation is running."""
        return self._evaluation_began is not None

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Count the seconds of the block as an evaluation's, even if it fails."""
        began = self._evaluation_began = time.perf_counter()
        try:
            yield
        finally:
            self.evaluate_seconds += time.perf_counter() - began
            self._evaluation_began = None

    def begin_step(self) -> None:
        """Start timing a training step."""
        self._step_began = time.perf_counter()

    def count_tokens(self, tokens: int) -> None:
        """Count a step's tokens and, with a budget, update the share of it that is spent.

        The main process's clock decides, so that all processes end at the same step.
        """
        self.tokens += tokens
        if self.budget.is_set:
            seconds = self.train_seconds + self.decision_seconds + time.perf_counter() - self._step_began
            self.progress = distributed.on_main(partial(self.budget.share, self.tokens, seconds))

    def end_step(self) -> None:
        """Count the seconds of the step that has just ended."""
        self.train_seconds += time.perf_counter() - self._step_began

    def so_far(self) -> dict[str, Any]:
        """Return the tokens and the seconds of each kind, as the record and the logs hold them."""
        running = 0.0 if self._evaluation_began is None else time.perf_counter() - self._evaluation_began
        return {
            "tokens": self.tokens,
            "train_seconds": round(self.train_seconds, 3),
            "decision_seconds": round(self.decision_seconds, 3),
            "evaluate_seconds": round(self.evaluate_seconds + running, 3),
        }

    def state_dict(self) -> State:
        """Return the counters for a checkpoint."""
        return {
            "train_seconds": self.train_seconds,
            "decision_seconds": self.decision_seconds,
            "evaluate_seconds": self.evaluate_seconds,
            "tokens": self.tokens,
        }

    def load_state_dict(self, state: State) -> None:
        """Restore the counters that :meth:`state_dict` returned."""
        self.train_seconds = float(state["train_seconds"])
        self.decision_seconds = float(state["decision_seconds"])
        self.evaluate_seconds = float(state["evaluate_seconds"])
        self.tokens = int(state["tokens"])
        self.progress = self.budget.share(self.tokens, self.train_seconds + self.decision_seconds)
