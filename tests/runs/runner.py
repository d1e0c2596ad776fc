"""Runs many short trainings in one process group: ``python runner.py SPEC.json`` or under torchrun.

A specification is a list of runs. Each has a ``name`` and ``args`` (LLaMA-Factory's arguments), and may have:

- ``plain``: whether LLaMA-Factory trains without DataFlex.
- ``record``: a recorded configuration to repeat.
- ``stop_at``: the step (counted from 0) at whose beginning the run is killed.
- ``die_at``: the number of the moment at which the run is killed (see ``Death``).
- ``keep``: a step. The run then trains in float64 and writes the micro-batches, those of the text of ``ptx``, and the
  gradient of that step to ``<output_dir>/kept-<rank>.pt``.

The trace of each run is written to ``<output_dir>/trace-<rank>.json``. Starting Python with LLaMA-Factory costs 20 s,
so the tests share their starts. DDP, DeepSpeed and FSDP runs may follow each other in one process group.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

os.environ.setdefault("LLAMAFACTORY_VERBOSITY", "WARN")

import torch
import torch.distributed as dist
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from between_runs import forget_training, start_deepspeed
from llamafactory.train import trainer_utils, tuner
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainerState

from dataflex.config.loading import load_config, split_config
from dataflex.integrations.llamafactory.parsing import replaced
from dataflex.integrations.llamafactory.run import run
from dataflex.integrations.llamafactory.stages import STAGES, workflow_of
from dataflex.record import checkpoint
from dataflex.record.writer import RunWriter
from dataflex.trainer.mixin import DynamicTrainerMixin
from dataflex.trainer.planned import PlannedRounds
from dataflex.trainer.ptx import Ptx
from dataflex.trainer.rounds import INDEX_KEY
from dataflex.trainer.run import StartedRun

ON_THE_CPU = os.environ.get("ACCELERATE_TORCH_DEVICE") == "cpu"


class Killed(BaseException):
    """Stands for the process being killed: nothing catches it."""


class Watch(TrainerCallback):
    """Counts optimizer steps, stores evaluations and saves, and kills the run at the beginning of step ``stop_at``."""

    def __init__(self, stop_at: int | None) -> None:
        self.stop_at = stop_at
        self.optimizer_steps = 0
        self.events: list[list[Any]] = []

    def on_optimizer_step(self, args, state, control, **kwargs) -> None:
        self.optimizer_steps += 1

    def on_evaluate(self, args, state, control, **kwargs) -> None:
        self.events.append(["evaluate", state.global_step])

    def on_save(self, args, state, control, **kwargs) -> None:
        self.events.append(["save", state.global_step])

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if self.stop_at is not None and state.global_step >= self.stop_at:
            raise Killed


class Death:
    """Kills a run at the ``at``-th of the moments that it counts, in the middle of a write if the moment is one.

    The moments are spread over a run: decisions, forwards, steps, every kind of file of a checkpoint and of the record,
    and the deletion of checkpoints.
    """

    def __init__(self, at: int | None) -> None:
        self.at, self.count, self.where = at, 0, ""
        self._originals: list[tuple[Any, str, Any]] = []
        for owner, name, writes in (
            (PlannedRounds, "decide", None),
            (StartedRun, "end_of_step", None),
            (DynamicTrainerMixin, "compute_loss", None),
            (DynamicTrainerMixin, "log", None),
            (RunWriter, "round", None),
            (RunWriter, "evaluation", None),
            (RunWriter, "begin", None),
            (RunWriter, "open_resumed", None),
            (torch, "save", 1),
            (Path, "replace", None),
            (checkpoint, "write_state", None),
            (checkpoint, "mark_complete", None),
            (shutil, "rmtree", None),
            (TrainerState, "save_to_json", 1),
        ):
            self._watch(owner, name, writes)

    def _watch(self, owner: Any, name: str, writes: int | None) -> None:
        """Count the calls of a function. ``writes`` is the index of the file name among its arguments."""
        original = getattr(owner, name)
        self._originals.append((owner, name, original))

        def counted(*args, **kwargs):
            self.count += 1
            if self.count == self.at:
                self.where = name
                if writes is not None and isinstance(args[writes], str):
                    Path(args[writes]).write_bytes(b"half")
                raise Killed
            return original(*args, **kwargs)

        setattr(owner, name, counted)

    def close(self) -> None:
        for owner, name, original in self._originals:
            setattr(owner, name, original)


class Trace:
    """Records the indices of every micro-batch, the step of every decision, and the classes that wrap the model."""

    def __init__(self, watch: Watch) -> None:
        self.micro_batches: list[list[Any]] = []
        self.decisions: list[list[int]] = []
        self.wrapper: list[str] = []
        self.targets: dict[str, int] = {}
        self.eos: list[int] = []
        compute_loss, decide = DynamicTrainerMixin.compute_loss, PlannedRounds.decide
        self._originals = (compute_loss, decide)

        def traced_loss(trainer, model, inputs, *args, **kwargs):
            self.wrapper = wrapper_of(trainer.model_wrapped)
            if INDEX_KEY in inputs and model.training:
                self.micro_batches.append([trainer.state.global_step, inputs[INDEX_KEY].tolist()])
            return compute_loss(trainer, model, inputs, *args, **kwargs)

        def traced_decision(rounds, slot):
            self.decisions.append([slot.number, slot.start_step, watch.optimizer_steps])
            self.eos = list(rounds.probe.tokens.eos)
            for targets in rounds.planner.readings.validation.values():
                self.targets |= dict(zip(targets.domains, targets.domain_sizes.tolist(), strict=True))
            return decide(rounds, slot)

        DynamicTrainerMixin.compute_loss, PlannedRounds.decide = traced_loss, traced_decision

    def close(self) -> None:
        DynamicTrainerMixin.compute_loss, PlannedRounds.decide = self._originals


def wrapper_of(model: torch.nn.Module) -> list[str]:
    """Return the names of a wrapper's classes, and for DeepSpeed the stage of ZeRO."""
    names = [kind.__name__ for kind in type(model).__mro__]
    return [*names, f"stage {model.zero_optimization_stage()}"] if "DeepSpeedEngine" in names else names


@contextmanager
def fsdp_on_cpu() -> Iterator[None]:
    """Let accelerate use FSDP on the CPU. Without this it trains with DDP there, without a message."""
    original = tuner.get_train_args
    os.environ["FSDP_STATE_DICT_TYPE"] = "FULL_STATE_DICT"  # else the trained model is not saved in one file

    def get_train_args(args):
        parsed = original(args)
        assert parsed[2].device.type == "cpu"
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        return parsed

    with replaced(tuner, "get_train_args", get_train_args):
        yield


class Kept:
    """Lets a run train in float64, and stores the micro-batches and the gradient of one step (counted from 0)."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.batches: list[dict[str, Any]] = []
        self.texts: list[dict[str, Any]] = []
        self.gradients: dict[str, torch.Tensor] = {}
        self.offsets: Any = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        compute_loss, clip = DynamicTrainerMixin.compute_loss, DynamicTrainerMixin._get_grad_norm
        add_gradient = Ptx.add_gradient

        def kept_text(ptx, model):
            if ptx._trainer.state.global_step == self.step:
                self.texts.append({key: value.clone() for key, value in ptx._waiting[0].items()})
            add_gradient(ptx, model)

        def kept_loss(trainer, model, inputs, *args, **kwargs):
            if model.training and trainer.state.global_step == self.step:
                self.batches.append({key: value.clone() for key, value in inputs.items()})
            return compute_loss(trainer, model, inputs, *args, **kwargs)

        def kept_norm(trainer, model, *args, **kwargs):
            if trainer.state.global_step == self.step:
                self.offsets = torch.as_tensor(trainer.dataflex.data.offsets)
                named = trainer.model.named_parameters()
                self.gradients = {name: each.grad.clone() for name, each in named if each.grad is not None}
            return clip(trainer, model, *args, **kwargs)

        def double(load):
            return lambda *args, **kwargs: load(*args, **kwargs).double()

        with ExitStack() as stack:
            stack.enter_context(replaced(DynamicTrainerMixin, "compute_loss", kept_loss))
            stack.enter_context(replaced(DynamicTrainerMixin, "_get_grad_norm", kept_norm))
            stack.enter_context(replaced(Ptx, "add_gradient", kept_text))
            for module in (trainer_utils, *map(workflow_of, STAGES)):
                stack.enter_context(replaced(module, "load_model", double(module.load_model)))
            yield

    def save(self, folder: Path, rank: int) -> None:
        found = {"batches": self.batches, "texts": self.texts, "gradients": self.gradients, "offsets": self.offsets}
        torch.save(found, folder / f"kept-{rank}.pt")


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
    trace, death = Trace(watch), Death(item.get("die_at"))
    error, kept = None, None if item.get("keep") is None else Kept(item["keep"])
    try:
        with fsdp_on_cpu() if args.get("fsdp") and ON_THE_CPU else nullcontext() if kept is None else kept.watching():
            if item.get("plain"):
                tuner.run_exp(args, [watch])
            elif item.get("record"):
                overrides = [f"{key}={value}" for key, value in args.items()]
                run(load_config(Path(item["record"]), overrides), [watch])
            else:
                run(split_config(args), [watch])
    except Killed:
        error = "killed"
    except Exception as problem:  # noqa: BLE001 - written to the trace, which the test reads
        error = f"{type(problem).__name__}: {problem}"
        traceback.print_exc()
    finally:
        death.close()
        trace.close()
    if dist.is_initialized():
        dist.barrier()  # the main process writes the files that are read now
    output = Path(args["output_dir"])
    if kept is not None and error is None:
        kept.save(output, int(os.environ.get("RANK", "0")))
    state = output / "trainer_state.json"
    history = json.loads(state.read_text())["log_history"] if state.is_file() and error is None else []
    return {
        "error": error,
        "micro_batches": trace.micro_batches,
        "decisions": trace.decisions,
        "wrapper": trace.wrapper,
        "targets": trace.targets,
        "eos": trace.eos,
        "events": watch.events,
        "moments": death.count,
        "died_in": death.where,
        "losses": [entry["loss"] for entry in history if "loss" in entry],
        "history": history,
        "weights": weights_digest(output) if error is None else None,
        "rng": hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest(),
    }


def main() -> None:
    destroy = dist.destroy_process_group
    dist.destroy_process_group = lambda *_: None  # one group for all runs
    rank = int(os.environ.get("RANK", "0"))
    items = json.loads(Path(sys.argv[1]).read_text())
    if any(item["args"].get("deepspeed") for item in items):
        start_deepspeed(ON_THE_CPU)
    variables = set(os.environ)
    for item in items:
        print(f"=== {item['name']}", flush=True)
        began = time.perf_counter()
        result = train(item)
        print(f"=== {item['name']}: {time.perf_counter() - began:.1f} s, error: {result['error']}", flush=True)
        folder = Path(item["args"]["output_dir"])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"trace-{rank}.json").write_text(json.dumps(result))
        if item.get("die_at") is not None:
            with (folder / "deaths.txt").open("a") as stream:
                stream.write(f"{result['died_in']}\n")
        if dist.is_initialized():
            dist.barrier()
        forget_training(variables)
        if item is items[0]:
            gc.collect()
            gc.freeze()  # most objects come from the imports; garbage collections of the runs skip them
    if dist.is_initialized():
        destroy()


if __name__ == "__main__":
    main()
