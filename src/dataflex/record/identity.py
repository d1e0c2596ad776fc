"""Identity of the run in a folder: ``run.json`` in the record, and a lock that only one run at a time holds.

A run gets its identity when its record begins, and writes the identity into every checkpoint. A checkpoint in the same
folder with another identity belongs to another run, whatever its step.
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
"""Name of the record's folder in the output folder."""
LOCK_FILE = ".dataflex.lock"
"""Name of the lock file. It is in the output folder, because the record's folder is moved when a new run begins."""


def new_identity() -> str:
    """Return an identity that no other run has."""
    return uuid.uuid4().hex


def read_identity(record: Path) -> str | None:
    """Return the identity of the run of a record; None if the folder is no record, or a record of an earlier release.

    Raises:
        ConfigError: if the file cannot be read.
    """
    value = read_object(record / RUN)
    return None if value is None else from_json(Identity, value, record / RUN).id


def write_identity(record: Path, identity: str, continues: Origin | None = None) -> None:
    """Write the identity of the run into its record.

    Args:
        record: folder of the record.
        identity: identity of the run.
        continues: the other run from whose checkpoint this run resumes.
    """
    value = to_json(Identity(identity, now(), continues))
    write_atomically(record / RUN, (json_text(value, indent=2) + "\n").encode())


def now() -> str:
    """Return the current time in the format of the record."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@contextmanager
def only_run_in(folder: Path, key: str = "output_dir") -> Iterator[None]:
    """Hold the lock on a folder during the block.

    The lock is a POSIX record lock. It ends with the process that holds it, even if that process is killed. Child
    processes, such as the workers of a data loader, do not inherit it.

    Args:
        folder: folder to lock. It is created if it does not exist.
        key: setting that errors name.

    Raises:
        ConfigError: if another process holds the lock, or the folder cannot be written to.
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
            holder = stream.read().strip() or "an unknown process"
            raise ConfigError(
                f"{key}: another run is at work in {folder} ({holder}). Wait for its end, or choose another folder."
            ) from error
        except OSError as error:
            # Some network file systems have no locks. LLaMA-Factory can train there, so DataFlex must not refuse.
            print(f"dataflex: {folder} cannot be locked ({error.strerror}); make sure that no other run writes to it")
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {socket.gethostname()}, since {now()}\n")
        stream.flush()
        try:
            yield
        finally:
            stream.truncate(0)
