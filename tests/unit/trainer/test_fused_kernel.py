"""The kernels of the fused loss: equal to all logits in Triton's interpreter, and compiled without a device."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dataflex.probe.head import AfterHead
from dataflex.trainer import fused_loss
from dataflex.trainer.fused_loss import linear_losses, softmax_kernel, weighted_linear_loss, works

triton = pytest.importorskip("triton")
CPU = torch.device("cpu")
NAME = "dataflex.trainer.fused_kernel"
AFTER = {"plain": AfterHead(), "Gemma 2": AfterHead(cap=3.0), "Granite": AfterHead(factor=2.0, divisor=8.0)}


def loaded(monkeypatch: pytest.MonkeyPatch, interpret: bool) -> ModuleType:
    """Return a fresh copy of the module: how a kernel runs is settled when it is defined."""
    monkeypatch.setenv("TRITON_INTERPRET", "1" if interpret else "0")
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    return importlib.import_module(NAME)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    module = loaded(monkeypatch, True)
    monkeypatch.setattr(module, "_BLOCK", 64)  # the interpreter merges the results of a block one by one
    yield module.RowSoftmax
    sys.modules.pop(NAME, None)


@pytest.mark.parametrize("after", AFTER.values(), ids=list(AFTER))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("columns", [7, 64, 201])  # part of a block, one block, several and a part
def test_losses_and_gradients_equal_those_of_all_logits(
    kernel: Any, columns: int, dtype: torch.dtype, tolerance: float, after: AfterHead
) -> None:
    torch.manual_seed(0)
    products = (torch.randn(5, columns) * 4).to(dtype)
    labels, scale = torch.tensor([0, columns - 1, 3, 5, 1]), torch.tensor([1.0, 0.0, -2.0, 1e-3, 30.0])
    exact = products.double().requires_grad_()
    losses = F.cross_entropy(after(exact), labels, reduction="none")
    (expected,) = torch.autograd.grad((losses * scale).sum(), exact)
    first = kernel(products.clone(), labels, None, after)
    torch.testing.assert_close(first.losses.double(), losses.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(first.sums.double(), after(exact.detach()).logsumexp(1), rtol=1e-5, atol=1e-5)
    for made in (first, kernel(products.clone(), labels, first.sums, after)):
        found = made.gradient(scale)
        assert found.dtype == dtype
        # Of the gradient of one loss, whose norm is at most sqrt(2). Less remains where the label is nearly certain.
        assert (torch.linalg.vector_norm(found.double() - expected, dim=1) <= tolerance * scale.abs()).all()


def test_extreme_logits_give_finite_losses(kernel: Any) -> None:
    products = torch.tensor([[3e4, -3e4, -float("inf")]] * 2)
    made = kernel(products, torch.tensor([0, 1]), None, AfterHead())
    torch.testing.assert_close(made.losses, torch.tensor([0.0, 6e4]))
    torch.testing.assert_close(made.gradient(torch.ones(2)), torch.tensor([[0.0, 0.0, 0.0], [1.0, -1.0, 0.0]]))


@pytest.mark.parametrize("later", [True, False])
@pytest.mark.parametrize("trained", [True, False])
def test_the_loss_is_the_same_with_the_kernel(
    kernel: Any, monkeypatch: pytest.MonkeyPatch, trained: bool, later: bool
) -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 90).requires_grad_(trained)
    hidden, labels, given = torch.randn(11, 8, requires_grad=True), torch.randint(0, 90, (11,)), torch.rand(11)
    given[::3] = 0
    inputs = [hidden, *(each for each in head.parameters() if each.requires_grad)]

    def run() -> list[torch.Tensor]:
        if later:
            losses, _ = linear_losses(head, hidden, labels, AFTER["Gemma 2"], size=4)
            total = (losses * given).sum()
        else:
            total, losses = weighted_linear_loss(head, hidden, labels, given, AFTER["Gemma 2"], 4)
        return [losses.detach(), *torch.autograd.grad(total, inputs)]

    expected = run()
    monkeypatch.setattr(fused_loss, "softmax_kernel", lambda device: kernel)
    torch.testing.assert_close(run(), expected, rtol=1e-4, atol=1e-6)


def test_a_statistic_sees_the_logits_before_the_kernel_overwrites_them(
    kernel: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_loss, "softmax_kernel", lambda device: kernel)
    head, hidden, labels = torch.nn.Linear(8, 50).bfloat16(), torch.randn(11, 8).bfloat16(), torch.randint(0, 50, (11,))
    _, means = linear_losses(head, hidden, labels, AFTER["Gemma 2"], lambda logits: logits.mean(1), size=4)
    torch.testing.assert_close(means, AFTER["Gemma 2"](head(hidden).float()).mean(1))


def test_a_kernel_is_tried_before_it_is_used(kernel: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert works(kernel, CPU)

    class Wrong(kernel):  # type: ignore[misc]
        def gradient(self, scale: torch.Tensor) -> torch.Tensor:
            return super().gradient(scale + 1)

    def broken(*_: Any) -> Any:
        raise RuntimeError("no C compiler")

    with caplog.at_level(logging.WARNING):
        assert not works(Wrong, CPU)
        assert not works(broken, CPU)
    assert ["its results are wrong" in caplog.messages[0], "no C compiler" in caplog.messages[1]] == [True, True]


def test_the_kernel_is_not_used_on_a_cpu() -> None:
    assert softmax_kernel(CPU) is None


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("name", ["_losses", "_gradient"])
def test_the_kernels_compile_for_a_device(
    name: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(loaded(monkeypatch, False), name)
    types = dict.fromkeys(kernel.arg_names, "*fp32") | {"products": f"*{dtype}", "labels": "*i64"}
    types |= {"factor": "fp32", "cap": "fp32", "CAPPED": "constexpr", "COLUMNS": "constexpr", "BLOCK": "constexpr"}
    aligned = {(number,): [["tt.divisibility", 16]] for number in range(4)}  # the tensors, as in a run
    source = ASTSource(kernel, types, constexprs={"CAPPED": True, "COLUMNS": 151_936, "BLOCK": 4096}, attrs=aligned)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert "atom" not in made.asm["ptx"]
    sys.modules.pop(NAME, None)
