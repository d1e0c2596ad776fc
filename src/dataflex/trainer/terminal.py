"""Training log on the terminal: a short line per log. The trackers still get the Trainer's full log."""

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
    """Prints a short line for each log of the training.

    Args:
        knows_end: whether the number of steps of the run is known.
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
    """The Trainer's progress bar, with a short line for each log while the training bar is shown."""

    def _shows(self) -> bool:
        return self.training_bar is not None


class ShortPrinter(_ShortLines, PrinterCallback):
    """A short line for each log, without a progress bar."""


def shorten(handler: CallbackHandler, knows_end: bool) -> None:
    """Replace the callback by which the Trainer prints its logs, whichever of the two it uses, by the short lines."""
    short = {ProgressCallback: ShortProgress, PrinterCallback: ShortPrinter}
    for place, callback in enumerate(handler.callbacks):
        if type(callback) in short:  # other callbacks stay, such as a notebook's progress bar
            handler.callbacks[place] = short[type(callback)](knows_end)
