"""Trainings one after another in one process: how the process group begins, and what is undone after a training."""

from __future__ import annotations

import os
from collections.abc import Iterable

from accelerate.state import AcceleratorState, GradientState, PartialState
from transformers.integrations.deepspeed import unset_hf_deepspeed_config


def start_deepspeed(on_the_cpu: bool) -> None:
    """Start the process group through DeepSpeed, as a training under DeepSpeed does."""
    import deepspeed
    import deepspeed.ops

    if on_the_cpu:
        # DeepSpeed would compile this operation for the CPU; gloo does the same without it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "gloo" if on_the_cpu else "nccl"
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)


def forget_training(variables: Iterable[str]) -> None:
    """Undo the settings that a training leaves in its process.

    Args:
        variables: Names of the environment variables before the training. Others are deleted.
    """
    unset_hf_deepspeed_config()
    for key in set(os.environ) - set(variables):
        del os.environ[key]
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    PartialState._reset_state()
