"""What DataFlex costs, as ratios measured in one run on one machine.

    python benchmarks/overhead.py training --model asset:smollm2-135m-instruct
    python benchmarks/overhead.py probe --model asset:smollm2-135m-instruct
    python benchmarks/overhead.py plans
    python benchmarks/overhead.py rows

``training``: tokens per second of a dynamic run with random selection, and of uniform weights, against plain
LLaMA-Factory on samples of one length. ``probe``: the loss probe against the bare forward of the same length-sorted
batches. ``plans``: time and memory of plans from a pool of 10^8 samples in 10 or 1000 domains, and of their record.
``rows``: time from the numbers of samples of 512 tokens to padded tensors, by the collator, as the probe does it, and
from flat arrays in memory, which is the floor.
Results are printed and, with ``--output``, written as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

WARMUP_STEPS = 2
"""Steps of each run that are not timed."""


def machine() -> dict[str, Any]:
    """Return what the numbers were measured on."""
    from dataflex.record.versions import installed_versions

    names = [line.split(":")[1].strip() for line in _lines(Path("/proc/cpuinfo")) if line.startswith("model name")]
    found = {"processor": names[0] if names else platform.processor(), "cores": os.cpu_count()}
    import torch

    if torch.cuda.is_available():
        found["accelerator"] = torch.cuda.get_device_name()
    return {**found, "versions": installed_versions()}


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def training(model: str, steps: int, repeats: int, folder: Path) -> dict[str, Any]:
    """Time plain, randomly selected and uniformly weighted training, in turn, on packed blocks of one length."""
    from transformers import TrainerCallback

    from dataflex import assets
    from dataflex.config.loading import split_config
    from dataflex.integrations.llamafactory.run import run

    class Clock(TrainerCallback):
        """Notes when every step begins."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """Note the time."""
            self.times.append(time.perf_counter())

        on_train_end = on_step_begin

    _write_texts(folder)
    variants: dict[str, Any] = {
        "plain": None,
        "random": {"update_steps": 5, "select": {"method": "random"}},
        "uniform weights": {"weight": {"method": "uniform"}},
    }
    base = {
        "model_name_or_path": assets.resolve(model), "stage": "pt", "do_train": True, "finetuning_type": "lora",
        "dataset": "texts", "dataset_dir": str(folder), "cutoff_len": 128, "per_device_train_batch_size": 4,
        "max_steps": steps, "logging_steps": 5, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
    }  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for repeat in range(repeats):
        for name in list(variants) if repeat % 2 == 0 else list(variants)[::-1]:
            clock = Clock()
            output = folder / f"{name.replace(' ', '-')}-{repeat}"
            args = {**base, "output_dir": str(output)}
            if variants[name] is not None:
                args["dataflex"] = variants[name]
            run(split_config(args), [clock])
            seconds[name] += list(np.diff(clock.times)[WARMUP_STEPS:])
    median = {name: statistics.median(values) for name, values in seconds.items()}
    tokens = base["per_device_train_batch_size"] * base["cutoff_len"]
    return {
        "tokens_per_second": {name: tokens / value for name, value in median.items()},
        "relative_to_plain": {name: median["plain"] / value for name, value in median.items()},
        "timed_steps_each": len(seconds["plain"]),
    }


def _write_texts(folder: Path) -> None:
    """Write text that is on every machine: the sources of the standard library."""
    sources = sorted(Path(os.__file__).parent.glob("*.py"))[:60]
    rows = [{"text": source.read_text(encoding="utf-8", errors="replace")[:20_000]} for source in sources]
    (folder / "texts.json").write_text(json.dumps(rows))
    info = {"texts": {"file_name": "texts.json", "columns": {"prompt": "text"}}}
    (folder / "dataset_info.json").write_text(json.dumps(info))


def probe(model: str, samples: int, repeats: int) -> dict[str, Any]:
    """Time the loss probe and the bare forward of the same batches, in turn."""
    import torch
    from accelerate import Accelerator
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

    from dataflex import Losses, assets
    from dataflex.data.pool import Pool
    from dataflex.probe.batches import length_batches
    from dataflex.probe.model import ModelProbe

    path = assets.resolve(model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    language_model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    rng = np.random.default_rng(0)
    rows = [_sample(rng, tokenizer.vocab_size) for _ in range(samples)]
    pool = Pool.concatenate({"samples": Dataset.from_list(rows)})
    collate = DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8)
    meter = ModelProbe(
        pool, lambda: language_model, collate, Accelerator(cpu=device.type == "cpu").autocast, device, 2048
    )
    indices = np.arange(samples)

    def bare() -> None:
        with torch.no_grad():
            for batch in length_batches(pool.lengths, meter.batch_tokens):
                inputs = {key: value.to(device) for key, value in collate(pool.rows(indices[batch])).items()}
                inputs.pop("labels")
                language_model(**inputs, use_cache=False).logits.sum().item()

    meter.measure(Losses(), indices[:8])  # chooses the head's path
    times = alternate({"bare forward": bare, "probe": lambda: meter.measure(Losses(), indices)}, repeats)
    return {"seconds": times, "relative_to_bare_forward": times["bare forward"] / times["probe"], "samples": samples}


def _sample(rng: np.random.Generator, vocabulary: int) -> dict[str, Any]:
    """Return one instruction sample: 16 to 256 tokens, between a third and two thirds of them in the answer."""
    length = int(rng.integers(16, 257))
    tokens = rng.integers(10, vocabulary, length).tolist()
    prompt = int(length * rng.uniform(1 / 3, 2 / 3))
    return {"input_ids": tokens, "attention_mask": [1] * length, "labels": [-100] * prompt + tokens[prompt:]}


def alternate(functions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Return the median seconds of each function, called in turn."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(repeats):
        for name in list(functions) if repeat % 2 == 0 else list(functions)[::-1]:
            began = time.perf_counter()
            functions[name]()
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in times.items()}


def rows(model: str, samples: int, repeats: int) -> dict[str, Any]:
    """Time what comes before a forward, in turn, in random batches of 8 samples from a data set on the disk."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, DataCollatorForSeq2Seq

    from dataflex import assets
    from dataflex.data.pool import Pool
    from dataflex.probe.collation import Collation

    rng, length = np.random.default_rng(0), 512
    tokenizer = AutoTokenizer.from_pretrained(assets.resolve(model))
    tokens = rng.integers(10, tokenizer.vocab_size, (samples, length))
    columns = {"input_ids": tokens, "attention_mask": np.ones_like(tokens), "labels": tokens}
    collate = DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8)
    collation = Collation(collate)
    batches = [rng.integers(0, samples, 8) for _ in range(samples // 8)]
    with tempfile.TemporaryDirectory() as folder:
        written = Dataset.from_dict({name: list(values) for name, values in columns.items()})
        written.save_to_disk(folder)
        pool = Pool.concatenate({"samples": Dataset.load_from_disk(folder)})

        def flat(batch: np.ndarray) -> None:
            for values in columns.values():
                padded = np.zeros((batch.size, length), dtype=np.int64)
                padded[:, :length] = values[batch]
                torch.from_numpy(padded)

        ways: dict[str, Callable[[np.ndarray], Any]] = {
            "collator": lambda batch: collate(pool.rows(batch)),
            "probe": lambda batch: collation.of(pool, batch),
            "flat arrays": flat,
        }
        seconds = alternate({name: partial(each, way, batches) for name, way in ways.items()}, repeats)
    return {"microseconds_per_sample": {name: 1e6 * value / (8 * len(batches)) for name, value in seconds.items()}}


def each(way: Callable[[np.ndarray], Any], batches: list[np.ndarray]) -> None:
    """Do something with each batch."""
    for batch in batches:
        way(batch)


PLAN_CASES: dict[str, tuple[dict[str, Any], int, int]] = {
    "mixture, 10^6 samples": ({"mix": {"method": "proportional"}}, 10**6, 10),
    "mixture, 10^7 samples": ({"mix": {"method": "proportional"}}, 10**7, 10),
    "random mixture, 10^7 samples, 1000 domains": ({"mix": {"method": "random"}}, 10**7, 1000),
    "random mixture of one pass, 10^8 samples, 1000 domains": ({"mix": {"method": "random"}}, 10**8, 1000),
    "capped mixture, 10^7 samples, 1000 domains": (
        {"mix": {"method": "random", "max_epochs_per_domain": 0.2}},
        10**7,
        1000,
    ),
    "random selection, 10^6 samples": ({"select": {"method": "random"}}, 10**6, 10),
    "loss selection with losses at hand, 10^6 samples": ({"select": {"method": "loss"}}, 10**6, 10),
    "one pass, 10^8 samples": ({"select": {"method": "full"}}, 10**8, 10),
}
"""Components, samples of the plan, and domains of the pool."""


def plans() -> dict[str, Any]:
    """Time every case in a separate process, so that its peak memory is that of the case."""
    results = {}
    for name in PLAN_CASES:
        command = [sys.executable, __file__, "one-plan", "--case", name]
        results[name] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return results


def one_plan(name: str) -> dict[str, float]:
    """Make one plan from 10^8 samples, and record it if it is not huge; return seconds and peak memory."""
    from dataflex.api.components import Components
    from dataflex.api.schedule import Schedule
    from dataflex.config.loading import split_config
    from dataflex.data.pool import Pool
    from dataflex.planning.planner import Planner
    from dataflex.record.schema import Cost
    from dataflex.record.writer import RunWriter

    section, size, count = PLAN_CASES[name]
    sizes = np.linspace(5, 15, count) / (10 * count) * 10**8
    sizes = np.diff(np.rint(np.concatenate([[0], np.cumsum(sizes)]))).astype(np.int64)
    pool = Pool(range(10**8), tuple(f"domain{number}" for number in range(count)), sizes)  # type: ignore[arg-type]
    components: Components = split_config({"dataflex": section}).build_components()
    schedule = Schedule(0, size // 1000, -1, size // 1000)
    planner = Planner(pool, components, schedule, seed=1, global_batch_size=1000)
    losses = np.random.default_rng(0).random(pool.size, dtype=np.float32) if "loss" in name else None

    class Stored:
        """Losses that were measured before."""

        def measure(self, measurement: Any, indices: np.ndarray, samples: Any = None) -> np.ndarray:
            """Return them."""
            assert losses is not None
            return losses[indices]

    began = time.perf_counter()
    plan = planner.plan(schedule.slot_at(0), Stored())
    seconds = time.perf_counter() - began
    assert plan.indices.size == size
    found = {"seconds": seconds, "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}
    if size <= 10**7:
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            writer = RunWriter(Path(folder))
            writer.begin({}, None, domains=dict(zip(pool.domains, pool.domain_sizes.tolist(), strict=True)))
            writer.round(plan, pool, Cost())
        found["record_seconds"] = time.perf_counter() - began
    return found


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["training", "probe", "plans", "rows", "one-plan"])
    parser.add_argument("--model", default="asset:smollm2-135m-instruct")
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--samples", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--case")
    parser.add_argument("--output", type=Path, help="JSON file that the result is added to")
    options = parser.parse_args()
    if options.what == "one-plan":
        print(json.dumps(one_plan(options.case)))
        return
    with tempfile.TemporaryDirectory() as folder:
        measure: dict[str, Callable[[], dict[str, Any]]] = {
            "training": lambda: training(options.model, options.steps, options.repeats, Path(folder)),
            "probe": lambda: probe(options.model, options.samples, options.repeats),
            "plans": plans,
            "rows": lambda: rows(options.model, max(options.samples, 2048), options.repeats),
        }
        result = {"command": " ".join(["python", *sys.argv]), **measure[options.what]()}
    print(json.dumps(result, indent=2))
    if options.output is not None:
        known = json.loads(options.output.read_text()) if options.output.exists() else {"machine": machine()}
        options.output.write_text(json.dumps({**known, options.what: result}, indent=2) + "\n")


if __name__ == "__main__":
    main()
