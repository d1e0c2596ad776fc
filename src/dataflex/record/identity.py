"""Which run a folder is: ``run.json`` in the record, and a lock that only one run at a time holds.

A run gets its identity when its record begins, and writes it into every checkpoint. A checkpoint in the same folder
that has another identity is another run's, whatever its number.
"""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from dataflex.errors import ConfigError
from dataflex.files import json_text, write_atomically
from dataflex.record.files import read_object
from dataflex.record.schema import RUN, Identity, Origin, from_json, to_json

FOLDER = "dataflex"
"""The record, in the output folder."""
LOCK_FILE = ".dataflex.lock"
"""In the output folder itself: the record's folder is moved when a new run begins."""


def new_identity() -> str:
    """Return an identity that no other run has."""
    return uuid.uuid4().hex


def read_identity(record: Path) -> str | None:
    """Return the identity of the run whose record a folder is; None if it is none, or an earlier release's.

    Raises:
        ConfigError: if the file cannot be read.
    """
    value = read_object(record / RUN)
    return None if value is None else from_json(Identity, value, record / RUN).id


def write_identity(record: Path, identity: str, continues: Origin | None = None) -> None:
    """Write whose record a folder is.

    Args:
        record: the folder.
        identity: of the run.
        continues: the other run that this one goes on from.
    """
    value = to_json(Identity(identity, now(), continues))
    write_atomically(record / RUN, (json_text(value, indent=2) + "\n").encode())


def now() -> str:
    """Return the present time, as it is written on record."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@contextmanager
def only_run_in(folder: Path, key: str = "output_dir") -> Iterator[None]:
    """Hold the lock on a folder for a while.

    It is a POSIX record lock: it ends with the process that took it, also if that is killed, and children such as the
    workers of a data loader do not inherit it.

    Args:
        folder: made if it is not there.
        key: the setting named in errors.

    Raises:
        ConfigError: if another process holds it, or the folder cannot be written to.
    """
    import fcntl

    path = folder / LOCK_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stream = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{key}: {folder} cannot be written to ({error.strerror or error}).") from error
    with stream:
        try:
            fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            stream.seek(0)
            holder = stream.read().strip() or "a process that has not said who it is"
            raise ConfigError(
                f"{key}: another run is at work in {folder} ({holder}). Wait for its end, or choose another folder."
            ) from error
        except OSError as error:
            # Some network file systems have no locks. Training must go on there, as it does without us.
            print(f"dataflex: {folder} cannot be locked ({error.strerror}); see that no other run writes to it")
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {socket.gethostname()}, since {now()}\n")
        stream.flush()
        try:
            yield
        finally:
            stream.truncate(0)
