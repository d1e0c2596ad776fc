"""Step statistics: losses of the whole batch by domain, by sample and by token."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from dataflex.api.context import StepStatistics
from dataflex.data.token_loss import sample_means
from dataflex.errors import ComponentError, DataFlexError, DivergenceError
from dataflex.trainer.sample_losses import SampleLosses
from dataflex.trainer.statistics import BatchLosses, MeanLosses, StepAccumulator, StepTotals, check_step
from unit.ranks import on_two_processes


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
    statistics, totals = accumulator.finish(7)
    assert statistics.step == 7
    assert statistics.tokens.tolist() == tokens.tolist()
    assert statistics.samples.tolist() == samples.tolist() == [5, 2, 5, 0]
    np.testing.assert_allclose(statistics.losses[:3], sums[:3] / tokens[:3], rtol=1e-6)
    assert np.isnan(statistics.losses[3])
    assert totals.tokens == 9
    again, totals = accumulator.finish(8)  # everything starts anew
    assert np.isnan(again.losses).all()
    assert again.samples.sum() == again.tokens.sum() == totals.tokens == 0


def test_batches_without_indices_are_one_domain() -> None:
    accumulator = StepAccumulator(np.array([0, 1]), torch.device("cpu"))
    accumulator.add(BatchLosses(torch.tensor([3.0, 5.0]), torch.tensor([1, 3])))
    accumulator.add_tokens({"input_ids": torch.zeros(2, 5)})
    statistics, totals = accumulator.finish(1)
    assert statistics.losses.tolist() == pytest.approx([2.0])
    assert statistics.samples.tolist() == [2]
    assert totals.tokens == 10


def make_step(number: int, losses: list[float], tokens: list[int]) -> StepStatistics:
    return StepStatistics(number, np.array(losses), np.array(tokens), np.ones(len(tokens), np.int64))


def test_the_loss_is_the_weighted_mean_of_the_domain_losses() -> None:
    rng = np.random.default_rng(0)
    losses, tokens = rng.uniform(1, 9, (5, 3)), rng.integers(1, 50, (5, 3))
    tokens[:, 2] = 0  # never any of it
    tokens[3, 1] = 0
    losses[tokens == 0] = np.nan
    found = MeanLosses()
    for number, (loss, count) in enumerate(zip(losses, tokens, strict=True)):
        found.add(make_step(number, loss.tolist(), count.tolist()))
    shares = tokens / tokens.sum(1, keepdims=True)
    known = np.where(tokens > 0, losses, 0.0)
    means = found.take()
    for domain in (0, 1):
        by_hand = sum(shares[s, domain] * known[s, domain] for s in range(5)) / sum(shares[:, domain])
        assert means[domain] == pytest.approx(by_hand)
    assert np.isnan(means[2])
    trainers = np.mean([(tokens[s] * known[s]).sum() / tokens[s].sum() for s in range(5)])  # what it logs as loss
    assert shares.mean(0)[:2] @ means[:2] == pytest.approx(trainers)
    assert found.take().size == 0  # everything starts anew


def test_a_step_without_a_finite_loss_is_left_out_of_the_mean() -> None:
    found = MeanLosses()
    found.add(make_step(1, [1.0, np.nan], [4, 0]))
    found.add(make_step(2, [np.inf, 3.0], [4, 4]))
    found.add(make_step(3, [np.nan, np.nan], [0, 0]))  # nothing trained
    found.add(make_step(4, [2.0, 6.0], [3, 1]))
    np.testing.assert_allclose(found.take(), [(1.0 + 0.75 * 2.0) / 1.75, 6.0])


def test_absent_domains_and_losses_that_are_not_finite_are_distinguished() -> None:
    sums = torch.tensor([0.0, 6.0, torch.nan, torch.inf, torch.nan])
    means = sample_means(sums, torch.tensor([0, 3, 2, 2, 0]))
    assert torch.isnan(means).tolist() == [True, False, False, False, True]
    assert means[1:4].tolist() == [2.0, np.inf, np.inf]


NAMES = ("code", "chat")


def step(sums: list[float], counts: list[int], loss: float, domains: tuple[str, ...] = NAMES) -> None:
    """Check a step of one sample of each domain, of two labels each where any counts."""
    accumulator = StepAccumulator(np.arange(len(domains) + 1), torch.device("cpu"))
    accumulator.indices = torch.arange(len(domains))
    accumulator.add(BatchLosses(torch.tensor(sums), torch.tensor(counts)))
    labels = [[-100, *([1] * count), *([-100] * (2 - count))] for count in counts]
    accumulator.add_tokens({"input_ids": torch.zeros(len(domains), 3), "labels": torch.tensor(labels)})
    accumulator.add_loss(torch.tensor(loss))
    check_step(domains, *accumulator.finish(3))


def test_a_step_that_is_not_finite_ends_the_run() -> None:
    step([1.0, 2.0], [2, 1], 3.0)
    step([1.0, 0.0], [2, 0], 3.0)  # a domain without a token is no error
    for broken in (float("nan"), float("inf")):
        with pytest.raises(DivergenceError, match=r"loss of domain 'chat' in step 3 is nan: has training diverged\?"):
            step([1.0, broken], [2, 1], broken)
        with pytest.raises(DivergenceError, match=r"training loss of step 3 is .*: has training diverged\?"):
            step([1.0, 2.0], [2, 1], broken)  # what a special loss, or a model's auxiliary one, gives
        with pytest.raises(DivergenceError, match="the training loss of step 3 is nan"):
            step([broken], [2], broken, ("all",))
        with pytest.raises(DataFlexError, match="step 3 has no token that is trained on") as caught:
            step([0.0, 0.0], [0, 0], broken)
        assert "diverged" not in str(caught.value)


def losses_of(place: int, padding: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return labels and losses of the 6 tokens of a sample: its place and a tenth of the column; sample 3 has none."""
    columns = 6 + padding
    labels = torch.full((columns,), 1)
    labels[place % 3 :: 3] = -100
    labels[5:] = -100
    if place == 3:
        labels[:] = -100
    return labels, torch.where(labels == -100, 0.0, place + torch.arange(columns) / 10)


def accumulated(batches: list[list[int]], kept: str, order: list[int]) -> tuple[StepStatistics, StepTotals]:
    """Return the statistics of a step of samples of a pool of 12, given this process's micro-batches."""
    accumulator = StepAccumulator(np.array([0, 6, 12]), torch.device("cpu"), SampleLosses(kept))  # type: ignore[arg-type]
    for number, places in enumerate(batches):
        rows = [losses_of(place, 4 * number) for place in places]  # batches are padded as they need
        labels, per_token = torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows])
        accumulator.indices = torch.tensor(places)
        accumulator.add(BatchLosses(per_token.sum(1), (labels != -100).sum(1), per_token=per_token, labels=labels))
    return accumulator.finish(4, np.array(order), np.full(len(order), 6, np.int32))


def check_kept(batches: list[list[int]], order: list[int]) -> None:
    for kept in ("samples", "tokens"):
        statistics, _ = accumulated(batches, kept, order)
        assert statistics.indices.tolist() == order
        assert statistics.token_losses.shape == (len(order), 6 if kept == "tokens" else 0)
        for row, place in enumerate(order):
            labels, per_token = losses_of(place)
            expected = [float(loss) for label, loss in zip(labels, per_token, strict=True) if label != -100]
            mean = sum(expected) / len(expected) if expected else math.nan
            assert float(statistics.sample_losses[row]) == pytest.approx(mean, nan_ok=True)
            if kept == "tokens":
                assert np.isnan(statistics.token_losses[row]).tolist() == (labels == -100).tolist()
                assert statistics.token_losses[row][labels != -100].tolist() == pytest.approx(expected)


def test_losses_of_samples_and_tokens_come_in_the_order_of_the_plan() -> None:
    check_kept([[8, 3], [0, 11]], [8, 3, 0, 11])


def kept_by_two(rank: int) -> None:
    check_kept([[[8, 3], [1, 2]], [[0, 11], [9, 4]]][rank], [8, 3, 0, 11, 1, 2, 9, 4])  # dealt out in turn


@pytest.mark.timeout(300)
def test_two_processes_join_the_losses_of_their_samples(tmp_path: Path) -> None:
    on_two_processes(kept_by_two, tmp_path)


def test_tokens_that_do_not_lie_in_their_sample_are_refused() -> None:
    accumulator = StepAccumulator(np.array([0, 2]), torch.device("cpu"), SampleLosses("tokens"))
    accumulator.indices = torch.tensor([0, 1])
    labels = torch.tensor([[-100, -100, 1, 1], [1, 1, -100, -100]])
    accumulator.add(BatchLosses(torch.ones(2), torch.tensor([2, 2]), per_token=torch.ones(2, 4), labels=labels))
    with pytest.raises(ComponentError, match=r"3 tokens, but 4 tokens are trained on.* padded on the right"):
        accumulator.finish(1, np.array([0, 1]), np.array([3, 3], np.int32))


def test_a_step_whose_coefficients_are_all_0_is_an_error() -> None:
    def finished(coefficients: float) -> tuple[StepStatistics, StepTotals]:
        accumulator = StepAccumulator(np.array([0, 2]), torch.device("cpu"))
        accumulator.add_tokens({"input_ids": torch.ones(1, 3), "labels": torch.ones(1, 3, dtype=torch.int64)})
        accumulator.add(BatchLosses(torch.ones(1), torch.tensor([2]), coefficients=torch.tensor(coefficients)))
        return accumulator.finish(5)

    check_step(("a",), *finished(0.5))
    with pytest.raises(ComponentError, match="every token of step 5 are 0"):
        check_step(("a",), *finished(0.0))
