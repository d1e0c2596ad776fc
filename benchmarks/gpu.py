"""What measurements cost on an accelerator, against the forward and backward of the same batches.

    python benchmarks/gpu.py                             # everything, under 9 minutes on one H100; `make bench-gpu`
    python benchmarks/gpu.py --only 8b-lora-512 --seconds 10
    python benchmarks/gpu.py --only tiny --device cpu    # tries the script itself

Models have random weights that are made on the device; nothing is downloaded. Each part runs in a separate process
under a time limit, and its results are written when it ends, so that a part that fails costs only itself. Variants of a
part run on the same batches, in turn, and are timed to the end of the device's work. Speeds are medians of the turns.

    floor                   forward and backward as a training step makes them, with activation checkpointing
    floor, kept             the same, and activations are kept
    forward                 the bare forward, without the head
    losses                  the loss probe
    features                per-sample gradients in Adam's direction, count-sketched to k = 8192
    features, kept          the same, and activations are kept
    features, no Adam       the gradients themselves, count-sketched
    features, kronecker     inputs and output gradients projected before they are multiplied
    features, dense         a dense Rademacher projection
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from overhead import machine

DIM = 8192
LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
QWEN_1_5B = {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}


@dataclass(frozen=True)
class Part:
    """One model and one length of samples.

    Attributes:
        config: sizes of a Llama.
        rank: of LoRA on all linear layers; 0: every weight is trained.
        length: tokens of a sample.
        tokens: tokens of a batch.
        limit: seconds after which the part is stopped.
        dense: whether the dense projection is timed, too.
    """

    config: dict[str, int]
    rank: int
    length: int
    tokens: int
    limit: int
    dense: bool = False


PARTS = {
    "8b-lora-512": Part(LLAMA_8B, 64, 512, 4096, 130, dense=True),
    "8b-lora-2048": Part(LLAMA_8B, 64, 2048, 4096, 100),
    "1.5b-full-512": Part(QWEN_1_5B, 0, 512, 8192, 100),
    "tiny": Part(TINY, 8, 32, 128, 60, dense=True),
}
"""``tiny`` is for trying the script; it is no part of a whole run."""
LIMITS = {"rates": 60, "steps": 120}
GOALS = {"features": 0.8, "features, kronecker": 0.8}
"""The least speed, of the floor's."""


def main() -> int:
    """Run the parts one after another and print what they measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ["rates", *PARTS, "steps"]
    parser.add_argument("--only", nargs="+", choices=names, default=[name for name in names if name != "tiny"])
    parser.add_argument("--seconds", type=float, default=4.0, help="of each variant")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--output", type=Path, help="JSON file of the results")
    parser.add_argument("--one", choices=names, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        device = torch.device(options.device)
        found = rates(device) if options.one == "rates" else measure(PARTS[options.one], device, options.seconds)
        print(json.dumps(found))
        return 0
    results: dict[str, Any] = {}
    whole = {"command": " ".join(["python", *sys.argv]), "machine": machine(), "results": results}
    for name in options.only:
        results[name] = apart(name, options)
        print(name, json.dumps(results[name], indent=2), flush=True)
        if options.output:
            options.output.write_text(json.dumps(whole, indent=2) + "\n")
    return 0


def apart(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run one part in a separate process, under its time limit."""
    here = Path(__file__)
    command = [sys.executable, str(here), "--one", name, "--seconds", str(options.seconds), "--device", options.device]
    if name == "steps":
        command = [sys.executable, str(here.with_name("mixing_overhead.py")), "--batch", "64", "--repeats", "2"]
    limit = LIMITS[name] if name in LIMITS else PARTS[name].limit
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done in {limit} s"}
    except subprocess.CalledProcessError as error:
        return {"failed": error.stderr[-2000:]}
    if name == "steps":
        return dict(json.loads(done.stdout[done.stdout.index("{") :]))
    return dict(json.loads(done.stdout.splitlines()[-1]))


class Clock:
    """Times work on a device to its end.

    Args:
        device: the work is done on.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def wait(self) -> None:
        """Wait until the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def turn(self, work: Callable[[], Any]) -> tuple[float, float]:
        """Return the seconds of one call, and those in which the host was busy with it."""
        self.wait()
        began = time.perf_counter()
        work()
        host = time.perf_counter() - began
        self.wait()
        return time.perf_counter() - began, host

    def median(self, work: Callable[[], Any], repeats: int = 20) -> float:
        """Return the median seconds of a call after one that is not timed."""
        work()
        return statistics.median(self.turn(work)[0] for _ in range(repeats))


def build(part: Part, device: torch.device) -> torch.nn.Module:
    """Return a model with random weights in bfloat16; the trained ones are in float32, as LLaMA-Factory has them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **part.config, tie_word_embeddings=not part.rank, attn_implementation="sdpa", max_position_embeddings=8192
    )
    torch.set_default_dtype(torch.bfloat16)
    with device:
        model: Any = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    if part.rank:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=part.rank, target_modules="all-linear", task_type="CAUSAL_LM"))
        for name, value in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(value, std=0.01)
    for value in model.parameters():
        if value.requires_grad:
            value.data = value.data.float()
    return model


def set_checkpointing(model: Any, wanted: bool) -> None:
    """Have the model checkpoint the activations of its layers, or keep them."""
    if wanted:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    else:
        model.gradient_checkpointing_disable()


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Return a batch of rows of one length."""
    return {key: torch.tensor([row[key] for row in rows]) for key in ("input_ids", "attention_mask", "labels")}


def measure(part: Part, device: torch.device, seconds: float) -> dict[str, Any]:
    """Return the speed and the peak memory of every variant."""
    from datasets import Dataset

    from dataflex.api.probe import GradientSettings
    from dataflex.data.pool import Pool
    from dataflex.probe.gradient_features import GradientSimilarities
    from dataflex.probe.losses import Losses
    from dataflex.probe.model import ModelProbe
    from dataflex.probe.moments import Moments

    clock, model = Clock(device), build(part, device)
    count = max(2, part.tokens // part.length)
    rng = np.random.default_rng(0)
    drawn = rng.integers(3, part.config["vocab_size"], (4 * count, part.length)).tolist()
    rows = [{"input_ids": ids, "attention_mask": [1] * part.length, "labels": ids} for ids in drawn]
    pool = Pool.concatenate({"samples": Dataset.from_list(rows)})
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    moments = {
        name: Moments(torch.full_like(value, 1e-4), torch.full_like(value, 1e-6), 5, (0.9, 0.999), 1e-8)
        for name, value in trained.items()
    }
    autocast = partial(torch.autocast, device.type, torch.bfloat16)
    probe = ModelProbe(pool, lambda: model, collate, autocast, device, part.tokens, moments=lambda: moments)
    everyone = np.arange(pool.size)
    batches = [
        {key: value.to(device) for key, value in collate(pool.rows(everyone[begin : begin + count])).items()}
        for begin in range(0, pool.size, count)
    ]

    def step() -> None:
        model.train()
        for batch in batches:
            with autocast():
                loss = model(**batch, use_cache=False).loss
            loss.backward()
            model.zero_grad(set_to_none=True)

    @torch.no_grad()
    def forward() -> None:
        model.eval()
        for batch in batches:
            with autocast():
                model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], logits_to_keep=1)

    def features(preconditioner: Any, projection: Any, rows: Any = everyone) -> None:
        others = np.zeros((1, DIM), dtype=np.float32)
        probe.measure(GradientSimilarities(GradientSettings(preconditioner, projection, DIM), others), rows)

    work: dict[str, tuple[bool, int, Callable[[], Any]]] = {
        "floor": (True, pool.size, step),
        "forward": (False, pool.size, forward),
        "losses": (True, pool.size, lambda: probe.measure(Losses(), everyone)),
        "features": (True, pool.size, partial(features, "adam", "count")),
        "features, no Adam": (True, pool.size, partial(features, "none", "count")),
        "features, kronecker": (True, pool.size, partial(features, "none", "kronecker")),
        "floor, kept": (False, pool.size, step),
        "features, kept": (False, pool.size, partial(features, "adam", "count")),
    }
    if part.dense:
        work["features, dense"] = (True, 2, partial(features, "none", "rademacher", everyone[:2]))
    found: dict[str, Any] = {"part": asdict(part), "trained": sum(value.numel() for value in trained.values())}
    for name, (checkpoints, samples, run) in work.items():
        set_checkpointing(model, checkpoints)
        probe.limits.clear()
        with contextlib.suppress(torch.OutOfMemoryError):
            found[name] = timed(clock, run, samples, 0.0 if name == "features, dense" else seconds)
            found[name]["tokens_cut_to"] = {kind: limit.tokens for kind, limit in probe.limits.items()}
        found.setdefault(name, {"failed": "out of memory"})
    speeds = {name: each.get("samples_per_second") for name, each in found.items() if isinstance(each, dict)}
    for name, speed in speeds.items():
        for floor in ("floor", "floor, kept", "forward"):
            if speed and speeds.get(floor):
                found[name][f"of_{floor}"] = round(speed / speeds[floor], 3)
        if name in GOALS:
            found[name]["goal"] = GOALS[name]
    return found


def timed(clock: Clock, work: Callable[[], Any], samples: int, seconds: float) -> dict[str, Any]:
    """Return the speed of some work over samples, the host's share of the time, and the peak of the memory."""
    work()
    clock.wait()
    if clock.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    turns, began = [clock.turn(work)], time.perf_counter()
    while time.perf_counter() - began < seconds:
        turns.append(clock.turn(work))
    middle = statistics.median(turn[0] for turn in turns)
    found: dict[str, Any] = {"samples_per_second": samples / middle, "turns": len(turns)}
    found["host_share"] = round(statistics.median(host / whole for whole, host in turns), 3)
    if clock.device.type == "cuda":
        found["peak_memory_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    return found


def rates(device: torch.device) -> dict[str, Any]:
    """Return what the device does at best: products, copies, and the passes over a block of gradients."""
    from dataflex.api.probe import GradientSettings
    from dataflex.probe.layers import Outer
    from dataflex.probe.moments import Moments
    from dataflex.probe.preconditioners import make_preconditioner
    from dataflex.probe.projections import make_projection
    from dataflex.probe.reducers import ProjectionReducer

    clock, big = Clock(device), device.type == "cuda"
    found: dict[str, Any] = {"products_tflops": {}, "passes": {}}
    size = 8192 if big else 256
    square = torch.randn(size, size, device=device).bfloat16()
    found["bf16_tflops"] = round(2 * size**3 / clock.median(lambda: square @ square) / 1e12, 2)
    copied = torch.empty(1 << (28 if big else 20), device=device)
    into = torch.empty_like(copied)
    found["copy_tb_per_second"] = round(2 * copied.nbytes / clock.median(lambda: into.copy_(copied)) / 1e12, 3)
    batch, tokens = (8, 512) if big else (2, 16)
    for rows, columns in ((64, 4096), (14336, 64), (4096, 4096), (8960, 1536)) if big else ((16, 32),):
        left, right = (torch.randn(batch, tokens, wide, device=device) for wide in (rows, columns))
        operations = 2 * batch * tokens * rows * columns
        for kind in (torch.float32, torch.bfloat16):
            part = Outer(right.to(kind), left.to(kind))
            taken = clock.median(partial(part.block, 0, rows))
            found["products_tflops"][f"{rows} x {columns}, {kind}"] = round(operations / taken / 1e12, 2)
        for adam in ("none", "adam"):
            settings = GradientSettings(adam, "count", DIM if big else 64)  # type: ignore[arg-type]
            shape = (rows, columns)
            moments = {
                "weight": Moments(
                    torch.zeros(shape, device=device), torch.ones(shape, device=device), 3, (0.9, 0.999), 1e-8
                )
            }
            reducer = ProjectionReducer(
                make_preconditioner(settings, moments if adam == "adam" else None),
                make_projection(settings, {"weight": rows * columns}, device),
                device,
            )
            part = Outer(right.bfloat16(), left.bfloat16())

            def add(reducer: ProjectionReducer = reducer, part: Outer = part) -> None:
                reducer.begin(batch, torch.float32)
                reducer.add("weight", [part])

            product = clock.median(partial(part.block, 0, rows))
            rest = clock.median(add) - product
            numbers = batch * rows * columns
            found["passes"][f"{rows} x {columns}, {adam}"] = {
                "product_us": round(product * 1e6, 1),
                "rest_us": round(rest * 1e6, 1),
                "bytes_a_number_at_copy_speed": round(rest * found["copy_tb_per_second"] * 1e12 / numbers, 1),
            }
    return found


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
