"""The kernel for processors: equal to the plain passes, and the same on any number of threads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dataflex.probe.preconditioners import AdamPreconditioner, NoPreconditioner, Preconditioner
from dataflex.probe.projections import CountProjection

fused_cpu = pytest.importorskip("dataflex.probe.fused_cpu", exc_type=ImportError)
CPU = torch.device("cpu")


def preconditioner(kind: str, total: int, dtype: torch.dtype = torch.float32) -> Preconditioner:
    from dataflex.probe.moments import Moments

    if kind == "none":
        return NoPreconditioner()
    generator = torch.Generator().manual_seed(1)
    average, square = torch.randn(total, generator=generator) * 0.1, torch.rand(total, generator=generator) + 1e-3
    return AdamPreconditioner(
        {"w": Moments(average.to(dtype), square.to(dtype), 4, (0.9, 0.99), 1e-6)}, kind == "adam_less"
    )


def sketched(values: Tensor, start: int, total: int, dim: int, made: Preconditioner, threads: int) -> Tensor:
    """Return the sketch on so many threads, or without the kernel on none."""
    projection = CountProjection(dim, 3, CPU)
    projection._fused = fused_cpu.BlockSums(threads) if threads else None
    sums = torch.zeros(values.shape[0], projection.width, dtype=values.dtype)
    projection.add_directions(sums, "w", start, values.clone(), total, made)
    return projection.folded(sums)


@pytest.mark.parametrize("kind", ["none", "adam", "adam_less"])
@pytest.mark.parametrize(
    "dim, total, start, size, batch",
    [
        (128, 640, 0, 640, 3),  # whole blocks
        (100, 1000, 0, 950, 2),
        (300, 2000, 450, 1111, 9),  # begins and ends within blocks
        (32, 5000, 70, 12, 1),  # a piece within one block
        (4096, 9000, 0, 9000, 5),
    ],
)
def test_the_kernel_equals_the_plain_passes(kind: str, dim: int, total: int, start: int, size: int, batch: int) -> None:
    values = torch.randn(batch, size, generator=torch.Generator().manual_seed(0))
    made = preconditioner(kind, total)
    expected = sketched(values.double(), start, total, dim, made, 0)
    found = [sketched(values, start, total, dim, made, threads) for threads in (1, 2, 3)]
    assert float((found[0] - expected).norm() / expected.norm()) < 1e-6
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_a_gradient_that_is_not_finite_gives_a_sketch_that_is_not_finite() -> None:
    values = torch.zeros(2, 64)
    values[1, 5] = torch.nan
    for kind in ("none", "adam"):
        found = sketched(values, 0, 64, 32, preconditioner(kind, 64), 2)
        assert found.isnan().sum(1).tolist() == [0, 1]


def test_gradients_of_other_types_do_not_use_the_kernel() -> None:
    values, low = torch.randn(2, 64), preconditioner("adam", 64, torch.bfloat16)
    assert not fused_cpu.BlockSums.serves(values.double(), None)
    assert not fused_cpu.BlockSums.serves(values, low.terms("w"))
    assert torch.equal(sketched(values, 0, 64, 32, low, 2), sketched(values, 0, 64, 32, low, 0))


def test_without_numba_the_plain_passes_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert CountProjection(32, 3, CPU)._fused is None
