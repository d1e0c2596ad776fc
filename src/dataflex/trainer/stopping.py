"""Ctrl-C and SIGTERM: how they end a command, and the message it prints then.

Nothing here imports torch, because the command line uses it.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from dataflex.config.loading import RunConfig


class Stopped(KeyboardInterrupt):
    """Raised when a signal asks the process to end.

    Args:
        number: number of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def status_of(stop: KeyboardInterrupt) -> int:
    """Return the exit status of a command that was stopped: 128 plus the signal's number, so 130 after Ctrl-C."""
    return 128 + (stop.number if isinstance(stop, Stopped) else signal.SIGINT)


@contextmanager
def taken(is_worker: bool) -> Iterator[None]:
    """Make SIGTERM raise :class:`Stopped` during the block, as SIGINT raises KeyboardInterrupt.

    Args:
        is_worker: whether this is one of several processes. Both signals then end the process at once and without a
            message. The launcher prints the message, and a process that raised an error would make the others fail in a
            collective.
    """
    if threading.current_thread() is not threading.main_thread():  # Python sets handlers in the main thread alone
        yield
        return

    def stop(number: int, _: FrameType | None) -> NoReturn:
        raise Stopped(number)

    # Python turns SIGINT alone into an exception. A worker gives that up; any other process adds SIGTERM.
    number = signal.SIGINT if is_worker else signal.SIGTERM
    before = signal.signal(number, signal.SIG_DFL if is_worker else stop)
    try:
        yield
    finally:
        signal.signal(number, signal.SIG_DFL if before is None else before)


def end(stop: KeyboardInterrupt, text: str) -> int:
    """Print a message about a command that was stopped, on a separate line, and return its exit status."""
    from dataflex.trainer import console

    console.end_bars()
    print(f"\ndataflex: {text}", file=sys.stderr)
    return status_of(stop)


def of_training(config: RunConfig) -> str:
    """Return the message for a training that was stopped. It says how the same command would continue."""
    from dataflex.trainer.resume import last_of

    given = config.llamafactory
    if config.dataflex is None or not given.get("do_train"):
        return "stopped."  # without a section LLaMA-Factory alone decides how a run resumes
    found = last_of(Path(str(given["output_dir"])))
    step = None if found is None else found.step
    requested, overwrite = given.get("resume_from_checkpoint"), given.get("overwrite_output_dir")
    go_on = f"with resume_from_checkpoint=true it resumes from step {step}"
    if isinstance(requested, str):
        begins = f"stopped; the same command resumes from {requested} again"
        return f"{begins}." if step is None else f"{begins}; {go_on}."
    if overwrite and not requested:
        begins = "stopped; the same command starts over, because overwrite_output_dir is true"
        return f"{begins}." if step is None else f"{begins}; {go_on}."
    if step is None:
        return "stopped before the first checkpoint; the same command starts over."
    return f"stopped; the same command resumes from step {step}."
