"""Tokens of the first samples of a step: which are recorded, how many, and in which steps."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dataflex.trainer import token_samples
from dataflex.trainer.statistics import BatchLosses
from dataflex.trainer.token_samples import FirstBatch, is_due


def batch(rows: int, columns: int, seed: int, by_token: bool = True) -> BatchLosses:
    generator = torch.Generator().manual_seed(seed)
    losses, weights = torch.rand(2, rows, columns, generator=generator)
    labels = torch.where(torch.rand(rows, columns, generator=generator) < 0.3, -100, 1)
    labels[1] = -100  # a sample that is not trained on
    places = torch.randperm(1000, generator=generator)[:rows]
    given = weights if by_token else weights[:, 0]
    return BatchLosses(losses.sum(1), losses.sum(1), per_token=losses, labels=labels, weights=given, places=places)


@pytest.mark.parametrize("by_token", [True, False])
def test_the_tokens_of_the_first_samples_are_recorded(by_token: bool) -> None:
    kept, first = FirstBatch(), batch(12, 9, 0, by_token)
    assert kept.recorded(1) is None
    kept.add(first)
    kept.add(batch(12, 9, 1, by_token))
    kept.finish()
    found = kept.recorded(5)
    assert found is not None
    assert found.step == 5
    assert first.places is not None
    assert first.labels is not None
    assert first.per_token is not None
    assert first.weights is not None
    assert [each.index for each in found.samples] == first.places[[0, 2, 3, 4, 5, 6, 7]].tolist()
    for each, row in zip(found.samples, [0, 2, 3, 4, 5, 6, 7], strict=True):
        trained = first.labels[row] != -100
        assert each.tokens == int(trained.sum())
        assert each.losses == pytest.approx(first.per_token[row][trained].tolist(), rel=5e-4)
        expected = first.weights[row][trained] if by_token else first.weights[row].expand(each.tokens)
        assert each.token_weights == pytest.approx(expected.tolist(), rel=5e-4)
        assert len(each.weights) == (each.tokens if by_token else 1)
        assert all(len(f"{value:.12g}") <= 7 for value in [*each.losses, *each.weights])
    kept.finish()
    assert kept.recorded(6) is None  # a step without weights


def test_the_number_of_tokens_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_samples, "TOKENS", 10)
    kept, first = FirstBatch(), batch(6, 9, 0)
    kept.add(first)
    kept.finish()
    found = kept.recorded(1)
    assert found is not None
    assert first.labels is not None
    lengths = [len(each.losses) for each in found.samples]
    assert sum(lengths) == 10
    assert [each.tokens for each in found.samples] == (first.labels != -100).sum(1)[[0, 2]].tolist()
    assert lengths[0] == found.samples[0].tokens
    assert lengths[1] < found.samples[1].tokens
    assert [len(each.weights) for each in found.samples] == lengths


def test_streamed_samples_are_not_recorded() -> None:
    kept, streamed = FirstBatch(), batch(3, 4, 0)
    streamed.places = None
    kept.add(streamed)
    kept.finish()
    assert kept.recorded(1) is None


@pytest.mark.parametrize("expected, every", [(150, 1), (100_000, 10), (1_000_000, 500)])
def test_the_number_of_recorded_steps_is_limited(expected: int, every: int) -> None:
    last, recorded = None, []
    for step in np.arange(every, expected + 1, every).tolist():
        if is_due(step, last, expected):
            recorded.append(step)
            last = step
    assert len(recorded) <= token_samples.STEPS
    assert len(recorded) == min(expected // every, token_samples.STEPS)
    assert recorded[-1] > expected - max(every, expected / token_samples.STEPS) - 1
