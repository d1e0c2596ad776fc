"""DPO gap: pairs by the difference of the implicit rewards of their responses.

    gap(x) = beta [(log p(c) - log p_ref(c)) - (log p(r) - log p_ref(r))]

c and r are the chosen and the rejected response of x, p is the model in training and p_ref its frozen reference. The
gap is the reward margin that the trainer of the stage computes. In stage rm it is the difference of the two scores of
the reward model.

Source: Qi et al., Difficulty-Based Preference Data Selection by DPO Implicit Reward Gap (2025, arXiv 2508.04149), who
keep the 10 % of the pairs with the smallest gaps, in the order of the signed gap.
Differs from it: the authors' code sums the log probabilities over padding too, so there a gap depends on the other
pairs of its batch.
Cost: one forward pass over both responses of the candidates per decision, and one of the reference over them.
"""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from dataflex import IndexArray, Margins, Needs, RoundContext, RunView, ScoreArray, Selector, SelectorParams, register
from dataflex.selectors.base_margins import Preference, preferred, reference_problem


class DpoGapParams(SelectorParams):
    """Parameters of the selection by implicit reward gaps."""

    prefer: Preference = Field(
        "small",
        description="Gaps that are preferred. small: the smallest signed gaps; small_absolute: those nearest to 0; "
        "middle: the middle ranks; large: the largest.",
    )


@register("selector", "dpo_gap")
class DpoGapSelector(Selector[DpoGapParams]):
    """Prefers pairs with a small, middle or large implicit reward gap under the current model."""

    def needs(self, run: RunView) -> Needs:
        """Return the margins of the candidates."""
        return Needs(measurements=(Margins(),))

    def problems(self, run: RunView) -> Iterator[tuple[str, str]]:
        """Yield the problem of a first decision in which every gap is 0. A stage without pairs has no margins."""
        yield from reference_problem(run, "method", self.name)

    def score(self, ctx: RoundContext, candidates: IndexArray) -> ScoreArray:
        """Return the score of every candidate by the parameter ``prefer``."""
        return preferred(ctx.probe.measure(Margins(), candidates), self.params.prefer)
