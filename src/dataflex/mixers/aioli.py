"""Aioli: measures during training how much each domain lowers each validation loss, and shifts the shares to that.

Chen et al., "Aioli: A Unified Optimization Framework for Language Model Data Mixing", ICLR 2025, arXiv 2411.05735.
The method assumes that losses are linear in the proportions: L_i(after) = L_i(before) - sum_j A_ij p_j. The run repeats
this cycle:

1. LearnParams: ``lp_rounds`` sweeps through the K domains, each sweep in a new random order. The round of domain j
   trains on the mixture with p_j = f (``one_hot_factor``) and (1 - f) / (K - 1) for each other domain. Column j of
   Delta is the validation losses before the round minus those after the round, averaged over the sweeps. W is the
   matrix of the mixtures. Row i of A solves W A_i = Delta_i.
2. ``normalize``: min A is subtracted if it is negative. Then A is divided by its sum.
3. p_j <- p_j * exp(eta * sum_i A_ij). The first p has equal shares. With ``ema`` = c, A_ema <- (1 - c) * A + c * A_ema
   and p_j ~ exp(eta * sum_i A_ema_ij) instead, which starts from equal shares every time.
4. ``exploit_rounds`` rounds with the proportions p.

A round has ``update_steps`` optimizer steps, which the authors' code calls lp_steps. With M validation domains A has
the shape (M, K). The sums over A do not need M = K.

Cost: in each cycle lp_rounds * K + 1 forward passes over the validation samples. The lp_rounds * K rounds of
LearnParams are part of the training, but use the mixtures of LearnParams instead of p.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from dataflex import (
    Losses,
    Measurement,
    Mixer,
    MixerParams,
    Needs,
    RoundContext,
    RunOutline,
    RunView,
    State,
    ValidationParams,
    register,
)
from dataflex.mixers.base_loss_weights import exponentiated_update
from dataflex.mixers.base_validation_loss import validation_losses


class AioliParams(MixerParams, ValidationParams):
    """Parameters of Aioli."""

    eta: float = Field(0.2, gt=0, description="Step size of the proportions.")
    lp_rounds: int = Field(4, ge=1, description="Sweeps through the domains in one LearnParams phase.")
    exploit_rounds: int = Field(
        50, ge=1, description="Rounds that train on the learned proportions before the next LearnParams."
    )
    one_hot_factor: float = Field(
        0.75, gt=0, le=1, description="f, the share of domain j in its LearnParams mixture; above 1 / K."
    )
    normalize: bool = Field(True, description="Whether to shift A to be non-negative and scale it to sum 1.")
    ema: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="Weight c of the earlier A in a moving average. Default: no average, each update continues from p.",
    )


@register("mixer", "aioli")
class AioliMixer(Mixer[AioliParams]):
    """Alternates between measuring how domains lower validation losses and training on the resulting shares."""

    state_depends_on: ClassVar[frozenset[str]] = frozenset({"lp_rounds", "one_hot_factor"})

    def __init__(self, params: AioliParams) -> None:
        super().__init__(params)
        self.proportions: NDArray[np.float64] = np.empty(0)
        """p, shape (K,), sum 1. Equal shares before the first LearnParams ends."""
        self._order: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        """Random order of the domains in the current sweep, shape (K,)."""
        self._tried = 0
        """Number of rounds of the current LearnParams so far."""
        self._exploited: int | None = None
        """Number of rounds with the present p so far. None before the first LearnParams."""
        self._trained_on: int | None = None
        """Domain whose LearnParams round is planned and not measured yet. None if no round is."""
        self._before: NDArray[np.float64] = np.empty(0)
        """Validation losses before the next LearnParams round, shape (M,). Empty if not measured."""
        self._drops: NDArray[np.float64] = np.empty((0, 0))
        """Delta, summed over the sweeps so far, shape (M, K). Empty outside LearnParams."""
        self._average: NDArray[np.float64] = np.empty((0, 0))
        """A_ema, shape (M, K). Empty before the first update, and without ``ema``."""

    def needs(self, run: RunView) -> Needs:
        """Ask for the losses of the validation samples."""
        return Needs(measurements=(Losses(),), validation=self.params)

    def problems(self, run: RunView) -> Iterator[tuple[str, str]]:
        """Yield that ``max_epochs_per_domain`` cannot be used with this mixer, if it is set."""
        if self.params.max_epochs_per_domain is not None:
            yield (
                "max_epochs_per_domain",
                "cannot be used with aioli: a round with a capped domain trains on another mixture than the one that "
                "the update assumes. Remove it.",
            )

    def check_domains(self, names: tuple[str, ...]) -> tuple[str, str] | None:
        """Check the initial proportions, and that the mixtures of LearnParams prefer their domain."""
        factor = self.params.one_hot_factor
        if len(names) > 1 and factor * len(names) <= 1:
            return (
                "one_hot_factor",
                f"must be above 1 / {len(names)} with {len(names)} domains, so that each mixture of LearnParams "
                f"prefers one domain; got {factor}.",
            )
        return super().check_domains(names)

    def wanted_rounds(self, domains: int) -> int:
        """Return the rounds of one cycle: the rounds of LearnParams and ``exploit_rounds``."""
        return int(self.params.lp_rounds * domains + self.params.exploit_rounds)

    def cannot_learn(self, run: RunOutline) -> str | None:
        """Return that LearnParams uses all rounds, so that the run never trains on its result."""
        learning = self.params.lp_rounds * run.domains
        if run.decisions > learning:
            return None
        return (
            f"LearnParams takes {learning} rounds (lp_rounds x {run.domains} domains), and the run has "
            f"{run.decisions}, so it never trains on the learned proportions. Lower dataflex.update_steps or "
            "lp_rounds, or train longer"
        )

    def measured_samples(self, measurement: Measurement[Any], run: RunOutline) -> float:
        """Return the number of validation samples times the number of measurements in the run."""
        learning = self.params.lp_rounds * run.domains
        full, rest = divmod(run.decisions, learning + self.params.exploit_rounds)
        measured = full * (learning + 1) + min(rest, learning + 1)
        return float(run.validation * measured)

    def initial(self, ctx: RoundContext) -> NDArray[np.float64]:
        """Return the configured initial proportions, or equal ones, shape (K,).

        A measurement that is still open is finished first, so that it does not count the effect of the warm-up round.
        """
        self._measure(ctx)
        # The warm-up round changes the model, so the next drop needs fresh losses to start from.
        self._before = np.empty(0)
        count = len(ctx.pool.domains)
        return np.full(count, 1.0 / count) if self.params.initial_proportions is None else super().initial(ctx)

    def mix(self, ctx: RoundContext) -> NDArray[np.float64]:
        """Return the next mixture of LearnParams, or p, shape (K,), sum 1."""
        count = len(ctx.pool.domains)
        if count == 1:
            return np.ones(1)
        if not self.proportions.size:
            self.proportions = np.full(count, 1.0 / count)
        self._measure(ctx)
        # LearnParams may end only after a whole sweep, so that Delta has every domain equally often.
        if self._drops.size and self._tried >= self.params.lp_rounds * count and self._tried % count == 0:
            self._update(self._tried // count)
        elif not self._drops.size and (self._exploited is None or self._exploited >= self.params.exploit_rounds):
            self._drops, self._tried = np.zeros((len(ctx.validation.domains), count)), 0
        if not self._drops.size:
            self._exploited = (self._exploited or 0) + 1
            return self.proportions
        if self._tried % count == 0:
            self._order = ctx.rng.permutation(count)
        if not self._before.size:
            self._before = validation_losses(ctx)
        self._trained_on = int(self._order[self._tried % count])
        self._tried += 1
        return _mixtures(count, self.params.one_hot_factor)[self._trained_on]

    def _measure(self, ctx: RoundContext) -> None:
        """Add the drop of the validation losses over the last round to Delta, if LearnParams chose its mixture."""
        if self._trained_on is None:
            return
        after = validation_losses(ctx)
        self._drops[:, self._trained_on] += self._before - after
        self._before, self._trained_on = after, None

    def _update(self, sweeps: int) -> None:
        """Update p from the Delta of ``sweeps`` sweeps, and end LearnParams."""
        found = mixing_matrix(self._drops / sweeps, self.params.one_hot_factor)
        matrix = _normalized(found) if self.params.normalize else found
        if self.params.ema is None:
            self.proportions = exponentiated_update(self.proportions, self.params.eta * matrix.sum(axis=0))
        else:
            old = self._average if self._average.size else matrix
            self._average = np.asarray(matrix + self.params.ema * (old - matrix), dtype=np.float64)
            equal = np.ones_like(self.proportions)
            self.proportions = exponentiated_update(equal, self.params.eta * self._average.sum(axis=0))
        self._drops, self._before, self._exploited = np.empty((0, 0)), np.empty(0), 0

    def state_dict(self) -> State:
        """Return p, the position in the cycle, and the measurements of the present LearnParams."""
        return {
            "proportions": self.proportions,
            "order": self._order,
            "tried": self._tried,
            "exploited": self._exploited,
            "trained_on": self._trained_on,
            "before": self._before,
            "drops": self._drops.copy(),
            "average": self._average,
        }

    def load_state_dict(self, state: State) -> None:
        """Restore the state that :meth:`state_dict` returned."""
        self.proportions, self._order, self._tried = state["proportions"], state["order"], int(state["tried"])
        self._exploited, self._trained_on, self._before = state["exploited"], state["trained_on"], state["before"]
        self._drops, self._average = state["drops"].copy(), state["average"]


def mixing_matrix(drops: NDArray[np.float64], one_hot_factor: float) -> NDArray[np.float64]:
    """Return A, whose rows solve W A_i = drops_i, shape (M, K).

    Args:
        drops: how much the loss of validation domain i fell in the round of domain j, shape (M, K), K >= 2.
        one_hot_factor: f. It must not be 1 / K, because then all mixtures are equal and W is singular.
    """
    return np.asarray(np.linalg.solve(_mixtures(drops.shape[1], one_hot_factor), drops.T).T, dtype=np.float64)


def _mixtures(count: int, factor: float) -> NDArray[np.float64]:
    """Return W, shape (K, K). Row j is the mixture of domain j's round."""
    mixtures = np.full((count, count), (1 - factor) / (count - 1))
    np.fill_diagonal(mixtures, factor)
    return mixtures


def _normalized(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the matrix shifted and scaled to sum 1.

    The lowest entry is subtracted from all entries if it is negative. If all entries are then 0, the result is uniform.
    """
    shifted: NDArray[np.float64] = matrix - min(0.0, float(matrix.min()))
    total = float(shifted.sum())
    return shifted / total if total > 0 else np.full(shifted.shape, 1.0 / shifted.size)
