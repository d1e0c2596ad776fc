"""Sums on a device: the type they are in, and an order that is the same in every run.

A device adds scattered numbers (``index_add_``) in the order in which its threads come, so two equal runs would differ
in the last bit, and a decision that hangs on it would go another way.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_WITHOUT_FLOAT64 = ("mps", "npu")


def sum_dtype(device: torch.device) -> torch.dtype:
    """Return the type in which many numbers are added on a device: float64, or float32 if the device has no float64."""
    return torch.float32 if device.type in _WITHOUT_FLOAT64 else torch.float64


def row_sums(values: Tensor, rows: Tensor, columns: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the sum of the values of each row, (B,), always added in the same order.

    Args:
        values: (n,).
        rows: of the values, (n,).
        columns: of the values, (n,); no two values have both in common.
        shape: rows and columns, (B, T).
    """
    placed = values.new_zeros(tuple(shape))
    placed[rows, columns] = values
    return placed.sum(1)
