"""The weighters rho1 and focal: golden numbers, gradients, exact counts, ties, and independence of the processes."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from dataflex.api.components import Entry
from dataflex.api.context import StepBatch, TokenLosses
from dataflex.api.mixer import Mixer
from dataflex.api.needs import Needs
from dataflex.errors import ComponentError
from dataflex.trainer.domain_loss import DomainLoss
from dataflex.trainer.loss import WeightedLoss
from dataflex.trainer.step_weights import MicroBatch, StepWeights, Weighing
from dataflex.weighters.focal import FocalWeighter, focal_weights
from dataflex.weighters.loss import LossWeighter
from dataflex.weighters.rho1 import Rho1Weighter
from unit.fakes import build
from unit.ranks import on_two_processes

IGNORED = -100


def rho1(**params: Any) -> Rho1Weighter:
    return build(Rho1Weighter, reference_model="folder", **params)


def batch_of(losses: Tensor, reference: Tensor | None = None, trained: Tensor | None = None) -> StepBatch:
    """Return a batch of token losses (n, T); all tokens are trained on if no mask is given."""
    mask = torch.ones_like(losses, dtype=torch.bool) if trained is None else trained
    zeros = torch.zeros_like(losses)
    tokens = TokenLosses(losses * mask, mask, (zeros if reference is None else reference) * mask)
    return StepBatch((losses * mask).sum(1) / mask.sum(1), tokens=tokens)


# rho1


def test_rho1_has_the_golden_numbers() -> None:
    losses, reference = torch.tensor([[2, 1, 0.5, 3, 0.2]]), torch.tensor([[1, 1.5, 0.1, 2.9, 0.3]])
    for scope in ("batch", "sample"):
        weights = rho1(scope=scope).weigh(batch_of(losses, reference))
        torch.testing.assert_close(weights, torch.tensor([[1.0, 0, 1, 1, 0]]) * 5 / 3)
        assert float((weights * losses).sum() / 5) == pytest.approx(1.833333, abs=1e-6)


def expected_of(excess: np.ndarray, share: str) -> np.ndarray:
    """Return the weights of a list of tokens, by a sort of (-excess, position) in exact arithmetic."""
    kept = max(1, int(Fraction(share) * excess.size))
    first = sorted(range(excess.size), key=lambda place: (-excess[place], place))[:kept]
    weights = np.zeros(excess.size)
    weights[first] = excess.size / kept
    return weights


@pytest.mark.parametrize("share", ["0.29", "0.6", "0.07", "0.999", "0.001", "1"])
@pytest.mark.parametrize("seed", range(4))
def test_rho1_equals_a_sort_of_all_tokens(share: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Few different values, so that many are equal.
    losses, reference = (torch.randint(0, 6, (7, 23), generator=generator).float() for _ in range(2))
    trained = torch.rand(7, 23, generator=generator) < 0.7
    trained[:, 0] = True
    batch, excess = batch_of(losses, reference, trained), (losses - reference).numpy()
    mask = trained.numpy()
    found = rho1(share=float(share)).weigh(batch)[trained].numpy()
    np.testing.assert_allclose(found, expected_of(excess[mask], share), rtol=1e-6)
    found = rho1(share=float(share), scope="sample").weigh(batch)
    for row, weights in enumerate(found.numpy()):
        np.testing.assert_allclose(weights[mask[row]], expected_of(excess[row, mask[row]], share), rtol=1e-6)


def test_the_number_of_kept_tokens_is_that_of_the_decimal_share() -> None:
    losses = torch.rand(1, 100, generator=torch.Generator().manual_seed(0))
    assert int(100 * 0.29) == 28
    assert int((rho1(share=0.29).weigh(batch_of(losses)) > 0).sum()) == 29
    assert int((rho1(share=0.29, scope="sample").weigh(batch_of(losses)) > 0).sum()) == 29
    assert int((rho1(share=0.001).weigh(batch_of(losses)) > 0).sum()) == 1


def test_all_tokens_kept_have_weight_one_exactly() -> None:
    losses = torch.rand(5, 9, generator=torch.Generator().manual_seed(0))
    trained = torch.ones(5, 9, dtype=torch.bool)
    trained[2, 3:] = False
    for scope in ("batch", "sample"):
        weights = rho1(share=1, scope=scope).weigh(batch_of(losses, None, trained))
        assert torch.equal(weights[trained], torch.ones(int(trained.sum())))


def test_with_the_model_as_its_reference_the_first_tokens_are_kept() -> None:
    losses = torch.rand(4, 5, generator=torch.Generator().manual_seed(0))
    weights = rho1(share=0.5).weigh(batch_of(losses, losses))
    assert (weights > 0).flatten().tolist() == [True] * 10 + [False] * 10
    weights = rho1(share=0.4, scope="sample").weigh(batch_of(losses, losses))
    assert (weights > 0).tolist() == [[True, True, False, False, False]] * 4


def test_a_reference_that_is_not_finite_is_an_error() -> None:
    losses = torch.ones(1, 3)
    with pytest.raises(ComponentError, match="rho1: the reference's loss of a token of step 1 is not finite"):
        rho1().weigh(batch_of(losses, torch.tensor([[1.0, torch.nan, 1]])))


def test_rho1_needs_the_whole_step_only_if_it_compares_it() -> None:
    assert rho1().decides_within_step
    assert not rho1(scope="sample").decides_within_step


def micro_batches(count: int = 4) -> list[MicroBatch]:
    """Return micro-batches of different widths, with losses of few values, so that many are equal."""
    generator, found = torch.Generator().manual_seed(5), []
    for number in range(count):
        labels = torch.randint(0, 9, (3, 6 + number), generator=generator)
        labels[torch.rand(labels.shape, generator=generator) < 0.3] = IGNORED
        labels[:, 0], labels[1, :] = 1, IGNORED if number == 2 else 1
        counted = labels != IGNORED
        losses = torch.randint(1, 5, labels.shape, generator=generator).float() * counted
        means = torch.where(counted.any(1), losses.sum(1) / counted.sum(1).clamp(min=1), torch.nan)
        reference = torch.randint(1, 5, (int(counted.sum()),), generator=generator).float()
        found.append(MicroBatch(labels, losses, means, torch.arange(3) + 3 * number, {"weight": reference}))
    return found


def decided(batches: list[MicroBatch], weighter: Rho1Weighter) -> list[Tensor]:
    weighing = Weighing(Entry(weighter, "weight", 1), tokens=True, reference=True)
    found = StepWeights([weighing], lambda losses, places, tokens: StepBatch(losses, tokens=tokens)).decide(batches, 0)
    assert found is not None
    return found


def kept_by_two(rank: int, share: float) -> None:
    batches = micro_batches()
    mine = decided(batches[rank::2], rho1(share=share))  # the micro-batches are dealt to the processes in turn
    dist.destroy_process_group()
    together = decided(batches, rho1(share=share))
    for ours, theirs in zip(mine, together[rank::2], strict=True):
        assert torch.equal(ours, theirs)
    counted = [batch.labels != IGNORED for batch in batches]
    kept = sum(int((weights[mask] > 0).sum()) for weights, mask in zip(together, counted, strict=True))
    trained = sum(int(mask.sum()) for mask in counted)
    assert kept == int(Fraction(str(share)) * trained)
    sums = [
        (weights * batch.per_token)[mask].sum() for weights, batch, mask in zip(together, batches, counted, strict=True)
    ]
    losses = torch.cat(
        [batch.per_token[(weights > 0) & mask] for weights, batch, mask in zip(together, batches, counted, strict=True)]
    )
    assert float(sum(sums)) / trained == pytest.approx(float(losses.mean()), rel=1e-6)


@pytest.mark.timeout(300)
def test_the_kept_share_is_exact_over_micro_batches_and_processes(tmp_path: Path) -> None:
    on_two_processes(kept_by_two, tmp_path, 0.29)


# focal


def test_focal_has_the_golden_numbers() -> None:
    losses = -torch.tensor([[0.9, 0.5, 0.1]], dtype=torch.float64).log()
    detached = build(FocalWeighter, gradient="detached").weigh(batch_of(losses))
    golden = torch.tensor([[0.001054, 0.173287, 1.865094]], dtype=torch.float64)
    torch.testing.assert_close(detached * losses, golden, atol=1e-6, rtol=0)
    assert float((detached * losses).mean()) == pytest.approx(0.679811, abs=1e-6)
    through = build(FocalWeighter).weigh(batch_of(losses))
    # by the logit of the token at p = .5, where the derivative of the loss is p - 1
    assert float(through[0, 1]) * (0.5 - 1) == pytest.approx(-0.298287, abs=1e-6)
    assert float(detached[0, 1]) * (0.5 - 1) == pytest.approx(-0.125, abs=1e-12)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0, 5.0])
def test_the_weights_give_the_gradient_of_the_focal_loss(gamma: float) -> None:
    logits = torch.randn(64, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 4
    labels = torch.arange(64) % 11
    logits.requires_grad_()
    losses = F.cross_entropy(logits, labels, reduction="none")
    other = torch.rand(64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    focal = (1 - torch.exp(-losses)) ** gamma * losses
    (expected,) = torch.autograd.grad((other * focal).sum(), logits, retain_graph=True)
    weights = focal_weights(losses.detach(), gamma, through=True)
    (found,) = torch.autograd.grad((other * weights * losses).sum(), logits)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_the_weights_of_samples_give_the_gradient_of_their_focal_losses() -> None:
    losses = torch.rand(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
    losses.requires_grad_()
    means = losses.mean(1)
    (expected,) = torch.autograd.grad(((1 - torch.exp(-means)) ** 2 * means).sum(), losses)
    weights = build(FocalWeighter, of="sample").weigh(StepBatch(losses.detach().mean(1)))
    (found,) = torch.autograd.grad((weights * losses.mean(1)).sum(), losses)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("through", [True, False])
def test_focal_weights_are_finite_at_the_ends(gamma: float, through: bool) -> None:
    losses = torch.tensor([0.0, 1e-30, 1e-7, 1.0, 50.0, 1e4])
    weights = focal_weights(losses, gamma, through=through)
    assert torch.isfinite(weights).all()
    assert (weights >= 0).all()
    if gamma == 0:
        assert torch.equal(weights, torch.ones(6))
    else:
        assert float(weights[0]) == 0
        assert float(weights[-1]) == 1


def test_focal_reads_tokens_only_if_it_weighs_them() -> None:
    assert build(FocalWeighter).needs(None).step_losses == "tokens"
    assert build(FocalWeighter, of="sample").needs(None).step_losses == "nothing"
    assert not build(FocalWeighter).decides_within_step


# Products


class ByLoss(Mixer):
    """Weighs each of two domains by its loss in the step."""

    family, name, weighs_loss = "mixer", "by_loss", True
    decides_within_step = True
    loss_weights = np.ones(2)

    def update_weights(self, ctx: Any) -> None:
        self.loss_weights = ctx.losses / ctx.losses.sum()


VOCAB, GAMMA, SHARE, TEMPERATURE = 13, 2.0, 0.6, 0.4


def coefficients_by_hand(losses: Tensor, reference: Tensor, trained: Tensor, domains: list[int]) -> Tensor:
    """Return the products of the weights of samples, domains and tokens, in float64 with a loop over tokens."""
    rows = range(len(losses))
    means = [float(losses[row][trained[row]].mean()) for row in rows]
    low, high = min(means), max(means)
    emphasis = [min((2 * mean - high - low) / (high - low) + 1, 1.0) for mean in means]
    exponents = [np.exp(value / TEMPERATURE) for value in emphasis]
    samples = [len(means) * value / sum(exponents) for value in exponents]
    sums, counts = [0.0, 0.0], [0, 0]
    for row in rows:
        sums[domains[row]] += float(losses[row][trained[row]].sum())
        counts[domains[row]] += int(trained[row].sum())
    of_domains = [total / count for total, count in zip(sums, counts, strict=True)]
    shares = [value / sum(of_domains) for value in of_domains]
    excess = (losses - reference)[trained].numpy()
    kept = torch.zeros_like(losses)
    kept[trained] = torch.from_numpy(expected_of(excess, str(SHARE)))
    found = torch.zeros_like(losses)
    for row in rows:
        for column in range(losses.shape[1]):
            loss = float(losses[row, column])
            p = np.exp(-loss)
            focal = (1 - p) ** GAMMA + GAMMA * loss * p * (1 - p) ** (GAMMA - 1)
            domain = shares[domains[row]] * sum(counts) / counts[domains[row]]
            found[row, column] = samples[row] * domain * focal * float(kept[row, column])
    return found * trained


def test_weights_of_samples_domains_and_tokens_multiply() -> None:
    generator = torch.Generator().manual_seed(7)
    logits = (torch.randn(5, 9, VOCAB, dtype=torch.float64, generator=generator) * 2).requires_grad_()
    labels = torch.randint(0, VOCAB, (5, 9), generator=generator)
    labels[torch.rand(5, 9, generator=generator) < 0.3] = IGNORED
    targets = F.pad(labels, (0, 1), value=IGNORED)[:, 1:]
    trained, domains = targets != IGNORED, [0, 1, 1, 0, 1]
    reference = torch.rand(5, 9, generator=generator, dtype=torch.float64) * 4
    chain = [build(LossWeighter, temperature=TEMPERATURE), rho1(share=SHARE), build(FocalWeighter, gamma=GAMMA)]
    weighings = [
        Weighing(Entry(weighter, f"weight.{number}", 1), tokens=number > 0, reference=number == 1)
        for number, weighter in enumerate(chain)
    ]
    weights = StepWeights(weighings, lambda losses, places, tokens: StepBatch(losses, tokens=tokens))
    mixer = build(ByLoss)
    domain_loss = DomainLoss(
        mixer,
        Needs(step_losses="domains"),
        ("a", "b"),
        torch.device("cpu"),
        lambda tokens, losses, excess: SimpleNamespace(step=0, losses=losses),  # type: ignore[arg-type,return-value]
    )
    function = WeightedLoss(5, lambda _: None, weights=weights, domain_loss=domain_loss, global_batch_size=5)
    function.domains, function.places = torch.tensor(domains), torch.arange(5)
    function.references = {"weight.1": reference[trained].float()}
    counts = trained.sum(1)
    domain_loss.begin(torch.zeros(2, dtype=torch.float64).index_add_(0, function.domains, counts.double()))
    loss = function(logits, labels, VOCAB, num_items_in_batch=counts.sum())
    (found,) = torch.autograd.grad(loss, logits)

    exact = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")
    products = coefficients_by_hand(exact.detach(), reference, trained, domains)
    assert 0 < int((products > 0).sum()) < int(trained.sum())
    expected = (products * exact).sum() / counts.sum()
    (gradient,) = torch.autograd.grad(expected, logits)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-7)
