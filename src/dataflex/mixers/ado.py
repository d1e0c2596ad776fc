"""ADO: gives larger shares to domains whose loss falls faster per sample, by a scaling law fitted to each domain.

Jiang et al., "Adaptive Data Optimization: Dynamic Sample Selection with Scaling Laws", ICLR 2025, arXiv 2410.11820.
With mu the prior, h_k the moving average of the share of domain k in the trained samples, and t the steps done:

    L_k(n) = exp(e_k) + exp(a_k) * n ** -alpha_k                      fitted to the training loss of domain k
    speed_k = max(alpha_k, 0.05) * (L_k(n) - exp(e_k)) / n            how fast the loss of domain k falls
    rho     ~ mu * speed * sqrt(h), no share below ``min_probability``
    pi_t    = 0.9 * mean of rho over the steps before + 0.1 * rho
    h       <- 0.9 * h + 0.1 * share of each domain in the samples of the step

h and the mean start at mu. rho is mu until every domain has a law. rho and the means change with every step. The laws
and the shares pi_t that a plan follows change between rounds only. n counts samples, as in the authors' code, in which
all samples have the same length.

Differences from the authors' code:

- The code's mean of rho counts the prior as one more element.
- The history of the losses is bounded, and the search for a law has fewer starting points (base_scaling_law.py).
- exp(e) has no lower bound by default. The code's bound exp(0.5) = 1.65 nats is above the losses that models reach on
  code or mathematics, and distorts the laws of these domains.

Cost: no model computation. A refit takes some hundredths of a second for each domain.
"""

from __future__ import annotations

import logging
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from dataflex import (
    Mixer,
    MixerParams,
    Needs,
    RoundContext,
    RunOutline,
    RunView,
    Shares,
    State,
    StepStatistics,
    register,
    shares_of,
    shares_problem,
)
from dataflex.mixers.base_scaling_law import FEWEST_POINTS, LossHistory, fit, reducible

logger = logging.getLogger(__name__)

_LOWEST_ALPHA = 0.05
_NEW = 0.1
"""Weight of the present step in h, and of rho in pi."""


class ADOParams(MixerParams):
    """Parameters of ADO."""

    prior: Shares | None = Field(
        None, description="mu, the shares until the laws are fitted: list, mapping or JSON file. Default: by samples."
    )
    start_step: int = Field(
        1000, ge=1, description="The laws are first fitted at the first round after this many steps."
    )
    fit_steps: int = Field(
        1000, ge=1, description="The laws are fitted again at the first round after this many further steps."
    )
    ignore_steps: int = Field(
        500, ge=0, description="Steps at the start of the run whose losses are left out of the fits."
    )
    use_same_step_size: bool = Field(
        True, description="true: n counts the samples of all domains. false: n counts the domain's samples."
    )
    smoothing_steps: int = Field(
        101, ge=0, description="Window of the Savitzky-Golay filter over the losses, in steps. 0: no smoothing."
    )
    history_points: int = Field(
        512,
        ge=16,
        multiple_of=2,
        description="Most losses stored for each domain. When full, pairs of losses are averaged.",
    )
    min_irreducible: float | None = Field(
        None,
        gt=0,
        description="Fits with an irreducible loss exp(e) below this value (nats) are penalised. Default: no limit.",
    )
    min_probability: float = Field(1e-2, ge=0, lt=1, description="Lowest share of a domain in rho, at most 1 / K.")


@register("mixer", "ado")
class ADOMixer(Mixer[ADOParams]):
    """Shares by the learning speed that the scaling law of each domain predicts."""

    state_depends_on: ClassVar[frozenset[str]] = frozenset({"prior"})

    def __init__(self, params: ADOParams) -> None:
        super().__init__(params)
        self._prior: NDArray[np.float64] = np.empty(0)
        """mu, shape (K,), sum 1."""
        self._realised: NDArray[np.float64] = np.empty(0)
        """h, moving average of the domains' shares in the trained samples, shape (K,)."""
        self._mean: NDArray[np.float64] = np.empty(0)
        """Mean of rho over the steps so far, shape (K,)."""
        self._preferred: NDArray[np.float64] = np.empty(0)
        """rho, shape (K,). Empty until every domain has a law."""
        self._samples: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        """Trained samples of each domain so far, shape (K,)."""
        self._losses: NDArray[np.float64] = np.empty(0)
        """Last training loss of each domain, shape (K,). NaN before the first one."""
        self._history = LossHistory(params.history_points)
        self._fitted_at: int | None = None
        """Step of the last fit. None before the first one."""
        self.laws: NDArray[np.float64] = np.empty((0, 3))
        """a, e and alpha of every domain, shape (K, 3). NaN if no law was fitted yet."""
        self.fits = 0
        """How many times the laws were fitted."""
        self.failed_fits: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        """How many of these fits found no law for a domain, shape (K,). The domain then keeps its previous law."""

    def needs(self, run: RunView) -> Needs:
        """Ask for the losses of each step by domain."""
        return Needs(step_losses="domains")

    def check_domains(self, names: tuple[str, ...]) -> tuple[str, str] | None:
        """Check that all shares are valid, every prior is positive and the lowest shares add up to at most 1."""
        lowest, prior = self.params.min_probability, self.params.prior
        if lowest * len(names) > 1:
            return (
                "min_probability",
                f"{lowest} for each of {len(names)} domains adds up to more than 1; use at most {1 / len(names):.6g}.",
            )
        problem = shares_problem(prior, names)
        if problem is None and prior is not None:
            absent = [name for name, share in zip(names, shares_of(prior, names), strict=True) if share == 0]
            if absent:
                problem = (
                    f"is 0 for {', '.join(absent)}, so no law can be fitted there; give every domain a positive share."
                )
        return super().check_domains(names) if problem is None else ("prior", problem)

    def cannot_learn(self, run: RunOutline) -> str | None:
        """Return that no decision comes late enough for a fit, or that the fit has too few losses."""
        last, start = run.schedule.last_decision or 0, self.params.start_step
        if last < start:
            return (
                f"laws are first fitted after start_step ({start}) steps, and the last of {run.decisions} decisions "
                f"comes after {last} of {run.total_steps} steps, so the shares stay at the prior. Lower start_step (to "
                "a tenth of the steps, for example) and ignore_steps, or train longer"
            )
        if last - self.params.ignore_steps < FEWEST_POINTS:
            return (
                f"ignore_steps ({self.params.ignore_steps}) leaves fewer than {FEWEST_POINTS} losses for a fit at the "
                f"last decision, after {last} of {run.total_steps} steps, so the shares stay at the prior. Lower "
                "ignore_steps"
            )
        return None

    def initial(self, ctx: RoundContext) -> NDArray[np.float64]:
        """Return the configured initial proportions, or the prior."""
        self._begin(ctx)
        return self._prior if self.params.initial_proportions is None else super().initial(ctx)

    def mix(self, ctx: RoundContext) -> NDArray[np.float64]:
        """Return pi, shape (K,), after fitting the laws again if a fit is due."""
        self._begin(ctx)
        last = -self.params.fit_steps if self._fitted_at is None else self._fitted_at
        if ctx.start_step >= max(self.params.start_step, last + self.params.fit_steps):
            self._fit(ctx)
        if not self._preferred.size:
            ctx.not_decided("there are no laws yet, the shares are the prior")
            return self._prior
        return (1 - _NEW) * self._mean + _NEW * self._preferred

    def on_step(self, statistics: StepStatistics) -> None:
        """Record the samples and losses of a step. A domain without a sample in the step keeps its last loss."""
        if self._preferred.size:
            self._mean = self._mean + (self._preferred - self._mean) / statistics.step
        self._samples = self._samples + statistics.samples
        self._losses = np.where(np.isnan(statistics.losses), self._losses, statistics.losses)
        share = statistics.samples / statistics.samples.sum()
        self._realised = (1 - _NEW) * self._realised + _NEW * share
        self._history.add(self._samples, self._losses)
        self._prefer()

    def _begin(self, ctx: RoundContext) -> None:
        """Set the initial state once. The prior is read only here, because its file may change during the run."""
        if self._prior.size:
            return
        given, sizes = self.params.prior, ctx.pool.domain_sizes
        prior = sizes.astype(np.float64) if given is None else shares_of(given, ctx.pool.domains)
        self._prior = prior / prior.sum()
        self._realised, self._mean = self._prior, self._prior
        self._samples = np.zeros(sizes.size, dtype=np.int64)
        self._losses = np.full(sizes.size, np.nan)
        self.laws = np.full((sizes.size, 3), np.nan)
        self.failed_fits = np.zeros(sizes.size, dtype=np.int64)

    def _fit(self, ctx: RoundContext) -> None:
        """Fit the law of every domain to its history. A domain whose fit fails keeps its previous law."""
        self._fitted_at, self.fits = ctx.start_step, self.fits + 1
        failed = []
        laws = self.laws.copy()  # state_dict hands out the array itself
        for domain, name in enumerate(ctx.pool.domains):
            n, losses = self._history.curve(
                domain,
                of_domain=not self.params.use_same_step_size,
                ignore_steps=self.params.ignore_steps,
                smoothing_steps=self.params.smoothing_steps,
            )
            found = fit(n, losses, self.params.min_irreducible)
            if found is None:
                failed.append(name)
                self.failed_fits[domain] += 1
            else:
                laws[domain] = found
        self.laws = laws
        if failed:
            logger.warning(
                "ado: at step %d no law could be fitted for %s. The previous law stays in use. As long as a domain has "
                "no law at all, the shares stay at the prior.",
                ctx.start_step,
                ", ".join(failed),
            )
        self._prefer()

    def _prefer(self) -> None:
        """Compute rho if every domain has a law."""
        if np.isnan(self.laws).any():
            return
        n = np.full(self._samples.shape, self._samples.sum()) if self.params.use_same_step_size else self._samples
        with np.errstate(divide="ignore"):  # h can underflow to 0: the domain then gets the lowest share
            logs = np.log(np.maximum(self.laws[:, 2], _LOWEST_ALPHA)) + reducible(self.laws, n.astype(np.float64))
            logs += np.log(self._prior) + 0.5 * np.log(self._realised) - np.log(n)
        shares = np.exp(logs - logs.max())
        raised = np.maximum(shares / shares.sum(), self.params.min_probability)
        self._preferred = raised / raised.sum()

    def state_dict(self) -> State:
        """Return the shares, the counts, the laws and the history."""
        return {
            "prior": self._prior,
            "realised": self._realised,
            "mean": self._mean,
            "preferred": self._preferred,
            "samples": self._samples,
            "losses": self._losses,
            "fitted_at": self._fitted_at,
            "laws": self.laws,
            "fits": self.fits,
            "failed_fits": self.failed_fits.copy(),
            "history": self._history.state_dict(),
        }

    def load_state_dict(self, state: State) -> None:
        """Restore the state that :meth:`state_dict` returned."""
        self._prior, self._realised, self._mean = state["prior"], state["realised"], state["mean"]
        self._preferred, self._samples, self._losses = state["preferred"], state["samples"], state["losses"]
        self._fitted_at = state["fitted_at"]
        self.laws, self.fits, self.failed_fits = state["laws"], int(state["fits"]), state["failed_fits"].copy()
        self._history.load_state_dict(state["history"])
