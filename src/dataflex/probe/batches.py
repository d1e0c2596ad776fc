"""Batches of samples for a probe: the same ones on any number of processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dataflex.data.sampling import IndexArray
from dataflex.data.token_loss import IGNORE_INDEX, shifted


def length_batches(lengths: np.ndarray, batch_tokens: int) -> list[IndexArray]:
    """Return positions in batches of similar length, longest first, each at most ``batch_tokens`` with padding.

    A sample longer than the budget is a batch of its own. The batches depend on nothing but the arguments.
    """
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    batches, begin = [], 0
    while begin < order.size:
        width = max(1, int(lengths[order[begin]]))
        count = max(1, batch_tokens // width)
        batches.append(order[begin : begin + count])
        begin += count
    return batches


def share_of(batches: list[IndexArray], rank: int, world_size: int) -> tuple[list[IndexArray], int]:
    """Return the batches of one process and how many of them count; all processes get the same number.

    Batches of neighbouring lengths are dealt out in turn, which balances tokens.
    """
    mine = batches[rank::world_size]
    useful = len(mine)
    most = -(-len(batches) // world_size)
    return mine + batches[:1] * (most - useful), useful


def inputs_of(batch: Mapping[str, Any], device: torch.device) -> tuple[dict[str, Any], Tensor]:
    """Return the model inputs of a collated batch on the device, and its shifted labels (B, T).

    Without labels all of them are ignored.
    """
    inputs = {key: on_device(value, device) for key, value in batch.items()}
    labels = inputs.pop("labels", None)
    if labels is None:
        return inputs, torch.full_like(inputs["input_ids"], IGNORE_INDEX)
    return inputs, shifted(labels)


def on_device(value: Any, device: torch.device) -> Any:
    """Return a value on the device if it is a tensor.

    A copy to a GPU is made from pinned memory, behind what the GPU has to do: from any other memory the process would
    wait until the GPU is idle.
    """
    if not isinstance(value, Tensor):
        return value
    if device.type == "cuda" and value.device.type == "cpu":
        value = value.pin_memory()
    return value.to(device, non_blocking=True)
