"""What a mixer costs a training step, as ratios to plain LLaMA-Factory measured in one process.

    python benchmarks/mixing_overhead.py [--steps 12] [--repeats 5] [--output benchmarks/results/NAME.json]

A Llama of 2.6 million random parameters is trained on packed blocks of one length of seven data sets, made of the
sources of the standard library; so every step of every run is the same work. In each repeat a short run of plain
LLaMA-Factory and one with each mixer follow one another, every second repeat in reverse order; a mixer's ratios are
those to the plain run of the same repeat. ``step`` compares the median step, ``run`` all timed seconds, decisions
between steps included, ``decision_seconds`` is what one of these took by the run's own record, but for the first. ADO
fits its laws anew in each of them, every 5 steps, where its paper does so every 1,000.

The floor of DoReMi with a reference model is a plain run in whose every step the reference also runs over a batch and
takes the loss of every token. The table of reference losses is made before anything is timed.

Run nothing else meanwhile; a step should take 0.3 s or more (``--batch``).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from overhead import WARMUP_STEPS, machine
from transformers import TrainerCallback

from dataflex.record.reader import read_run

sys.path.append(str(Path(__file__).parent / "leaderboard"))
from pretraining import Size, write_model

DOMAINS = tuple(f"part{number}" for number in range(7))
BLOCK, VOCABULARY = 256, 4096
MODEL = Size(
    vocabulary=VOCABULARY,
    width=192,
    inner=512,
    layers=4,
    heads=6,
    block=BLOCK,
    batch=8,
    learning_rate=3.0e-3,
    tokens=0,
    validation=None,
    device={},
)
"""The trained model. The options of the command set its batch and its length."""
UPDATE_STEPS = 5
GOALS = {
    "odm": 1.03,
    "ado": 1.03,
    "group_dro": 1.03,
    "schedule": 1.03,
    "doremi, reference model": 1.03,
    "doremi, table": 1.03,
}
"""The most a step may take, of the plain step; with a reference model, of the floor."""


class Clock(TrainerCallback):
    """Notes when every step begins and when training ends."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the time."""
        self.times.append(time.perf_counter())

    on_train_end = on_step_begin

    @property
    def steps(self) -> list[float]:
        """Seconds of each step but the first few."""
        return [float(seconds) for seconds in np.diff(self.times)[WARMUP_STEPS:]]


class ReferenceForward(TrainerCallback):
    """Runs a model over one batch in every step and takes the loss of each token: what DoReMi cannot do without."""

    def __init__(self, folder: Path, batch: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
        self.tokens = torch.randint(3, VOCABULARY, (batch, BLOCK), device=device)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Run it."""
        import torch

        with torch.no_grad():
            logits = self.model(self.tokens, use_cache=False).logits[:, :-1].flatten(0, 1)
            torch.nn.functional.cross_entropy(logits, self.tokens[:, 1:].flatten(), reduction="none").sum().item()


def variants(folder: Path) -> dict[str, dict[str, Any] | None]:
    """Return the mixer of every variant; None trains without one."""
    reference = {"reference_model": str(folder / "reference")}
    even = [1.0] * len(DOMAINS)
    points = [{"step": 0, "proportions": even}, {"step": 100, "proportions": [*even[1:], 4.0]}]
    return {
        "plain": None,
        "plain and reference forward": None,
        "static": {"method": "static", "proportions": even},
        "odm": {"method": "odm"},
        "ado": {"method": "ado", "ignore_steps": 0, "start_step": 4, "fit_steps": 1, "smoothing_steps": 0},
        "group_dro": {"method": "group_dro"},
        "schedule": {"method": "schedule", "points": points},
        "doremi, reference model": {"method": "doremi", **reference},
        "doremi, table": {"method": "doremi", "reference_losses": str(folder / "table"), **reference},
    }


def floor_of(name: str) -> str:
    """Return the variant that another is measured against."""
    return "plain and reference forward" if name == "doremi, reference model" else "plain"


def measure(folder: Path, names: list[str], batch: int, steps: int, repeats: int) -> dict[str, Any]:
    """Time every variant, in turn."""
    write_inputs(folder)
    mixers = variants(folder)
    if "doremi, table" in names:
        train(folder, "doremi, table", mixers["doremi, table"], batch, 1)
    seconds: dict[str, list[list[float]]] = {name: [] for name in names}
    decisions: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(repeats):
        for name in names if repeat % 2 == 0 else names[::-1]:
            clock, output = train(folder, f"{name}-{repeat}", mixers[name], batch, steps, name == names[1])
            seconds[name].append(clock.steps)
            if mixers[name] is not None:
                decisions[name] += [each.cost.seconds for each in read_run(output).rounds[1:]]
    found: dict[str, Any] = {}
    for name in names:
        all_steps = [step for run in seconds[name] for step in run]
        found[name] = {
            "step_seconds": {"median": statistics.median(all_steps), "quartiles": quartiles(all_steps)},
            "of_plain": ratios(seconds[name], seconds["plain"]),
        }
        if floor_of(name) != "plain":
            found[name]["of_floor"] = ratios(seconds[name], seconds[floor_of(name)])
        if decisions[name]:
            found[name]["decision_seconds"] = statistics.median(decisions[name])
        if name in GOALS:
            found[name]["goal"] = {"of": floor_of(name), "at_most": GOALS[name]}
    settings = {"batch": batch, "block": BLOCK, "steps": steps, "not_timed": WARMUP_STEPS, "repeats": repeats}
    return {"settings": {**settings, "update_steps": UPDATE_STEPS}, "variants": found}


def ratios(runs: list[list[float]], floors: list[list[float]]) -> dict[str, Any]:
    """Return how runs compare with those of the floor in the same repeats: the median ratio, the least and the most."""
    pairs = list(zip(runs, floors, strict=True))
    step = [statistics.median(run) / statistics.median(floor) for run, floor in pairs]
    whole = [sum(run) / sum(floor) for run, floor in pairs]
    return {
        "step": {"median": statistics.median(step), "range": [min(step), max(step)]},
        "run": {"median": statistics.median(whole), "range": [min(whole), max(whole)]},
    }


def quartiles(values: list[float]) -> list[float]:
    """Return the first and the third."""
    return [float(value) for value in np.quantile(values, [0.25, 0.75])]


def train(
    folder: Path, name: str, mixer: dict[str, Any] | None, batch: int, steps: int, with_reference: bool = False
) -> tuple[Clock, Path]:
    """Train a fresh model for a few steps."""
    from dataflex.config.loading import split_config
    from dataflex.integrations.llamafactory.run import run

    output = folder / "runs" / name.replace(", ", "-").replace(" ", "-")
    args = arguments(folder, output, batch, steps)
    if mixer is not None:
        args["dataflex"] = {"update_steps": UPDATE_STEPS, "mix": mixer}
    clock = Clock()
    reference = [ReferenceForward(folder / "reference", batch)] if with_reference else []
    run(split_config(args), [clock, *reference])
    return clock, output


def arguments(folder: Path, output: Path, batch: int, steps: int) -> dict[str, Any]:
    """Return the arguments of a run that trains a fresh model for a few steps."""
    return {
        "model_name_or_path": str(folder / "model"),
        "train_from_scratch": True,
        "stage": "pt",
        "do_train": True,
        "finetuning_type": "full",
        "dataset": ",".join(DOMAINS),
        "dataset_dir": str(folder / "data"),
        "packing": True,
        "cutoff_len": BLOCK,
        "per_device_train_batch_size": batch,
        "learning_rate": 1.0e-3,
        "max_steps": steps,
        "logging_steps": UPDATE_STEPS,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "output_dir": str(output),
    }


def write_inputs(folder: Path) -> None:
    """Write data sets from text that is on every machine, a tokenizer and configuration, and a reference model."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    texts = list(sources())
    data = folder / "data"
    data.mkdir()
    info = {}
    for number, name in enumerate(DOMAINS):
        rows = [{"text": text} for text in texts[number :: len(DOMAINS)]]
        (data / f"{name}.json").write_text(json.dumps(rows))
        info[name] = {"file_name": f"{name}.json", "columns": {"prompt": "text"}}
    (data / "dataset_info.json").write_text(json.dumps(info))
    write_model(iter(texts), folder / "model", MODEL)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder / "model"), dtype=torch.float32)
    model.save_pretrained(folder / "reference")
    AutoTokenizer.from_pretrained(folder / "model").save_pretrained(folder / "reference")


def sources() -> Iterator[str]:
    """Yield the beginnings of the standard library's modules."""
    for file in sorted(Path(os.__file__).parent.glob("*.py"))[:42]:
        yield file.read_text(encoding="utf-8", errors="replace")[:20_000]


def main() -> None:
    """Parse, measure, print."""
    names = list(variants(Path()))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12, help="steps of each run")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8, help="blocks in a step")
    parser.add_argument("--mixers", nargs="+", choices=names[2:], default=names[2:], help="only these")
    parser.add_argument("--output", type=Path, help="JSON file of the result")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        chosen = [*names[:2], *options.mixers]
        found = measure(Path(folder), chosen, options.batch, options.steps, options.repeats)
    result = {"command": " ".join(["python", *sys.argv]), "machine": machine(), **found}
    text = json.dumps(result, indent=2) + "\n"
    print(text)
    if options.output is not None:
        options.output.write_text(text)


if __name__ == "__main__":
    main()
