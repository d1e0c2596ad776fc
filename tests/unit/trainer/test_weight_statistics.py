"""Statistics of the token weights: equal to loops over the tokens, whatever the micro-batches and the processes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dataflex.api.components import Entry
from dataflex.api.context import StepBatch
from dataflex.api.weighter import Weighter
from dataflex.record.schema import WEIGHT_EDGES, TokenWeights
from dataflex.trainer.loss import WeightedLoss
from dataflex.trainer.statistics import BatchLosses, StepAccumulator, StepTotals
from dataflex.trainer.step_weights import StepWeights, Weighing
from dataflex.trainer.weight_statistics import BINS, WeightTotals
from unit.fakes import build
from unit.ranks import on_two_processes

DOMAINS = ("code", "chat", "none")
OFFSETS = np.array([0, 5, 12, 20])
"""First sample of each domain. No sample of the last domain is trained on."""
COLUMNS = 7


def bin_of(weight: float) -> int:
    """Return the bin by its definition: the nearest power of 2 on a logarithmic scale."""
    return 0 if weight == 0 else min(max(round(math.log2(weight)), -6), 6) + 7


def sample(place: int, step: int, by_token: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the shifted labels of a sample, (T,), and its weight or the weights of its tokens."""
    rng = np.random.default_rng([place, step])
    labels = np.where(rng.random(COLUMNS) < 0.4, -100, 1)
    weights = np.exp(rng.normal(0, 3, COLUMNS)) * (rng.random(COLUMNS) < 0.7)
    return torch.tensor(labels), torch.tensor(weights if by_token else weights[0], dtype=torch.float32)


def totals_of(places: list[list[int]], step: int, by_token: bool) -> StepTotals:
    """Return the totals of a step whose micro-batches on this process have samples of these pool indices."""
    accumulator = StepAccumulator(OFFSETS, torch.device("cpu"), weighs=True)
    for batch in places:
        labels, weights = (torch.stack(each) for each in zip(*(sample(i, step, by_token) for i in batch), strict=True))
        accumulator.indices = torch.tensor(batch)
        losses = torch.ones(labels.shape)
        accumulator.add(BatchLosses(losses.sum(1), losses.sum(1), per_token=losses, labels=labels, weights=weights))
    return accumulator.finish(step)[1]


def by_hand(steps: list[list[int]], by_token: bool) -> dict[str, Any]:
    """Return the statistics of steps with these samples, by a loop over the tokens."""
    found: dict[str, Any] = {key: dict.fromkeys(DOMAINS, 0.0) for key in ("sums", "squares", "effective")}
    found |= {key: dict.fromkeys(DOMAINS, 0) for key in ("tokens", "counting")}
    found |= {"bins": {name: [0] * BINS for name in DOMAINS}, "effective_tokens": 0.0}
    for step, places in enumerate(steps):
        of_step: dict[str, list[float]] = {name: [] for name in DOMAINS}
        for place in places:
            labels, weights = sample(place, step, by_token)
            name = DOMAINS[0] if place < 5 else DOMAINS[1] if place < 12 else DOMAINS[2]
            of_step[name] += [
                float(weight) for label, weight in zip(labels, weights.expand(COLUMNS), strict=True) if label != -100
            ]
        for name, values in of_step.items():
            found["tokens"][name] += len(values)
            found["counting"][name] += sum(value > 0 for value in values)
            found["sums"][name] += sum(values)
            found["squares"][name] += sum(value**2 for value in values)
            found["effective"][name] += sum(values) ** 2 / sum(v**2 for v in values) if any(values) else 0.0
            for value in values:
                found["bins"][name][bin_of(value)] += 1
        every = [value for values in of_step.values() for value in values]
        found["effective_tokens"] += sum(every) ** 2 / sum(v**2 for v in every) if any(every) else 0.0
    return found


STEPS = [[0, 3, 4, 11, 7, 2], [5, 6, 1, 1, 10, 9], [8, 8, 4, 0, 11, 3]]


def check(line: TokenWeights, by_token: bool) -> None:
    expected = by_hand(STEPS, by_token)
    assert (line.step, line.steps) == (9, len(STEPS))
    for key in ("tokens", "counting", "bins"):
        assert getattr(line, key) == expected[key], key
    for key in ("sums", "squares", "effective"):
        assert getattr(line, key) == pytest.approx(expected[key], rel=1e-6), key
    assert line.effective_tokens == pytest.approx(expected["effective_tokens"], rel=1e-6)
    assert line.counting_share == sum(expected["counting"].values()) / sum(expected["tokens"].values())
    assert line.mean == pytest.approx(sum(expected["sums"].values()) / sum(expected["tokens"].values()), rel=1e-6)


def cut(places: list[int], size: int) -> list[list[int]]:
    return [places[i : i + size] for i in range(0, len(places), size)]


@pytest.mark.parametrize("by_token", [True, False])
@pytest.mark.parametrize("size", [6, 2, 1])
def test_the_statistics_equal_a_loop_over_the_tokens(size: int, by_token: bool) -> None:
    totals = WeightTotals(DOMAINS)
    assert totals.take(1) is None
    for step, places in enumerate(STEPS):
        found = totals_of(cut(places, size), step, by_token)
        assert found.weights is not None
        totals.add(found.weights)
    line = totals.take(9)
    assert line is not None
    check(line, by_token)
    assert totals.take(10) is None  # everything starts anew


def halves(rank: int, folder: Path) -> None:
    """Train half of each step's samples on each process."""
    for by_token in (True, False):
        totals = WeightTotals(DOMAINS)
        for step, places in enumerate(STEPS):
            found = totals_of(cut(places[3 * rank : 3 * rank + 3], 2 - rank), step, by_token)
            assert found.weights is not None
            totals.add(found.weights)
        line = totals.take(9)
        assert line is not None
        check(line, by_token)
    (folder / f"{rank}").write_text("checked")


@pytest.mark.timeout(300)
def test_two_processes_have_the_statistics_of_one(tmp_path: Path) -> None:
    on_two_processes(halves, tmp_path, tmp_path)
    assert (tmp_path / "0").exists()
    assert (tmp_path / "1").exists()


def test_the_weight_1_is_in_the_middle_of_a_bin_and_every_bin_is_reached() -> None:
    edges = np.array(WEIGHT_EDGES)
    np.testing.assert_allclose(edges[6:8], [2**-0.5, 2**0.5])
    np.testing.assert_allclose(edges[2:] / edges[1:-1], 2.0)
    assert [bin_of(value) for value in (0, 1e-9, 2**-6, 0.5, 0.71, 1, 1.41, 2, 64, 1e9)] == [
        0, 1, 1, 7 - 1, 7, 7, 7, 8, 13, 13,
    ]  # fmt: skip


def test_a_checkpoint_between_two_logs_loses_no_step() -> None:
    whole, before, after = (WeightTotals(DOMAINS) for _ in range(3))
    for step, places in enumerate(STEPS):
        found = totals_of([places], step, True).weights
        assert found is not None
        whole.add(found)
        (before if step < 2 else after).add(found)
        if step == 1:
            after.load_state_dict(before.state_dict())
    assert after.take(9) == whole.take(9)


def test_steps_without_weights_are_not_counted() -> None:
    accumulator = StepAccumulator(OFFSETS, torch.device("cpu"), weighs=True)
    accumulator.indices = torch.tensor([0, 7])
    labels = torch.ones(2, COLUMNS, dtype=torch.int64)
    accumulator.add(BatchLosses(torch.ones(2), torch.ones(2), per_token=torch.ones(2, COLUMNS), labels=labels))
    assert accumulator.finish(1)[1].weights is None
    assert totals_of([[0, 7]], 1, True).weights is not None


class Doubled(Weighter):
    """Gives weight 2 to the tokens in even columns and 0 to the others."""

    family, name = "weighter", "doubled"

    def weigh(self, batch: StepBatch) -> torch.Tensor:
        assert batch.token_losses is not None
        return (2.0 * (torch.arange(batch.token_losses.shape[1]) % 2 == 0)).expand(batch.token_losses.shape)


@pytest.mark.parametrize("active", [True, False])
@pytest.mark.parametrize("every", [1, 2])
def test_the_loss_passes_its_weights_on(active: bool, every: int) -> None:
    """Only in steps in which a weighter acts; the loss is in step number 3."""
    weighing = Weighing(Entry(build(Doubled), "weight", every), tokens=True)
    weights = StepWeights([weighing], lambda losses, places, tokens: StepBatch(losses, 3, 9, tokens=tokens))
    accumulator = StepAccumulator(np.array([0, 9]), torch.device("cpu"), weighs=True)
    loss = WeightedLoss(2, accumulator.add, weights, active=active, step=3, places=torch.tensor([4, 6]))
    labels = torch.tensor([[-100, 1, 2, 1, -100], [-100, -100, 2, 1, 3]])
    loss(torch.zeros(2, 5, 4), labels, 4)
    found = accumulator.finish(4)[1].weights
    assert accumulator.first_batch is not None
    tokens = accumulator.first_batch.recorded(4)
    if not active or every == 2:
        assert found is None
        assert tokens is None
        return
    assert found is not None
    assert found[0, :2].tolist() == [6.0, 12.0]  # the tokens in columns 0 and 2 of the first sample, 2 of the second
    assert np.flatnonzero(found[0, 2:]).tolist() == [bin_of(0), bin_of(2)]
    assert found[0, 2:][[bin_of(0), bin_of(2)]].tolist() == [3, 3]
    assert tokens is not None
    assert [(each.index, each.weights) for each in tokens.samples] == [(4, [2.0, 0.0, 2.0]), (6, [0.0, 2.0, 0.0])]
    assert json.dumps(tokens.samples[0].losses) == json.dumps([round(math.log(4), 3)] * 3)


def test_a_run_without_a_weighter_reduces_the_same_values(monkeypatch: pytest.MonkeyPatch) -> None:
    reduced: list[torch.Tensor] = []
    monkeypatch.setattr(
        "dataflex.trainer.statistics.distributed.all_reduce_sum", lambda values: reduced.append(values) or values
    )
    accumulator = StepAccumulator(OFFSETS, torch.device("cpu"))
    accumulator.indices = torch.tensor([0, 7])
    accumulator.add(BatchLosses(torch.tensor([1.0, 2.0]), torch.tensor([3, 4])))
    assert accumulator.finish(1)[1].weights is None
    assert reduced[0].tolist() == [1, 3, 1, 0, 2, 4, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]
    assert accumulator.first_batch is None
