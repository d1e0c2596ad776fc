"""Measurements of samples on the model in training."""

from __future__ import annotations

from typing import ClassVar


class Measurement:
    """Base of all measurements: a frozen dataclass of settings."""

    name: ClassVar[str]
    forwards: ClassVar[float]
    """What one sample costs, in forward passes; a forward and backward counts as three."""
