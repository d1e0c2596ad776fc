"""A command that trains several models: its plan, the lock on its folder, and its message after a stop."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from dataflex.errors import ConfigError
from dataflex.report.tables import Table, print_tables
from dataflex.trainer import stopping


@dataclass(frozen=True)
class Work:
    """The work of a command, after its file was read.

    Attributes:
        output: the folder that the command writes to.
        plan: returns the tables of the planned runs.
        run: does the work and returns the exit status.
        notes: messages that are printed first.
    """

    output: Path
    plan: Callable[[], list[Table]]
    run: Callable[[], int]
    notes: Sequence[str] = ()


def carry_out(load: Callable[[], Work], *, dry_run: bool, on_stop: str) -> int:
    """Do the work of a command while its folder is locked, or only print the plan, and return the exit status.

    Args:
        load: reads the command's file.
        dry_run: only print the plan.
        on_stop: message after Ctrl-C or SIGTERM.

    Returns:
        The status of the work; 130 after Ctrl-C, 143 after SIGTERM.

    Raises:
        ConfigError: if the file has problems, or another command works in the folder.
    """
    try:
        work = load()
        say(work.notes)
        if dry_run:
            print_tables(work.plan())
            return 0
        with locked(work.output):
            return work.run()
    except KeyboardInterrupt as stop:
        return stopping.end(stop, on_stop)


def say(notes: Sequence[str]) -> None:
    """Print notes to stderr."""
    for note in notes:
        print(f"dataflex: note: {note}", file=sys.stderr)


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Hold the lock on a folder, which is created if it does not exist.

    Raises:
        ConfigError: if another command holds the lock, or the folder cannot be written to.
    """
    lock = FileLock(output / ".lock", timeout=0)
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise ConfigError(f"output_dir: another command is at work in {output}; wait until it ends.") from error
    except OSError as error:
        raise ConfigError(f"output_dir: {output} cannot be written to ({error.strerror or error}).") from error
    try:
        yield
    finally:
        lock.release()
