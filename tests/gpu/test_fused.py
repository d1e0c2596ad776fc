"""The fused kernel and the signs on an accelerator: equal to the CPU, and the same bits in every run."""

from __future__ import annotations

import pytest
import torch

from dataflex.probe.moments import Moments
from dataflex.probe.preconditioners import AdamPreconditioner, NoPreconditioner, Preconditioner
from dataflex.probe.projections import CountProjection, fused_sketch, plain_sketch
from dataflex.probe.signs import random_numbers, random_signs

CPU = torch.device("cpu")


def preconditioner(kind: str, total: int, device: torch.device) -> Preconditioner:
    if kind == "none":
        return NoPreconditioner()
    generator = torch.Generator().manual_seed(1)
    average, square = torch.randn(total, generator=generator) * 0.1, torch.rand(total, generator=generator) + 1e-3
    moments = Moments(average.to(device), square.to(device), 4, (0.9, 0.99), 1e-6)
    return AdamPreconditioner({"w": moments}, kind == "adam_less")


@pytest.mark.parametrize("key", [0, 2**127 + 11])
def test_signs_on_the_device_equal_those_on_the_cpu(device: torch.device, key: int) -> None:
    for first, length in ((0, 8192), (2**32 - 5, 1000), (2**40, 1)):
        found = random_signs(key, first, 50, length, device)
        assert torch.equal(found.cpu(), random_signs(key, first, 50, length, CPU))
        found = random_numbers(key, first, 50, 8192, device)
        assert torch.equal(found.cpu(), random_numbers(key, first, 50, 8192, CPU))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["none", "adam", "adam_less"])
@pytest.mark.parametrize(
    "dim, total, start, size, batch",
    [(8192, 2_000_000, 0, 2_000_000, 8), (8192, 300_000, 12_345, 200_001, 3), (100, 70_000, 50, 69_000, 1)],
)
def test_the_kernel_equals_the_plain_passes_on_the_cpu(
    cuda: torch.device, kind: str, dtype: torch.dtype, dim: int, total: int, start: int, size: int, batch: int
) -> None:
    sketch = fused_sketch(cuda)
    assert sketch is not None
    values = torch.randn(batch, size, generator=torch.Generator().manual_seed(0)).to(dtype)
    projection = CountProjection(dim, 3, CPU)
    key = projection._key("w")
    sums = torch.zeros(batch, projection.width, dtype=torch.float64)
    projection.add_directions(sums, "w", start, values.double(), total, preconditioner(kind, total, CPU))
    expected, there = projection.folded(sums), preconditioner(kind, total, cuda)
    found = sketch(values.to(cuda), start, key, dim, there.terms("w"))
    assert (found.cpu() - expected).norm() < 1e-5 * expected.norm()
    assert torch.equal(found, sketch(values.to(cuda), start, key, dim, there.terms("w")))
    plain = plain_sketch(there("w", start, values.to(cuda, torch.float32)), start, key, dim)
    assert (plain.cpu() - expected).norm() < 1e-5 * expected.norm()
