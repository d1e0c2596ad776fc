"""What mixers share that weigh the domains in the loss: uniform sampling, exponentiated updates, and the average.

Their result is not the last weight of each domain but the average over all steps, as in DoReMi (Xie et al. 2023,
arXiv 2305.10429, Algorithm 1) and DoGE (Fan et al. 2023, arXiv 2310.15393, Algorithm 1).
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from dataflex import (
    DomainParams,
    Mixer,
    Needs,
    RoundContext,
    RunOutline,
    RunView,
    Shares,
    State,
    StepContext,
    shares_of,
    shares_problem,
)


class LossWeightParams(DomainParams):
    """Parameters of mixers that weigh the domains in the loss."""

    proportions: Shares | None = Field(
        None, description="Shares the samples are drawn by, in every round: list, mapping or JSON file; none: uniform."
    )


class StepWeightParams(LossWeightParams):
    """Parameters of those that decide from a step's losses, for which the losses of the step before can stand in."""

    weights: Literal["current", "previous"] = Field(
        "current",
        description="Weights in a step's loss: decided from that step itself (a second forward where gradients are "
        "accumulated), or from the one before.",
    )


LossWeightT = TypeVar("LossWeightT", bound=LossWeightParams, covariant=True)
StepWeightT = TypeVar("StepWeightT", bound=StepWeightParams, covariant=True)


class LossWeightMixer(Mixer[LossWeightT]):
    """Draws samples by fixed shares and weighs the domains in the loss; write :meth:`updated`."""

    weighs_loss: ClassVar[bool] = True
    constant_shares: ClassVar[bool] = True
    state_depends_on: ClassVar[frozenset[str]] = frozenset({"proportions"})

    def __init__(self, params: LossWeightT) -> None:
        super().__init__(params)
        self._weights: NDArray[np.float64] = np.empty(0)
        self._sum: NDArray[np.float64] = np.empty(0)
        self._shares: NDArray[np.float64] = np.empty(0)
        """Those of a file as they were when training began: it may change while a run goes on."""
        self.steps = 0
        """Times the weights were decided."""

    @abstractmethod
    def updated(self, weights: NDArray[np.float64], ctx: StepContext) -> NDArray[np.float64]:
        """Return the weights that follow ``weights`` after looking at a step, shape (K,), sum 1."""

    def initial(self, ctx: RoundContext) -> NDArray[np.float64]:
        """Return the given shares, or equal ones."""
        given, names = self.params.proportions, ctx.pool.domains
        if not self._weights.size:
            self._weights = np.full(len(names), 1.0 / len(names))
            self._sum = np.zeros_like(self._weights)
        if not isinstance(given, str):
            return np.ones(len(names)) if given is None else shares_of(given, names)
        if not self._shares.size:
            self._shares = shares_of(given, names)
        return self._shares

    def mix(self, ctx: RoundContext) -> NDArray[np.float64]:
        """Return the same shares as in warm-up rounds: only the loss changes."""
        return self.initial(ctx)

    def check_domains(self, names: tuple[str, ...]) -> tuple[str, str] | None:
        """Check names or length, sign and sum of the given shares."""
        problem = shares_problem(self.params.proportions, names)
        return None if problem is None else ("proportions", problem)

    @property
    def loss_weights(self) -> NDArray[np.float64]:
        """The weights of the domains in the loss, shape (K,), sum 1; equal before the first decision."""
        return self._weights

    @property
    def average(self) -> NDArray[np.float64]:
        """The mean of the weights over all steps, shape (K,)."""
        return self._sum / self.steps if self.steps else self._weights

    def update_weights(self, ctx: StepContext) -> None:
        """Decide the weights from a step."""
        self._weights = self.updated(self._weights, ctx)
        self._sum = self._sum + self._weights
        self.steps += 1

    def result(self, names: tuple[str, ...]) -> dict[str, Any] | None:
        """Return the average weights, which are the method's result, and the last ones.

        None where they were never decided, as in a run that ends in its warm-up: equal weights would look like a find.
        """
        if not self.steps:
            return None
        return {
            "method": self.name,
            "steps": self.steps,
            "proportions": dict(zip(names, self.average.tolist(), strict=True)),
            "last": dict(zip(names, self._weights.tolist(), strict=True)),
        }

    def state_dict(self) -> State:
        """Return the weights, their sum over the steps, the number of steps, and the shares."""
        return {"weights": self._weights, "sum": self._sum, "steps": self.steps, "shares": self._shares}

    def load_state_dict(self, state: State) -> None:
        """Take back what :meth:`state_dict` returned."""
        self._weights, self._sum, self.steps = state["weights"], state["sum"], int(state["steps"])
        self._shares = state["shares"]


class StepWeightMixer(LossWeightMixer[StepWeightT]):
    """Decides the weights from the losses of a step, that step's or the one's before it."""

    def needs(self, run: RunView) -> Needs:
        """Return the step's losses by domain."""
        return Needs(step_losses="domains")

    @property
    def decides_within_step(self) -> bool:
        """Whether the weights in a step's loss are decided from that step itself."""
        return self.params.weights == "current"

    def cannot_learn(self, run: RunOutline) -> str | None:
        """Return that weights taken from the step before are never used."""
        if self.decides_within_step or run.decided_steps > 1:
            return None
        return (
            "with weights: previous the first step after warm-up has equal weights, and the run has no second one; "
            "train longer"
        )


def exponentiated_update(
    weights: NDArray[np.float64], gains: NDArray[np.float64], smoothing: float = 0.0
) -> NDArray[np.float64]:
    """Return ``(1 - c) * normalised(weights * exp(gains)) + c / K``, shape (K,), sum 1.

    Computed in logarithms, so that no gain overflows. A weight of 0 stays 0 without smoothing.

    Args:
        weights: non-negative, with a positive sum, shape (K,).
        gains: finite, shape (K,).
        smoothing: c, in [0, 1]; every weight is then at least c / K.
    """
    with np.errstate(divide="ignore"):
        logs = np.log(weights) + gains
    shares = np.exp(logs - logs.max())
    return (1.0 - smoothing) * shares / shares.sum() + smoothing / weights.size
