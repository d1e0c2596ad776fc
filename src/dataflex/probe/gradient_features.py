"""Measurements of projected gradients: features, their inner products with given features, and stored features."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from dataflex.api.measurement import MeasurementRun, register_measurement
from dataflex.data.rules import ScoreArray
from dataflex.errors import ComponentError
from dataflex.probe.gradient_norms import GradientMeasurement

if TYPE_CHECKING:
    from torch import Tensor

    from dataflex.probe.store import FeatureStore


@register_measurement("gradient_features")
@dataclass(frozen=True)
class GradientFeatures(GradientMeasurement[ScoreArray]):
    """The feature of each sample, shape (n, k); 0 for a sample without a trained token.

    All features are in memory, so measure few samples. ``settings.store`` is ignored; to store the features of many
    samples, use :class:`StoredFeatures`.

    Example:
        >>> import torch
        >>> from dataflex import GradientFeatures, GradientSettings
        >>> measurement = GradientFeatures(GradientSettings(preconditioner="adam", dim=1024))
        >>> measurement.feature(torch.tensor([[3.0, 4.0]]))
        tensor([[0.6000, 0.8000]])
    """

    untrained: ClassVar[float | None] = 0.0

    def run(self, run: MeasurementRun) -> ScoreArray:
        """Return the features."""
        from dataflex.probe.gradient_runs import each_gradient, projection_of, runner_of

        reducer = projection_of(runner_of(run).probe, self.settings)
        return each_gradient(run, self.settings, reducer, self.feature)

    def feature(self, values: Tensor) -> Tensor:
        """Return features, (B, k), scaled to length 1 if the settings say so."""
        import torch

        return torch.nn.functional.normalize(values, dim=1) if self.settings.normalize else values


@register_measurement("gradient_similarities")
@dataclass(frozen=True, eq=False)
class GradientSimilarities(GradientMeasurement[ScoreArray]):
    """Inner products of each sample's feature with given ones, shape (n, S); NaN for a sample without a trained token.

    Features are computed, used and discarded batch by batch, so memory does not grow with their number. If
    ``settings.store`` is set, the features are stored in that folder and read from there later.

    Attributes:
        others: the features to compare with, shape (S, k).

    Example:
        A selector that prefers samples whose gradients are similar to those of validation samples:

        >>> import numpy as np
        >>> from dataflex import GradientFeatures, GradientSimilarities, Needs
        >>> from dataflex import Selector, SelectorParams, ValidationParams
        >>> class TargetParams(SelectorParams, ValidationParams):
        ...     pass
        >>> class Target(Selector[TargetParams]):
        ...     def needs(self, run):
        ...         return Needs((GradientFeatures(), GradientSimilarities()), validation=self.params)
        ...     def score(self, ctx, candidates):
        ...         samples = ctx.validation
        ...         features = ctx.probe.measure(GradientFeatures(), np.arange(samples.size), samples)
        ...         return ctx.probe.measure(GradientSimilarities(others=features), candidates).mean(axis=1)
    """

    others: ScoreArray | None = None

    def run(self, run: MeasurementRun) -> ScoreArray:
        """Return the inner products.

        Raises:
            ComponentError: if ``others`` is missing, or its features have another length.
        """
        import torch

        from dataflex.probe.gradient_runs import each_gradient, feature_size, projection_of, runner_of
        from dataflex.probe.store import similarities

        runner = runner_of(run)
        probe, others = runner.probe, self.others
        size = feature_size(probe, self.settings)
        if others is None or others.ndim != 2 or others.shape[1] != size:
            got = "none" if others is None else f"an array of shape {others.shape}"
            raise ComponentError(f"gradient similarities need the features to compare with, (S, {size}); got {got}.")
        matrix = torch.from_numpy(np.ascontiguousarray(others.T)).to(probe.device)
        full_precision = torch.autocast(probe.device.type, enabled=False)  # autocast would round the inner products
        if self.settings.store is not None:
            store = StoredFeatures(self.settings).run(run)
            with full_precision:
                found = similarities(store, matrix.T, probe.device)
            # Stored features have length 1.
            return found if self.settings.normalize else found * store.norms()[:, None]
        made = GradientFeatures(self.settings)

        def compared(values: Tensor) -> Tensor:
            features = made.feature(values)
            with torch.autocast(probe.device.type, enabled=False):
                return features.float() @ matrix

        return each_gradient(run, self.settings, projection_of(probe, self.settings), compared)


@register_measurement("stored_features")
@dataclass(frozen=True)
class StoredFeatures(GradientMeasurement["FeatureStore"]):
    """The features of samples, scaled to length 1 and stored in the folder ``settings.store``.

    Features that the folder already holds are read, and the missing features are computed.

    Example:
        A selector that stores the features and prefers samples with a large gradient:

        >>> from dataflex import GradientSettings, Needs, Selector, SelectorParams, StoredFeatures
        >>> class Stored(Selector[SelectorParams]):
        ...     features = StoredFeatures(GradientSettings(store="features"))
        ...     def needs(self, run):
        ...         return Needs(measurements=(self.features,))
        ...     def score(self, ctx, candidates):
        ...         return ctx.probe.measure(self.features, candidates).norms()
    """

    def run(self, run: MeasurementRun) -> FeatureStore:
        """Return the store.

        Raises:
            ComponentError: if the settings name no folder.
        """
        from dataflex.probe.extraction import extract
        from dataflex.probe.gradient_runs import runner_of

        if self.settings.store is None:
            raise ComponentError("features cannot be stored: the settings name no folder (store).")
        settings = replace(self.settings, normalize=True, store=None)
        return extract(runner_of(run), settings, Path(self.settings.store))
