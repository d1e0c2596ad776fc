"""The fused loss on an accelerator: equal to the one on the CPU, and the same bits in every run."""

from __future__ import annotations

import pytest
import torch

from dataflex.probe.head import AfterHead
from dataflex.trainer.fused_loss import linear_losses, softmax_kernel, weighted_linear_loss

TOKENS, WIDTH, VOCABULARY = 300, 64, 10_001


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("after", [AfterHead(), AfterHead(factor=2.0, cap=5.0)], ids=["plain", "capped"])
@pytest.mark.parametrize("later", [True, False])
@pytest.mark.parametrize("trained", [True, False])
def test_losses_and_gradients_equal_those_on_the_cpu(
    device: torch.device, trained: bool, later: bool, after: AfterHead, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    weight, states = torch.randn(VOCABULARY, WIDTH).to(dtype) / 8, torch.randn(TOKENS, WIDTH).to(dtype)
    labels, given = torch.randint(0, VOCABULARY, (TOKENS,)), torch.rand(TOKENS)
    given[::3] = 0

    def run(where: torch.device, kind: torch.dtype) -> list[torch.Tensor]:
        head = torch.nn.Linear(WIDTH, VOCABULARY, bias=False, device="meta")
        head.weight = torch.nn.Parameter(weight.to(where, kind), requires_grad=trained)
        hidden, coefficients = states.to(where, kind).requires_grad_(), given.to(where)
        if later:
            losses, _ = linear_losses(head, hidden, labels.to(where), after, size=128)
            total = (losses * coefficients).sum()
        else:
            total, losses = weighted_linear_loss(head, hidden, labels.to(where), coefficients, after, 128)
        found = torch.autograd.grad(total, [hidden, *([head.weight] if trained else [])])
        return [losses.detach(), *found]

    expected, found, again = run(torch.device("cpu"), torch.float64), run(device, dtype), run(device, dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for mine, same, theirs in zip(found, again, expected, strict=True):
        assert torch.equal(mine, same)
        assert torch.linalg.vector_norm(mine.cpu().double() - theirs) <= tolerance * torch.linalg.vector_norm(theirs)


def test_the_kernel_is_used(cuda: torch.device) -> None:
    assert softmax_kernel(cuda) is not None
