"""Tokens of samples that a run has on record: their losses and weights in some steps, and their text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dataflex.errors import ConfigError
from dataflex.explain.samples import Part, Texts
from dataflex.record.schema import TOKEN_SAMPLES, TokensOfSample

if TYPE_CHECKING:
    from dataflex.explain.explain import Record


@dataclass(frozen=True)
class StepTokens:
    """The trained tokens of a sample in one optimizer step, as far as they are on record."""

    step: int
    """Optimizer step, counted from 1."""
    losses: list[float]
    weights: list[float]

    @property
    def counting(self) -> int:
        """Number of tokens with a weight above 0."""
        return sum(weight > 0 for weight in self.weights)

    @property
    def effective(self) -> float:
        """(Sum of weights)^2 / (sum of squared weights); 0 if every weight is 0."""
        squares = sum(weight**2 for weight in self.weights)
        return sum(self.weights) ** 2 / squares if squares else 0.0

    @property
    def mean_loss(self) -> float:
        """Mean loss of the tokens."""
        return sum(self.losses) / len(self.losses)

    @property
    def weighted_loss(self) -> float | None:
        """Mean loss weighted with the weights; None if every weight is 0."""
        total = sum(self.weights)
        products = (loss * weight for loss, weight in zip(self.losses, self.weights, strict=True))
        return sum(products) / total if total else None


@dataclass(frozen=True)
class SampleTokens:
    """A sample and its trained tokens in the recorded steps."""

    index: int
    domain: str | None
    dataset: str | None
    row: int | None
    trained: int
    """Number of trained tokens. Those behind the end of the lists of a step are not on record."""
    steps: list[StepTokens]
    """The recorded steps, ascending. With ``--step`` that step alone."""
    all_steps: list[int]
    """Numbers of all recorded steps."""
    tokens: list[str] | None
    """Text of each token. None without texts."""
    ids: list[int] | None
    """The tokens themselves. None without texts."""
    text: list[Part] | None


@dataclass(frozen=True)
class Listed:
    """A sample whose tokens are on record."""

    index: int
    domain: str | None
    steps: list[int]
    trained: int
    last: StepTokens
    """The tokens in the last recorded step."""


def recorded(record: Record) -> dict[int, dict[int, TokensOfSample]]:
    """Return the tokens on record by sample and by step, samples ascending.

    Raises:
        ConfigError: if the record has no tokens.
    """
    found: dict[int, dict[int, TokensOfSample]] = {}
    for line in record.run.token_samples:
        for sample in line.samples:
            found.setdefault(sample.index, {}).setdefault(line.step, sample)
    if not found:
        raise ConfigError(
            f"--tokens: {record.run.path} has no tokens on record (dataflex/{TOKEN_SAMPLES}). Runs with weight: record "
            "them with their logs (logging_steps), unless their data is streamed or their stage is dpo, rm or kto, in "
            "which a sample has a single loss."
        )
    return {index: found[index] for index in sorted(found)}


def tokens_of(
    record: Record, indices: Sequence[int], step: int | None, rows: Mapping[int, int], texts: Texts | None
) -> dict[str, Any]:
    """Return the tokens of samples. Without indices, return the samples whose tokens are on record.

    Args:
        record: record of the run.
        indices: pool indices of the samples.
        step: the recorded step to return. None means all.
        rows: rows of samples in their data sets, by pool index, as far as they are known.
        texts: texts of the samples, or None.

    Raises:
        ConfigError: if nothing is on record, or if a sample is on record without the step.
    """
    found = recorded(record)
    if not indices:
        return {"recorded": [_listed(record, index, steps) for index, steps in found.items()]}
    asked = dict.fromkeys(indices)
    return {
        "tokens": [_sample(record, index, found[index], step, rows, texts) for index in asked if index in found],
        "not_on_record": [index for index in asked if index not in found],
        "on_record": list(found),
    }


def _listed(record: Record, index: int, steps: Mapping[int, TokensOfSample]) -> Listed:
    number, last = list(steps.items())[-1]
    return Listed(index, record.domain_of(index), list(steps), last.tokens, _of_step(number, last))


def _of_step(step: int, tokens: TokensOfSample) -> StepTokens:
    return StepTokens(step, tokens.losses, tokens.token_weights)


def _sample(
    record: Record,
    index: int,
    steps: Mapping[int, TokensOfSample],
    step: int | None,
    rows: Mapping[int, int],
    texts: Texts | None,
) -> SampleTokens:
    if step is not None and step not in steps:
        raise ConfigError(
            f"--step: {step} is not on record for sample {index}; on record are its tokens of step "
            f"{', '.join(map(str, steps))}."
        )
    domain, last = record.domain_of(index), list(steps.values())[-1]
    ids = None if texts is None or index >= texts.pool.size else texts.trained_tokens(index)
    if ids is not None and len(ids) != last.tokens:
        raise ConfigError(
            f"--index: sample {index} has {len(ids)} trained tokens, on record are {last.tokens}. Is the data that of "
            "the run? --no-text shows the values without the texts."
        )
    shown = None if ids is None else ids[: max(len(each.losses) for each in steps.values())]
    return SampleTokens(
        index=index,
        domain=domain,
        dataset=record.dataset_of(domain),
        row=rows.get(index),
        trained=last.tokens,
        steps=[_of_step(number, tokens) for number, tokens in steps.items() if step in (None, number)],
        all_steps=list(steps),
        tokens=None if shown is None or texts is None else [texts.decode([each]) for each in shown],
        ids=shown,
        text=None if texts is None or shown is None else texts.parts(index),
    )
