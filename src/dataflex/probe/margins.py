"""Reward margins of preference pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dataflex.api.measurement import MeasuredBatch, Measurement, register_measurement

if TYPE_CHECKING:
    from torch import Tensor


@register_measurement("margins")
@dataclass(frozen=True)
class Margins(Measurement):
    """The reward margin of each pair, shape (n,).

    Example:
        >>> from dataflex import Margins
        >>> Margins().name
        'margins'
    """

    def measure(self, batch: MeasuredBatch) -> Tensor:
        """Return the margins, (B,)."""
        raise NotImplementedError
