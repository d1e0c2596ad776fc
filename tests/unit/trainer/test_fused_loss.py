"""The fused loss against autograd on all logits, for every kind of head."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from dataflex.probe.head import AfterHead
from dataflex.trainer.fused_loss import (
    CHUNK_BYTES,
    checkpointed_losses,
    chunk_of,
    linear_losses,
    weighted_linear_loss,
)

TOKENS, WIDTH, VOCABULARY = 37, 16, 50
AFTER = {
    "plain": AfterHead(),
    "Gemma 2": AfterHead(cap=3.0),
    "Cohere": AfterHead(factor=0.0625),
    "Granite": AfterHead(divisor=8.0),
    "all": AfterHead(factor=2.0, divisor=3.0, cap=1.5),
}


def apply_after(after: AfterHead, logits: torch.Tensor) -> torch.Tensor:
    """Return the logits after the operations that Transformers' models name so in their configurations."""
    logits = logits * (after.factor or 1.0) / (after.divisor or 1.0)
    return logits if after.cap is None else after.cap * torch.tanh(logits / after.cap)


def problem(bias: bool, trained: bool, seed: int = 1) -> tuple[torch.nn.Linear, torch.Tensor, torch.Tensor]:
    """Return a head, hidden states and labels in float64."""
    torch.manual_seed(seed)
    head = torch.nn.Linear(WIDTH, VOCABULARY, bias=bias, dtype=torch.float64).requires_grad_(trained)
    hidden = torch.randn(TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)
    return head, hidden, torch.randint(0, VOCABULARY, (TOKENS,))


def gradients(loss: torch.Tensor, head: torch.nn.Linear, hidden: torch.Tensor) -> list[torch.Tensor]:
    inputs = [hidden, *(each for each in head.parameters() if each.requires_grad)]
    return list(torch.autograd.grad(loss, inputs))


def wanted(
    head: torch.nn.Linear,
    hidden: torch.Tensor,
    labels: torch.Tensor,
    after: AfterHead,
    decide: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the token losses and the gradients from all logits."""
    losses = F.cross_entropy(apply_after(after, head(hidden)), labels, reduction="none")
    return losses.detach(), gradients((decide(losses.detach()) * losses).sum(), head, hidden)


def equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.linalg.vector_norm(mine - theirs) <= 1e-9 * torch.linalg.vector_norm(theirs)


@pytest.mark.parametrize("size", [1, 8, 64])
@pytest.mark.parametrize("after", AFTER.values(), ids=list(AFTER))
@pytest.mark.parametrize(("bias", "trained"), [(False, True), (True, True), (True, False)])
def test_known_coefficients_give_the_gradients_of_all_logits(
    bias: bool, trained: bool, after: AfterHead, size: int
) -> None:
    head, hidden, labels = problem(bias, trained)
    coefficients = torch.rand(TOKENS, dtype=torch.float64)
    coefficients[::5] = 0
    losses, expected = wanted(head, hidden, labels, after, lambda _: coefficients)
    total, mine = weighted_linear_loss(head, hidden, labels, coefficients, after, size)
    torch.testing.assert_close(mine, losses, rtol=1e-12, atol=1e-12)
    assert total.item() == pytest.approx(float((coefficients * losses).sum()), rel=1e-12)
    # The Trainer divides the sum, so the gradient that arrives is not 1.
    equal(gradients(total / 7, head, hidden), [each / 7 for each in expected])


@pytest.mark.parametrize("size", [1, 8, 64])
@pytest.mark.parametrize("after", AFTER.values(), ids=list(AFTER))
@pytest.mark.parametrize(("bias", "trained"), [(False, True), (True, True), (True, False)])
def test_coefficients_of_the_same_losses_give_the_gradients_of_all_logits(
    bias: bool, trained: bool, after: AfterHead, size: int
) -> None:
    head, hidden, labels = problem(bias, trained)

    def decide(losses: torch.Tensor) -> torch.Tensor:
        return losses.softmax(0) * (losses > losses.median())

    losses, expected = wanted(head, hidden, labels, after, decide)
    mine, _ = linear_losses(head, hidden, labels, after, size=size)
    torch.testing.assert_close(mine.detach(), losses, rtol=1e-12, atol=1e-12)
    equal(gradients((decide(mine.detach()) * mine).sum(), head, hidden), expected)


@pytest.mark.parametrize("after", AFTER.values(), ids=list(AFTER))
def test_a_head_with_an_adapter_gives_the_gradients_of_all_logits(after: AfterHead) -> None:
    head, hidden, labels = problem(bias=False, trained=False)
    down = torch.randn(4, WIDTH, dtype=torch.float64, requires_grad=True)
    up = torch.randn(VOCABULARY, 4, dtype=torch.float64, requires_grad=True)

    def apply(part: torch.Tensor) -> torch.Tensor:
        return head(part) + part @ down.T @ up.T

    given = torch.rand(TOKENS, dtype=torch.float64)
    losses = F.cross_entropy(apply_after(after, apply(hidden)), labels, reduction="none")
    expected = torch.autograd.grad((given * losses).sum(), [hidden, down, up])
    mine, _ = checkpointed_losses(apply, hidden, labels, after, 8)
    torch.testing.assert_close(mine, losses, rtol=1e-12, atol=1e-12)
    equal(list(torch.autograd.grad((given * mine).sum(), [hidden, down, up])), list(expected))


def test_sixteen_bits_round_as_the_products_of_all_logits_do() -> None:
    head, hidden, labels = problem(bias=False, trained=True)
    head, hidden = head.to(torch.bfloat16), hidden.detach().bfloat16().requires_grad_()
    given = torch.rand(TOKENS)
    losses = F.cross_entropy(head(hidden).float(), labels, reduction="none")
    expected = gradients((given * losses).sum(), head, hidden)
    total, mine = weighted_linear_loss(head, hidden, labels, given, AfterHead(), 8)
    torch.testing.assert_close(mine, losses.detach(), rtol=1e-6, atol=1e-6)
    for found, theirs in zip(gradients(total, head, hidden), expected, strict=True):
        assert found.dtype == torch.bfloat16
        assert torch.linalg.vector_norm((found - theirs).float()) < 0.01 * torch.linalg.vector_norm(theirs.float())


def test_autocast_makes_the_products_in_its_number_type() -> None:
    head, hidden, labels = problem(bias=False, trained=True)
    head, hidden = head.float(), hidden.detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        losses = F.cross_entropy(head(hidden).float(), labels, reduction="none")
        mine, _ = linear_losses(head, hidden, labels, AfterHead(), size=8)
    torch.testing.assert_close(mine, losses, rtol=1e-6, atol=1e-6)
    expected, found = gradients(losses.sum(), head, hidden), gradients(mine.sum(), head, hidden)
    for each, theirs in zip(found, expected, strict=True):
        assert each.dtype == torch.float32
        assert torch.linalg.vector_norm(each - theirs) < 0.01 * torch.linalg.vector_norm(theirs)


def test_no_token_counts() -> None:
    head, hidden, labels = problem(bias=False, trained=True)
    total, losses = weighted_linear_loss(head, hidden[:0], labels[:0], torch.ones(0), AfterHead())
    total.backward()
    assert losses.shape == (0,)
    assert total == 0
    assert not head.weight.grad.any()
    later = linear_losses(head, hidden[:0], labels[:0], AfterHead())[0].sum()
    later.backward()
    assert later == 0
    assert checkpointed_losses(head, hidden[:0], labels[:0], AfterHead(), 8)[0].shape == (0,)


def test_the_logits_of_a_chunk_have_a_bounded_size() -> None:
    assert chunk_of(32_000) == 2097
    assert chunk_of(131_072) == 512
    assert chunk_of(200) * 200 * 4 < CHUNK_BYTES
    assert chunk_of(10**9) == 1


def test_the_gradient_of_known_coefficients_cannot_be_computed_twice() -> None:
    head, hidden, labels = problem(bias=False, trained=True)
    total, _ = weighted_linear_loss(head, hidden, labels, torch.ones(TOKENS), AfterHead())
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="only once"):
        total.backward()
