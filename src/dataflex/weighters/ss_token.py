"""ssToken: trains on the tokens that have improved and that attend to the prompt (arXiv 2510.18250).

For the N trained tokens of a sample, with r_t the loss of a token under the history model, the model that training
started from, and l_t its loss under the model in training:

    d_t = r_t - l_t                                     the improvement since the start
    d'_t = (d_t - min d) / (max d - min d + 1e-8)       min and max over the sample
    a_t = attention of token t to its prompt            last layer, mean over the heads, summed over the prompt
    s_t = g d'_t + (1 - g) a_t                          g: ``gamma``
    w_t = N / K   for the K tokens of the largest s_t, else 0

K is the share ``share`` of N, rounded up. Of equal scores the first are kept. The row of a_t is that of the token
itself, not of the position that predicts it. The prompt of a token consists of all earlier tokens of the sample that
are not trained on, so it has the earlier turns of a conversation, too.

Cost: one forward pass of the history model over the step's samples, or a table of its losses, and a second run of the
last layer's attention function.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Self

from pydantic import Field, model_validator

from dataflex import (
    ComponentError,
    Needs,
    ReferenceParams,
    RunOutline,
    RunView,
    StepBatch,
    Weighter,
    WeighterParams,
    register,
)
from dataflex.weighters.base_top_tokens import top_weights

if TYPE_CHECKING:
    from torch import Tensor

_SPREAD_FLOOR = 1e-8
"""Added to max d - min d, so that equal improvements cause no division by 0. The value is the authors'."""


class SSTokenParams(WeighterParams, ReferenceParams):
    """Parameters of ssToken. The reference is the history model."""

    reference_is_optional: ClassVar[bool] = True

    share: float = Field(0.6, gt=0, le=1, description="Share of the trained tokens of each sample that are kept.")
    gamma: float = Field(
        0.5,
        ge=0,
        le=1,
        description="g: 1 scores by the improvement since the history model alone, 0 by the attention to the prompt "
        "alone, without a history model.",
    )

    @model_validator(mode="after")
    def _history_as_needed(self) -> Self:
        if self.gamma and not self.names_reference:
            raise ValueError(
                "needs reference_model, reference_losses or both: the model that training starts from, whose losses "
                "are compared (or gamma: 0, which compares none)"
            )
        if not self.gamma and self.names_reference:
            raise ValueError("gamma: 0 compares no losses; remove reference_model and reference_losses, or raise gamma")
        return self


@register("weighter", "ss_token")
class SSTokenWeighter(Weighter[SSTokenParams]):
    """Trains on the tokens of each sample that have improved and that attend to the prompt."""

    elementwise = True

    def needs(self, run: RunView) -> Needs:
        """Return the reference and the attention to prompts, each if it has a part in the score."""
        gamma = self.params.gamma
        return Needs(reference=self.params if gamma else None, prompt_attention=gamma < 1)

    def problems(self, run: RunView) -> Iterator[tuple[str, str]]:
        """Yield settings under which all tokens are trained on, so that samples have no prompt."""
        if self.params.gamma == 1:
            return
        given = run.llamafactory
        if given.get("stage", "sft") != "sft":
            yield (
                "gamma",
                f"{self.params.gamma:g} scores attention to prompts, and stage {given['stage']} has none; set 1.",
            )
        elif str(given.get("train_on_prompt", False)).lower() in ("1", "true", "yes"):
            yield (
                "gamma",
                f"{self.params.gamma:g} scores attention to the tokens that are not trained on, and train_on_prompt "
                "trains on all; remove train_on_prompt, or set gamma: 1.",
            )

    def cannot_act(self, run: RunOutline) -> str | None:
        """Return a reason if every token is kept."""
        return "share is 1, so every token has weight 1; lower share" if self.params.share == 1 else None

    def weigh(self, batch: StepBatch) -> Tensor:
        """Return the weights of the tokens, shape (n, T)."""
        gamma, trained = self.params.gamma, batch.trained
        scores = batch.token_losses.new_zeros(trained.shape)
        if gamma:
            improved = batch.reference_losses - batch.token_losses
            if not bool(improved.isfinite().all()):  # the model's own losses are finite
                raise ComponentError(
                    f"ss_token: the history model's loss of a token of step {batch.step + 1} is not finite: the model "
                    "overflows in this precision, or the table of its losses is damaged."
                )
            scores = gamma * scaled(improved, trained)
        if gamma < 1:
            scores = scores + (1 - gamma) * batch.prompt_attention
        return top_weights(scores, trained, self.params.share, rounded_up=True)


def scaled(values: Tensor, trained: Tensor) -> Tensor:
    """Return the values of each row moved and scaled to [0, 1] by the extremes of its trained tokens, (n, T)."""
    import torch

    low = values.masked_fill(~trained, torch.inf).amin(1, keepdim=True)
    high = values.masked_fill(~trained, -torch.inf).amax(1, keepdim=True)
    return (values - low) / (high - low + _SPREAD_FLOOR)
