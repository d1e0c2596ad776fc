"""Measuring without leaving a trace: evaluation mode, no gradients, and every random stream put back."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch
from torch.distributed.fsdp import FSDPModule


@contextlib.contextmanager
def preserved_rng() -> Iterator[None]:
    """Put Python's, numpy's, torch's and the devices' random states back at the end.

    Example:
        >>> import torch
        >>> from dataflex import preserved_rng
        >>> with preserved_rng():
        ...     noise = torch.rand(3)
        >>> bool((torch.rand(3) == noise).all())
        True
    """
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002 - saved, not used
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)  # noqa: NPY002


@contextlib.contextmanager
def probe_mode(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module's mode and every random stream is as before.

    A compiled model is run as it is written: graphs do not see hooks that come and go, and each shape and mode would be
    compiled anew.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with preserved_rng(), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module in training:
            module.training = True


def reshard(model: torch.nn.Module) -> None:
    """Have FSDP2's modules hold their own parameters again, which a forward alone may leave gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
