"""Adam's moments read back: against the recursion by hand, of every kind of Adam that runs in one process."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from dataflex.errors import ComponentError
from dataflex.probe.moments import Moments, read_moments

BETAS, EPS = (0.8, 0.95), 1e-6


class Tiny(nn.Module):
    """A frozen part, tied weights, a part that is not used at first, and one of more than 4096 elements."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.frozen = nn.Linear(6, 6)
        self.frozen.requires_grad_(False)
        self.embedding = nn.Linear(6, 6, bias=False)
        self.head = nn.Linear(6, 6, bias=False)
        self.head.weight = self.embedding.weight
        self.unused = nn.Linear(6, 3)
        self.large = nn.Linear(6, 900)

    def forward(self, x: Tensor, *, use_all: bool = False) -> Tensor:
        hidden = self.head(torch.tanh(self.embedding(self.frozen(x))))
        loss = self.large(hidden).pow(2).mean()
        return loss + self.unused(hidden).pow(2).mean() if use_all else loss


NAMES = {"embedding.weight", "unused.weight", "unused.bias", "large.weight", "large.bias"}


def batches(count: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        yield torch.randn(5, 6, generator=generator)


def train(model: Tiny, optimizer: Any, count: int, **options: Any) -> list[dict[str, Tensor]]:
    """Train, and return the gradients of each step."""
    gradients = []
    for x in batches(count):
        optimizer.zero_grad(set_to_none=True)
        model(x, **options).backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        optimizer.step()
    return gradients


def by_hand(gradients: list[dict[str, Tensor]], name: str) -> tuple[Tensor, Tensor, int]:
    """Adam's recursion in float64."""
    first = second = torch.zeros(1, dtype=torch.float64)
    seen = [step[name].double() for step in gradients if name in step]
    for gradient in seen:
        first = BETAS[0] * first + (1 - BETAS[0]) * gradient
        second = BETAS[1] * second + (1 - BETAS[1]) * gradient**2
    return first, second, len(seen)


def assert_by_hand(moments: dict[str, Moments], gradients: list[dict[str, Tensor]]) -> None:
    for name in ("embedding.weight", "large.weight", "large.bias"):
        first, second, steps = by_hand(gradients, name)
        torch.testing.assert_close(moments[name].exp_avg.double(), first, rtol=1e-5, atol=1e-10)
        torch.testing.assert_close(moments[name].exp_avg_sq.double(), second, rtol=1e-5, atol=1e-12)
        assert moments[name].step == steps
        assert (moments[name].betas, moments[name].eps) == (BETAS, EPS)


def groups(model: nn.Module, decay: float = 0.1) -> list[dict[str, Any]]:
    """Decay and no decay, as the Trainer has them."""
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return [
        {"params": [p for n, p in trainable.items() if "bias" not in n], "weight_decay": decay},
        {"params": [p for n, p in trainable.items() if "bias" in n], "weight_decay": 0.0},
    ]


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("implementation", [{}, {"foreach": True}, {"fused": True}])
def test_moments_of_torch_optimizers_follow_the_recursion(
    kind: Callable[..., torch.optim.Optimizer], implementation: dict[str, bool]
) -> None:
    model = Tiny()
    decay = 0.0 if kind is torch.optim.Adam else 0.1  # Adam's own is part of the gradient
    optimizer = kind(groups(model, decay), lr=0.01, betas=BETAS, eps=EPS, **implementation)
    gradients = train(model, optimizer, 4)
    moments = read_moments(optimizer, model)
    assert moments.keys() == NAMES
    assert_by_hand(moments, gradients)
    assert moments["large.weight"].exp_avg is optimizer.state[model.large.weight]["exp_avg"]


def test_moments_are_read_under_accelerates_wrapper() -> None:
    model = Tiny()
    accelerator = Accelerator(cpu=True)
    optimizer = accelerator.prepare(torch.optim.AdamW(groups(model), betas=BETAS, eps=EPS))
    gradients = train(model, optimizer, 3)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert_by_hand(read_moments(optimizer, model), gradients)


def test_a_parameter_without_a_gradient_has_zero_moments() -> None:
    model = Tiny()
    optimizer = torch.optim.AdamW(groups(model, decay=0.0), lr=0.01, betas=BETAS, eps=EPS)
    train(model, optimizer, 3)
    before = read_moments(optimizer, model)["unused.weight"]
    assert before.exp_avg.shape == (3, 6)
    assert not before.exp_avg.any()
    assert not before.exp_avg_sq.any()
    assert (before.step, before.betas, before.eps) == (0, BETAS, EPS)

    # What Adam does to it next follows from what was read.
    weight = model.unused.weight.detach().clone()
    gradient = train(model, optimizer, 1, use_all=True)[0]["unused.weight"]
    first = BETAS[0] * before.exp_avg + (1 - BETAS[0]) * gradient
    second = BETAS[1] * before.exp_avg_sq + (1 - BETAS[1]) * gradient**2
    corrected = first / (1 - BETAS[0] ** (before.step + 1))
    expected = weight - 0.01 * corrected / ((second / (1 - BETAS[1] ** (before.step + 1))).sqrt() + EPS)
    torch.testing.assert_close(model.unused.weight.detach(), expected, rtol=1e-5, atol=1e-7)
    assert read_moments(optimizer, model)["unused.weight"].step == 1


def test_reading_moments_changes_nothing() -> None:
    ends = []
    for reads in (False, True):
        model = Tiny()
        optimizer = torch.optim.AdamW(groups(model), lr=0.01)
        for count in (2, 3):
            train(model, optimizer, count)
            if reads:
                before = copy.deepcopy(optimizer.state_dict())
                read_moments(optimizer, model)
                torch.testing.assert_close(optimizer.state_dict(), before, rtol=0, atol=0)
                assert model.unused.weight not in optimizer.state
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*ends)


# bitsandbytes


@pytest.mark.parametrize("name", ["Adam8bit", "AdamW8bit", "PagedAdamW8bit", "AdamW32bit"])
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_moments_of_bitsandbytes_are_close_to_the_recursion(name: str) -> None:
    optim = pytest.importorskip("bitsandbytes").optim
    model = Tiny()
    optimizer = getattr(optim, name)(groups(model), lr=0.01, betas=BETAS, eps=EPS)
    gradients = train(model, optimizer, 4)
    state = copy.deepcopy(optimizer.state[model.large.weight])
    moments = read_moments(optimizer, model)
    assert moments.keys() == NAMES
    quantised = state["state1"].dtype == torch.uint8
    assert quantised == name.endswith("8bit")
    if not quantised:
        assert_by_hand(moments, gradients)
        return
    assert optimizer.state[model.embedding.weight]["state1"].dtype == torch.float32
    read = moments["large.weight"]
    assert read.exp_avg.dtype == torch.float32
    assert read.exp_avg.shape == (900, 6)
    assert (read.step, read.betas, read.eps) == (4, BETAS, EPS)
    assert moments["unused.weight"].step == 0
    for got, exact in zip((read.exp_avg, read.exp_avg_sq), by_hand(gradients, "large.weight")[:2], strict=True):
        # A block's largest value sets its scale: the error of one quantisation is some per cent of it at most.
        error, largest = (got.double() - exact).flatten(), exact.abs().max()
        assert error.abs().max() < 0.03 * largest
        assert torch.nn.functional.cosine_similarity(got.double().flatten(), exact.flatten(), dim=0) > 0.999
    for key, value in optimizer.state[model.large.weight].items():
        assert torch.equal(value, state[key]) if isinstance(value, Tensor) else value == state[key]


# What cannot be read


class GaLoreAdamW(torch.optim.AdamW):
    """Stands for another package's variant with states of another meaning."""


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adafactor, torch.optim.NAdam, GaLoreAdamW])
def test_other_optimizers_are_named(kind: Callable[..., torch.optim.Optimizer]) -> None:
    model = Tiny()
    optimizer = kind(groups(model), lr=0.01)
    train(model, optimizer, 1)
    with pytest.raises(ComponentError, match=rf"{kind.__name__} keeps no .* preconditioner: none"):
        read_moments(optimizer, model)


def test_bitsandbytes_lion_is_named() -> None:
    optim = pytest.importorskip("bitsandbytes").optim
    model = Tiny()
    with pytest.raises(ComponentError, match=r"Lion8bit keeps no .* preconditioner: none"):
        read_moments(optim.Lion8bit(groups(model)), model)


def test_amsgrad_is_refused() -> None:
    model = Tiny()
    optimizer = torch.optim.AdamW(groups(model), amsgrad=True)
    train(model, optimizer, 1)
    with pytest.raises(ComponentError, match="amsgrad"):
        read_moments(optimizer, model)


def test_reading_before_the_first_step_is_an_error() -> None:
    model = Tiny()
    optimizer = torch.optim.AdamW(groups(model))
    with pytest.raises(ComponentError, match=r"dataflex\.warmup_steps to at least 1, or preconditioner: none"):
        read_moments(optimizer, model)


def test_a_parameter_the_optimizer_does_not_have_is_an_error() -> None:
    model = Tiny()
    optimizer = torch.optim.AdamW(groups(model))
    train(model, optimizer, 1)
    model.frozen.requires_grad_(True)
    with pytest.raises(ComponentError, match=r"frozen\.weight"):
        read_moments(optimizer, model)
