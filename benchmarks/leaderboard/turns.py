"""Variants of the same work, each in a process that stays alive, measured in turn.

A variant is a function ``variant(settings, serve)``. It loads what it needs, then calls ``serve(work)``, or
``serve(work, warm)`` with a function that is called once before anything is timed. ``work(request)`` is called for each
request. So one request of every variant can follow another in alternating order, and each process has a separate peak
memory.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol


class Serve(Protocol):
    """Answers requests with ``work`` until there are no more."""

    def __call__(self, work: Callable[[Any], Any], warm: Callable[[], Any] | None = None) -> None:
        """Answer them."""


Variant = Callable[[Any, Serve], None]


@dataclass
class Timed:
    """What a variant's process did.

    Attributes:
        start_seconds: seconds from the start of the process until it was ready.
        seconds: seconds of each timed request.
        values: the answers to them.
        peak_bytes: most memory of the process so far: of the device if it has one, else of the process.
    """

    start_seconds: float
    seconds: list[float] = field(default_factory=list)
    values: list[Any] = field(default_factory=list)
    peak_bytes: int = 0


@dataclass
class Turns:
    """The running processes of some variants.

    Attributes:
        found: what each variant did so far, by its name.
    """

    _connections: dict[str, Connection]
    _logs: dict[str, Path]
    found: dict[str, Timed]

    def measure(self, requests: Sequence[Any]) -> dict[str, Timed]:
        """Time every request in every variant, every second time in reverse order."""
        names = list(self._connections)
        for number, request in enumerate(requests):
            for name in names if number % 2 == 0 else names[::-1]:
                seconds, value, peak = self._ask(name, request)
                timed = self.found[name]
                timed.seconds.append(seconds)
                timed.values.append(value)
                timed.peak_bytes = peak
                print(f"  {name}: {seconds:.2f} s", flush=True)
        return self.found

    def ask(self, name: str, request: Any) -> Any:
        """Return one variant's answer, which is not timed."""
        return self._ask(name, request)[1]

    def _ask(self, name: str, request: Any) -> tuple[float, Any, int]:
        with contextlib.suppress(BrokenPipeError):  # the process has ended: that is told with its log
            self._connections[name].send(request)
        return received(self._connections[name], self._logs[name])


@contextmanager
def in_turn(variants: Mapping[str, Variant], settings: Any, logs: Path) -> Iterator[Turns]:
    """Start a process for every variant, one after another, and end them with the block.

    Args:
        variants: the variants by name; functions of a module.
        settings: what the variants are given; must be picklable.
        logs: folder of what the processes print.
    """
    logs.mkdir(parents=True, exist_ok=True)
    spawn = multiprocessing.get_context("spawn")
    turns = Turns({}, {}, {})
    with ExitStack() as stack:
        for name, variant in variants.items():
            mine, theirs = spawn.Pipe()
            log = logs / f"{name.replace(', ', '-').replace(' ', '-')}.txt"
            began = time.perf_counter()
            process = spawn.Process(target=_child, args=(theirs, variant, settings, log))
            process.start()
            theirs.close()  # so that the end of the child is the end of the pipe
            stack.callback(_end, process, mine)
            received(mine, log)
            turns.found[name] = Timed(time.perf_counter() - began)
            received(mine, log)  # warm
            turns._connections[name], turns._logs[name] = mine, log
        yield turns


def received(connection: Connection, log: Path) -> Any:
    """Return what a process sent.

    Raises:
        RuntimeError: if the process has ended, with the end of its log.
    """
    try:
        return connection.recv()
    except (EOFError, ConnectionResetError):
        raise RuntimeError(f"the process ended; the end of {log}:\n{log.read_text(errors='replace')[-4000:]}") from None


def _end(process: multiprocessing.process.BaseProcess, connection: Connection) -> None:
    """Let a process end, and wait for it."""
    connection.close()
    process.join(60)
    if process.is_alive():
        process.terminate()


def _child(connection: Connection, variant: Variant, settings: Any, log: Path) -> None:
    """Run a variant with its output in the log."""
    with log.open("w") as file:
        sys.stdout.flush()
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    variant(settings, partial(_serve, connection))


def _serve(connection: Connection, work: Callable[[Any], Any], warm: Callable[[], Any] | None = None) -> None:
    """Answer requests until the other end of the pipe is closed."""
    finished()
    connection.send("ready")
    if warm is not None:
        warm()
        finished()
    connection.send("warm")
    with contextlib.suppress(EOFError):
        while True:
            request = connection.recv()
            began = time.perf_counter()
            value = work(request)
            finished()
            connection.send((time.perf_counter() - began, value, peak_bytes()))


def finished() -> None:
    """Wait for the device, if this process uses one."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_bytes() -> int:
    """Return the most memory this process had so far: on the device if it uses one, else in main memory."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run_command(arguments: list[str], log: Path) -> tuple[float, int]:
    """Run a command as a user does; return its seconds and the peak of its main memory in bytes.

    Raises:
        RuntimeError: if it fails, with the end of its output.
    """
    # Python may keep what it compiled, as on a user's machine: without that a start takes three times as long.
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}
    began = time.perf_counter()
    with log.open("a") as file:
        process = subprocess.Popen(arguments, stdout=file, stderr=subprocess.STDOUT, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed; the end of {log}:\n{log.read_text()[-4000:]}")
    return seconds, usage.ru_maxrss * 1024


def row(
    timed: Timed, samples: int, seconds: Sequence[float] | None = None, *, reckoned: bool = False
) -> dict[str, Any]:
    """Return a variant's figures for the result file.

    Args:
        timed: what its process did.
        samples: number of samples of one request.
        seconds: the seconds to report. Empty means those of the requests.
        reckoned: whether a part of the seconds was reckoned from a smaller measurement.
    """
    each = list(seconds or timed.seconds)
    return {
        "seconds": each,
        "median_seconds": statistics.median(each),
        "start_seconds": timed.start_seconds,
        "peak_bytes": timed.peak_bytes,
        "samples": samples,
        "reckoned": reckoned,
    }


def ratio(others: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    """Return how many times as long another variant takes: the median, the least and the most of the pairs in turn."""
    pairs = [theirs / mine for theirs, mine in zip(others["seconds"], ours["seconds"], strict=True)]
    reckoned = others["reckoned"] or ours["reckoned"]
    return {"median": statistics.median(pairs), "low": min(pairs), "high": max(pairs), "reckoned": reckoned}
