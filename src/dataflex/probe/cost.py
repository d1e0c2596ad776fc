"""Cost of decisions."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Cost:
    """Time and model computation spent on decisions."""

    seconds: float = 0.0
    samples: int = 0
    """Samples run through a model."""
    tokens: int = 0
    """Tokens of these samples, without padding."""
