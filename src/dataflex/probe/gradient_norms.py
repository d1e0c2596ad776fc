"""Length of each sample's update direction, and the base of all measurements of gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from dataflex.api.measurement import Measurement, MeasurementRun, ResultT, register_measurement
from dataflex.api.probe import GradientSettings
from dataflex.data.rules import ScoreArray
from dataflex.probe.run_limits import layer_problems, moment_problems

if TYPE_CHECKING:
    from dataflex.api.needs import RunView


@dataclass(frozen=True)
class GradientMeasurement(Measurement[ResultT]):
    """Base of measurements of per-sample gradients.

    Attributes:
        settings: how gradients are preconditioned, projected and stored.
    """

    settings: GradientSettings = field(default_factory=GradientSettings)

    quantity: ClassVar[str] = "gradient"
    of_sample_loss: ClassVar[bool] = True
    forwards: ClassVar[float] = 3.0
    untrained: ClassVar[float | None] = math.nan

    def problems(self, run: RunView) -> Iterator[tuple[str, str]]:
        """Yield why a run cannot give per-sample gradients, or the optimizer's moments if the settings need them."""
        yield from layer_problems(run)
        yield from moment_problems(self.settings, run)


@register_measurement("gradient_norms")
@dataclass(frozen=True)
class GradientNorms(GradientMeasurement[ScoreArray]):
    """The exact length of each sample's update direction, shape (n,); NaN for a sample without a trained token.

    Directions are not projected, so ``projection``, ``dim``, ``seed``, ``normalize`` and ``store`` have no effect.

    Example:
        A selector that prefers samples with a large update under Adam:

        >>> from dataflex import GradientNorms, GradientSettings, Needs, Selector, SelectorParams
        >>> class Large(Selector[SelectorParams]):
        ...     def needs(self, run):
        ...         return Needs(measurements=(GradientNorms(GradientSettings("adam")),))
        ...     def score(self, ctx, candidates):
        ...         return ctx.probe.measure(GradientNorms(GradientSettings("adam")), candidates)
    """

    def run(self, run: MeasurementRun) -> ScoreArray:
        """Return the lengths."""
        from dataflex.probe.gradient_runs import each_gradient, preconditioner_of, runner_of
        from dataflex.probe.reducers import NormReducer

        probe = runner_of(run).probe
        reducer = NormReducer(preconditioner_of(probe, self.settings), probe.device)
        return each_gradient(run, self.settings, reducer, lambda squares: squares.sqrt())
