"""Trains a tiny model under DDP, FSDP2 and ZeRO-1, 2, 3 and reads Adam's moments: ``moments_runner.py MODEL OUTPUT``.

Torchrun starts this script on the CPU. Every mode trains with and without reading. The moments that were read and the
weights at the end are written to ``OUTPUT/<mode>-<run>-<rank>.pt``.
"""

from __future__ import annotations

import gc
import os
import sys
import time
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from between_runs import forget_training, start_deepspeed
from peft import LoraConfig, get_peft_model
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

import tiny
from dataflex.errors import ComponentError
from dataflex.probe.moments import read_moments

READ_AT = (2, 4)
STEPS = 5
DECODER_LAYER = "LlamaDecoderLayer"


def mode_arguments(mode: str) -> dict[str, Any]:
    if mode == "fsdp2":
        return {
            "fsdp": "full_shard auto_wrap",
            "fsdp_config": {
                "version": 2,
                "transformer_layer_cls_to_wrap": [DECODER_LAYER],
                "cpu_ram_efficient_loading": False,
            },
        }
    return {"deepspeed": tiny.deepspeed_config(int(mode[-1]))} if mode.startswith("zero") else {}


class Reader(TrainerCallback):
    """Reads the moments after some of the steps, and tries to before the first step, when there are none."""

    def __init__(self) -> None:
        self.trainer: Trainer | None = None
        self.moments: dict[int, dict[str, Any]] = {}
        self.error = ""
        self.seconds = 0.0

    def read(self) -> dict[str, Any]:
        raw = self.trainer.accelerator.unwrap_model(self.trainer.model_wrapped)
        return read_moments(self.trainer.optimizer, raw)

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        try:
            self.read()
        except ComponentError as error:
            self.error = str(error)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step in READ_AT:
            start = time.perf_counter()
            moments = self.read()
            self.seconds = time.perf_counter() - start
            self.moments[state.global_step] = {
                name: (one.exp_avg.clone(), one.exp_avg_sq.clone(), one.step, one.betas, one.eps)
                for name, one in moments.items()
            }


def full_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    weights = {}
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            value = parameter.detach()
            weights[name] = (value.full_tensor() if isinstance(value, DTensor) else value).clone()
    return weights


def build(path: str, *, lora: bool) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    if not lora:
        return model
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))


def train(path: str, output: Path, mode: str, *, lora: bool, reads: bool) -> dict[str, Any]:
    args = TrainingArguments(
        output_dir=str(output / "trainer"),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=STEPS,
        learning_rate=0.01,
        weight_decay=0.1,
        adam_beta2=0.99,
        optim="adamw_torch",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
        seed=5,
        **mode_arguments(mode),
    )
    if mode == "fsdp2":
        # accelerate turns only GPU runs into FSDP ones
        assert args.device.type == "cpu"
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    model = build(path, lora=lora)
    generator = torch.Generator().manual_seed(2)
    rows = [torch.randint(3, 100, (12,), generator=generator) for _ in range(48)]
    reader = Reader()
    trainer = Trainer(
        model,
        args,
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        callbacks=[reader] if reads else [],
    )
    reader.trainer = trainer
    trainer.train()
    raw = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    inner = trainer.optimizer.optimizer
    return {
        "wrapper": [kind.__name__ for kind in type(trainer.model_wrapped).__mro__],
        "optimizer": type(inner).__name__,
        "partitions_gradients": bool(inner.partition_gradients) if mode in ("zero1", "zero2") else None,
        "moments": reader.moments,
        "error": reader.error,
        "seconds": reader.seconds,
        "weights": full_weights(raw),
    }


def main() -> None:
    path, output = sys.argv[1], Path(sys.argv[2])
    start_deepspeed(on_the_cpu=True)
    rank = dist.get_rank()
    variables = set(os.environ)
    gc.freeze()  # objects of the imports: garbage collections of the trainings skip them
    for mode in ("ddp", "fsdp2", "zero1", "zero2", "zero3"):
        for run, lora, reads in (("full", False, True), ("unread", False, False), ("lora", True, True)):
            start = time.perf_counter()
            result = train(path, output, mode, lora=lora, reads=reads)
            torch.save(result, output / f"{mode}-{run}-{rank}.pt")
            print(f"{mode} {run}: {time.perf_counter() - start:.1f} s, reading {result['seconds']:.3f} s", flush=True)
            forget_training(variables)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
