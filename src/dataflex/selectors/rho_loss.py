"""RHO-LOSS: samples that are learnable, worth learning and not yet learned.

    score(x) = l(x) - l_ref(x)

l(x) is the token-mean loss of x under the model in training. l_ref(x) is its loss under a frozen reference, the model
of the irreducible loss: a model trained on held-out data of the same kind, which may be smaller.

Source: Mindermann et al., Prioritized Training on Points that are Learnable, Worth Learning, and Not Yet Learnt (ICML
2022, arXiv 2206.07137), equation 3.
Differs from it: the paper chooses a step of 32 samples from 320 drawn at random, this selector a round from the whole
pool. The authors' code measures in training mode, here dropout is off.
Cost: one forward pass over the candidates per decision, and one of the reference over the pool per run (none with a
table).
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
    """Prefers samples whose loss is furthest above the loss of a reference."""

    def needs(self, run: RunView) -> Needs:
        """Return the losses of the candidates and the reference."""
        return Needs(measurements=(Losses(),), reference=self.params)

    def score(self, ctx: RoundContext, candidates: IndexArray) -> ScoreArray:
        """Return the reducible loss of every candidate; NaN if no token is trained on."""
        return ctx.probe.measure(Losses(), candidates) - ctx.reference.losses(candidates)
