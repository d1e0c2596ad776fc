"""Runs many short trainings in one process group: ``python runner.py SPEC.json`` or under torchrun.

A specification is a list of ``{"name", "args", "plain", "stop_at"}``. What each run did is written to
``<output_dir>/trace-<rank>.json``. Starting Python with LLaMA-Factory costs 20 s, so the tests share two starts.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

os.environ.setdefault("LLAMAFACTORY_VERBOSITY", "WARN")

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState, PartialState
from llamafactory.train import tuner
from safetensors.torch import load_file
from transformers import TrainerCallback

from dataflex import bridge
from dataflex.config import split_config
from dataflex.trainer.mixin import DynamicTrainerMixin
from dataflex.trainer.rounds import INDEX_KEY
from dataflex.trainer.run import DynamicRun


class Killed(BaseException):
    """Stands for the process being killed: nothing catches it."""


class Watch(TrainerCallback):
    """Notes what the Trainer does, and stops it where a test wants it killed."""

    def __init__(self, stop_at: int | None) -> None:
        self.stop_at = stop_at
        self.optimizer_steps = 0

    def on_optimizer_step(self, args, state, control, **kwargs) -> None:
        self.optimizer_steps += 1

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if self.stop_at is not None and state.global_step >= self.stop_at:
            raise Killed


class Trace:
    """Records the indices of every micro-batch and when every decision was made."""

    def __init__(self, watch: Watch) -> None:
        self.micro_batches: list[list[Any]] = []
        self.decisions: list[list[int]] = []
        compute_loss, decide = DynamicTrainerMixin.compute_loss, DynamicRun._decide
        self._originals = (compute_loss, decide)

        def traced_loss(trainer, model, inputs, *args, **kwargs):
            if INDEX_KEY in inputs and model.training:
                self.micro_batches.append([trainer.state.global_step, inputs[INDEX_KEY].tolist()])
            return compute_loss(trainer, model, inputs, *args, **kwargs)

        def traced_decision(run, slot):
            self.decisions.append([slot.number, slot.start_step, watch.optimizer_steps])
            return decide(run, slot)

        DynamicTrainerMixin.compute_loss, DynamicRun._decide = traced_loss, traced_decision

    def close(self) -> None:
        DynamicTrainerMixin.compute_loss, DynamicRun._decide = self._originals


def weights_digest(folder: Path) -> str | None:
    for name in ("adapter_model.safetensors", "model.safetensors"):
        if (folder / name).is_file():
            digest = hashlib.sha256()
            for key, value in sorted(load_file(folder / name).items()):
                digest.update(key.encode() + value.contiguous().view(torch.uint8).numpy().tobytes())
            return digest.hexdigest()
    return None


def train(item: dict[str, Any]) -> dict[str, Any]:
    args = dict(item["args"])
    args["disable_tqdm"] = True
    watch = Watch(item.get("stop_at"))
    trace = Trace(watch)
    error = None
    try:
        if item.get("plain"):
            tuner.run_exp(args, [watch])
        else:
            bridge.run(split_config(args), [watch])
    except Killed:
        error = "killed"
    except Exception as problem:  # noqa: BLE001 - told to the test that looks at this run
        error = f"{type(problem).__name__}: {problem}"
        traceback.print_exc()
    finally:
        trace.close()
    output = Path(args["output_dir"])
    state = output / "trainer_state.json"
    history = json.loads(state.read_text())["log_history"] if state.is_file() and error is None else []
    return {
        "error": error,
        "micro_batches": trace.micro_batches,
        "decisions": trace.decisions,
        "losses": [entry["loss"] for entry in history if "loss" in entry],
        "history": history,
        "weights": weights_digest(output) if error is None else None,
        "rng": hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest(),
    }


def main() -> None:
    destroy = dist.destroy_process_group
    dist.destroy_process_group = lambda *_: None  # one group for all runs
    rank = int(os.environ.get("RANK", "0"))
    for item in json.loads(Path(sys.argv[1]).read_text()):
        print(f"=== {item['name']}", flush=True)
        result = train(item)
        folder = Path(item["args"]["output_dir"])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"trace-{rank}.json").write_text(json.dumps(result))
        if dist.is_initialized():
            dist.barrier()
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        PartialState._reset_state()
    if dist.is_initialized():
        destroy()


if __name__ == "__main__":
    main()
