"""Measuring without a trace: evaluation mode, no gradients, and restored random streams."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch
from torch.distributed.fsdp import FSDPModule


@contextlib.contextmanager
def preserved_rng() -> Iterator[None]:
    """Restore the random states of Python, numpy, torch and the devices at the end of the context.

    Example:
        >>> import torch
        >>> from dataflex import preserved_rng
        >>> with preserved_rng():
        ...     noise = torch.rand(3)
        >>> bool((torch.rand(3) == noise).all())
        True
    """
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002 - saved, not used
    # Before CUDA is initialised, devices have no random states to restore.
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)  # noqa: NPY002


@contextlib.contextmanager
def probe_mode(model: torch.nn.Module) -> Iterator[None]:
    """Run in evaluation mode without gradients; at the end, restore every module's mode and every random stream.

    A compiled model runs eagerly. Compiled graphs do not see temporary hooks, and each new shape and mode would start
    another compilation.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with preserved_rng(), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module in training:
            module.training = True  # not train(), which would change the mode of all modules inside


def reshard(model: torch.nn.Module) -> None:
    """Let FSDP2's modules hold their shards again; after a forward pass alone, parameters may stay gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
