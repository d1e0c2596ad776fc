"""Sums on a device: their dtype, and an order of additions that is the same in every run.

A device adds scattered values (``index_add_``) in the order in which its threads arrive. Two equal runs would then
differ in the last bit, and a decision that depends on this bit could change.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_WITHOUT_FLOAT64 = ("mps", "npu")


def sum_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype for sums of many values on a device: float64, or float32 if the device has no float64."""
    return torch.float32 if device.type in _WITHOUT_FLOAT64 else torch.float64


def row_sums(values: Tensor, rows: Tensor, columns: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the sum of the values of each row, (B,), always added in the same order.

    Args:
        values: (n,).
        rows: the row of each value, (n,).
        columns: the column of each value, (n,). No two values have the same row and column.
        shape: number of rows and columns, (B, T).
    """
    placed = values.new_zeros(tuple(shape))
    placed[rows, columns] = values
    return placed.sum(1)
