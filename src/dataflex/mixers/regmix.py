"""RegMix: the mixture with the lowest loss that a regression over small models predicts.

Many small models are trained, each on another mixture. A regression learns their loss as a function of the mixture.
100,000 mixtures are simulated, and the mean of the 128 with the lowest predicted loss is the mixture of every round.
The mixtures and losses of the small models are read from two tables.

Source: Liu et al., ICLR 2025, arXiv 2407.01492; code sail-sg/regmix.
Differences from the code: it stops adding trees by the error on the same mixtures that it reports the correlation on,
while the number of trees here is found on held-out fifths of the table. The code simulates mixtures with
Dirichlet(prior), while here they are simulated by the distribution that the small models' mixtures are drawn from.
Cost: some seconds, once. The small models are trained outside this run.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from dataflex import (
    ConfigError,
    DomainParams,
    InputPath,
    Mixer,
    Problem,
    RoundContext,
    Shares,
    State,
    by_domain,
    register,
    shares_of,
    shares_problem,
    unknown,
)
from dataflex.mixers.base_mixtures import Drawing, Floats
from dataflex.mixers.base_regression import Regressor, best_mixture, check_runs, fit, read_runs


class RegMixParams(DomainParams):
    """Parameters of the RegMix mixer."""

    mixtures: InputPath = Field(
        min_length=1, description="CSV file: one row of weights for each small model, one column for each domain."
    )
    losses: InputPath = Field(min_length=1, description="CSV file: the losses of the same models, in the same order.")
    target: str | list[str] | None = Field(
        None, description="Column of losses to minimise, or columns whose mean is minimised. Default: all columns."
    )
    regressor: Regressor = Field(
        "lightgbm", description="lightgbm: trees, for at least 64 models. linear: least squares."
    )
    samples: int = Field(100_000, ge=1, description="Number of simulated mixtures.")
    top: int = Field(128, ge=1, description="How many mixtures with the lowest predicted loss are averaged.")
    prior: Shares | None = Field(
        None, description="Weights that mixtures are simulated around: list, mapping or JSON file. Default: by size."
    )
    unit: Literal["tokens", "samples"] = Field(
        "tokens",
        description="Unit of the weights. tokens: divided by the domains' mean lengths to get shares of samples.",
    )
    seed: int = Field(
        0, ge=0, description="Seed of the simulation and of the held-out fifths, separate from the run's seed."
    )


@register("mixer", "regmix")
class RegMixMixer(Mixer[RegMixParams]):
    """Uses the mixture that a regression over small models predicts to be best."""

    constant_shares: ClassVar[bool] = True
    state_depends_on: ClassVar[frozenset[str]] = frozenset(
        {"mixtures", "losses", "target", "regressor", "samples", "top", "prior", "unit", "seed"}
    )

    def __init__(self, params: RegMixParams) -> None:
        super().__init__(params)
        self._mixture: NDArray[np.float64] = np.empty(0)
        """The best mixture, shape (K,), sum 1, in shares of ``unit``. Empty until the first round."""

    def initial(self, ctx: RoundContext) -> NDArray[np.float64]:
        """Return the best mixture as shares of samples, shape (K,). The first call computes the mixture."""
        lengths = ctx.pool.domain_tokens / ctx.pool.domain_sizes if self.params.unit == "tokens" else np.ones(1)
        if not self._mixture.size:
            self._mixture = self._found(ctx.pool.domains, ctx.pool.domain_sizes * lengths)
        return self._mixture / lengths

    def mix(self, ctx: RoundContext) -> NDArray[np.float64]:
        """Return the same shares as in warm-up rounds."""
        return self.initial(ctx)

    def check_domains(self, names: tuple[str, ...]) -> tuple[str, str] | None:
        """Check both tables, the target, the regressor and the prior."""
        if self.params.target == []:
            return "target", "must name at least one column of losses; remove it to use all columns."
        if self.params.top > self.params.samples:
            return "top", f"must be at most samples ({self.params.samples}), got {self.params.top}."
        wrong = shares_problem(self.params.prior, names)
        if wrong is not None:
            return "prior", wrong
        try:
            self._runs(names)
        except ConfigError as error:
            (problem,) = error.problems
            return problem.key, problem.message
        return None

    def state_dict(self) -> State:
        """Return the best mixture, so that a resumed run neither reads the tables nor fits again."""
        return {"mixture": self._mixture}

    def load_state_dict(self, state: State) -> None:
        """Restore the state that :meth:`state_dict` returned."""
        self._mixture = state["mixture"]

    def _found(self, names: tuple[str, ...], sizes: Floats) -> Floats:
        mixtures, losses = self._runs(names)
        regressions = [fit(mixtures, column, self.params.regressor, self.params.seed) for column in losses.T]
        prior = sizes if self.params.prior is None else shares_of(self.params.prior, names)
        rng = np.random.default_rng(self.params.seed)
        drawing = Drawing(max_epochs=None)
        return best_mixture(regressions, prior, rng, drawing, samples=self.params.samples, top=self.params.top)

    def _runs(self, names: tuple[str, ...]) -> tuple[Floats, Floats]:
        """Return the mixtures (n, K) and the losses of the targets (n, targets).

        The columns of the mixtures are in the order of ``names``.

        Raises:
            ConfigError: if a table cannot be read, or no regression can be fitted to its values.
        """
        found, mixtures, loss_columns, losses = read_runs(self.params.mixtures, self.params.losses)
        columns = list(by_domain(dict.fromkeys(found), names))
        strange = [name for name in columns if name not in names]
        if strange:
            raise _bad("mixtures", f"{self.params.mixtures}: {unknown('domain', strange[0], names)}")
        missing = [name for name in names if name not in columns]
        if missing:
            raise _bad(
                "mixtures",
                f"{self.params.mixtures} has no column for {', '.join(missing)}. Every domain needs a column.",
            )
        target = self.params.target
        wanted = list(loss_columns) if target is None else [target] if isinstance(target, str) else target
        for name in wanted:
            if name not in loss_columns:
                raise _bad("target", unknown(f"column of {self.params.losses}", name, loss_columns))
        mixtures = mixtures[:, [columns.index(name) for name in names]]
        losses = losses[:, [loss_columns.index(name) for name in wanted]]
        for column in losses.T:
            check_runs(mixtures, column, self.params.regressor)
        return mixtures, losses


def _bad(parameter: str, message: str) -> ConfigError:
    return ConfigError(problems=[Problem(parameter, message)])
