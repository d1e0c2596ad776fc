"""Ctrl-C and SIGTERM: how a command ends when it is told to stop, and what is said then. No torch here."""

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
    """A signal asked the process to end.

    Args:
        number: the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def status_of(stop: KeyboardInterrupt) -> int:
    """Return the exit status of a command that was stopped: 128 and the signal's number, so 130 after Ctrl-C."""
    return 128 + (stop.number if isinstance(stop, Stopped) else signal.SIGINT)


@contextmanager
def taken(is_worker: bool) -> Iterator[None]:
    """Have SIGTERM raise :class:`Stopped` for a while, as SIGINT raises KeyboardInterrupt.

    Args:
        is_worker: whether this is one of several processes. Both signals then end it at once and without a word: the
            launcher speaks for all, and one that raised would have the others fail in a collective.
    """
    if threading.current_thread() is not threading.main_thread():  # where no handler can be set
        yield
        return

    def stop(number: int, _: FrameType | None) -> NoReturn:
        raise Stopped(number)

    number = signal.SIGINT if is_worker else signal.SIGTERM
    before = signal.signal(number, signal.SIG_DFL if is_worker else stop)
    try:
        yield
    finally:
        signal.signal(number, signal.SIG_DFL if before is None else before)


def end(stop: KeyboardInterrupt, text: str) -> int:
    """Say on a line of its own what becomes of a command that was stopped, and return its exit status."""
    from dataflex.trainer import console

    console.end_bars()
    print(f"\ndataflex: {text}", file=sys.stderr)
    return status_of(stop)


def of_training(config: RunConfig) -> str:
    """Return what the same command would do, of a training that was stopped."""
    from dataflex.trainer.resume import last_of

    given = config.llamafactory
    if config.dataflex is None or not given.get("do_train"):
        return "stopped."  # what a plain run goes on from is LLaMA-Factory's to say
    found = last_of(Path(str(given["output_dir"])))
    step = None if found is None else found.step
    requested, overwrite = given.get("resume_from_checkpoint"), given.get("overwrite_output_dir")
    go_on = f"resume_from_checkpoint=true goes on from step {step}"
    if isinstance(requested, str):
        begins = f"stopped; the same command begins at {requested} again"
        return f"{begins}." if step is None else f"{begins}, {go_on}."
    if overwrite and not requested:
        begins = "stopped; the same command begins again, because overwrite_output_dir is true"
        return f"{begins}." if step is None else f"{begins}; {go_on}."
    if step is None:
        return "stopped before the first checkpoint; the same command begins again."
    return f"stopped; the same command goes on from step {step}."
