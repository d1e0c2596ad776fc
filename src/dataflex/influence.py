"""What the influence methods share: the parameters of gradient features, the validation set, and its features."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, field_validator

from dataflex.components import ComponentParams, GradientSettings, RoundContext, Selector, SelectorParams
from dataflex.errors import ComponentError
from dataflex.selection import ScoreArray

if TYPE_CHECKING:
    from dataflex.config import RunConfig

_NO_MOMENTS = {
    "use_galore": "GaLore keeps its moments in a subspace of each gradient",
    "use_apollo": "APOLLO keeps its moments in a subspace of each gradient",
    "use_badam": "BAdam keeps moments of one block at a time",
    "use_adam_mini": "Adam-mini keeps one second moment for many parameters",
    "use_muon": "Muon keeps no second moment",
}
"""LLaMA-Factory keys that choose an optimizer whose state holds no moment for each parameter."""


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

    sketch: Literal["count", "rademacher", "kronecker", "identity"] = Field(
        "count", description="Random linear map of the gradients; identity keeps every number (for tests)."
    )
    proj_dim: int = Field(8192, ge=1, description="Length of a feature; at most the number of trainable parameters.")
    projection_seed: int = Field(0, ge=0, description="Seed of the map.")

    def settings(self, **changes: Any) -> GradientSettings:
        """Return what the probe is asked for, with ``changes``."""
        chosen = {"sketch": self.sketch, "dim": self.proj_dim, "seed": self.projection_seed}
        return super().settings(**{**chosen, **changes})


class ValidationParams(ComponentParams):
    """Which samples stand for what the model is to become good at."""

    validation: list[str] | None = Field(
        None, description="Data sets of the validation samples, each a sub-task; none: eval_dataset (or val_size)."
    )
    subtask_column: str | None = Field(
        None, description="Column of the raw data whose values divide the validation samples into sub-tasks."
    )

    @field_validator("validation", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        names = value.split(",") if isinstance(value, str) else value
        if isinstance(names, list) and not [name for name in names if str(name).strip()]:
            raise ValueError("must name a data set")
        return [str(name).strip() for name in names] if isinstance(names, list) else names


class InfluenceParams(SelectorParams, FeatureParams, ValidationParams):
    """Parameters of selectors that compare training samples with validation samples."""


class GradientSelector(Selector):
    """Base of selectors that look at per-sample gradients."""

    leaves_out_unscored: ClassVar[bool] = True

    def problems(self, run: RunConfig) -> Iterator[tuple[str, str]]:
        """Yield what shows before a model is loaded: Adam's direction needs an Adam, and a step of it."""
        yield from super().problems(run)
        if self.params.preconditioner == "none" or run.dataflex is None:
            return
        if run.dataflex.warmup_steps == 0:
            yield (
                "preconditioner",
                f"{self.params.preconditioner!r} reads the optimizer's moments, and before the first step there are "
                "none. Set dataflex.warmup_steps to 1 or more (LESS warms up on 5 % of the pool), or preconditioner: "
                "none.",
            )
        optimizer = str(run.llamafactory.get("optim", "adamw_torch"))
        if "adam" not in optimizer.lower():
            yield "preconditioner", f"{self.params.preconditioner!r} needs an Adam optimizer, got optim: {optimizer}."
        for key, reason in _NO_MOMENTS.items():
            if str(run.llamafactory.get(key, False)).lower() in ("1", "true", "yes"):
                yield "preconditioner", f"{self.params.preconditioner!r} does not go with {key}: {reason}."


class InfluenceSelector(GradientSelector):
    """Base of selectors that compare training samples with validation samples."""

    Params: ClassVar[type[ComponentParams]] = InfluenceParams
    needs_validation: ClassVar[bool] = True

    def target_features(self, ctx: RoundContext) -> ScoreArray:
        """Return the mean raw-gradient feature of each sub-task, (S, k), float32; made once in a round.

        Each validation gradient has length 1, so the inner product with a training feature of length 1 is the mean of
        its cosines with the sub-task's samples.

        Raises:
            ComponentError: if a sub-task has no sample with a trained token.
        """
        if "target_features" not in ctx.memo:
            settings = self.params.settings(preconditioner="none")
            assert ctx.targets is not None
            features = ctx.probe.gradients(np.arange(ctx.targets.size), settings, ctx.targets)
            ctx.memo["target_features"] = subtask_means(features, ctx)
        means: ScoreArray = ctx.memo["target_features"]
        return means


def subtask_means(features: ScoreArray, ctx: RoundContext) -> ScoreArray:
    """Return the mean feature of each sub-task, (S, k); samples whose feature is zero are left out.

    Raises:
        ComponentError: if a sub-task has none left.
    """
    assert ctx.targets is not None
    means = []
    for name, low, high in zip(ctx.targets.domains, ctx.targets.offsets, ctx.targets.offsets[1:], strict=False):
        part = features[low:high]
        part = part[(part != 0).any(axis=1)]
        if not part.size:
            raise ComponentError(
                f"no validation sample of {name!r} has a token that is trained on and a gradient. Check its template "
                "and cutoff_len."
            )
        means.append(part.mean(axis=0))
    return np.stack(means).astype(np.float32)
