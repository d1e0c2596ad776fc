"""The number of processes that will train, determined from the environment without torch."""

from __future__ import annotations

import math
import os
from pathlib import Path


def is_worker() -> bool:
    """Return whether this process was started by torchrun."""
    return "LOCAL_RANK" in os.environ and "WORLD_SIZE" in os.environ


def planned_processes(certain: bool = False) -> int:
    """Return the number of processes that will train, as far as it can be known without torch.

    Args:
        certain: do not count accelerators, because torch may see fewer of them than the machine has. The returned
            number is then a lower bound.
    """
    if is_worker():
        return int(os.environ["WORLD_SIZE"])
    # The rules below are those by which LLaMA-Factory's launcher decides whether to start torchrun.
    devices = 0 if certain else _visible_devices()
    if devices < 2 and os.environ.get("FORCE_TORCHRUN", "").lower() not in ("1", "true", "y"):
        return 1
    given = (os.environ.get("NPROC_PER_NODE") or str(max(1, devices)), os.environ.get("NNODES") or "1")
    return math.prod(int(number) if number.isdecimal() and int(number) else 1 for number in given)


def _visible_devices() -> int:
    """Return how many of this machine's NVIDIA or Ascend accelerators this process may use."""
    found = 0
    for pattern, variable in (("nvidia[0-9]*", "CUDA_VISIBLE_DEVICES"), ("davinci[0-9]*", "ASCEND_RT_VISIBLE_DEVICES")):
        there = len(list(Path("/dev").glob(pattern)))
        named = os.environ.get(variable)
        found += there if named is None else min(there, len([name for name in named.split(",") if name.strip()]))
    return found
