"""What does the embedding service cost? Against the bare forward of the same length-sorted batches.

    python benchmarks/embeddings.py                  # MiniLM on texts of this machine, and the model in training

Samples per second of

    bare forward    the model's forward and pooling of rows that are tokenized and sorted before
    service         texts to the file on disk: tokenizing, sorting, forward, pooling, float16, a mark for each chunk
    bare model      the forward of a language model without its head, of tokenized and sorted rows
    measurement     the measurement ``Embeddings`` of the same rows, by the probe

Every variant runs in a process of its own, which also gives its peak memory, and the processes take turns.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from overhead import _sample, machine

PAIRS = {"service": "bare forward", "measurement": "bare model"}
"""Variant -> the floor it is compared with."""
VARIANTS = tuple(name for pair in PAIRS.items() for name in pair)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="asset:all-minilm-l6-v2")
    parser.add_argument("--model", default="asset:smollm2-135m-instruct")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--texts", type=int, default=1024)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="JSON file of the results")
    parser.add_argument("--one", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(options)))
        return
    found: dict[str, list[dict[str, float]]] = {name: [] for name in options.variants}
    for repeat in range(options.repeats):
        for name in options.variants if repeat % 2 == 0 else options.variants[::-1]:
            found[name].append(apart(options, name))
            print(name, found[name][-1], flush=True)
    speed = {name: statistics.median(run["samples_per_second"] for run in runs) for name, runs in found.items()}
    results = {
        "samples_per_second": speed,
        "relative_to_floor": {
            name: speed[name] / speed[floor] for name, floor in PAIRS.items() if name in speed and floor in speed
        },
        "peak_memory_gb": {name: max(run["peak_memory_gb"] for run in runs) for name, runs in found.items()},
        "runs": found,
    }
    print(json.dumps(results, indent=2))
    if options.output:
        content = {"command": " ".join(["python", *sys.argv]), "machine": machine(), "results": results}
        options.output.write_text(json.dumps(content, indent=2) + "\n")


def apart(options: argparse.Namespace, name: str) -> dict[str, float]:
    """Run one variant in a process of its own."""
    command = [sys.executable, __file__, "--one", name, "--encoder", options.encoder, "--model", options.model]
    command += ["--texts", str(options.texts), "--samples", str(options.samples)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def one(options: argparse.Namespace) -> dict[str, float]:
    """Measure one variant here."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    prepare = {
        "bare forward": bare_forward,
        "service": service,
        "bare model": bare_model,
        "measurement": measurement,
    }[options.one]
    with tempfile.TemporaryDirectory() as folder:
        work = prepare(options, device, Path(folder))
        work(True)
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        count = work(False)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    return {"samples_per_second": count / seconds, "peak_memory_gb": round(peak / 1e9, 3)}


Work = Callable[[bool], int]
"""Does the work, of a few samples to warm up or of all, and returns how many they were."""


def texts_of(count: int) -> list[str]:
    """Return texts of the installed Python packages, the rows of the asset again and again."""
    from dataflex import assets

    rows = [
        row
        for file in sorted(assets.fetch("python-docs").glob("*.json"))
        if file.name not in ("dataset_info.json", "useless.json")
        for row in json.loads(file.read_text(encoding="utf-8"))
    ]
    return [f"{row['instruction']}\n{row['output']} {number // len(rows)}" for number, row in _cycle(rows, count)]


def _cycle(rows: list[Any], count: int) -> list[tuple[int, Any]]:
    return [(number, rows[number % len(rows)]) for number in range(count)]


def bare_forward(options: argparse.Namespace, device: Any, folder: Path) -> Work:
    import torch
    from transformers import AutoModel, AutoTokenizer

    from dataflex import assets
    from dataflex.embedding.store import CHUNK_ROWS
    from dataflex.embedding.transformers_encoder import BATCH_TOKENS
    from dataflex.probe.batches import length_batches

    path = assets.resolve(options.encoder)
    model, tokenizer = AutoModel.from_pretrained(path).eval().to(device), AutoTokenizer.from_pretrained(path)
    rows = tokenizer(texts_of(options.texts), truncation=True, max_length=256)
    lengths = np.array([len(ids) for ids in rows["input_ids"]])
    batches = [
        tokenizer.pad(
            {name: [values[begin + row] for row in batch] for name, values in rows.items()}, return_tensors="pt"
        )
        for begin in range(0, options.texts, CHUNK_ROWS)
        for batch in length_batches(lengths[begin : begin + CHUNK_ROWS], BATCH_TOKENS)
    ]

    @torch.inference_mode()
    def work(is_warm_up: bool) -> int:
        for batch in batches[-1:] if is_warm_up else batches:
            inputs = batch.to(device)
            states, mask = model(**inputs).last_hidden_state, inputs["attention_mask"].unsqueeze(-1)
            ((states * mask).sum(1) / mask.sum(1)).cpu()
        return options.texts

    return work


def service(options: argparse.Namespace, device: Any, folder: Path) -> Work:
    from dataflex import EmbeddingParams
    from dataflex.embedding.encoders import choose
    from dataflex.embedding.making import EncoderRun
    from dataflex.embedding.texts import TextList

    texts = texts_of(options.texts)
    backend = EmbeddingParams(encoder=options.encoder, encoder_backend="transformers")
    run = EncoderRun(choose(backend), folder, device)

    def work(is_warm_up: bool) -> int:
        return run.embed(TextList(texts[:8] if is_warm_up else texts)).rows

    return work


def bare_model(options: argparse.Namespace, device: Any, folder: Path) -> Work:
    import torch

    from dataflex.probe.batches import length_batches

    probe = probe_of(options, device)
    decoder = probe.model().get_decoder()
    order = length_batches(probe.pool.lengths, probe.batch_tokens)
    batches = [probe.collate(probe.pool.rows(batch)) for batch in order]

    @torch.no_grad()
    def work(is_warm_up: bool) -> int:
        for batch in batches[-1:] if is_warm_up else batches:
            inputs = {name: value.to(device) for name, value in batch.items() if name != "labels"}
            states, mask = decoder(**inputs, use_cache=False).last_hidden_state, inputs["attention_mask"].unsqueeze(-1)
            ((states * mask).sum(1) / mask.sum(1)).cpu()
        return options.samples

    return work


def measurement(options: argparse.Namespace, device: Any, folder: Path) -> Work:
    from dataflex import Embeddings

    probe = probe_of(options, device)

    def work(is_warm_up: bool) -> int:
        return len(probe.measure(Embeddings(), np.arange(8 if is_warm_up else options.samples)))

    return work


def probe_of(options: argparse.Namespace, device: Any) -> Any:
    """Return the probe of a language model on samples of 16 to 256 tokens."""
    import torch
    from accelerate import Accelerator
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

    from dataflex import assets
    from dataflex.data.pool import Pool
    from dataflex.probe.model import ModelProbe

    path = assets.resolve(options.model)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(device).eval()
    tokenizer, rng = AutoTokenizer.from_pretrained(path), np.random.default_rng(0)
    rows = [_sample(rng, tokenizer.vocab_size) for _ in range(options.samples)]
    pool = Pool.concatenate({"samples": Dataset.from_list(rows)})
    collate = DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8)
    return ModelProbe(pool, lambda: model, collate, Accelerator(cpu=device.type == "cpu").autocast, device, 2048)


if __name__ == "__main__":
    main()
