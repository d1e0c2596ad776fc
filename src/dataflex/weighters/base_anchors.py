"""Shared base of the weighters that compare a step's samples with anchors, which are embedded validation samples.

An embedding is the hidden states of a layer, pooled over the tokens of a sample and scaled to length 1. The embeddings
of the step's samples come from the forward pass that the step needs anyway. Every ``anchor_every`` steps all processes
embed the anchors again with the model in training.

Hidden states of one model all point in similar directions (their cosines lie between 0.4 and 0.95). So a common centre
is subtracted first, the mean embedding of samples drawn from the pool, and lengths are scaled to 1 again:

    z = u(u(h) - c),    c = mean over the drawn samples of u(h),    u(v) = v / |v|

With ``center_samples: 0`` nothing is subtracted.
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
    """Defaults of the earlier release that differ from the present ones."""

    defaults: Literal["dataflex", "dataflex_1"] = Field(
        "dataflex",
        description="Defaults of the parameters that are not set: those of this release (dataflex) or of the earlier "
        "release (dataflex_1).",
    )
    layer: int = Field(
        -1,
        description="Layer whose hidden states are pooled; 0 is the embedding layer, -1 the last layer after the "
        "final norm.",
    )
    pooling: Literal["mean", "weighted_mean", "first", "last"] = Field(
        "weighted_mean", description="Pooling of token states into one vector; weighted_mean: token t has weight t."
    )
    anchor_every: int = Field(
        50, ge=1, description="Number of optimizer steps after which the anchors are embedded again."
    )
    anchors: int | None = Field(
        256, ge=1, description="Number of validation samples drawn as anchors each time. If null, all of them."
    )
    center_samples: int = Field(
        256,
        ge=0,
        description="Number of samples drawn from the pool whose mean embedding is subtracted; 0 subtracts nothing.",
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("defaults") == "dataflex_1":
            return {**cls.earlier, **given}
        return given

    @property
    def embeddings(self) -> Embeddings:
        """The measurement that embeds samples."""
        return Embeddings(layer=self.layer, pooling=self.pooling)


AnchorParamsT = TypeVar("AnchorParamsT", bound=AnchorParams, covariant=True)


@dataclass(frozen=True)
class Anchors:
    """The anchors as the model embedded them last.

    Attributes:
        step: number of optimizer steps done at that time.
        mean: mean of the anchors' embeddings, shape (H,), float32.
        center: vector subtracted from every embedding, shape (H,), float32.
    """

    step: int
    mean: NDArray[np.float32]
    center: NDArray[np.float32]


class AnchoredWeighter(Weighter[AnchorParamsT]):
    """Base of weighters that embed anchors and compare a step's samples with them."""

    Params = AnchorParams
    state_depends_on = frozenset({"layer", "pooling", "anchors", "center_samples"})

    def __init__(self, params: AnchorParamsT) -> None:
        super().__init__(params)
        self._anchors: Anchors | None = None
        """The anchors as they were embedded last. None before the first step."""

    def needs(self, run: RunView) -> Needs:
        """Return the validation samples, their embeddings, and the embeddings of the step's samples."""
        wanted = self.params.embeddings
        return Needs(measurements=(wanted,), validation=self.params, step_embeddings=wanted)

    def measured_samples(self, measurement: Measurement[Any], run: RunOutline) -> float:
        """Return the anchors and the samples of the centre, each as often as it is embedded in the run."""
        times = -(-run.decided_steps // self.params.anchor_every)
        return float(times * (min(run.validation, self.params.anchors or run.validation) + self.params.center_samples))

    def begin_step(self, start: StepStart) -> None:
        """Embed the anchors again if that is due."""
        if self._anchors is None or start.step - self._anchors.step >= self.params.anchor_every:
            self._anchors = self._embedded(start)

    def _embedded(self, start: StepStart) -> Anchors:
        """Return the anchors, embedded with the present model, and the centre that is subtracted."""
        assert start.probe is not None  # streaming data is refused before the run
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
        """Return the embeddings of a step's samples, (n, H), and the mean of the anchors' embeddings, (H,)."""
        import torch

        assert self._anchors is not None  # begin_step() is called before weigh()
        center, mean = (batch.step_embeddings.new_tensor(each) for each in (self._anchors.center, self._anchors.mean))
        return torch.nn.functional.normalize(batch.step_embeddings - center, dim=-1), mean

    def state_dict(self) -> State:
        """Return the anchors as they were embedded last."""
        last = self._anchors
        return {} if last is None else {"step": last.step, "mean": last.mean, "center": last.center}

    def load_state_dict(self, state: State) -> None:
        """Restore the anchors."""
        self._anchors = Anchors(**state) if state else None


def _drawn(rng: np.random.Generator, size: int, count: int | None) -> IndexArray:
    """Return the indices of ``count`` of ``size`` samples, ascending.

    All indices are returned if ``count`` is None or not smaller than ``size``.
    """
    if count is None or count >= size:
        return np.arange(size)
    return np.sort(rng.choice(size, count, replace=False))
