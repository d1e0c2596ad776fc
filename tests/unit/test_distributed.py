"""What two processes say to one another: waiting longer than the training's group does, values, and errors."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
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
    kept = _get_default_store().num_keys()
    large = np.random.default_rng(0).bytes(MEGABYTES)
    assert distributed.on_main(lambda: large if rank == 0 else b"") == large
    found = distributed.on_each(lambda: (rank, large))
    assert [number for number, _ in found] == [0, 1]
    assert all(value == large for _, value in found)
    distributed.barrier()
    distributed.barrier()  # the keys of the call before are gone when this one is over, or shortly after
    for _ in range(100):
        left = _get_default_store().num_keys() - kept
        if left <= 0:
            break
        time.sleep(0.05)
    assert left <= 0


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
    # A value that cannot be told is an error, too.
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
    # A process that finds nobody raises by itself, and the others when they come.
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


def test_one_process_waits_for_nobody() -> None:
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


def watched(rank: int, port: int, root: Path, what: Callable[[int], None]) -> None:
    """Do something under a watch, whose report and whose error go to a file."""
    distributed._GRACE = 1.0
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    told = root / str(rank)
    try:
        with distributed.Watch(lambda text: told.write_text(f"ended: {text}"), lambda error: None) as watch:
            watch.begin()
            what(rank)
            told.write_text("done")
    except Exception as error:
        told.write_text(f"{type(error).__name__}: {error}")
        raise SystemExit(1) from error


def fails_while_the_other_is_in_a_collective(rank: int) -> None:
    if rank == 1:
        raise ComponentError("no judge")
    dist.all_reduce(torch.zeros(1))


def stumbles_while_the_other_is_in_a_collective(rank: int) -> None:
    if rank == 0:
        raise KeyError("weight")
    dist.all_reduce(torch.zeros(1))


def fails_while_the_other_waits(rank: int) -> None:
    if rank == 0:
        raise ComponentError("no judge")
    distributed.barrier()


def fails_together(rank: int) -> None:
    with distributed.together():
        if rank == 1:
            raise KeyError("weight")


def fails_at_its_end(rank: int) -> None:
    if rank == 1:
        time.sleep(1)
        raise ComponentError("no judge")


def is_killed_while_the_other_waits(rank: int) -> None:
    if rank == 0:
        distributed.barrier()
        os.kill(os.getpid(), signal.SIGKILL)
    distributed.barrier()
    distributed.on_main(lambda: None)


def ends_well(rank: int) -> None:
    distributed.barrier()


LOST = "DataFlexError: the connection to the main process"
KEY_ERROR = "process {} has failed (KeyError: 'weight'). Its own output has the traceback."


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("what", "said", "status"),
    [
        (
            fails_while_the_other_is_in_a_collective,
            ["ended: no judge", "ComponentError: no judge"],
            [2, 1],
        ),
        (
            stumbles_while_the_other_is_in_a_collective,
            ["KeyError: 'weight'", f"ended: {KEY_ERROR.format(0)}"],
            [1, 2],
        ),
        (fails_while_the_other_waits, ["ComponentError: no judge", "DataFlexError: no judge"], [1, 1]),
        (fails_together, [f"DataFlexError: {KEY_ERROR.format(1)}", "KeyError: 'weight'"], [1, 1]),
        (fails_at_its_end, ["DataFlexError: no judge", "ComponentError: no judge"], [1, 1]),
        (is_killed_while_the_other_waits, [None, LOST], [-signal.SIGKILL, 1]),
        (ends_well, ["done", "done"], [0, 0]),
    ],
)
def test_a_process_that_ends_ends_the_other(
    what: Callable[[int], None], said: list[str | None], status: list[int], tmp_path: Path
) -> None:
    """Within 30 seconds, whatever the other waits for: it would for half an hour."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        multiprocessing.get_context("spawn").Process(target=watched, args=(rank, port, tmp_path, what))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(30 + 20)  # torch takes some to be imported
            assert process.exitcode is not None
    finally:
        for process in processes:
            with suppress(ProcessLookupError):
                process.kill()
    assert [process.exitcode for process in processes] == status
    for rank, text in enumerate(said):
        if text is not None:
            assert (tmp_path / str(rank)).read_text().startswith(text)
