"""What the influence methods share: the parameters of gradient features, the validation set, and its features."""

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

_OTHER_ORDER = ("galore_", "apollo_", "lomo", "adalomo")
"""How values of ``optim`` begin whose parameters are in another order than in other optimizers."""
_OTHER_ORDER_KEYS = ("use_galore", "use_apollo", "use_badam", "use_adam_mini", "use_muon")
"""LLaMA-Factory keys that choose such an optimizer."""


class GradientParams(ComponentParams):
    """Parameters of per-sample gradients."""

    preconditioner: Literal["none", "adam", "adam_less"] = Field(
        "none",
        description="Direction of a sample: its gradient, the optimizer's next Adam step, or that of LESS's code.",
    )
    unsupported_parameters: Literal["error", "ignore"] = Field(
        "error", description="What to do with trainable parameters that have no per-sample rule."
    )

    def settings(self, **changes: Any) -> GradientSettings:
        """Return what the probe is asked for, with ``changes``."""
        chosen = {"preconditioner": self.preconditioner, "unsupported": self.unsupported_parameters}
        return GradientSettings(**{**chosen, **changes})


class FeatureParams(GradientParams):
    """Parameters of gradient features."""

    projection: Literal["count", "rademacher", "kronecker", "identity"] = Field(
        "count", description="Random linear map of the gradients; identity keeps every number (for tests)."
    )
    proj_dim: int = Field(8192, ge=1, description="Length of a feature; at most the number of trainable parameters.")
    projection_seed: int = Field(0, ge=0, description="Seed of the map.")
    feature_dir: OutputPath | None = Field(
        None,
        description="Folder to keep the pool's features in, so that a killed decision goes on where it was; none: they "
        "are used and dropped.",
    )

    def settings(self, **changes: Any) -> GradientSettings:
        """Return what the probe is asked for, with ``changes``."""
        chosen = {
            "projection": self.projection,
            "dim": self.proj_dim,
            "seed": self.projection_seed,
            "store": self.feature_dir,
        }
        return super().settings(**{**chosen, **changes})


class CheckpointParams(ComponentParams):
    """Stored checkpoints that stand for the course of a run."""

    checkpoints: list[InputPath] = Field(
        default_factory=list,
        description="Checkpoint folders of an earlier run of the same model, in order; none: the model as it is.",
    )
    checkpoint_weights: list[float] | None = Field(
        None, description="Weight of each checkpoint, scaled to sum 1; none: mean learning rate of its part of the run."
    )

    @model_validator(mode="after")
    def _one_weight_each(self) -> Self:
        weights = self.checkpoint_weights
        if weights is None:
            return self
        if len(weights) != len(self.checkpoints):
            raise ValueError(f"checkpoint_weights has {len(weights)} numbers for {len(self.checkpoints)} checkpoints")
        if min(weights) < 0 or sum(weights) <= 0:
            raise ValueError(f"checkpoint_weights must not be negative and not all zero, got {weights}")
        return self

    def checkpoint_problems(self, moments: bool) -> Iterator[tuple[str, str]]:
        """Yield what is wrong with the folders; ``moments``: whether the optimizer's are wanted."""
        for folder in self.checkpoints:
            if not Path(folder).is_dir():
                yield "checkpoints", f"there is no folder {folder!r}."
            elif not any(Path(folder).glob("*model*.safetensors")) and not any(Path(folder).glob("adapter_model.*")):
                yield "checkpoints", f"{folder!r} holds no model and no adapter."
            elif moments and not (Path(folder) / "optimizer.pt").is_file():
                yield (
                    "checkpoints",
                    f"{folder!r} has no optimizer.pt, which holds Adam's moments; use preconditioner: none.",
                )
            elif self.checkpoint_weights is None and not (Path(folder) / "trainer_state.json").is_file():
                yield (
                    "checkpoints",
                    f"{folder!r} has no trainer_state.json to take its weight from; set checkpoint_weights.",
                )


class InfluenceParams(SelectorParams, FeatureParams, ValidationParams):
    """Parameters of selectors that compare training samples with validation samples."""


class CheckpointedParams(InfluenceParams, CheckpointParams):
    """Parameters of those that may compare under stored checkpoints."""


class LessParams(CheckpointedParams):
    """Parameters of LESS, and of what scores samples as it does."""

    preconditioner: Literal["none", "adam", "adam_less"] = Field(
        "adam", description="Direction of a training sample; validation samples keep their gradient."
    )
    aggregation: Literal["max", "mean"] = Field("max", description="Over sub-tasks.")


GradientT = TypeVar("GradientT", bound=GradientParams, covariant=True)
InfluenceT = TypeVar("InfluenceT", bound=InfluenceParams, covariant=True)
CheckpointedT = TypeVar("CheckpointedT", bound=CheckpointedParams, covariant=True)


class GradientSelector(Selector[GradientT]):
    """Base of selectors that look at per-sample gradients."""

    @property
    def stored_checkpoints(self) -> list[str]:
        """The checkpoint folders whose gradients count; none: the model as it is."""
        return []

    def expected_passes(self, decisions: int) -> int:
        """Return how often the pool is gone through in a run, for the estimate of its cost."""
        return decisions * max(1, len(self.stored_checkpoints))

    def problems(self, run: RunView) -> Iterator[tuple[str, str]]:
        """Yield what shows before a model is loaded: Adam's direction needs an Adam, and a step of it."""
        yield from super().problems(run)
        if self.params.preconditioner != "none" and self.stored_checkpoints:
            yield from self._moment_problems(run)

    def _moment_problems(self, run: RunView) -> Iterator[tuple[str, str]]:
        """Yield why the moments of stored checkpoints cannot be had; the measurement tells of the run's own."""
        settings, given = self.params.settings(), run.llamafactory
        if settings.projection == "kronecker":
            yield "projection", "kronecker works on the gradient itself; it needs preconditioner: none."
        optimizer = str(given.get("optim") or "adamw_torch")
        chosen = [key for key in _OTHER_ORDER_KEYS if str(given.get(key, False)).lower() in ("1", "true", "yes")]
        if optimizer.startswith(_OTHER_ORDER):
            chosen.append(f"optim: {optimizer}")
        for key in chosen:
            yield (
                "preconditioner",
                f"{settings.preconditioner!r} does not go with {key}: the moments of checkpoints are matched by the "
                "order of this run's optimizer, and this one has another order. Use optim: adamw_torch, or "
                "preconditioner: none.",
            )


class InfluenceSelector(GradientSelector[InfluenceT]):
    """Base of selectors that compare training samples with validation samples."""

    def needs(self, run: RunView) -> Needs:
        """Return the gradients of training and validation samples."""
        settings = self.params.settings()
        if self.stored_checkpoints:  # whose moments are not the run's
            settings = replace(settings, preconditioner="none")
        return Needs(measurements=(GradientFeatures(settings),), validation=self.params)

    def __init__(self, params: InfluenceT) -> None:
        super().__init__(params)
        self._validation_features: dict[str, ScoreArray] = {}
        """Mean feature of each sub-task in this decision, (S, k), by stored checkpoint; "": of the model as it is."""

    def begin(self, ctx: RoundContext) -> None:
        """Make the features of the validation samples; those of stored checkpoints when these are looked at."""
        self._validation_features = {}
        if not self.stored_checkpoints:
            self.validation_features(ctx, self.params.settings())

    def validation_features(self, ctx: RoundContext, settings: GradientSettings, checkpoint: str = "") -> ScoreArray:
        """Return the mean feature of each sub-task, (S, k), float32; made once in a decision for a checkpoint.

        Validation samples keep their raw gradient whatever the preconditioner. Where each has length 1, the inner
        product with a training feature of length 1 is the mean of its cosines with the sub-task's samples.

        Raises:
            ComponentError: if a sub-task has no sample with a trained token.
        """
        if checkpoint not in self._validation_features:
            raw = replace(settings, preconditioner="none")
            features = ctx.probe.measure(GradientFeatures(raw), np.arange(ctx.validation.size), ctx.validation)
            self._validation_features[checkpoint] = subtask_means(features, ctx)
        return self._validation_features[checkpoint]

    def influence(self, ctx: RoundContext, candidates: IndexArray, settings: GradientSettings) -> ScoreArray:
        """Return each candidate's mean inner product with every sub-task's samples, (n, S)."""
        return ctx.probe.measure(GradientSimilarities(settings, self.validation_features(ctx, settings)), candidates)

    def extract(self, ctx: RoundContext, candidates: IndexArray) -> list[FeatureStore]:
        """Make the candidates' features in ``feature_dir``, under every checkpoint or the model as it is."""
        settings = self.params.settings()
        if not self.stored_checkpoints:
            return [ctx.probe.measure(StoredFeatures(settings), candidates)]
        stores = []
        for folder in self.stored_checkpoints:
            with ctx.probe.checkpoint(folder):
                stores.append(ctx.probe.measure(StoredFeatures(settings), candidates))
        return stores


class CheckpointSelector(InfluenceSelector[CheckpointedT]):
    """Base of selectors that compare them under stored checkpoints, or under the model as it is."""

    @property
    def stored_checkpoints(self) -> list[str]:
        """The checkpoint folders whose gradients count; none: the model as it is."""
        return self.params.checkpoints

    def problems(self, run: RunView) -> Iterator[tuple[str, str]]:
        """Yield also what is wrong with the folders, and with a model that is spread out."""
        yield from super().problems(run)
        moments = self.params.preconditioner != "none"
        yield from self.params.checkpoint_problems(moments)
        if self.stored_checkpoints and not run.offline:
            yield from self._spread_problems(run, moments)

    def _spread_problems(self, run: RunView, moments: bool) -> Iterator[tuple[str, str]]:
        """Yield why stored checkpoints cannot be looked at in a run whose model or optimizer is spread out."""
        spread = run.sharded_by
        if spread is not None:
            others = "Train under DDP (neither deepspeed nor fsdp)" + ("" if moments else " or ZeRO-2")
            yield (
                "checkpoints",
                f"stored weights cannot be looked at while {spread} spreads the model over the processes. {others}, or "
                "score the pool before with dataflex-cli score, also without them, and train on what it selects.",
            )
        elif moments and run.deepspeed is not None:
            yield (
                "checkpoints",
                f"with preconditioner: {self.params.preconditioner} the moments in each checkpoint's optimizer.pt are "
                "matched with this run's optimizer parameter by parameter, and DeepSpeed flattens it. Train under DDP "
                "(no deepspeed), set preconditioner: none, or score the pool before with dataflex-cli score, without "
                "deepspeed, and train on what it selects.",
            )

    def measured(self, ctx: RoundContext, candidates: IndexArray, settings: GradientSettings) -> ScoreArray:
        """Return the influence of each candidate on every sub-task, (n, S), under what there is."""
        measure = self.over_checkpoints if self.stored_checkpoints else self.influence
        return measure(ctx, candidates, settings)

    def over_checkpoints(self, ctx: RoundContext, candidates: IndexArray, settings: GradientSettings) -> ScoreArray:
        """Return :meth:`influence` summed over stored checkpoints by their weights, scaled to sum 1, (n, S)."""
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
    """Return the mean feature of each sub-task, (S, k); samples whose feature is zero are left out.

    Raises:
        ComponentError: if a sub-task has none left.
    """
    means, held = [], ctx.validation
    for name, low, high in zip(held.domains, held.offsets, held.offsets[1:], strict=False):
        part = features[low:high]
        part = part[(part != 0).any(axis=1)]
        if not part.size:
            raise ComponentError(
                f"no validation sample of {name!r} has a token that is trained on and a gradient. Check its template "
                "and cutoff_len."
            )
        means.append(part.mean(axis=0))
    return np.stack(means).astype(np.float32)
