"""Shared base of selectors that measure per-sample gradients, and of influence methods among them.

An influence method compares the gradient of a training sample with the gradients of validation samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

import numpy as np
from pydantic import Field, model_validator

from dataflex import (
    ComponentError,
    ComponentParams,
    GradientFeatures,
    GradientSettings,
    GradientSimilarities,
    IndexArray,
    InputPath,
    Needs,
    OutputPath,
    RoundContext,
    RunView,
    ScoreArray,
    Selector,
    SelectorParams,
    StoredFeatures,
    ValidationParams,
)

if TYPE_CHECKING:
    from dataflex import FeatureStore

_UNUSUAL_ORDER = ("galore_", "apollo_", "lomo", "adalomo")
"""Prefixes of the ``optim`` values whose optimizers do not store the parameters in the usual order."""
_UNUSUAL_ORDER_KEYS = ("use_galore", "use_apollo", "use_badam", "use_adam_mini", "use_muon")
"""LLaMA-Factory keys that choose an optimizer of this kind."""


class GradientParams(ComponentParams):
    """Parameters of per-sample gradients."""

    preconditioner: Literal["none", "adam", "adam_less"] = Field(
        "none",
        description="Direction of a training sample: none, its gradient; adam, the next step of the run's Adam "
        "optimizer; adam_less, the Adam step as the code of LESS computes it.",
    )
    unsupported_parameters: Literal["error", "ignore"] = Field(
        "error",
        description="Trainable parameters of a kind without a rule for per-sample gradients: error ends the run, "
        "ignore leaves them out.",
    )

    def settings(self, **changes: Any) -> GradientSettings:
        """Return the settings of the gradient measurement.

        Args:
            changes: settings that replace the values of these parameters.
        """
        chosen = {"preconditioner": self.preconditioner, "unsupported": self.unsupported_parameters}
        return GradientSettings(**{**chosen, **changes})


class FeatureParams(GradientParams):
    """Parameters of gradient features."""

    projection: Literal["count", "rademacher", "kronecker", "identity"] = Field(
        "count", description="Random linear map that shortens gradients; identity keeps every element (for tests)."
    )
    proj_dim: int = Field(8192, ge=1, description="Length of a feature; at most the number of trainable parameters.")
    projection_seed: int = Field(0, ge=0, description="Seed of the projection.")
    feature_dir: OutputPath | None = Field(
        None,
        description="Folder that stores the features of the pool, so that a decision that was killed resumes with "
        "them. If null, the features are discarded after use.",
    )

    def settings(self, **changes: Any) -> GradientSettings:
        """Return the settings of the gradient measurement.

        Args:
            changes: settings that replace the values of these parameters.
        """
        chosen = {
            "projection": self.projection,
            "dim": self.proj_dim,
            "seed": self.projection_seed,
            "store": self.feature_dir,
        }
        return super().settings(**{**chosen, **changes})


class CheckpointParams(ComponentParams):
    """Parameters that name stored checkpoints, for methods that sum gradients over the course of an earlier run."""

    checkpoints: list[InputPath] = Field(
        default_factory=list,
        description="Checkpoint folders of an earlier run of the same model, in order. If empty, the current model "
        "is measured.",
    )
    checkpoint_weights: list[float] | None = Field(
        None,
        description="Weight of each checkpoint, scaled to sum 1. If null, the mean learning rate of the checkpoint's "
        "part of the run.",
    )

    @model_validator(mode="after")
    def _one_weight_each(self) -> Self:
        """Check that the weights are one for each checkpoint, non-negative and not all 0."""
        weights = self.checkpoint_weights
        if weights is None:
            return self
        if len(weights) != len(self.checkpoints):
            raise ValueError(
                f"checkpoint_weights has {len(weights)} numbers for {len(self.checkpoints)} checkpoints. Give one "
                "number for each checkpoint."
            )
        if min(weights) < 0 or sum(weights) <= 0:
            raise ValueError(f"checkpoint_weights must be 0 or more and not all 0, got {weights}")
        return self

    def checkpoint_problems(self, moments: bool) -> Iterator[tuple[str, str]]:
        """Yield one problem for each checkpoint folder that cannot be used, as (parameter, problem).

        Args:
            moments: whether the optimizer's moments are read from the folder, too.
        """
        for folder in self.checkpoints:
            if not Path(folder).is_dir():
                yield "checkpoints", f"there is no folder {folder!r}. Name the folder of a checkpoint."
            elif not any(Path(folder).glob("*model*.safetensors")) and not any(Path(folder).glob("adapter_model.*")):
                yield "checkpoints", f"{folder!r} holds no model and no adapter. Name the folder of a checkpoint."
            elif moments and not (Path(folder) / "optimizer.pt").is_file():
                yield (
                    "checkpoints",
                    f"{folder!r} has no optimizer.pt, the file of Adam's moments. Set preconditioner: none.",
                )
            elif self.checkpoint_weights is None and not (Path(folder) / "trainer_state.json").is_file():
                yield (
                    "checkpoints",
                    f"{folder!r} has no trainer_state.json, from which its weight is read. Set checkpoint_weights.",
                )


class InfluenceParams(SelectorParams, FeatureParams, ValidationParams):
    """Parameters of selectors that compare training samples with validation samples."""


class CheckpointedParams(InfluenceParams, CheckpointParams):
    """Parameters of influence selectors that may use the gradients of stored checkpoints."""


class LessParams(CheckpointedParams):
    """Parameters of LESS and of the selectors that score samples in the same way."""

    preconditioner: Literal["none", "adam", "adam_less"] = Field(
        "adam",
        description="Direction of a training sample: none, its gradient; adam, the next step of the run's Adam "
        "optimizer; adam_less, the Adam step as the code of LESS computes it. Validation samples keep "
        "their gradient.",
    )
    aggregation: Literal["max", "mean"] = Field(
        "max", description="Score of a sample from its influence on the sub-tasks: the largest one or the mean."
    )


GradientT = TypeVar("GradientT", bound=GradientParams, covariant=True)
InfluenceT = TypeVar("InfluenceT", bound=InfluenceParams, covariant=True)
CheckpointedT = TypeVar("CheckpointedT", bound=CheckpointedParams, covariant=True)


class GradientSelector(Selector[GradientT]):
    """Base of selectors that measure per-sample gradients."""

    @property
    def stored_checkpoints(self) -> list[str]:
        """The checkpoint folders whose gradients are measured. If empty, the model in training is measured."""
        return []

    def expected_passes(self, decisions: int) -> int:
        """Return the number of times that the whole pool is measured in a run, to estimate the cost of the run."""
        return decisions * max(1, len(self.stored_checkpoints))

    def problems(self, run: RunView) -> Iterator[tuple[str, str]]:
        """Yield also the problems of Adam's moments in stored checkpoints, before a model is loaded."""
        yield from super().problems(run)
        if self.params.preconditioner != "none" and self.stored_checkpoints:
            yield from self._moment_problems(run)

    def _moment_problems(self, run: RunView) -> Iterator[tuple[str, str]]:
        """Yield why the moments of stored checkpoints cannot be used.

        Only stored checkpoints are checked here. The measurement itself checks the moments of the run's own optimizer.
        """
        settings, given = self.params.settings(), run.llamafactory
        if settings.projection == "kronecker":
            yield (
                "projection",
                "kronecker projects only raw gradients. Set preconditioner: none, or another projection.",
            )
        optimizer = str(given.get("optim") or "adamw_torch")
        chosen = [key for key in _UNUSUAL_ORDER_KEYS if str(given.get(key, False)).lower() in ("1", "true", "yes")]
        if optimizer.startswith(_UNUSUAL_ORDER):
            chosen.append(f"optim: {optimizer}")
        for key in chosen:
            yield (
                "preconditioner",
                f"{settings.preconditioner!r} cannot be combined with {key}: the moments in checkpoints are matched "
                "with parameters by the order of this run's optimizer, and this optimizer has another order. Set "
                "optim: adamw_torch, or preconditioner: none.",
            )


class InfluenceSelector(GradientSelector[InfluenceT]):
    """Base of selectors that compare training samples with validation samples."""

    def needs(self, run: RunView) -> Needs:
        """Return the gradients of training and validation samples."""
        settings = self.params.settings()
        if self.stored_checkpoints:
            # Moments come from the checkpoints, so the run's own optimizer need not have any.
            settings = replace(settings, preconditioner="none")
        return Needs(measurements=(GradientFeatures(settings),), validation=self.params)

    def __init__(self, params: InfluenceT) -> None:
        super().__init__(params)
        self._validation_features: dict[str, ScoreArray] = {}
        """Mean feature of each sub-task in this decision, (S, k), by checkpoint folder. "" is the model in training."""

    def begin(self, ctx: RoundContext) -> None:
        """Measure the features of the validation samples under the model in training.

        With stored checkpoints, :meth:`over_checkpoints` measures the features while each checkpoint is loaded.
        """
        self._validation_features = {}
        if not self.stored_checkpoints:
            self.validation_features(ctx, self.params.settings())

    def validation_features(self, ctx: RoundContext, settings: GradientSettings, checkpoint: str = "") -> ScoreArray:
        """Return the mean feature of each sub-task, shape (S, k), float32. Computed once per decision and checkpoint.

        Validation samples keep their raw gradient, whatever the preconditioner. If features have length 1, the inner
        product of a training feature and a sub-task's mean equals the mean cosine of the training feature with the
        features of the sub-task's samples.

        Args:
            ctx: the round.
            settings: settings of the training features; the preconditioner is ignored.
            checkpoint: folder whose weights are loaded; "" is the model in training.

        Raises:
            ComponentError: if a sub-task has no sample with a trained token and a gradient.
        """
        if checkpoint not in self._validation_features:
            raw = replace(settings, preconditioner="none")
            features = ctx.probe.measure(GradientFeatures(raw), np.arange(ctx.validation.size), ctx.validation)
            self._validation_features[checkpoint] = subtask_means(features, ctx)
        return self._validation_features[checkpoint]

    def influence(self, ctx: RoundContext, candidates: IndexArray, settings: GradientSettings) -> ScoreArray:
        """Return the mean inner product of each candidate with the samples of every sub-task, shape (n, S)."""
        return ctx.probe.measure(GradientSimilarities(settings, self.validation_features(ctx, settings)), candidates)

    def extract(self, ctx: RoundContext, candidates: IndexArray) -> list[FeatureStore]:
        """Store the candidates' features in ``feature_dir``, for every checkpoint or for the model in training.

        Returns:
            One store per checkpoint, or a single store.
        """
        settings = self.params.settings()
        if not self.stored_checkpoints:
            return [ctx.probe.measure(StoredFeatures(settings), candidates)]
        stores = []
        for folder in self.stored_checkpoints:
            with ctx.probe.checkpoint(folder):
                stores.append(ctx.probe.measure(StoredFeatures(settings), candidates))
        return stores


class CheckpointSelector(InfluenceSelector[CheckpointedT]):
    """Base of influence selectors that measure stored checkpoints, or else the model in training."""

    @property
    def stored_checkpoints(self) -> list[str]:
        """The checkpoint folders whose gradients are measured. If empty, the model in training is measured."""
        return self.params.checkpoints

    def problems(self, run: RunView) -> Iterator[tuple[str, str]]:
        """Yield also problems of the checkpoint folders, and of a model or optimizer that is spread over processes."""
        yield from super().problems(run)
        moments = self.params.preconditioner != "none"
        yield from self.params.checkpoint_problems(moments)
        if self.stored_checkpoints and not run.offline:
            yield from self._spread_problems(run, moments)

    def _spread_problems(self, run: RunView, moments: bool) -> Iterator[tuple[str, str]]:
        """Yield why a run whose model or optimizer is spread over processes cannot measure stored checkpoints."""
        spread = run.sharded_by
        if spread is not None:
            others = "Train under DDP (neither deepspeed nor fsdp)" + ("" if moments else " or ZeRO-2")
            yield (
                "checkpoints",
                f"stored weights cannot be loaded while {spread} spreads the model over the processes. {others}. Or "
                "score the pool before the training with dataflex-cli score, under DDP too, and train on the selected "
                "samples.",
            )
        elif moments and run.deepspeed is not None:
            yield (
                "checkpoints",
                f"preconditioner: {self.params.preconditioner} matches the moments in each checkpoint's optimizer.pt "
                "with this run's optimizer parameter by parameter, and DeepSpeed flattens the optimizer's parameters. "
                "Train under DDP (no deepspeed) or set preconditioner: none. Or score the pool before the training "
                "with dataflex-cli score, without deepspeed, and train on the selected samples.",
            )

    def measured(self, ctx: RoundContext, candidates: IndexArray, settings: GradientSettings) -> ScoreArray:
        """Return the influence of each candidate on every sub-task, shape (n, S).

        The influence is measured under the stored checkpoints if any are named, else under the model in training.
        """
        measure = self.over_checkpoints if self.stored_checkpoints else self.influence
        return measure(ctx, candidates, settings)

    def over_checkpoints(self, ctx: RoundContext, candidates: IndexArray, settings: GradientSettings) -> ScoreArray:
        """Return the weighted mean of the influence over the stored checkpoints, shape (n, S)."""
        total = np.zeros((candidates.size, len(ctx.validation.domains)), dtype=np.float32)
        weights = self.params.checkpoint_weights or ctx.probe.learning_rates(self.params.checkpoints)
        scale = sum(weights)
        for folder, weight in zip(self.params.checkpoints, weights, strict=True):
            with ctx.probe.checkpoint(folder):
                targets = self.validation_features(ctx, settings, folder)
                total += np.float32(weight / scale) * ctx.probe.measure(
                    GradientSimilarities(settings, targets), candidates
                )
        return total


def subtask_means(features: ScoreArray, ctx: RoundContext) -> ScoreArray:
    """Return the mean feature of each sub-task, shape (S, k), float32. Samples whose feature is zero are left out.

    Args:
        features: features of all validation samples, shape (n, k).
        ctx: the round.

    Raises:
        ComponentError: if every sample of a sub-task is left out.
    """
    means, held = [], ctx.validation
    for name, low, high in zip(held.domains, held.offsets, held.offsets[1:], strict=False):  # S + 1 offsets
        part = features[low:high]
        part = part[(part != 0).any(axis=1)]
        if not part.size:
            raise ComponentError(
                f"no validation sample of {name!r} has both a token that is trained on and a gradient. Check its "
                "template and cutoff_len."
            )
        means.append(part.mean(axis=0))
    return np.stack(means).astype(np.float32)
