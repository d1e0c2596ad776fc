"""IFD: samples whose prompt helps least to predict the answer, provided that it helps at all.

With c(x) the mean cross entropy of the answer's tokens given the prompt and d(x) that of the same tokens without the
prompt,

    cherry:          r(x) = c(x) / d(x),             no score if r(x) > limit
    superfiltering:  r(x) = exp(c(x) - d(x)),        no score if r(x) >= limit

and the samples of largest r(x) come first. The answer consists of the tokens that are trained on, found by their
labels. Without the prompt the sequence is the sample's first token (the beginning-of-sequence token, if the template
writes one) followed by the answer. So the first token of an answer counts in both means, and an answer of one token has
a score.

Source: Li et al., From Quantity to Quality: Boosting LLM Performance with Self-Guided Data Selection for Instruction
Tuning (NAACL 2024, arXiv 2308.12032). Li et al., Superfiltering (ACL 2024, arXiv 2402.00530), use the ratio of
perplexities under a small model; name that model as ``reference_model``.
Cost: two forward passes per decision, one over the candidates and one over their answers. With a reference, both run
once in a run.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from dataflex import (
    IGNORE_INDEX,
    IndexArray,
    Losses,
    Measurement,
    Needs,
    Pool,
    ReferenceParams,
    RoundContext,
    RunOutline,
    RunView,
    ScoreArray,
    Selector,
    SelectorParams,
    register,
)


class IfdParams(SelectorParams, ReferenceParams):
    """Parameters of IFD."""

    reference_is_optional: ClassVar[bool] = True

    variant: Literal["cherry", "superfiltering"] = Field(
        "cherry",
        description="Ratio of mean losses (cherry) or of perplexities (superfiltering); the two rank samples "
        "differently.",
    )
    limit: float | None = Field(
        1.0,
        gt=0,
        description="Samples with a larger ratio are left out, with superfiltering also those with an equal ratio. "
        "If null, no sample is left out.",
    )


class Answers:
    """The samples of a pool without their prompts: the first token, followed by the tokens that are trained on.

    Args:
        pool: the samples.
    """

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    @property
    def size(self) -> int:
        """Number of samples, N."""
        return self._pool.size

    @cached_property
    def lengths(self) -> NDArray[np.int32]:
        """Number of tokens of every shortened sample, shape (N,)."""
        return (self._pool.trained_tokens + 1).astype(np.int32)

    def rows(self, indices: IndexArray) -> list[dict[str, Any]]:
        """Return shortened samples as inputs of the collator."""
        return [_answer_alone(row) for row in self._pool.rows(indices)]


def _answer_alone(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row reduced to its first token and the tokens that are trained on."""
    tokens, labels = row["input_ids"], row["labels"]
    answer = [token for token, label in zip(tokens[1:], labels[1:], strict=True) if label != IGNORE_INDEX]
    ids = [tokens[0], *answer]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [IGNORE_INDEX, *answer]}


@register("selector", "ifd")
class IfdSelector(Selector[IfdParams]):
    """Prefers samples whose prompt helps little to predict the answer."""

    reference_passes: ClassVar[int] = 2
    without_score: ClassVar[str | None] = (
        "the prompts of the others are of no help, as their ratios exceed the limit; raise limit, or set it to null"
    )

    def __init__(self, params: IfdParams) -> None:
        super().__init__(params)
        self._answers: Answers | None = None
        """The answers without their prompts. None before they are needed."""

    def needs(self, run: RunView) -> Needs:
        """Return the reference if one is named, else the losses of the candidates."""
        if self.params.names_reference:
            return Needs(reference=self.params)
        return Needs(measurements=(Losses(),))

    def problems(self, run: RunView) -> Iterator[tuple[str, str]]:
        """Yield settings under which samples have no prompt, or the labels do not tell the prompt from the answer."""
        given = run.llamafactory
        if given.get("stage", "sft") != "sft":
            yield (
                "method",
                f"ifd compares token losses of answers with and without their prompts, which stage {given['stage']} "
                "does not have; use stage sft.",
            )
        for key in ("packing", "neat_packing"):
            if given.get(key) is True:
                yield (
                    "method",
                    f"ifd needs the prompt and the answer of each sample; {key} joins several samples. Remove {key}.",
                )
        if given.get("train_on_prompt") is True:
            yield (
                "method",
                "ifd takes the trained tokens for the answer, and train_on_prompt trains on prompts, too. Remove "
                "train_on_prompt.",
            )
        if self.params.names_reference and self.params.reference_model is None:
            yield (
                "reference_losses",
                "a table holds only the losses of answers after their prompts, and ifd also needs the losses without "
                "prompts. Name the reference_model, too.",
            )

    def measured_samples(self, measurement: Measurement[Any], run: RunOutline) -> float:
        """Return the candidates of all decisions twice, with and without their prompts."""
        return 2 * super().measured_samples(measurement, run)

    def begin(self, ctx: RoundContext) -> None:
        """Prepare the samples without prompts."""
        self._answers = self._answers or Answers(ctx.pool)

    def score(self, ctx: RoundContext, candidates: IndexArray) -> ScoreArray:
        """Return the ratio of every candidate; NaN if no token is trained on or the ratio exceeds ``limit``."""
        assert self._answers is not None
        if self.params.names_reference:
            given = ctx.reference.losses(candidates)
            alone = ctx.reference.losses(candidates, self._answers)
        else:
            given = ctx.probe.measure(Losses(), candidates)
            alone = ctx.probe.measure(Losses(), candidates, self._answers)
        return difficulty(given, alone, self.params.variant, self.params.limit)


def difficulty(given: ScoreArray, alone: ScoreArray, variant: str = "cherry", limit: float | None = 1.0) -> ScoreArray:
    """Return the ratio of each sample, shape (n,), float32; NaN without a ratio, or with a ratio beyond the limit.

    Args:
        given: mean losses of the answers after their prompts, shape (n,), NaN without an answer.
        alone: mean losses of the answers without their prompts, shape (n,). An answer with the loss 0 has no ``cherry``
            ratio, as no prompt can help to predict it.
        variant: ``cherry`` or ``superfiltering``.
        limit: largest ratio; None means no limit.
    """
    with_prompt, without = given.astype(np.float64), alone.astype(np.float64)
    if variant == "superfiltering":
        ratios = np.exp(with_prompt - without)
        beyond = np.zeros(ratios.shape, dtype=bool) if limit is None else ratios >= limit
    else:
        ratios = np.divide(with_prompt, without, out=np.full(without.shape, np.nan), where=without != 0)
        beyond = np.zeros(ratios.shape, dtype=bool) if limit is None else ratios > limit
    return np.where(beyond, np.nan, ratios).astype(np.float32)
