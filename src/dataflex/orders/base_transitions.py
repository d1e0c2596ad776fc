"""Sorted samples with a pattern in windows around the borders of sections, shared by stair and saw."""

from __future__ import annotations

from typing import Literal, Self, TypeVar

from pydantic import Field, model_validator

from dataflex import exactly
from dataflex.orders.base_curriculum import CurriculumOrder, CurriculumParams
from dataflex.orders.base_patterns import window_radius


class TransitionParams(CurriculumParams):
    """Parameters of sections with transition windows between them."""

    sections: int = Field(2, ge=2, description="Equal parts of the sorted samples, with a window around each border.")
    radius: float = Field(0.225, gt=0, le=0.5, description="Half the width of a window, as a share of the samples.")
    layers: int = Field(3, ge=1, description="Number of sweeps through the samples of a window.")
    overlap: Literal["refuse", "clamp"] = Field(
        "refuse",
        description="Overlapping windows: raise an error, or start the later window at the end of the earlier one.",
    )

    @model_validator(mode="after")
    def _windows_fit(self) -> Self:
        if self.overlap == "refuse" and 2 * exactly(self.radius) * self.sections > 1:
            most = 1 / (2 * self.sections)
            raise ValueError(
                f"windows of radius {self.radius:g} overlap: each takes {2 * self.radius:g} of the samples, and the "
                f"borders of {self.sections} sections are {1 / self.sections:.4g} of the samples apart; use a radius "
                f"of at most {int(most * 1e4) / 1e4:g}, fewer sections, or overlap: clamp, as the official code does"
            )
        return self


TransitionParamsT = TypeVar("TransitionParamsT", bound=TransitionParams, covariant=True)


class TransitionOrder(CurriculumOrder[TransitionParamsT]):
    """Sorted samples, with several sweeps inside the windows."""

    def moves_nothing(self, samples: int) -> str | None:
        """Return that a window has at most as many samples as layers, so that the pattern changes nothing."""
        width = 2 * window_radius(samples, self.params.radius)
        if width > self.params.layers > 1:
            return None
        reason = "layers: 1 sweeps once"
        if self.params.layers > 1:
            reason = f"a window has {width} of {samples} samples and layers is {self.params.layers}"
        return f"{reason}, so the order is the sorted one; raise radius or layers, or arrange more samples at a time"
