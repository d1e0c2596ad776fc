"""Collectives on two processes: work of the main one alone may take longer than the training's group waits."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
import torch.multiprocessing

from dataflex import distributed
from dataflex.errors import ComponentError

TIMEOUT, LONGER = 3.0, 6.0


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


def work(rank: int, root: Path) -> None:
    start(root / "first", rank)
    began = time.perf_counter()
    assert distributed.on_main(slow) == "from rank 0"
    assert time.perf_counter() - began > 0.9 * LONGER  # both waited
    with pytest.raises(ComponentError, match="no judge"):
        distributed.on_main(failing)
    assert distributed.on_each(lambda: rank) == [0, 1]
    with pytest.raises(ComponentError, match="no judge"):
        distributed.on_each(failing if rank == 1 else lambda: "done")
    group = distributed._waiting_group()
    assert distributed._waiting_group() is group
    assert group is not dist.group.WORLD
    distributed.require_equal("same", "a value")
    # A run in the same process may have another default group; the one of before is of no use then.
    dist.destroy_process_group()
    start(root / "second", rank)
    assert distributed.on_main(lambda: f"from rank {rank}") == "from rank 0"
    assert distributed._waiting_group() is not group
    dist.destroy_process_group()
    assert distributed.on_main(lambda: rank) == rank  # one process again


@pytest.mark.timeout(300)
def test_the_others_wait_for_the_main_process(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(work, args=(tmp_path,), nprocs=2)


def test_one_process_makes_no_group() -> None:
    def failed() -> int:
        raise ComponentError("no judge")

    assert not dist.is_initialized()
    assert distributed.on_main(lambda: 5) == 5
    with pytest.raises(ComponentError, match="no judge"):
        distributed.on_main(failed)
    assert not distributed._waiting_groups
