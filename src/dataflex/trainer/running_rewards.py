"""TRL's running mean of rewards, which the losses of BCO subtract. It is part of checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from dataflex.trainer.base import RunTrainer

if TYPE_CHECKING:
    from dataflex.api.component import State

_MOMENTS = ("mean", "std", "var", "count")
"""Numbers in the state of TRL's running mean."""


class RunningRewardsTrainer(RunTrainer):
    """Stores TRL's running mean of rewards in checkpoints, which TRL and LLaMA-Factory leave out."""

    def trainer_state(self) -> State:
        """Return the running mean of rewards."""
        running = running_of(self)
        return {} if running is None else {name: float(getattr(running, name)) for name in _MOMENTS}

    def load_trainer_state(self, state: State) -> None:
        """Restore the running mean of rewards."""
        for name, value in state.items():
            setattr(running_of(self), name, value)


def running_of(trainer: Any) -> Any:
    """Return the running mean of rewards; None if the loss has none."""
    return getattr(trainer, "running", None)  # TRL makes the attribute for such a loss alone


@contextmanager
def still(trainer: Any) -> Iterator[None]:
    """Keep the running mean of rewards unchanged, because only a training step may change it."""
    running = running_of(trainer)
    if running is None:
        yield
        return
    trainer.running = SimpleNamespace(mean=running.mean, update=lambda rewards: None)
    try:
        yield
    finally:
        trainer.running = running
