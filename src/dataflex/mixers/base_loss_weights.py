"""Shared parts of the mixers that weigh the domains in the loss: fixed sampling shares, updates and averages.

The result of a mixer of this kind is the average of its weights over all steps, not the last weights. DoReMi (Xie
et al. 2023, arXiv 2305.10429, Algorithm 1) and DoGE (Fan et al. 2023, arXiv 2310.15393, Algorithm 1) do the same.
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
        None,
        description="Sampling share of each domain in every round: list, mapping or JSON file. Default: equal shares.",
    )


class StepWeightParams(LossWeightParams):
    """Parameters of mixers that decide the loss weights from the losses of a step.

    The losses of the previous step can be used instead of the losses of the step itself.
    """

    weights: Literal["current", "previous"] = Field(
        "current",
        description="current: decide the loss weights of a step from that step, which costs a second forward pass "
        "with gradient accumulation. previous: decide them from the step before.",
    )


LossWeightT = TypeVar("LossWeightT", bound=LossWeightParams, covariant=True)
StepWeightT = TypeVar("StepWeightT", bound=StepWeightParams, covariant=True)


class LossWeightMixer(Mixer[LossWeightT]):
    """Draws samples by fixed shares and weighs the domains in the loss of every step.

    A subclass defines :meth:`updated`.
    """

    weighs_loss: ClassVar[bool] = True
    constant_shares: ClassVar[bool] = True
    state_depends_on: ClassVar[frozenset[str]] = frozenset({"proportions"})

    def __init__(self, params: LossWeightT) -> None:
        super().__init__(params)
        self._weights: NDArray[np.float64] = np.empty(0)
        """Present weights of the domains in the loss, shape (K,), sum 1."""
        self._sum: NDArray[np.float64] = np.empty(0)
        """Sum of the weights over all decisions, shape (K,). Their mean is the result of the run."""
        self._shares: NDArray[np.float64] = np.empty(0)
        """The shares read from a file, stored because the file may change during the run."""
        self.steps = 0
        """How many times the weights were decided."""

    @abstractmethod
    def updated(self, weights: NDArray[np.float64], ctx: StepContext) -> NDArray[np.float64]:
        """Return the next weights of the domains in the loss, shape (K,), sum 1.

        Args:
            weights: the present weights, shape (K,), sum 1.
            ctx: the step that the next weights are decided from.
        """

    def initial(self, ctx: RoundContext) -> NDArray[np.float64]:
        """Return the configured sampling shares, or equal shares if none are configured, shape (K,)."""
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
        """Return the same sampling shares as in warm-up rounds, because only the loss weights change."""
        return self.initial(ctx)

    def check_domains(self, names: tuple[str, ...]) -> tuple[str, str] | None:
        """Check the names, number, sign and sum of the configured shares."""
        problem = shares_problem(self.params.proportions, names)
        return None if problem is None else ("proportions", problem)

    @property
    def loss_weights(self) -> NDArray[np.float64]:
        """The present weights of the domains in the loss, shape (K,), sum 1. Equal before the first decision."""
        return self._weights

    @property
    def average(self) -> NDArray[np.float64]:
        """The mean of the weights over all steps, shape (K,)."""
        return self._sum / self.steps if self.steps else self._weights

    def update_weights(self, ctx: StepContext) -> None:
        """Decide the weights from a step, and add them to the average."""
        self._weights = self.updated(self._weights, ctx)
        self._sum = self._sum + self._weights
        self.steps += 1

    def result(self, names: tuple[str, ...]) -> dict[str, Any] | None:
        """Return the average weights, which are the result of the method, and the last weights.

        Return None if the weights were never decided, as in a run that ends in its warm-up. Otherwise equal
        weights would look like a result.
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
        """Restore the state that :meth:`state_dict` returned."""
        self._weights, self._sum, self.steps = state["weights"], state["sum"], int(state["steps"])
        self._shares = state["shares"]


class StepWeightMixer(LossWeightMixer[StepWeightT]):
    """Decides the loss weights from the losses of the present step or of the step before."""

    def needs(self, run: RunView) -> Needs:
        """Ask for the losses of each step by domain."""
        return Needs(step_losses="domains")

    @property
    def decides_within_step(self) -> bool:
        """Whether the weights in the loss of a step are decided from that step itself."""
        return self.params.weights == "current"

    def cannot_learn(self, run: RunOutline) -> str | None:
        """Return that ``weights: previous`` needs a second step after the warm-up, if the run has none."""
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

    The computation is done in logarithms, so that no gain overflows. A weight of 0 stays 0 without smoothing.

    Args:
        weights: non-negative, with a positive sum, shape (K,).
        gains: finite, shape (K,).
        smoothing: c, in [0, 1]. Every weight is then at least c / K.
    """
    with np.errstate(divide="ignore"):
        logs = np.log(weights) + gains
    shares = np.exp(logs - logs.max())
    return (1.0 - smoothing) * shares / shares.sum() + smoothing / weights.size
