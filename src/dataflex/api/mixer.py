"""Mixers choose the proportions of the domains. They may also weigh the domains in the loss."""

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
    """Parameters of all mixers.

    Example:
        >>> from dataflex import DomainParams
        >>> DomainParams(max_epochs_per_domain=4.0).given_initial is None
        True
    """

    max_epochs_per_domain: float | None = Field(
        None, gt=0, description="Most passes over each domain; the rest of its share goes to the other domains."
    )

    @property
    def given_initial(self) -> Shares | None:
        """The shares in warm-up rounds that the user has set, or None.

        None also means that the mixer has no such parameter.
        """
        return None


class MixerParams(DomainParams):
    """Parameters of mixers that decide. They add the proportions that hold before the first decision.

    Example:
        >>> from pydantic import Field
        >>> from dataflex import MixerParams
        >>> class TemperatureParams(MixerParams):
        ...     temperature: float = Field(2.0, gt=0, description="Larger values give more equal proportions.")
        >>> TemperatureParams(initial_proportions={"code": 0.3, "math": 0.7}).temperature
        2.0
    """

    initial_proportions: Shares | None = Field(
        None, description="Shares of the domains in warm-up rounds: list, mapping or JSON file. If null, by size."
    )

    @property
    def given_initial(self) -> Shares | None:
        """The shares in warm-up rounds that the user has set."""
        return self.initial_proportions


MixerParamsT = TypeVar("MixerParamsT", bound=DomainParams, covariant=True)


class Mixer(Component[MixerParamsT]):
    """Base of all mixers: chooses the domain proportions of the next plan, and may weigh the domains in the loss.

    A mixer that weighs the loss sets :attr:`weighs_loss` and defines :attr:`loss_weights` and :meth:`update_weights`.
    Its :meth:`needs` name the step losses by domain, a reference in addition, or its own measurements. The loss of a
    step is then sum_i loss_weights_i * (token-mean loss of domain i in the step's global batch). A domain without
    samples in the step has no term. Warm-up rounds use the plain loss.

    Example:
        Proportions by the square root of the domain sizes:

        >>> from types import SimpleNamespace
        >>> import numpy as np
        >>> from dataflex import Mixer, MixerParams
        >>> class SquareRoot(Mixer[MixerParams]):
        ...     def mix(self, ctx):
        ...         return np.sqrt(ctx.pool.domain_sizes)
        >>> ctx = SimpleNamespace(pool=SimpleNamespace(domain_sizes=np.array([900, 100])))
        >>> SquareRoot(MixerParams()).mix(ctx)
        array([30., 10.])
    """

    Params: ClassVar[type[ComponentParams]] = MixerParams
    weighs_loss: ClassVar[bool] = False
    """Whether the mixer weighs the domains in the loss of every step."""
    constant_shares: ClassVar[bool] = False
    """Whether :meth:`mix` returns the same shares in every round."""
    begins_with_initial: ClassVar[bool] = False
    """Whether :meth:`mix` starts from the initial proportions even without a warm-up."""

    def wanted_rounds(self, domains: int) -> int:
        """Return 10, so that the shares can change several times, or 1 if the shares are constant."""
        return 1 if self.constant_shares else 10

    def cannot_act(self, run: RunOutline) -> str | None:
        """Return that the run has one domain, the answer of :meth:`cannot_learn`, or a parameter without effect."""
        if run.domains == 1:
            return (
                "there is one domain, whose share is always 1; train on several data sets, or divide one with "
                "dataflex.domain_column"
            )
        return self.cannot_learn(run) or self._unused(run)

    def _unused(self, run: RunOutline) -> str | None:
        """Return that the user has set the proportions of warm-up rounds although the run has no warm-up round."""
        if self.params.given_initial is None or self.begins_with_initial or run.schedule.warmup_steps:
            return None
        return "initial_proportions apply to warm-up rounds only, and the run has none; set dataflex.warmup_steps"

    def cannot_learn(self, run: RunOutline) -> str | None:
        """Return why the mixer cannot learn its shares or loss weights in this run, or None if it can.

        Same as :meth:`cannot_act`, but called only for a run of several domains.
        """
        return None

    def initial(self, ctx: RoundContext) -> NDArray[np.float64]:
        """Return the proportions of warm-up rounds, shape (K,): the user's, or the domain sizes of the pool."""
        given = self.params.given_initial
        if given is not None:
            return shares_of(given, ctx.pool.domains, "initial_proportions")
        return ctx.pool.domain_sizes.astype(np.float64)

    def check_domains(self, names: tuple[str, ...]) -> tuple[str, str] | None:
        """Return a parameter and its problem with these domains, or None. Called before a model is loaded."""
        problem = shares_problem(self.params.given_initial, names)
        return None if problem is None else ("initial_proportions", problem)

    def mix(self, ctx: RoundContext) -> NDArray[np.float64]:
        """Return non-negative proportions with a positive sum, shape (K,). The framework normalises them."""
        raise NotImplementedError(f"mixer {self.name!r} does not define mix()")

    @property
    def loss_weights(self) -> NDArray[np.float64]:
        """The weights of the domains in the loss, shape (K,), non-negative with a positive sum."""
        raise NotImplementedError(f"mixer {self.name!r} does not define loss_weights")

    def update_weights(self, ctx: StepContext) -> None:
        """Update :attr:`loss_weights` from the data of an optimizer step, before the step. Called on every rank."""
        raise NotImplementedError(f"mixer {self.name!r} does not define update_weights()")

    def result(self, names: tuple[str, ...]) -> dict[str, Any] | None:
        """Return the result of a finished run for ``domain_weights.json`` in its record, or None.

        If the result has ``proportions`` by name, another run can read the file as its proportions.
        """
        return None
