"""RHO-LOSS: samples that are learnable, worth learning and not yet learned.

    score(x) = l(x) - l_ref(x)

with l(x) the token-mean loss of x under the model in training and l_ref(x) that under a frozen reference, the model of
the irreducible loss: one trained on held-out data of the same kind, which may be smaller.

Source: Mindermann et al., Prioritized Training on Points that are Learnable, Worth Learning, and Not Yet Learnt (ICML
2022, arXiv 2206.07137), equation 3. There a step of 32 samples is chosen from 320 drawn at random; here a round from
the whole pool. The authors' code measures in training mode; here dropout is off.
Cost: one forward over the candidates per decision, and one of the reference over the pool per run (none with a table).
"""

from __future__ import annotations

from dataflex import (
    IndexArray,
    Losses,
    Needs,
    ReferenceParams,
    RoundContext,
    RunView,
    ScoreArray,
    Selector,
    SelectorParams,
    register,
)


class RhoLossParams(SelectorParams, ReferenceParams):
    """Parameters of RHO-LOSS."""


@register("selector", "rho_loss")
class RhoLossSelector(Selector[RhoLossParams]):
    """Prefers samples whose loss is furthest above a reference's."""

    def needs(self, run: RunView) -> Needs:
        """Return the losses of the candidates and the reference."""
        return Needs(measurements=(Losses(),), reference=self.params)

    def score(self, ctx: RoundContext, candidates: IndexArray) -> ScoreArray:
        """Return the reducible loss of every candidate; NaN where no token is trained on."""
        return ctx.probe.measure(Losses(), candidates) - ctx.reference.losses(candidates)
