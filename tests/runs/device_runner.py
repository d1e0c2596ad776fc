"""Runs trainings on a pretended accelerator: ``python device_runner.py SPEC.json``, specifications as in ``runner.py``.

The counts of the device for each optimizer step are written to ``<output_dir>/counts.json``. A step lasts from the end
of the step before to its own end, decisions and logs included.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("LLAMAFACTORY_VERBOSITY", "WARN")

from accelerate.state import AcceleratorState, PartialState
from between_runs import forget_training
from llamafactory.train import tuner
from transformers import Trainer, TrainerCallback, TrainingArguments

from dataflex.config.loading import split_config
from dataflex.integrations.llamafactory.parsing import replaced
from dataflex.integrations.llamafactory.run import run
from pretended_device import Counts, on_device, pretended


class Steps(TrainerCallback):
    """Stores the counts of the device for each optimizer step."""

    def __init__(self, counts: Counts) -> None:
        self.counts = counts
        self.taken: list[dict[str, dict[str, int]]] = []

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.counts.clear()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        counts = self.counts
        self.taken.append({name: dict(vars(counts)[name]) for name in ("waits", "unordered", "doubles")})
        counts.clear()


@contextmanager
def training_on(place: Any) -> Iterator[None]:
    """Let the Trainer train on the pretended device."""
    create = Trainer.create_accelerator_and_postprocess

    def created(trainer: Trainer) -> None:
        create(trainer)
        for state in (AcceleratorState, PartialState):
            state._shared_state["device"] = place

    def moved(trainer: Trainer, model: Any, device: Any) -> Any:
        return on_device(model, place)

    def saved(trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Save nothing: safetensors reads memory that is not there."""

    own_device = TrainingArguments.device.fget

    def device(args: TrainingArguments) -> Any:
        own_device(args)  # which sets up more than the device
        return place

    with (
        replaced(TrainingArguments, "device", property(device)),
        replaced(Trainer, "create_accelerator_and_postprocess", created),
        replaced(Trainer, "_move_model_to_device", moved),
        replaced(Trainer, "save_model", saved),
    ):
        yield


def train(item: dict[str, Any], steps: Steps) -> None:
    args = {**item["args"], "disable_tqdm": True}
    if item["plain"]:
        tuner.run_exp(args, [steps])
    else:
        run(split_config(args), [steps])


def main() -> None:
    variables = set(os.environ)
    for item in json.loads(Path(sys.argv[1]).read_text()):
        folder = Path(item["args"]["output_dir"])
        folder.mkdir(parents=True, exist_ok=True)
        began, error = time.perf_counter(), None
        with pretended() as (place, counts), training_on(place):
            steps = Steps(counts)
            try:
                train(item, steps)
            except Exception as problem:  # noqa: BLE001 - written to the trace, which the test reads
                error = f"{type(problem).__name__}: {problem}"
                traceback.print_exc()
        print(f"=== {item['name']}: {time.perf_counter() - began:.1f} s, error: {error}", flush=True)
        (folder / "trace-0.json").write_text(json.dumps({"error": error}))
        (folder / "counts.json").write_text(json.dumps(steps.taken))
        forget_training(variables)


if __name__ == "__main__":
    main()
