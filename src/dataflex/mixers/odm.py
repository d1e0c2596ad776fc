"""Online data mixing: a bandit over the domains whose reward is the training loss, so nothing has to be measured.

After t optimizer steps with a loss (warm-up rounds included), for K domains,

    eps_0 = 1 / K,    eps_t = min(1 / K, sqrt(ln K / (K t))).

``variant: paper`` is Exp3 with a moving average. Every domain i with a loss L_i in step t, drawn by the shares
pi_{t-1}, takes R_i <- alpha R_i + (1 - alpha) L_i / pi_{t-1}(i), the others keep R_i (0 at first), and

    pi_t(i) = (1 - K eps_t) exp(eps_{t-1} R_i) / sum_j exp(eps_{t-1} R_j) + eps_t.

``variant: official`` is what the authors' code does: R_i <- alpha R_i + (1 - alpha) exp(L_i), without the division and
not in warm-up rounds, whose steps only count in t, and

    pi_t(i) = (1 - K eps_t) R_i / sum_j R_j + eps_t.

Source: Albalak et al. 2023, arXiv 2312.02406; code alon-albalak/online-data-mixing.
Differs from both: plans keep to the shares, what rounding leaves over being carried, and every domain of a step is
rewarded with its token-mean loss over the whole step, where the paper draws one domain for a batch and the code one for
each micro-batch of a process; and shares change at every round, which is every step only with ``update_steps: 1``.
Cost: none.
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
        "paper", description="paper: Exp3 on loss / share; official: shares by averaged exp(loss), as the code does."
    )
    alpha: float = Field(0.9, ge=0, lt=1, description="What a domain's average keeps of itself when it is rewarded.")


@register("mixer", "odm")
class OdmMixer(Mixer[OdmParams]):
    """Shares by the training loss of each domain, with a falling share for exploration."""

    def __init__(self, params: OdmParams) -> None:
        super().__init__(params)
        self.steps = 0
        """Optimizer steps heard that had a loss, t."""
        self._rewards: NDArray[np.float64] = np.empty(0)
        """R of the paper, shape (K,)."""
        self._log_perplexities: NDArray[np.float64] = np.empty(0)
        """Logarithm of R of the code, which would overflow, shape (K,); -inf where R is 0."""

    def needs(self, run: RunView) -> Needs:
        """Return the step's losses by domain."""
        return Needs(step_losses="domains")

    def cannot_learn(self, run: RunOutline) -> str | None:
        """Return that the last decision comes before the exploration leaves room for anything but equal shares."""
        if self.params.variant == "official" and run.decisions == 1 and run.schedule.warmup_steps:
            return (
                "the only decision comes after the warm-up, from which variant: official learns nothing; lower "
                "dataflex.update_steps"
            )
        last = run.schedule.last_decision or 0
        needed = 1
        while exploration(needed, run.domains) >= 1.0 / run.domains:
            needed += 1
        if last >= needed:
            return None
        return (
            f"the last decision comes after {last} of {run.total_steps} steps, and before {needed} steps with "
            f"{run.domains} domains its shares are equal whatever the losses are; lower dataflex.update_steps or train "
            "longer"
        )

    def on_step(self, statistics: StepStatistics) -> None:
        """Reward every domain that has a loss; for both variants, so that a resumed run may change to the other."""
        losses, alpha = statistics.losses, self.params.alpha
        present = ~np.isnan(losses)
        if not present.any():
            return
        if not self.steps:
            self._rewards, self._log_perplexities = np.zeros(losses.size), np.full(losses.size, -np.inf)
        rewards, logs = self._rewards.copy(), self._log_perplexities.copy()
        rewards[present] *= alpha
        rewards[present] += (1.0 - alpha) * losses[present] / statistics.proportions[present]
        kept = math.log(alpha) if alpha else -math.inf
        if not statistics.warmup:
            logs[present] = np.logaddexp(kept + logs[present], math.log1p(-alpha) + losses[present])
        self._rewards, self._log_perplexities = rewards, logs
        self.steps += 1

    def mix(self, ctx: RoundContext) -> NDArray[np.float64]:
        """Return pi_t, shape (K,), sum 1, each at least eps_t.

        Shares are equal if no step was heard yet, and those of the warm-up if it is all that was and nothing is learnt
        from it.
        """
        count = len(ctx.pool.domains)
        floor = exploration(self.steps, count)
        if floor >= 1.0 / count:
            ctx.not_decided(f"exploration keeps the shares equal until more losses were heard ({self.steps} so far)")
        if not self.steps:
            return np.full(count, 1.0 / count)
        if self.params.variant == "paper":
            logits = exploration(self.steps - 1, count) * self._rewards
        elif np.isneginf(self._log_perplexities).all():
            ctx.not_decided("variant: official learns nothing from the warm-up, whose shares stay")
            return self.initial(ctx)
        else:
            logits = self._log_perplexities
        shares = np.exp(logits - logits.max())
        return (1.0 - count * floor) * shares / shares.sum() + floor

    def state_dict(self) -> State:
        """Return the averages of both variants and the number of steps heard."""
        return {"rewards": self._rewards, "log_perplexities": self._log_perplexities, "steps": self.steps}

    def load_state_dict(self, state: State) -> None:
        """Take back what :meth:`state_dict` returned."""
        self._rewards, self._log_perplexities = state["rewards"], state["log_perplexities"]
        self.steps = int(state["steps"])


def exploration(steps: int, count: int) -> float:
    """Return eps_t, the least share of each of ``count`` domains after ``steps`` rewarded steps, in [0, 1 / count]."""
    return min(1.0 / count, math.sqrt(math.log(count) / (count * steps))) if steps else 1.0 / count
