"""Exchanges between two processes: waiting longer than the group's timeout, values, and errors."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.distributed.distributed_c10d import _get_default_store

from dataflex import distributed
from dataflex.errors import ComponentError, ConfigError, DataFlexError, DivergenceError, Problem

TIMEOUT, LONGER = 3.0, 6.0
MEGABYTES = 9 << 20


def start(folder: Path, rank: int) -> None:
    """Make a default group that waits for ``TIMEOUT`` seconds, once both processes are here."""
    folder.mkdir(exist_ok=True)
    (folder / str(rank)).touch()
    while not (folder / str(1 - rank)).exists():
        time.sleep(0.01)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2, timeout=timedelta(seconds=TIMEOUT)
    )


def slow() -> str:
    time.sleep(LONGER)
    return f"from rank {dist.get_rank()}"


def failing() -> str:
    raise ComponentError("no judge")


class TwoParts(DataFlexError):
    """A component's error that cannot be made again from its message."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} and {second}")


def waits_and_passes_values(rank: int) -> None:
    began = time.perf_counter()
    assert distributed.on_main(slow) == "from rank 0"
    assert time.perf_counter() - began > 0.9 * LONGER  # both waited
    assert distributed.on_each(lambda: rank) == [0, 1]
    assert distributed.gather_objects({rank: None}) == [{0: None}, {1: None}]
    distributed.require_equal("same", "a value")
    with pytest.raises(DataFlexError, match=r"a value differs between processes \(0, 1\)"):
        distributed.require_equal(str(rank), "a value")
    assert not distributed.everywhere(rank == 0)
    assert distributed.everywhere(rank < 2)
    large = np.random.default_rng(0).bytes(MEGABYTES)
    assert distributed.on_main(lambda: large if rank == 0 else b"") == large
    found = distributed.on_each(lambda: (rank, large))
    assert [number for number, _ in found] == [0, 1]
    assert all(value == large for _, value in found)


def on_second(error: Exception, rank: int) -> None:
    """Raise an error on the second process, in a block of both."""
    with distributed.together():
        if rank == 1:
            raise error


def agrees_on_errors(rank: int) -> None:
    with pytest.raises(ComponentError, match="no judge"):
        distributed.on_main(failing)
    with pytest.raises(ComponentError, match="no judge"):
        distributed.on_each(failing if rank == 1 else lambda: "done")
    for made in (
        DivergenceError("the loss of pool index 3 is nan"),
        ConfigError(problems=[Problem("dataflex.mix", "no"), Problem("x", "y")], source="a.yaml"),
        TwoParts("one", "two"),
    ):
        with pytest.raises(DataFlexError) as caught:
            on_second(made, rank)
        assert str(caught.value) == str(made)
        assert rank == 1 or type(caught.value) is (DataFlexError if isinstance(made, TwoParts) else type(made))
    # Of two errors all raise that of the lowest rank.
    with pytest.raises(DataFlexError, match="rank 0"), distributed.together():
        raise DataFlexError(f"rank {rank}")
    # Another exception stays what it is on its process.
    other = (KeyError, "weight") if rank == 1 else (DataFlexError, r"process 1 has failed \(KeyError: 'weight'\)")
    with pytest.raises(other[0], match=other[1]):
        on_second(KeyError("weight"), rank)
    # A value that cannot be pickled is an error, too.
    with pytest.raises(Exception, match="pickle"):
        distributed.on_main(lambda: lambda: None)


def meets_the_others_in_their_next_call(rank: int) -> None:
    """The error is raised wherever the others are, once, and the processes stay together behind it."""
    calls: list[Callable[[], Any]] = [
        lambda: distributed.on_main(lambda: 1),
        lambda: distributed.on_each(lambda: 1),
        lambda: distributed.gather_objects(1),
        lambda: distributed.require_equal("1", "it"),
        lambda: distributed.everywhere(True),
        distributed.barrier,
    ]
    for call in calls:
        with pytest.raises(ComponentError, match="no judge"), distributed.together(), distributed.together():
            failing() if rank == 1 else call()
        assert distributed.on_each(lambda: rank) == [0, 1]
    # A process that waits for the others in vain raises an error, and so do the others when they arrive.
    distributed._PATIENCE = 0.2
    if rank == 0:
        while not Path("alone").exists():
            time.sleep(0.01)
    with pytest.raises(ComponentError, match="no judge"):
        distributed.on_each(failing if rank == 1 else lambda: 1)
    Path("alone").touch()
    assert distributed.on_each(lambda: rank) == [0, 1]


def work(rank: int, root: Path) -> None:
    os.chdir(root)
    start(root / "first", rank)
    waits_and_passes_values(rank)
    agrees_on_errors(rank)
    meets_the_others_in_their_next_call(rank)
    # A run in the same process may have another default group; the store of before is of no use then.
    dist.destroy_process_group()
    start(root / "second", rank)
    assert distributed.on_main(lambda: f"from rank {rank}") == "from rank 0"
    dist.destroy_process_group()
    assert distributed.on_main(lambda: rank) == rank  # one process again


@pytest.mark.timeout(300)
def test_two_processes_wait_and_fail_together(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(work, args=(tmp_path,), nprocs=2)


def test_one_process_does_not_wait() -> None:
    assert not dist.is_initialized()
    assert distributed.on_main(lambda: 5) == 5
    assert distributed.on_each(lambda: 5) == [5]
    with pytest.raises(ComponentError, match="no judge"):
        distributed.on_main(failing)
    with pytest.raises(KeyError), distributed.together():
        raise KeyError
    with distributed.Watch(print, str) as watch:
        watch.begin()
    assert not distributed._boards


# A process that ends


def watched(rank: int, what: Callable[[int], None]) -> str:
    """Do something under a watch, and return how that ended."""

    def report(text: str) -> None:
        Path(f"{rank}").write_text(f"ended: {text}")

    try:
        with distributed.Watch(report, lambda error: None) as watch:
            watch.begin()
            what(rank)
    except Exception as error:  # noqa: BLE001 - the test looks at it
        return f"{type(error).__name__}: {error}"
    return "done"


def fails_while_the_other_waits(rank: int) -> None:
    if rank == 0:
        raise ComponentError("no judge")
    distributed.barrier()


def fails_together(rank: int) -> None:
    on_second(KeyError("weight"), rank)


def fails_at_its_end(rank: int) -> None:
    if rank == 1:
        time.sleep(1)
        raise ComponentError("no judge")


def leaves_nothing_behind(rank: int) -> None:
    """A run makes calls by the thousand, all in the same store."""
    kept = _get_default_store().num_keys()
    for number in range(20):
        distributed.barrier()
        assert len(distributed.on_main(lambda number=number: bytes(MEGABYTES * (number == 3)))) in (0, MEGABYTES)
        assert distributed.on_each(lambda: rank) == [0, 1]
        distributed.require_equal("a", "it")
    for _ in range(200):  # the last process to read a value removes it
        left = _get_default_store().num_keys() - kept
        if left <= 2:  # the other may be in its next call
            break
        time.sleep(0.05)
    assert left <= 2


def end_by_themselves(rank: int) -> None:
    """One run after another in the same processes."""
    text = "process 1 has failed (KeyError: 'weight'). Its own output has the traceback."
    for what, said in (
        (leaves_nothing_behind, ["done", "done"]),
        (fails_while_the_other_waits, ["ComponentError: no judge", "DataFlexError: no judge"]),
        (fails_together, [f"DataFlexError: {text}", "KeyError: 'weight'"]),
        (fails_at_its_end, ["DataFlexError: no judge", "ComponentError: no judge"]),
        (leaves_nothing_behind, ["done", "done"]),
    ):
        found = watched(rank, what)
        assert found == said[rank], (what, found)


def is_in_a_collective(rank: int) -> None:
    if rank == 0:
        raise KeyError("weight")
    dist.all_reduce(torch.zeros(1))


def is_ended_in_a_collective(rank: int) -> None:
    distributed._GRACE = 1.0
    Path(f"{rank}").write_text(watched(rank, is_in_a_collective))
    time.sleep(8)  # gloo, unlike others, would notice at once that this process is gone


def is_killed(rank: int) -> None:
    distributed.barrier()
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    distributed.on_main(lambda: None)


def waits_for_one_that_is_killed(rank: int) -> None:
    Path(f"{rank}").write_text(watched(rank, is_killed))


def grouped(rank: int, port: int, folder: Path, what: Callable[[int], None]) -> None:
    os.chdir(folder)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    what(rank)


LOST = "DataFlexError: the connection to the main process (rank 0) is lost"
ENDED = "ended: process 0 has failed (KeyError: 'weight'). Its own output has the traceback."


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("what", "status", "said"),
    [
        (end_by_themselves, [0, 0], None),
        (is_ended_in_a_collective, [0, 2], ENDED),
        (waits_for_one_that_is_killed, [-signal.SIGKILL, 0], LOST),
    ],
)
def test_an_ended_process_ends_the_other(
    what: Callable[[int], None], status: list[int], said: str | None, tmp_path: Path
) -> None:
    """The other process ends in whichever call it waits. Without a message it would wait for half an hour."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        multiprocessing.get_context("spawn").Process(target=grouped, args=(rank, port, tmp_path, what))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(80)  # 30, and what it takes to import torch
    finally:
        for process in processes:
            process.kill()
    assert [process.exitcode for process in processes] == status
    if said is not None:
        assert (tmp_path / "1").read_text().startswith(said)
