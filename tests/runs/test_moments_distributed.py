"""Adam's moments on two processes: DDP, FSDP2 and ZeRO-1, 2, 3 give the same, and reading changes nothing."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from launch import ON_THE_CPU, run_script

HERE = Path(__file__).parent
pytestmark = [
    pytest.mark.launch,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed"),
]
SHARDED = ["fsdp2", "zero1", "zero2", "zero3"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, int], dict[str, Any]]:
    """What one start of two processes found, by mode, run and rank."""
    folder = tmp_path_factory.mktemp("moments")
    model = tiny.make_model(folder / "model")
    environment = {**ON_THE_CPU, "CUDA_VISIBLE_DEVICES": ""}
    script = HERE / "moments_runner.py"
    run_script(script, model, folder, log=folder / "log", processes=2, environment=environment)
    found = {}
    for file in folder.glob("*-*.pt"):
        mode, run, rank = file.stem.split("-")
        found[mode, run, int(rank)] = torch.load(file, weights_only=True)
    return found


def assert_near(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.dtype == torch.float32
    assert got.shape == expected.shape
    assert (got - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("run", ["full", "lora"])
@pytest.mark.parametrize("mode", SHARDED)
def test_moments_under_sharding_equal_those_under_ddp(results: dict, mode: str, run: str) -> None:
    for rank in (0, 1):
        expected, got = results["ddp", run, 0]["moments"], results[mode, run, rank]["moments"]
        assert got.keys() == expected.keys() == {2, 4}
        for step in (2, 4):
            assert list(got[step]) == list(expected[step])
            for name, (exp_avg, exp_avg_sq, *rest) in got[step].items():
                first, second, *settings = expected[step][name]
                assert first.norm() > 0, name
                assert_near(exp_avg, first)
                assert_near(exp_avg_sq, second)
                assert rest == settings == [step, (0.9, 0.99), 1e-8]


def test_only_the_trainable_parameters_are_read(results: dict) -> None:
    full, lora = (results["ddp", run, 0]["moments"][2] for run in ("full", "lora"))
    assert full.keys() == results["ddp", "full", 0]["weights"].keys()
    assert lora
    assert all("lora_" in name for name in lora)
    assert len(lora) < len(results["ddp", "lora", 0]["weights"])


@pytest.mark.parametrize("mode", ["ddp", *SHARDED])
def test_reading_does_not_change_the_weights(results: dict, mode: str) -> None:
    unread = results[mode, "unread", 0]["weights"]
    for rank in (0, 1):
        read = results[mode, "full", rank]["weights"]
        assert read.keys() == unread.keys()
        assert all(torch.equal(read[name], unread[name]) for name in read)


@pytest.mark.parametrize("mode", ["ddp", *SHARDED])
def test_reading_moments_before_the_first_step_is_an_error(results: dict, mode: str) -> None:
    for rank in (0, 1):
        assert "dataflex.warmup_steps to at least 1" in results[mode, "full", rank]["error"]


def test_each_mode_used_the_intended_wrapper(results: dict) -> None:
    kinds = {mode: results[mode, "full", 0] for mode in ("ddp", *SHARDED)}
    assert kinds["ddp"]["wrapper"][0] == "DistributedDataParallel"
    assert "FSDPModule" in kinds["fsdp2"]["wrapper"]
    for stage in ("1", "2", "3"):
        assert "DeepSpeedEngine" in kinds[f"zero{stage}"]["wrapper"]
    optimizers = {mode: kind["optimizer"] for mode, kind in kinds.items()}
    assert optimizers == {
        "ddp": "AdamW",
        "fsdp2": "AdamW",
        "zero1": "DeepSpeedZeroOptimizer",
        "zero2": "DeepSpeedZeroOptimizer",
        "zero3": "DeepSpeedZeroOptimizer_Stage3",
    }
    assert [kinds[f"zero{stage}"]["partitions_gradients"] for stage in "12"] == [False, True]
