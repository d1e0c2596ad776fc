"""Times bergson's per-sample gradients, for ``gradient_features.py --peer``; needs an environment with bergson.

    uv venv peer && uv pip install --python peer "bergson==2.5.1" "torch==2.11.*"
    peer/bin/python benchmarks/peers/bergson_features.py --model FOLDER --samples samples.jsonl --batch-tokens 1024

Every linear layer of the body gives a gradient of 16 x 16 numbers, projected before inputs and output gradients are
multiplied. Gradients stay in memory.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import torch
from bergson.collector.collector import CollectorComputer
from bergson.collector.in_memory_collector import InMemoryCollector
from bergson.config.config import IndexConfig
from bergson.data import allocate_batches
from bergson.gradients import GradientProcessor
from datasets import Dataset
from transformers import AutoModelForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--samples", type=Path, required=True, help="JSON lines of input_ids and labels")
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--projection-dim", type=int, default=16)
    options = parser.parse_args()
    samples = [json.loads(line) for line in options.samples.read_text().splitlines()]
    data = Dataset.from_list([{key: sample[key] for key in ("input_ids", "labels")} for sample in samples])
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    # As bergson sets up a model of its own: no parameter needs a gradient, but the layers' outputs do.
    model.requires_grad_(False)
    model.get_input_embeddings().requires_grad_(True)
    batches = allocate_batches([len(sample["input_ids"]) for sample in samples], options.batch_tokens)
    with tempfile.TemporaryDirectory() as folder:
        config = IndexConfig(run_path=f"{folder}/run", projection_dim=options.projection_dim)
        Path(config.partial_run_path).mkdir()

        def collect() -> float:
            collector = InMemoryCollector(
                model=model.base_model,
                data=data,
                cfg=config,
                processor=GradientProcessor(projection_dim=options.projection_dim),
            )
            computer = CollectorComputer(model, data, collector=collector, batches=batches, cfg=config)
            began = time.perf_counter()
            computer.run_with_collector_hooks("gradients")
            seconds = time.perf_counter() - began
            width = sum(values.shape[1] for values in collector.gradients.values())
            assert width == options.projection_dim**2 * len(collector.target_info)
            assert all(values.abs().sum() > 0 for values in collector.gradients.values())
            return seconds

        collect()  # the first is slower: memory is taken from the system
        seconds = collect()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"samples_per_second": len(samples) / seconds, "peak_memory_gb": round(peak / 1e9, 3)}))


if __name__ == "__main__":
    main()
