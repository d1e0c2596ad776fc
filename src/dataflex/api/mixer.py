"""Mixers choose the shares of the domains, and may weigh the domains in the loss."""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from dataflex.api.component import Component
from dataflex.api.context import RoundContext, StepContext
from dataflex.api.params import ComponentParams, Shares, shares_of, shares_problem
from dataflex.api.schedule import RunOutline


class DomainParams(ComponentParams):
    """Parameters all mixers have."""

    max_epochs_per_domain: float | None = Field(
        None, gt=0, description="No domain is gone through more often; its further share goes to the others."
    )

    @property
    def given_initial(self) -> Shares | None:
        """The shares of warm-up rounds that were given, None if none can be or were."""
        return None


class MixerParams(DomainParams):
    """Parameters of mixers that decide: what is trained on before the first decision."""

    initial_proportions: Shares | None = Field(
        None, description="Shares of the domains in warm-up rounds: list, mapping or JSON file; none: by size."
    )

    @property
    def given_initial(self) -> Shares | None:
        """The shares of warm-up rounds that were given."""
        return self.initial_proportions


MixerParamsT = TypeVar("MixerParamsT", bound=DomainParams, covariant=True)


class Mixer(Component[MixerParamsT]):
    """Chooses the domain proportions of the next plan; may also weigh the domains in the loss of every step.

    A mixer that weighs the loss sets :attr:`weighs_loss`, and has :attr:`loss_weights` and :meth:`update_weights`; it
    asks in :meth:`needs` for the step's losses by domain, for a reference too, or for what it measures itself. The loss
    of a step is then sum_i loss_weights_i * (token-mean loss of domain i in the step's global batch), without a term
    for a domain the step has nothing of. In warm-up rounds the loss is the plain one.
    """

    Params: ClassVar[type[ComponentParams]] = MixerParams
    weighs_loss: ClassVar[bool] = False
    """Whether it weighs the domains in the loss of every step."""
    constant_shares: ClassVar[bool] = False
    """Whether :meth:`mix` returns the same shares in every round."""
    begins_with_initial: ClassVar[bool] = False
    """Whether :meth:`mix` starts from the initial proportions, also without a warm-up."""

    def wanted_rounds(self, domains: int) -> int:
        """Return 10, so that shares that change can do so several times, or 1 where they do not."""
        return 1 if self.constant_shares else 10

    def cannot_act(self, run: RunOutline) -> str | None:
        """Return that one domain leaves nothing to mix, what :meth:`cannot_learn` says, or what has no effect."""
        if run.domains == 1:
            return (
                "there is one domain, whose share is always 1; name several data sets in dataset, or divide one with "
                "dataflex.domain_column"
            )
        return self.cannot_learn(run) or self._unused(run)

    def _unused(self, run: RunOutline) -> str | None:
        """Return that the proportions of warm-up rounds are given where there are none."""
        if self.params.given_initial is None or self.begins_with_initial or run.schedule.warmup_steps:
            return None
        return "initial_proportions are those of warm-up rounds, and there are none; set dataflex.warmup_steps"

    def cannot_learn(self, run: RunOutline) -> str | None:
        """Return why the shares (or loss weights) cannot become what the mixer is for in this run; None where they can.

        As :meth:`cannot_act`, for a run of several domains.
        """
        return None

    def initial(self, ctx: RoundContext) -> NDArray[np.float64]:
        """Return the proportions of warm-up rounds, shape (K,): the given ones, or the share of samples in the pool."""
        given = self.params.given_initial
        if given is not None:
            return shares_of(given, ctx.pool.domains, "initial_proportions")
        return ctx.pool.domain_sizes.astype(np.float64)

    def check_domains(self, names: tuple[str, ...]) -> tuple[str, str] | None:
        """Return a parameter and what is wrong with it for these domains, or None. Called before a model is loaded."""
        problem = shares_problem(self.params.given_initial, names)
        return None if problem is None else ("initial_proportions", problem)

    def mix(self, ctx: RoundContext) -> NDArray[np.float64]:
        """Return non-negative proportions with a positive sum, shape (K,); the framework normalises them."""
        raise NotImplementedError(f"mixer {self.name!r} does not define mix()")

    @property
    def loss_weights(self) -> NDArray[np.float64]:
        """The weights of the domains in the loss, shape (K,), non-negative with a positive sum."""
        raise NotImplementedError(f"mixer {self.name!r} does not define loss_weights")

    def update_weights(self, ctx: StepContext) -> None:
        """Decide :attr:`loss_weights` anew from one optimizer step, before it is made; called on every rank."""
        raise NotImplementedError(f"mixer {self.name!r} does not define update_weights()")

    def result(self, names: tuple[str, ...]) -> dict[str, Any] | None:
        """Return what a finished run found, for ``domain_weights.json`` in its record, or None.

        Its ``proportions``, by name, are what other runs read where the file is given as their proportions.
        """
        return None
