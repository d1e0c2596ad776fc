"""Whole runs through LLaMA-Factory on an accelerator: every kind of method, resumed, under NCCL, ZeRO-3 and QLoRA."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from launch import ON_THE_CPU
from runs.workshop import Workshop

EVALUATED = {"eval_dataset": "held", "eval_strategy": "steps", "eval_steps": 4}
LESS: dict[str, Any] = {"method": "less", "preconditioner": "adam", "proj_dim": 256}
REWARD = {"type": "python", "path": str(Path(__file__).with_name("rewards.py")), "function": "vowels"}
METHODS: dict[str, dict[str, Any]] = {
    "uniform": {"mix": {"method": "uniform"}},
    "odm": {"update_steps": 2, "mix": {"method": "odm"}},
    "group_dro": {"mix": {"method": "group_dro"}},
    "doge": {"mix": {"method": "doge", "proj_dim": 256}},
    "weight": {"weight": {"method": "loss"}},
    "loss": {"update_steps": 4, "select": {"method": "loss"}},
    "less": {"warmup_steps": 2, "update_steps": 3, "select": LESS},
    "cluster_less": {
        "update_steps": 4,
        "select": {"method": "cluster_less", "preconditioner": "none", "proj_dim": 256},
    },
    "greats": {"update_steps": 4, "select": {"method": "greats"}},
    "grand": {"update_steps": 4, "select": {"method": "grand"}},
    "rds_plus": {"update_steps": 4, "select": {"method": "rds_plus"}},
    "nice": {
        "warmup_steps": 2,
        "update_steps": 3,
        "select": {"method": "nice", "proj_dim": 256, "reward": REWARD, "samples": 4},
    },
    "capped": {"warmup_steps": 2, "update_steps": 3, "select": {**LESS, "max_overhead": 2.0}},
}
ON_THE_DEVICE = {"OMP_NUM_THREADS": "8", "PYTHONWARNINGS": "ignore"}
RESUMED = {"warmup_steps": 3, "update_steps": 3, "select": LESS}


@pytest.fixture(scope="module")
def shop(device: torch.device, tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """Return a workshop whose runs are on the device under test."""
    inputs = tmp_path_factory.mktemp("inputs")
    return Workshop(
        root=tmp_path_factory.mktemp("runs"),
        model=tiny.make_model(inputs / "model", hidden=64),
        dropout_model=tiny.make_model(inputs / "dropout", dropout=0.1),
        data=tiny.make_data(inputs / "data"),
        environment=ON_THE_DEVICE if device.type == "cuda" else ON_THE_CPU,
    )


def add(shop: Workshop, name: str, section: dict[str, Any] | None, **changes: Any) -> None:
    """Add a run over three domains; in bfloat16 on a device."""
    given = {"dataset": "alpha,beta,gamma", "bf16": shop.environment != ON_THE_CPU, **EVALUATED, **changes}
    shop.add(name, plain=section is None, **given, **({} if section is None else {"dataflex": section}))


def add_resumed(shop: Workshop, kind: str) -> None:
    """Add a run, the same run killed behind a checkpoint, and the rest of that one."""
    keep = {"save_strategy": "steps", "save_steps": 4, "full_determinism": True}
    add(shop, f"{kind}-whole", RESUMED, **keep)
    add(shop, f"{kind}-cut", RESUMED, stop_at=6, **keep)
    checkpoint = str(shop.root / f"{kind}-cut" / "checkpoint-4")
    add(shop, f"{kind}-rest", RESUMED, into=f"{kind}-cut", resume_from_checkpoint=checkpoint, **keep)


def check_resumed(shop: Workshop, kind: str) -> None:
    """Check that the two have the same bits and the same plans."""
    assert shop.trace(f"{kind}-whole")["weights"] == shop.trace(f"{kind}-cut")["weights"] is not None
    assert shop.plan_digests(f"{kind}-whole") == shop.plan_digests(f"{kind}-cut")


@pytest.fixture(scope="module")
def alone(shop: Workshop) -> Workshop:
    """Return the workshop after the runs of one process."""
    for name, section in METHODS.items():
        add(shop, name, section)
    add_resumed(shop, "alone")
    shop.start(1)
    return shop


@pytest.mark.parametrize("name", METHODS)
def test_every_kind_of_method_runs(name: str, alone: Workshop) -> None:
    trace = alone.trace(name)
    assert len(trace["losses"]) == 8
    assert all(loss == loss for loss in trace["losses"])


def test_a_resumed_run_has_the_same_bits(alone: Workshop) -> None:
    check_resumed(alone, "alone")


def test_runs_of_one_process_under_torchrun_train_and_resume(shop: Workshop) -> None:
    """One process with NCCL: the collectives are made, though there is nobody to wait for."""
    for name in ("less", "group_dro", "cluster_less"):
        add(shop, f"torchrun-{name}", METHODS[name])
    add_resumed(shop, "torchrun")
    shop.start(1, torchrun=True)
    for name in ("less", "group_dro", "cluster_less"):
        assert len(shop.trace(f"torchrun-{name}")["losses"]) == 8
    check_resumed(shop, "torchrun")


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
def test_zero3_trains_with_parameters_and_optimizer_offloaded(
    shop: Workshop, cuda: torch.device, tmp_path: Path
) -> None:
    settings = tiny.zero(tmp_path, 3)
    path = Path(settings["deepspeed"])
    config = tiny.deepspeed_config(3)
    where = {"device": "cpu", "pin_memory": True}
    config["zero_optimization"] |= {"offload_param": where, "offload_optimizer": where}
    config["zero_force_ds_cpu_optimizer"] = False
    path.write_text(json.dumps(config))
    for name in ("less", "loss", "cluster_less", "group_dro"):
        add(shop, f"zero3-{name}", METHODS[name], **settings)
    shop.start(1, torchrun=True)
    for name in ("less", "loss", "cluster_less", "group_dro"):
        assert len(shop.trace(f"zero3-{name}")["losses"]) == 8


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_four_bit_weights_train(shop: Workshop, cuda: torch.device) -> None:
    for name in ("less", "loss"):
        add(shop, f"qlora-{name}", METHODS[name], quantization_bit=4, quantization_method="bnb")
    shop.start(1)
    for name in ("less", "loss"):
        assert len(shop.trace(f"qlora-{name}")["losses"]) == 8


def test_fsdp2_trains_with_parameters_offloaded_to_the_host(shop: Workshop, cuda: torch.device, tmp_path: Path) -> None:
    """The parameters' device is not that of the batches, whose precision the gradients must be taken in."""
    config = tmp_path / "fsdp.json"
    config.write_text(json.dumps({"fsdp_version": 2, "reshard_after_forward": True}))
    fsdp = {"fsdp": "full_shard auto_wrap offload", "fsdp_config": str(config)}
    add(shop, "fsdp2-less", METHODS["less"], finetuning_type="full", **fsdp)
    shop.start(1, torchrun=True)
    assert len(shop.trace("fsdp2-less")["losses"]) == 8


def test_a_compiled_model_trains(shop: Workshop, cuda: torch.device) -> None:
    add(shop, "compiled-loss", METHODS["loss"], torch_compile=True)
    shop.start(1)
    assert len(shop.trace("compiled-loss")["losses"]) == 8
