"""Whether a run that is killed again and again ends as one that never was: SIGKILL at random times.

    python benchmarks/kill.py
    python benchmarks/kill.py --kills 100 --seed 1

One run selects, mixes, orders and weights, evaluates every second step, saves every step and keeps one checkpoint. It
is started, killed a random time after its first step (one start in five: while it is loading), and started again by
the same configuration, until it has been killed ``--kills`` times; then it may end. Weights, losses, plans and
evaluations are compared bit for bit with those of the same run never killed. Each start is a fork of a process that
has trained before, so that it takes a second. Needs no accelerator.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("LLAMAFACTORY_VERBOSITY", "WARN")
os.environ.setdefault("ACCELERATE_TORCH_DEVICE", "cpu")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from accelerate.state import AcceleratorState, GradientState, PartialState
from transformers import TrainerCallback

import tiny
from dataflex.config.loading import split_config
from dataflex.integrations.llamafactory.run import run
from dataflex.record.checkpoint import checkpoints, problem_of
from dataflex.record.reader import read_run
from dataflex.record.schema import Cost

STEPS = 60


def arguments(model: Path, data: Path, output: Path) -> dict[str, Any]:
    """Return the configuration of the run."""
    section = {
        "warmup_steps": 2,
        "update_steps": 5,
        "select": {"method": "loss"},
        "mix": {"method": "odm"},
        "order": {"method": "sort", "by": "length"},
        "weight": {"method": "loss"},
    }
    cadence = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 1}
    return tiny.arguments(
        model,
        data,
        output,
        dataset="alpha,beta",
        eval_dataset="held",
        max_steps=STEPS,
        save_total_limit=1,
        disable_tqdm=True,
        dataflex=section,
        **cadence,
    )


class Begun(TrainerCallback):
    """Says through a pipe that training has begun."""

    def __init__(self, pipe: int) -> None:
        self.pipe = pipe

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Say so once for each step; nobody need listen."""
        os.write(self.pipe, b".")


def start(args: dict[str, Any], log: Path) -> tuple[int, int]:
    """Start the run in a separate process, and return its id and the end of a pipe that tells of its steps."""
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        return child, reading
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    status = 1
    try:
        run(split_config(args), [Begun(writing)])
        status = 0
    finally:
        os._exit(status)


def ended(child: int, within: float) -> bool:
    """Wait for a process, and return whether it has ended by itself."""
    deadline = time.perf_counter() + within
    while time.perf_counter() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            if status:
                raise SystemExit(f"a start ended with status {status}; see its log")
            return True
        time.sleep(0.002)
    return False


def state(output: Path) -> str:
    """Return what a kill left, for the table."""
    problems = {path.name: problem_of(path) for path in checkpoints(output)}
    whole = [name for name, problem in problems.items() if problem is None]
    torn = [name for name, problem in problems.items() if problem is not None]
    return f"{whole[0] if whole else 'no checkpoint'}" + (f", {torn[0]} cut off" if torn else "")


def outcome(output: Path) -> dict[str, Any]:
    """Return what must be equal."""
    record = read_run(output)
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return {
        "weights": hashlib.sha256((output / "adapter_model.safetensors").read_bytes()).hexdigest(),
        "losses": [(entry["step"], entry["loss"]) for entry in history if "loss" in entry],
        "rounds": [replace(each, cost=Cost()) for each in record.rounds],
        "plans": [record.plan(each.round).to_pydict() for each in record.rounds],
        "evaluations": [(each.step, each.tokens, each.domains) for each in record.evaluations],
        "checkpoints": [path.name for path in output.glob("*checkpoint-*")],
    }


def main() -> None:
    """Run, kill, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        model, data = tiny.make_model(root / "model", dropout=0.1), tiny.make_data(root / "data")
        whole, cut = root / "whole", root / "cut"
        run(split_config(arguments(model, data, root / "warm") | {"max_steps": 3}))
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        PartialState._reset_state()
        child, pipe = start(arguments(model, data, whole), root / "whole.log")
        os.read(pipe, 1)
        began = time.perf_counter()
        if not ended(child, 600):
            raise SystemExit("the run did not end within 600 s")
        step = (time.perf_counter() - began) / STEPS
        print(f"never killed: {step:.2f} s a step")
        kills = 0
        while kills < options.kills:
            child, pipe = start(arguments(model, data, cut), root / "cut.log")
            loading = rng.random() < 0.2
            after = rng.uniform(0, 2 if loading else 4 * step)
            if not loading:
                os.read(pipe, 1)
            if ended(child, after):
                raise SystemExit(f"the run came to its end after {kills} kills; choose fewer")
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(pipe)
            kills += 1
            print(f"kill {kills}, {after:.2f} s after {'the start' if loading else 'a first step'}: {state(cut)}")
        child, pipe = start(arguments(model, data, cut), root / "cut.log")
        if not ended(child, 600):
            raise SystemExit("the run did not end within 600 s")
        first, second = outcome(whole), outcome(cut)
        different = [key for key in first if first[key] != second[key]]
        print(f"killed {kills} times: {'all equal' if not different else 'DIFFERENT: ' + ', '.join(different)}")
        raise SystemExit(1 if different else 0)


if __name__ == "__main__":
    main()
