"""Functions run on two processes that are joined in a process group."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.multiprocessing


def on_two_processes(work: Callable[..., None], folder: Path, *arguments: Any) -> None:
    """Call ``work(rank, *arguments)`` on two new processes, and fail if it fails on one of them.

    Args:
        work: Function of a module, so that it can be pickled.
        folder: Folder for the file by which the processes find each other.
        arguments: Further arguments of ``work``.
    """
    torch.multiprocessing.spawn(_joined, args=(work, folder / "group", arguments), nprocs=2)


def _joined(rank: int, work: Callable[..., None], file: Path, arguments: tuple[Any, ...]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    work(rank, *arguments)
    if dist.is_initialized():  # the work may have left the group
        dist.destroy_process_group()
