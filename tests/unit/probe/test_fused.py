"""The fused kernel: in Triton's interpreter equal to the plain passes, and compiled for a device without one."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from dataflex.probe import projections
from dataflex.probe.moments import Moments
from dataflex.probe.preconditioners import AdamPreconditioner, NoPreconditioner, Preconditioner
from dataflex.probe.projections import CountProjection, fused_sketch, plain_sketch, works

triton = pytest.importorskip("triton")
CPU = torch.device("cpu")
NAME = "dataflex.probe.fused"


def loaded(monkeypatch: pytest.MonkeyPatch, interpret: bool) -> ModuleType:
    """Return a fresh copy of the module: how a kernel runs is settled when it is defined."""
    monkeypatch.setenv("TRITON_INTERPRET", "1" if interpret else "0")
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    return importlib.import_module(NAME)


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    yield loaded(monkeypatch, True)
    sys.modules.pop(NAME, None)


def preconditioner(kind: str, total: int) -> Preconditioner:
    if kind == "none":
        return NoPreconditioner()
    generator = torch.Generator().manual_seed(1)
    average, square = torch.randn(total, generator=generator), torch.rand(total, generator=generator) + 1e-3
    return AdamPreconditioner({"w": Moments(average * 0.1, square, 4, (0.9, 0.99), 1e-6)}, kind == "adam_less")


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["none", "adam", "adam_less"])
@pytest.mark.parametrize(
    "dim, total, start, size, batch, programs",
    [
        (128, 640, 0, 640, 3, 1),  # whole blocks, several tiles for the batch's padding
        (100, 1000, 0, 950, 2, 3),  # blocks that end within a word of signs and a tile of places
        (300, 2000, 450, 1111, 9, 24),  # a piece that begins and ends within blocks, two tiles of samples, splits
        (32, 5000, 70, 12, 1, 8),  # a piece within one block
    ],
)
def test_equal_to_the_plain_passes(
    fused: ModuleType,
    kind: str,
    dtype: torch.dtype,
    dim: int,
    total: int,
    start: int,
    size: int,
    batch: int,
    programs: int,
) -> None:
    values = torch.randn(batch, size, generator=torch.Generator().manual_seed(0)).to(dtype)
    made, projection = preconditioner(kind, total), CountProjection(dim, 3, CPU)
    sums = torch.zeros(batch, projection.width, dtype=torch.float64)
    projection.add_directions(sums, "w", start, values.double(), total, made)
    expected = projection.folded(sums)
    found = fused.sketch(values.clone(), start, projection._key("w"), dim, made.terms("w"), programs)
    assert found.dtype == torch.float32
    assert distance(found, expected) < 1e-6
    again = fused.sketch(values.clone(), start, projection._key("w"), dim, made.terms("w"), programs)
    assert torch.equal(found, again)
    plain = plain_sketch(made("w", start, values.double()), start, projection._key("w"), dim)
    assert distance(plain, expected) < 1e-6


def test_parameters_of_more_than_32_bits(fused: ModuleType) -> None:
    start = (2**33 + 3) * 40 + 5
    values = torch.randn(2, 100, generator=torch.Generator().manual_seed(0))
    found = fused.sketch(values, start, 2**127 + 11, 40, None)
    assert distance(found, plain_sketch(values.double(), start, 2**127 + 11, 40)) < 1e-6
    assert distance(found, plain_sketch(values.double(), start - 2**33 * 40, 2**127 + 11, 40)) > 0.5


def test_a_sample_has_the_same_sketch_in_any_batch(fused: ModuleType) -> None:
    values, made = torch.randn(8, 500), preconditioner("adam", 500)
    whole = fused.sketch(values, 0, 5, 64, made.terms("w"), 1)
    assert torch.equal(fused.sketch(values[2:3], 0, 5, 64, made.terms("w"), 1), whole[2:3])


@pytest.mark.parametrize("with_kernel", [True, False])
@pytest.mark.parametrize("kind", ["none", "adam"])
def test_a_projection_on_a_device(
    fused: ModuleType, monkeypatch: pytest.MonkeyPatch, kind: str, with_kernel: bool
) -> None:
    """What a projection does there, on the CPU's tensors: with the kernel and without it the CPU's features."""
    used = []

    def kernel(*args: Any) -> Tensor:
        used.append(args)
        return fused.sketch(*args)

    monkeypatch.setattr(projections, "fused_sketch", lambda device: kernel if with_kernel else None)
    values, made = torch.randn(3, 400, generator=torch.Generator().manual_seed(0)), preconditioner(kind, 400)
    sums = []
    for device in (CPU, torch.device("cuda")):
        projection = CountProjection(100, 3, device)
        out = torch.zeros(3, projection.width)
        for begin, end in ((0, 150), (150, 400)):
            projection.add_directions(out, "w", begin, values[:, begin:end].clone(), 400, made)
        sums.append(projection.folded(out).double())
    assert distance(sums[1], sums[0]) < 1e-6
    assert len(used) == (2 if with_kernel else 0)


def test_a_kernel_is_tried_before_it_is_used(fused: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    def no_compiler(*args: Any) -> Tensor:
        raise RuntimeError("Failed to find C compiler")

    assert works(fused.sketch, CPU)
    assert not caplog.messages
    assert not works(no_compiler, CPU)
    assert not works(lambda *args: fused.sketch(*args) * 1.01, CPU)
    reasons = [message.rpartition(": ")[2] for message in caplog.messages]
    assert reasons == ["Failed to find C compiler", "its results are wrong"]


@pytest.mark.parametrize("adam", [False, True])
def test_compiled_for_a_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, adam: bool) -> None:
    """Threads lie side by side in the places of a block, so that they read one stretch of memory together.

    That a block's places are said to be contiguous makes no load a vector: it would read over the end of the block.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = loaded(monkeypatch, False)._sketch
    constants = {"ADAM": adam, "SAMPLES": 8, "PLACES": 256, "BLOCKS": 32}
    types = dict.fromkeys(kernel.arg_names, "i32")
    types |= dict.fromkeys(("values", "average", "square", "out"), "*fp32") | dict.fromkeys(constants, "constexpr")
    scales = kernel.arg_names[kernel.arg_names.index("average_scale") : kernel.arg_names.index("ADAM")]
    types |= dict.fromkeys(scales, "fp32") | {"start": "i64"}
    aligned = {(number,): [["tt.divisibility", 16]] for number in range(4)}  # the tensors, as in a run
    source = ASTSource(kernel, types, constexprs=constants, attrs=aligned)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    layouts = [line for line in made.asm["ttgir"].splitlines() if line.startswith("#blocked =")]
    assert len(layouts) == 1
    assert "threadsPerWarp = [1, 32], warpsPerCTA = [1, 4], order = [1, 0]" in layouts[0]
    assert "ld.global.b32" in made.asm["ptx"]
    assert "ld.global.v" not in made.asm["ptx"]
    assert "atom" not in made.asm["ptx"]
    sys.modules.pop(NAME, None)


def test_not_used_on_a_cpu() -> None:
    assert fused_sketch(CPU) is None
