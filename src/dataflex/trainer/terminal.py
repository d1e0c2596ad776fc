"""The training log on the terminal: a short line for what the Trainer prints whole, and the trackers keep."""

from __future__ import annotations

from typing import Any

from transformers import (
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import CallbackHandler

from dataflex.trainer import console

Logs = dict[str, Any]


class _ShortLines(TrainerCallback):
    """A short line for each log of the training.

    Args:
        knows_end: whether the number of the run's steps is known.
    """

    def __init__(self, knows_end: bool) -> None:
        super().__init__()
        self._knows_end = knows_end

    def _shows(self) -> bool:
        return True

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Logs | None = None, **_: Any
    ) -> None:
        """Print the line."""
        if not state.is_world_process_zero or not self._shows():
            return
        line = console.log(logs or {}, state.global_step, state.max_steps if self._knows_end else None)
        if line is not None:
            console.say(line)


class ShortProgress(_ShortLines, ProgressCallback):
    """The Trainer's progress bar, with a short line for each log while the bar of the training is there."""

    def _shows(self) -> bool:
        return self.training_bar is not None


class ShortPrinter(_ShortLines, PrinterCallback):
    """A short line for each log, without a progress bar."""


def shorten(handler: CallbackHandler, knows_end: bool) -> None:
    """Put the short lines in the place of the Trainer's own printing, whichever of the two it has."""
    short = {ProgressCallback: ShortProgress, PrinterCallback: ShortPrinter}
    for place, callback in enumerate(handler.callbacks):
        if type(callback) in short:  # not a notebook's
            handler.callbacks[place] = short[type(callback)](knows_end)
