"""Token weights that the data gives: by role, by message, by marks in the text, and by spans of characters.

    w_t = role weight * message weight * product of the marks around t * weight of the span around t

Each factor is 1 if nothing is given for token t. With ``normalized: true`` all weights are divided by their mean over
the trained tokens. A token belongs to the part of the text that holds its first character that is not white space.
Weights are computed when the data is loaded, through LLaMA-Factory's own tokenization, and do not change.
Cost: the data is tokenized a second time before training; no cost in a step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dataflex import GivenWeightParams, Needs, RunView, StepBatch, Weighter, WeighterParams, register

if TYPE_CHECKING:
    from torch import Tensor


class SpanWeighterParams(WeighterParams, GivenWeightParams):
    """Parameters of token weights that the data gives."""


@register("weighter", "span")
class SpanWeighter(Weighter[SpanWeighterParams]):
    """Weighs tokens by their role, their message, marks in the text and spans that the data lists."""

    elementwise = True
    reads_losses = False

    def needs(self, run: RunView) -> Needs:
        """Return the weights that the data gives."""
        return Needs(given_weights=self.params)

    def weigh(self, batch: StepBatch) -> Tensor:
        """Return the weights of the tokens, shape (n, T)."""
        return batch.given_weights
