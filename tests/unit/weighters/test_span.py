"""The weighter span in a step: its weights on the positions of the trained tokens, alone and in a chain."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from dataflex import StepBatch
from dataflex.api.components import Entry
from dataflex.data.given_weights import GivenWeights
from dataflex.errors import ComponentError
from dataflex.trainer.step_weights import MicroBatch, StepWeights, Weighing
from dataflex.weighters.loss import LossWeighter
from dataflex.weighters.span import SpanWeighter
from unit.fakes import build
from unit.ranks import on_two_processes

IGNORED = -100
ROWS = [[0.5, 2.0], [], [1.0, 0.0, 3.0], [0.25], [4.0, 4.0, 4.0, 5.0], [0.0, 0.0]]
"""Weights of the trained tokens of the samples 0 to 5. Sample 1 has none."""


def given(normalized: bool = False) -> GivenWeights:
    values = np.array([weight for row in ROWS for weight in row], np.float32)
    return GivenWeights.of(values, np.array([len(row) for row in ROWS]), normalized)


def micro_batch(*places: int, left: bool = False) -> MicroBatch:
    """Return a batch of samples whose trained tokens follow two tokens of a prompt, padded on one side."""
    width = 4 + max(len(ROWS[place]) for place in places)
    labels = torch.full((len(places), width), IGNORED)
    for row, place in enumerate(places):
        count = len(ROWS[place])
        begin = width - 1 - count if left else 2
        labels[row, begin : begin + count] = 7
    counted = labels != IGNORED
    per_token = torch.rand(labels.shape, generator=torch.Generator().manual_seed(places[0])) * counted
    means = torch.where(counted.any(1), per_token.sum(1) / counted.sum(1).clamp(min=1), torch.nan)
    return MicroBatch(labels, per_token, means, torch.tensor(places))


def weights_of(*others: object, weights: GivenWeights | None = None) -> StepWeights:
    span = Weighing(Entry(build(SpanWeighter, roles={"assistant": 1}), "weight.0", 1), given=weights or given())
    chain = [span, *(Weighing(Entry(each, f"weight.{i}", 1)) for i, each in enumerate(others, 1))]  # type: ignore[arg-type]
    return StepWeights(chain, lambda losses, places, tokens: StepBatch(losses, 3, 12, places=places, tokens=tokens))


@pytest.mark.parametrize("left", [False, True])
def test_weights_stand_at_the_trained_tokens_of_their_sample(left: bool) -> None:
    places = (4, 1, 0, 2)
    batch = micro_batch(*places, left=left)
    [found] = weights_of().decide([batch], 0) or []
    for row, place in enumerate(places):
        counted = batch.labels[row] != IGNORED
        assert found[row][counted].tolist() == ROWS[place]
        assert (found[row][~counted] == 1).all()


def test_micro_batches_of_different_width_keep_their_weights() -> None:
    batches = [micro_batch(3, 5), micro_batch(4, 0)]
    together = weights_of().decide(batches, 0) or []
    apart = [(weights_of().decide([batch], 0) or [])[0] for batch in batches]
    for ours, theirs, batch in zip(together, apart, batches, strict=True):
        assert torch.equal(ours, theirs)
        assert ours.shape == batch.labels.shape


def test_samples_of_weight_0_are_allowed() -> None:
    batch = micro_batch(5)
    [found] = weights_of().decide([batch], 0) or []
    assert found[batch.labels != IGNORED].tolist() == [0.0, 0.0]


def test_normalized_weights_are_divided_by_the_mean_over_all_tokens() -> None:
    flat = [weight for row in ROWS for weight in row]
    [found] = weights_of(weights=given(normalized=True)).decide([micro_batch(4)], 0) or []
    expected = torch.tensor(ROWS[4]) * len(flat) / sum(flat)
    torch.testing.assert_close(found[0, 2:6], expected)


def test_the_weights_multiply_with_those_of_a_weighter_of_samples() -> None:
    batches = [micro_batch(0, 2), micro_batch(4)]
    loss = build(LossWeighter)
    found = weights_of(loss).decide(batches, 0) or []
    chain = StepWeights([Weighing(Entry(loss, "weight", 1))], lambda losses, *_: StepBatch(losses, 3, 12))
    factors = chain.decide(batches, 0) or []
    for ours, factor, batch, places in zip(found, factors, batches, [(0, 2), (4,)], strict=True):
        for row, place in enumerate(places):
            counted = batch.labels[row] != IGNORED
            torch.testing.assert_close(ours[row][counted], torch.tensor(ROWS[place]) * factor[row])


def gathered(rank: int) -> None:
    everyone = [micro_batch(0, 2), micro_batch(4, 3), micro_batch(5, 0), micro_batch(2, 1)]
    found = weights_of(build(LossWeighter)).decide(everyone[rank::2], 0) or []
    dist.destroy_process_group()  # what follows is what one process decides
    expected = (weights_of(build(LossWeighter)).decide(everyone, 0) or [])[rank::2]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.timeout(300)
def test_one_process_and_two_give_the_same_weights(tmp_path: Path) -> None:
    on_two_processes(gathered, tmp_path)


def test_labels_that_a_collator_changed_are_refused() -> None:
    batch = micro_batch(2)
    batch.labels[0, 2] = IGNORED
    with pytest.raises(ComponentError, match=r"to \[3\] tokens .* which has \[2\] trained tokens: the collator"):
        weights_of().decide([batch], 0)


def test_a_weighter_that_needs_no_given_weights_has_none() -> None:
    with pytest.raises(ComponentError, match=r"batch.given_weights .* Needs\(given_weights=self.params\)"):
        _ = StepBatch(torch.ones(2)).given_weights
