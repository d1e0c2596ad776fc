"""What the weighters share that compare a step's samples with anchors, which are embedded validation samples.

An embedding is a layer's hidden states, pooled over the tokens of a sample and scaled to length 1. The step's samples
have theirs from the forward that the step makes anyway. The anchors are embedded anew by the model in training every
``anchor_every`` steps, on all processes together.

Hidden states of one model point into much the same direction (their cosines lie between 0.4 and 0.95), so a common
centre is taken off first, the mean embedding of samples drawn from the pool, and lengths are scaled to 1 again:

    z = u(u(h) - c),    c = mean over the drawn samples of u(h),    u(v) = v / |v|

With ``center_samples: 0`` nothing is taken off.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from dataflex import (
    Embeddings,
    IndexArray,
    Measurement,
    Needs,
    RunOutline,
    RunView,
    State,
    StepBatch,
    StepStart,
    ValidationParams,
    Weighter,
    WeighterParams,
)

if TYPE_CHECKING:
    from torch import Tensor


class AnchorParams(WeighterParams, ValidationParams):
    """Parameters of weighters that compare samples with anchors."""

    earlier: ClassVar[Mapping[str, Any]] = {}
    """The defaults of the earlier release, where they are others."""

    defaults: Literal["dataflex", "dataflex_1"] = Field(
        "dataflex", description="Whose values parameters have that are not given; dataflex_1: the earlier release's."
    )
    layer: int = Field(-1, description="Layer whose hidden states are pooled; -1: the last, behind the final norm.")
    pooling: Literal["mean", "weighted_mean", "first", "last"] = Field(
        "weighted_mean", description="How tokens make a vector; weighted_mean: token t has weight t."
    )
    anchor_every: int = Field(50, ge=1, description="Optimizer steps after which the anchors are embedded anew.")
    anchors: int | None = Field(
        256, ge=1, description="Validation samples that are drawn as anchors each time; none: all of them."
    )
    center_samples: int = Field(
        256, ge=0, description="Samples drawn from the pool whose mean embedding is taken off; 0: none is."
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("defaults") == "dataflex_1":
            return {**cls.earlier, **given}
        return given

    @property
    def embeddings(self) -> Embeddings:
        """What is made of a sample's hidden states."""
        return Embeddings(layer=self.layer, pooling=self.pooling)


AnchorParamsT = TypeVar("AnchorParamsT", bound=AnchorParams, covariant=True)


@dataclass(frozen=True)
class Anchors:
    """The anchors as the model saw them last.

    Attributes:
        step: optimizer steps done then.
        mean: mean of their embeddings, (H,), float32.
        center: what is taken off every embedding, (H,), float32.
    """

    step: int
    mean: NDArray[np.float32]
    center: NDArray[np.float32]


class AnchoredWeighter(Weighter[AnchorParamsT]):
    """Has the anchors embedded, and compares a step's samples with them."""

    Params = AnchorParams
    state_depends_on = frozenset({"layer", "pooling", "anchors", "center_samples"})

    def __init__(self, params: AnchorParamsT) -> None:
        super().__init__(params)
        self._anchors: Anchors | None = None

    def needs(self, run: RunView) -> Needs:
        """Return the anchors, their embeddings, and those of the step's samples."""
        wanted = self.params.embeddings
        return Needs(measurements=(wanted,), validation=self.params, step_embeddings=wanted)

    def measured_samples(self, measurement: Measurement[Any], run: RunOutline) -> float:
        """Return the anchors and the samples of the centre, each as often as they are embedded."""
        times = -(-run.decided_steps // self.params.anchor_every)
        return float(times * (min(run.validation, self.params.anchors or run.validation) + self.params.center_samples))

    def begin_step(self, start: StepStart) -> None:
        """Embed the anchors anew if that is due."""
        if self._anchors is None or start.step - self._anchors.step >= self.params.anchor_every:
            self._anchors = self._embedded(start)

    def _embedded(self, start: StepStart) -> Anchors:
        assert start.probe is not None  # streams are refused
        assert start.pool is not None
        wanted, params = self.params.embeddings, self.params
        validation = start.validation
        chosen = _drawn(start.rng, validation.size, params.anchors)
        vectors = start.probe.measure(wanted, chosen, validation)
        center = np.zeros(vectors.shape[1], np.float32)
        if params.center_samples:
            others = start.probe.measure(wanted, _drawn(start.rng, start.pool.size, params.center_samples))
            center = others.mean(0, dtype=np.float64).astype(np.float32)
        moved = vectors.astype(np.float64) - center
        lengths = np.linalg.norm(moved, axis=1, keepdims=True)
        return Anchors(start.step, (moved / np.maximum(lengths, 1e-12)).mean(0).astype(np.float32), center)

    def compared(self, batch: StepBatch) -> tuple[Tensor, Tensor]:
        """Return the embeddings of a step's samples, (n, H), and the mean of the anchors', (H,)."""
        import torch

        assert self._anchors is not None  # begin_step() came before
        center, mean = (batch.step_embeddings.new_tensor(each) for each in (self._anchors.center, self._anchors.mean))
        return torch.nn.functional.normalize(batch.step_embeddings - center, dim=-1), mean

    def state_dict(self) -> State:
        """Return the anchors as they were embedded last."""
        last = self._anchors
        return {} if last is None else {"step": last.step, "mean": last.mean, "center": last.center}

    def load_state_dict(self, state: State) -> None:
        """Take back the anchors."""
        self._anchors = Anchors(**state) if state else None


def _drawn(rng: np.random.Generator, size: int, count: int | None) -> IndexArray:
    """Return the numbers of so many of ``size`` samples, ascending; all of them if there are no more."""
    if count is None or count >= size:
        return np.arange(size)
    return np.sort(rng.choice(size, count, replace=False))
