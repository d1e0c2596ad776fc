"""Step statistics: per-domain losses of the whole batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dataflex.trainer.loss import BatchLosses
from dataflex.trainer.statistics import StepAccumulator


def test_micro_batches_are_added_up_by_domain() -> None:
    accumulator = StepAccumulator(np.array([0, 10, 11, 30, 40]), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    domain_of = [0] * 10 + [1] + [2] * 19 + [3] * 10
    sums, tokens, samples = np.zeros(4), np.zeros(4, dtype=int), np.zeros(4, dtype=int)
    for indices in ([0, 9, 10, 11], [29, 29, 3, 10], [12, 0, 0, 28]):  # none of the last domain
        losses = torch.rand(4, generator=generator) * 10
        counts = torch.randint(0, 20, (4,), generator=generator)
        accumulator.indices = torch.tensor(indices)
        accumulator.add(BatchLosses(losses, counts))
        accumulator.add_tokens({"attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]]), "input_ids": torch.zeros(2, 3)})
        for position, index in enumerate(indices):
            sums[domain_of[index]] += losses[position].item()
            tokens[domain_of[index]] += counts[position].item()
            samples[domain_of[index]] += 1
    statistics, trained = accumulator.finish(7)
    assert statistics.step == 7
    assert statistics.tokens.tolist() == tokens.tolist()
    assert statistics.samples.tolist() == samples.tolist() == [5, 2, 5, 0]
    np.testing.assert_allclose(statistics.losses[:3], sums[:3] / tokens[:3], rtol=1e-6)
    assert np.isnan(statistics.losses[3])
    assert trained == 9
    again, trained = accumulator.finish(8)  # everything starts anew
    assert np.isnan(again.losses).all()
    assert again.samples.sum() == again.tokens.sum() == trained == 0


def test_batches_without_indices_are_one_domain() -> None:
    accumulator = StepAccumulator(np.array([0, 1]), torch.device("cpu"))
    accumulator.add(BatchLosses(torch.tensor([3.0, 5.0]), torch.tensor([1, 3])))
    accumulator.add_tokens({"input_ids": torch.zeros(2, 5)})
    statistics, trained = accumulator.finish(1)
    assert statistics.losses.tolist() == pytest.approx([2.0])
    assert statistics.samples.tolist() == [2]
    assert trained == 10
