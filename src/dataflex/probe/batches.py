"""Batches of samples for a probe: the same ones on any number of processes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dataflex.data.sampling import IndexArray
from dataflex.data.token_loss import IGNORE_INDEX, shifted

if TYPE_CHECKING:
    from dataflex.probe.model import ModelProbe


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


def inputs_of(probe: ModelProbe, rows: list[dict[str, Any]]) -> tuple[dict[str, Any], Tensor]:
    """Return the model inputs of rows on the device, and their shifted labels (B, T); all ignored if they have none."""
    inputs = {key: _to(value, probe.device) for key, value in probe.collate(rows).items()}
    labels = inputs.pop("labels", None)
    if labels is None:
        return inputs, torch.full_like(inputs["input_ids"], IGNORE_INDEX)
    return inputs, shifted(labels)


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value
