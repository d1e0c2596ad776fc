"""Online data mixing (ODM): a bandit over the domains whose reward is the training loss.

The method needs no measurement. Let K be the number of domains, and t the number of optimizer steps so far in which a
domain had a loss, warm-up rounds included. The exploration rate is

    eps_0 = 1 / K,    eps_t = min(1 / K, sqrt(ln K / (K t))).

``variant: paper`` is Exp3 with a moving average. The samples of step t are drawn by the shares pi_{t-1}. If domain i
has a loss L_i in this step, then R_i <- alpha R_i + (1 - alpha) L_i / pi_{t-1}(i). Otherwise R_i, which is 0 at first,
stays the same. The shares after step t are

    pi_t(i) = (1 - K eps_t) exp(eps_{t-1} R_i) / sum_j exp(eps_{t-1} R_j) + eps_t.

``variant: official`` follows the authors' code: R_i <- alpha R_i + (1 - alpha) exp(L_i), without the division by the
share. Warm-up rounds do not change R, but their steps count in t. The shares after step t are

    pi_t(i) = (1 - K eps_t) R_i / sum_j R_j + eps_t.

Source: Albalak et al. 2023, arXiv 2312.02406; code alon-albalak/online-data-mixing.
Differences from both paper and code:

- Samples are not drawn at random by the shares. The counts of a plan are the shares times the samples of the round,
  rounded, and the rounding error is carried to the next round.
- Every domain of a step is rewarded with its token-mean loss over the whole step. The paper draws one domain for each
  batch, and the code draws one for each micro-batch of a process.
- Shares change between rounds. They change after every step only with ``update_steps: 1``.

Cost: no forward or backward pass.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from dataflex import Mixer, MixerParams, Needs, RoundContext, RunOutline, RunView, State, StepStatistics, register


class OdmParams(MixerParams):
    """Parameters of the odm mixer."""

    variant: Literal["paper", "official"] = Field(
        "paper",
        description="paper: Exp3 on loss / share. official: shares by averaged exp(loss), as the authors' code.",
    )
    alpha: float = Field(0.9, ge=0, lt=1, description="Weight of the earlier average when a domain is rewarded.")


@register("mixer", "odm")
class OdmMixer(Mixer[OdmParams]):
    """Shares by the training loss of each domain, with a decreasing share for exploration."""

    def __init__(self, params: OdmParams) -> None:
        super().__init__(params)
        self.steps = 0
        """t, the number of optimizer steps so far in which a domain had a loss."""
        self._rewards: NDArray[np.float64] = np.empty(0)
        """R of the paper, shape (K,)."""
        self._log_perplexities: NDArray[np.float64] = np.empty(0)
        """Logarithm of the code's R, shape (K,), because R itself would overflow. -inf if R is 0."""

    def needs(self, run: RunView) -> Needs:
        """Ask for the losses of each step by domain."""
        return Needs(step_losses="domains")

    def cannot_learn(self, run: RunOutline) -> str | None:
        """Return the reason if no decision can use a loss, or if exploration keeps the shares equal in all of them."""
        if self.params.variant == "official" and run.decisions == 1 and run.schedule.warmup_steps:
            return (
                "the only decision comes after the warm-up, from which variant: official learns nothing; lower "
                "dataflex.update_steps"
            )
        last = run.schedule.last_decision or 0
        needed = 1  # the smallest t at which eps_t is below 1 / K, so that shares can differ
        while exploration(needed, run.domains) >= 1.0 / run.domains:
            needed += 1
        if last >= needed:
            return None
        return (
            f"the last decision comes after {last} of {run.total_steps} steps, and before {needed} steps with "
            f"{run.domains} domains exploration keeps the shares equal; lower dataflex.update_steps or train longer"
        )

    def on_step(self, statistics: StepStatistics) -> None:
        """Reward every domain that has a loss in the step.

        The rewards of both variants are updated, so that a resumed run may change the variant.
        """
        losses, alpha = statistics.losses, self.params.alpha
        present = ~np.isnan(losses)
        if not present.any():
            return
        if not self.steps:
            self._rewards, self._log_perplexities = np.zeros(losses.size), np.full(losses.size, -np.inf)
        # Change copies, because `state_dict` returns the arrays themselves.
        rewards, logs = self._rewards.copy(), self._log_perplexities.copy()
        rewards[present] *= alpha
        rewards[present] += (1.0 - alpha) * losses[present] / statistics.proportions[present]
        log_alpha = math.log(alpha) if alpha else -math.inf
        if not statistics.warmup:
            logs[present] = np.logaddexp(log_alpha + logs[present], math.log1p(-alpha) + losses[present])
        self._rewards, self._log_perplexities = rewards, logs
        self.steps += 1

    def mix(self, ctx: RoundContext) -> NDArray[np.float64]:
        """Return pi_t, shape (K,), with sum 1. Each share is at least eps_t.

        Before the first step with a loss, the shares are equal. ``variant: official`` learns nothing from the warm-up,
        so it returns the initial shares until a later step has a loss.
        """
        count = len(ctx.pool.domains)
        floor = exploration(self.steps, count)
        if floor >= 1.0 / count:  # the formula below then gives equal shares
            ctx.not_decided(
                f"exploration keeps the shares equal until there are losses of more steps ({self.steps} so far)"
            )
        if not self.steps:
            return np.full(count, 1.0 / count)
        if self.params.variant == "paper":
            logits = exploration(self.steps - 1, count) * self._rewards
        elif np.isneginf(self._log_perplexities).all():
            ctx.not_decided("variant: official learns nothing from the warm-up, so its shares stay")
            return self.initial(ctx)
        else:
            logits = self._log_perplexities
        shares = np.exp(logits - logits.max())
        return (1.0 - count * floor) * shares / shares.sum() + floor

    def state_dict(self) -> State:
        """Return the averages of both variants, and the number of steps with a loss."""
        return {"rewards": self._rewards, "log_perplexities": self._log_perplexities, "steps": self.steps}

    def load_state_dict(self, state: State) -> None:
        """Restore the state that :meth:`state_dict` returned."""
        self._rewards, self._log_perplexities = state["rewards"], state["log_perplexities"]
        self.steps = int(state["steps"])


def exploration(steps: int, count: int) -> float:
    """Return eps_t, the lowest share of each domain, in [0, 1 / count].

    Args:
        steps: t, optimizer steps with a loss so far.
        count: number of domains.
    """
    return min(1.0 / count, math.sqrt(math.log(count) / (count * steps))) if steps else 1.0 / count
