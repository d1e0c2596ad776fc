"""ADO: more of the domains whose loss falls fastest per sample, by a scaling law of each fitted while training.

Jiang et al., "Adaptive Data Optimization: Dynamic Sample Selection with Scaling Laws", ICLR 2025, arXiv 2410.11820.
With mu the prior, h_k the moving average of domain k's share of the samples trained on, and t steps made:

    L_k(n) = exp(e_k) + exp(a_k) * n ** -alpha_k                      fitted to the training loss of domain k
    speed_k = max(alpha_k, 0.05) * (L_k(n) - exp(e_k)) / n            how fast it falls
    rho     ~ mu * speed * sqrt(h), no share below ``min_probability``
    pi_t    = 0.9 * mean of the rho of the steps before + 0.1 * rho
    h       <- 0.9 * h + 0.1 * share of the step's samples

h and the mean begin at mu, and rho is mu until there are laws. rho and the means change with every step, the laws and
what is trained on between rounds. n counts samples, as in the authors' code, where all have the same length.

What differs from it: the code's mean of rho counts the prior as one more element; the history of the losses is
bounded, and the laws are searched for from fewer starts (base_scaling_law.py); there is no floor under exp(e) unless
asked for: the code's exp(0.5) = 1.65 nats is above what code or mathematics reach, and pushes their laws aside.

Cost: no model computation; a refit takes some hundredths of a second for each domain.
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
"""Weight of the present in h, and of rho in the decision."""


class ADOParams(MixerParams):
    """Parameters of ADO."""

    prior: Shares | None = Field(
        None, description="mu, the shares before there are laws: list, mapping or JSON file; none: by size."
    )
    start_step: int = Field(1000, ge=1, description="Laws are first fitted at the first round after so many steps.")
    fit_steps: int = Field(1000, ge=1, description="They are fitted again at the first round after so many more.")
    ignore_steps: int = Field(500, ge=0, description="First steps of the run whose losses are not fitted to.")
    use_same_step_size: bool = Field(
        True, description="Whether n counts the samples of all domains; else the domain's own."
    )
    smoothing_steps: int = Field(
        101, ge=0, description="Window of the Savitzky-Golay filter over the losses; 0: they are not smoothed."
    )
    history_points: int = Field(
        512, ge=16, multiple_of=2, description="Losses kept for each domain at most; more are averaged in pairs."
    )
    min_irreducible: float | None = Field(
        None, gt=0, description="Fits whose irreducible loss exp(e) is lower, in nats, are penalised; none: no floor."
    )
    min_probability: float = Field(1e-2, ge=0, lt=1, description="Lowest share in rho; at most 1 / K.")


@register("mixer", "ado")
class ADOMixer(Mixer[ADOParams]):
    """Follows the learning speeds that the domains' scaling laws foretell."""

    state_depends_on: ClassVar[frozenset[str]] = frozenset({"prior"})

    def __init__(self, params: ADOParams) -> None:
        super().__init__(params)
        self._prior: NDArray[np.float64] = np.empty(0)
        self._realised: NDArray[np.float64] = np.empty(0)
        self._mean: NDArray[np.float64] = np.empty(0)
        self._preferred: NDArray[np.float64] = np.empty(0)
        self._samples: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._losses: NDArray[np.float64] = np.empty(0)
        self._history = LossHistory(params.history_points)
        self._fitted_at: int | None = None
        self.laws: NDArray[np.float64] = np.empty((0, 3))
        """a, e and alpha of every domain, shape (K, 3); NaN where none could be fitted yet."""
        self.fits = 0
        """Times the laws were fitted."""
        self.failed_fits: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        """How many of them found no law for a domain, shape (K,); it kept the one it had."""

    def needs(self, run: RunView) -> Needs:
        """Return the step's losses by domain."""
        return Needs(step_losses="domains")

    def check_domains(self, names: tuple[str, ...]) -> tuple[str, str] | None:
        """Check the shares, that no domain's prior is 0, and that the lowest shares fit into 1."""
        lowest, prior = self.params.min_probability, self.params.prior
        if lowest * len(names) > 1:
            return (
                "min_probability",
                f"{lowest} for each of {len(names)} domains is more than 1 together; at most {1 / len(names):.6g}.",
            )
        problem = shares_problem(prior, names)
        if problem is None and prior is not None:
            absent = [name for name, share in zip(names, shares_of(prior, names), strict=True) if share == 0]
            if absent:
                problem = (
                    f"is 0 for {', '.join(absent)}, whose law could then not be fitted; give every domain a share."
                )
        return super().check_domains(names) if problem is None else ("prior", problem)

    def cannot_learn(self, run: RunOutline) -> str | None:
        """Return that no decision comes late enough for a fit, or that a fit would have too few losses."""
        last, start = run.schedule.last_decision or 0, self.params.start_step
        if last < start:
            return (
                f"laws are first fitted after start_step ({start}) steps, and the last of {run.decisions} decisions "
                f"comes after {last} of {run.total_steps}: the shares stay the prior. Lower start_step (a tenth of the "
                "steps, say) and ignore_steps, or train longer"
            )
        if last - self.params.ignore_steps < FEWEST_POINTS:
            return (
                f"ignore_steps ({self.params.ignore_steps}) leaves fewer than {FEWEST_POINTS} losses to fit to at the "
                f"last decision, after {last} of {run.total_steps} steps: the shares stay the prior. Lower it"
            )
        return None

    def initial(self, ctx: RoundContext) -> NDArray[np.float64]:
        """Return the given initial proportions, or the prior."""
        self._begin(ctx)
        return self._prior if self.params.initial_proportions is None else super().initial(ctx)

    def mix(self, ctx: RoundContext) -> NDArray[np.float64]:
        """Return pi, after fitting the laws anew where that is due."""
        self._begin(ctx)
        last = -self.params.fit_steps if self._fitted_at is None else self._fitted_at
        if ctx.start_step >= max(self.params.start_step, last + self.params.fit_steps):
            self._fit(ctx)
        if not self._preferred.size:
            ctx.not_decided("there are no laws yet, the shares are the prior")
            return self._prior
        return (1 - _NEW) * self._mean + _NEW * self._preferred

    def on_step(self, statistics: StepStatistics) -> None:
        """Take in the samples and losses of a step; a domain that was absent keeps its last loss."""
        if self._preferred.size:
            self._mean = self._mean + (self._preferred - self._mean) / statistics.step
        self._samples = self._samples + statistics.samples
        self._losses = np.where(np.isnan(statistics.losses), self._losses, statistics.losses)
        share = statistics.samples / statistics.samples.sum()
        self._realised = (1 - _NEW) * self._realised + _NEW * share
        self._history.add(self._samples, self._losses)
        self._prefer()

    def _begin(self, ctx: RoundContext) -> None:
        """Set what the run begins with; the prior is read once, for a file may change while a run goes on."""
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
        """Fit the law of every domain to its history; one without a result keeps what it had."""
        self._fitted_at, self.fits = ctx.start_step, self.fits + 1
        failed = []
        laws = self.laws.copy()
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
                "ado: at step %d no law could be fitted for %s; the last one stays, and while a domain has none the "
                "proportions stay the prior.",
                ctx.start_step,
                ", ".join(failed),
            )
        self._prefer()

    def _prefer(self) -> None:
        """Set rho, where every domain has a law."""
        if np.isnan(self.laws).any():
            return
        n = np.full(self._samples.shape, self._samples.sum()) if self.params.use_same_step_size else self._samples
        with np.errstate(divide="ignore"):  # a share h that has vanished gives 0, and then the lowest share
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
        """Take back what :meth:`state_dict` returned."""
        self._prior, self._realised, self._mean = state["prior"], state["realised"], state["mean"]
        self._preferred, self._samples, self._losses = state["preferred"], state["samples"], state["losses"]
        self._fitted_at = state["fitted_at"]
        self.laws, self.fits, self.failed_fits = state["laws"], int(state["fits"]), state["failed_fits"].copy()
        self._history.load_state_dict(state["history"])
