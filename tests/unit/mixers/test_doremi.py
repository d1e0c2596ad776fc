"""DoReMi: the update against the paper's formula by hand, and the gradient of its objective in float64."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from dataflex.api.context import StepContext
from dataflex.config.loading import RunConfig
from dataflex.errors import ComponentError, DivergenceError
from dataflex.mixers.base_loss_weights import exponentiated_update
from dataflex.mixers.doremi import DoReMiMixer
from dataflex.trainer.domain_loss import DomainLoss
from dataflex.trainer.loss import WeightedLoss, loss_function
from unit.fakes import FakeProbe, build, context, make_pool
from unit.ranks import on_two_processes

NAN = math.nan


def step(excess: list[float], number: int = 0, **changes: Any) -> StepContext:
    pool = make_pool({f"d{index}": 4 for index in range(len(excess))})
    given: dict[str, Any] = {
        "pool": pool,
        "probe": FakeProbe(),
        "step": number,
        "total_steps": 20,
        "learning_rate": 1e-3,
        "indices": np.arange(4),
        "tokens": np.array([0 if math.isnan(value) else 8 for value in excess]),
        "losses": np.asarray(excess) + 1.0,
        "excess": np.asarray(excess),
    }
    return StepContext(**{**given, **changes})


def mixer(domains: int, **params: Any) -> DoReMiMixer:
    made = build(DoReMiMixer, reference_model="ref", **params)
    made.mix(context(make_pool({f"d{index}": 4 for index in range(domains)})))
    return made


def test_an_update_has_the_golden_numbers() -> None:
    made = mixer(3)
    made._weights = np.array([0.5, 0.3, 0.2])
    made.update_weights(step([0.2, 0.0, 0.5]))
    np.testing.assert_allclose(made.loss_weights, [0.492165, 0.241940, 0.265895], atol=5e-7)


@pytest.mark.parametrize("domains", [2, 3, 7])
@pytest.mark.parametrize("eta, c", [(1.0, 1e-3), (0.1, 0.05), (3.0, 0.0)])
def test_the_trajectory_follows_the_formula_of_the_paper(domains: int, eta: float, c: float) -> None:
    rng = random.Random(domains)
    made = mixer(domains, reweight_eta=eta, reweight_eps=c)
    alpha, last, total = [1.0 / domains] * domains, [0.0] * domains, [0.0] * domains
    for number in range(20):
        excess = [NAN if rng.random() < 0.3 else rng.random() * 2 for _ in range(domains)]
        made.update_weights(step(excess, number))
        for i in range(domains):
            if not math.isnan(excess[i]):
                last[i] = excess[i]
        raised = [alpha[i] * math.e ** (eta * last[i]) for i in range(domains)]
        alpha = [(1 - c) * value / math.fsum(raised) + c / domains for value in raised]
        total = [before + value for before, value in zip(total, alpha, strict=True)]
        np.testing.assert_allclose(made.loss_weights, alpha, rtol=1e-9)
        assert made.loss_weights.min() >= c / domains
        assert made.loss_weights.sum() == pytest.approx(1, abs=1e-12)
        if number == 9:
            state, names = made.state_dict(), tuple(f"d{i}" for i in range(domains))
            made = mixer(domains, reweight_eta=eta, reweight_eps=c)
            made.load_state_dict(state)
    found = made.result(names)
    assert found is not None
    np.testing.assert_allclose(list(found["proportions"].values()), [value / 20 for value in total], rtol=1e-9)
    np.testing.assert_allclose(list(found["last"].values()), alpha, rtol=1e-9)
    assert found["steps"] == 20


def test_a_run_without_steps_has_no_mixture() -> None:
    names, made = ("d0", "d1"), mixer(2)
    assert made.result(names) is None
    made.update_weights(step([0.1, 0.2]))
    assert made.result(names) is not None


def test_equal_excess_leaves_the_weights() -> None:
    made = mixer(4, reweight_eps=0.0)
    made._weights = np.array([0.1, 0.2, 0.3, 0.4])
    made.update_weights(step([0.7, 0.7, 0.7, 0.7]))
    np.testing.assert_allclose(made.loss_weights, [0.1, 0.2, 0.3, 0.4], rtol=1e-12)


def test_a_large_excess_does_not_overflow() -> None:
    assert exponentiated_update(np.array([0.5, 0.5]), np.array([2000.0, 0.0]), 0.1) == pytest.approx([0.95, 0.05])


# The gradient. Two or four micro-batches of samples of three domains, one domain absent, one process and two.

DOMAINS = ("alpha", "beta", "gamma", "absent")
SAMPLE_DOMAINS = [0, 1, 1, 2, 0, 1, 2, 2]


def models() -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    config = LlamaConfig(
        vocab_size=17,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    torch.manual_seed(3)
    proxy = LlamaForCausalLM(config).double()
    with torch.no_grad():
        for parameter in proxy.parameters():
            parameter.mul_(8)  # losses that differ between the samples
    torch.manual_seed(4)
    return proxy, LlamaForCausalLM(config).double()


def samples() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, 17, (8, 9), generator=generator)
    labels = tokens.clone()
    labels[torch.rand(8, 9, generator=generator) < 0.3] = -100
    return tokens, labels


def token_losses_by_hand(model: LlamaForCausalLM, tokens: Tensor, labels: Tensor) -> list[list[Tensor]]:
    """Return the loss of every trained token of every sample, one sample at a time."""
    found = []
    for row in range(len(tokens)):
        logits = model(input_ids=tokens[row : row + 1]).logits[0]
        losses = []
        for position in range(tokens.size(1) - 1):
            label = int(labels[row, position + 1])
            if label != -100:
                losses.append(torch.logsumexp(logits[position], 0) - logits[position, label])
        found.append(losses)
    return found


def papers_gradient() -> tuple[list[float], list[Tensor]]:
    """Return alpha after one step of Algorithm 1, and the gradient of sum_i alpha_i * mean excess loss of domain i."""
    proxy, reference = models()
    tokens, labels = samples()
    mine = token_losses_by_hand(proxy, tokens, labels)
    theirs = token_losses_by_hand(reference, tokens, labels)
    excess, objective = [], []
    for domain in range(4):
        pairs = [
            (a, b.detach())
            for sample, of in enumerate(SAMPLE_DOMAINS)
            if of == domain
            for a, b in zip(mine[sample], theirs[sample], strict=True)
        ]
        excess.append(sum(max(float((a - b).detach()), 0.0) for a, b in pairs) / len(pairs) if pairs else 0.0)
        objective.append(sum(a - b for a, b in pairs) / len(pairs) if pairs else torch.zeros(()))
    raised = [0.25 * math.exp(value) for value in excess]
    alpha = [(1 - 1e-3) * value / sum(raised) + 1e-3 / 4 for value in raised]
    loss = sum(weight * value for weight, value in zip(alpha, objective, strict=True))
    assert isinstance(loss, Tensor)
    loss.backward()
    return alpha, [parameter.grad for parameter in proxy.parameters() if parameter.grad is not None]


def our_gradient(rank: int, world: int, accumulation: int, items: str) -> tuple[list[float], list[Tensor]]:
    """Return the same by way of the training loss, scaled as the Trainer does."""
    proxy, reference = models()
    tokens, labels = samples()
    made = mixer(4)
    weighs = DomainLoss(
        made,
        made.needs(RunConfig({}, None)),
        DOMAINS,
        torch.device("cpu"),
        lambda tokens, losses, excess: step(excess.tolist(), tokens=tokens, losses=losses),
    )
    per_step = 8 if items == "across" else 8 // world
    function = WeightedLoss(per_step, lambda _: None, global_batch_size=8, domain_loss=weighs)
    mine = [list(range(8))[(turn * world + rank) :: world * accumulation] for turn in range(accumulation)]
    of = torch.tensor(SAMPLE_DOMAINS)
    counted = (labels[:, 1:] != -100).sum(1)
    rows = [row for batch in mine for row in batch]
    counts = torch.zeros(4, dtype=torch.float64).index_add_(0, of[rows], counted[rows].double())
    weighs.begin(counts)

    def reference_losses(batch: list[int]) -> Tensor:
        with torch.no_grad():
            by_hand = token_losses_by_hand(reference, tokens[batch], labels[batch])
        return torch.stack([loss for losses in by_hand for loss in losses])

    def sums_of(batch: list[int]) -> tuple[Tensor, Tensor]:
        from dataflex.data.token_loss import shifted, token_losses

        targets = shifted(labels[batch])
        with torch.no_grad():
            per_token = token_losses(proxy(input_ids=tokens[batch]).logits, targets)
        excess = weighs.excess_sums(per_token, targets, reference_losses(batch))
        assert excess is not None
        return per_token.sum(1), excess

    if accumulation > 1:
        parts = [sums_of(batch) for batch in mine]
        weighs.decide(of[rows], torch.cat([sums for sums, _ in parts]), torch.cat([excess for _, excess in parts]))
    everything = int((labels != -100).sum()) + 3  # whatever the Trainer counts must cancel
    for batch in mine:
        function.domains = of[batch]
        if not weighs.decided:
            function.references = {"mix": reference_losses(batch)}
        number = None if items == "none" else everything
        with loss_function(proxy, function):
            given = {} if number is None else {"num_items_in_batch": number}
            loss = proxy(input_ids=tokens[batch], labels=labels[batch], **given).loss
        if items == "across":
            loss = loss * world
        if items == "none":
            loss = loss / accumulation
        (loss / world).backward()
    gradients = [parameter.grad for parameter in proxy.parameters() if parameter.grad is not None]
    if world > 1:
        for gradient in gradients:
            dist.all_reduce(gradient)
    return made.loss_weights.tolist(), gradients


def check(rank: int, world: int) -> None:
    alpha, expected = papers_gradient()
    assert max(alpha) - min(alpha) > 0.05
    for accumulation in (1, 4):
        for items in ("across", "own", "none"):
            weights, gradients = our_gradient(rank, world, accumulation, items)
            np.testing.assert_allclose(weights, alpha, rtol=1e-9)
            for ours, theirs in zip(gradients, expected, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_the_gradient_equals_that_of_the_papers_objective() -> None:
    check(0, 1)


@pytest.mark.timeout(300)
def test_the_gradient_is_the_same_on_two_processes(tmp_path: Path) -> None:
    on_two_processes(check, tmp_path, 2)


def test_a_loss_that_is_not_finite_is_named() -> None:
    made = mixer(2)
    weighs = DomainLoss(
        made,
        made.needs(RunConfig({}, None)),
        ("alpha", "beta"),
        torch.device("cpu"),
        lambda tokens, losses, excess: step(excess.tolist(), 6, tokens=tokens, losses=losses),
    )
    weighs.begin(torch.tensor([3.0, 3.0]))
    with pytest.raises(DivergenceError, match="domain 'beta' in step 7 is nan"):
        weighs.decide(torch.tensor([0, 1]), torch.tensor([1.0, NAN]), torch.tensor([1.0, NAN]))


def test_a_measurement_that_is_not_finite_is_named_with_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(ctx: StepContext) -> None:
        raise DivergenceError("the gradient of pool index 3 is not finite")

    made = mixer(2)
    monkeypatch.setattr(made, "update_weights", measure)
    weighs = DomainLoss(
        made,
        made.needs(RunConfig({}, None)),
        ("alpha", "beta"),
        torch.device("cpu"),
        lambda tokens, losses, excess: step(excess.tolist(), 6, tokens=tokens, losses=losses),
    )
    weighs.begin(torch.tensor([3.0, 3.0]))
    with pytest.raises(DivergenceError, match="in the loss weights of step 7, the gradient of pool index 3 is not"):
        weighs.decide(torch.tensor([0, 1]), torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]))


def test_a_reference_loss_that_is_not_finite_is_an_error() -> None:
    for broken in (NAN, math.inf):
        weighs = DomainLoss(
            mixer(2),
            mixer(2).needs(RunConfig({}, None)),
            ("alpha", "beta"),
            torch.device("cpu"),
            lambda tokens, losses, excess: step(excess.tolist(), 6, tokens=tokens, losses=losses),
        )
        weighs.begin(torch.tensor([2.0, 1.0]))
        per_token = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
        excess = weighs.excess_sums(per_token, torch.tensor([[3, 3], [3, -100]]), torch.tensor([0.1, broken, 0.2]))
        with pytest.raises(ComponentError, match="reference's loss on domain 'alpha' in step 7"):
            weighs.decide(torch.tensor([0, 1]), per_token.sum(1), excess)
