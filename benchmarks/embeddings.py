"""What does the embedding service cost? Against the bare forward of the same length-sorted batches.

    python benchmarks/embeddings.py                  # MiniLM on texts of this machine, and the model in training

Samples per second of

    bare forward    the model's forward and pooling of rows that are tokenized and sorted before
    service         texts to the file on disk: tokenizing, sorting, forward, pooling, float16, a mark for each chunk
    bare model      the forward of a language model without its head, of tokenized and sorted rows
    measurement     the measurement ``Embeddings`` of the same rows, by the probe

Each of the two is measured in turn with its floor in one process, because a machine's speed drifts by more than what is
to be seen; ratios are of neighbours in time, and their median counts.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="asset:all-minilm-l6-v2")
    parser.add_argument("--model", default="asset:smollm2-135m-instruct")
    parser.add_argument("--variants", nargs="+", choices=PAIRS, default=list(PAIRS))
    parser.add_argument("--texts", type=int, default=512)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--output", type=Path, help="JSON file of the results")
    options = parser.parse_args()
    results = {}
    for name in options.variants:
        results[name] = in_turn(options, name, PAIRS[name])
        print(
            name,
            json.dumps({key: value for key, value in results[name].items() if key != "runs"}, indent=2),
            flush=True,
        )
    if options.output:
        content = {"command": " ".join(["python", *sys.argv]), "machine": machine(), "results": results}
        options.output.write_text(json.dumps(content, indent=2) + "\n")


def in_turn(options: argparse.Namespace, name: str, floor: str) -> dict[str, Any]:
    """Measure a variant and its floor by turns: first the one, then the other, then both the other way round."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    prepare = {
        "bare forward": bare_forward,
        "service": service,
        "bare model": bare_model,
        "measurement": measurement,
    }
    runs: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        work = {each: prepare[each](options, device, Path(folder)) for each in (name, floor)}
        for repeat in range(-1, options.repeats):  # the first time warms up
            order = [name, floor] if repeat % 2 == 0 else [floor, name]
            both = {each: speed(work[each], device) for each in order}
            if repeat >= 0:
                runs.append(both)
    ratios = [both[name] / both[floor] for both in runs]
    return {
        "samples_per_second": statistics.median(both[name] for both in runs),
        "samples_per_second_of_the_floor": statistics.median(both[floor] for both in runs),
        "relative_to_floor": statistics.median(ratios),
        "from_to": [min(ratios), max(ratios)],
        "runs": runs,
    }


def speed(work: Work, device: Any) -> float:
    """Return samples per second."""
    import torch

    began = time.perf_counter()
    count = work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return count / (time.perf_counter() - began)


Work = Callable[[], int]
"""Does all of the work and returns how many samples there were."""


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
    def work() -> int:
        for batch in batches:
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
    run = EncoderRun(choose(backend), folder / "embeddings", device)

    def work() -> int:
        shutil.rmtree(run.root, ignore_errors=True)
        return run.embed(TextList(texts)).rows

    return work


def bare_model(options: argparse.Namespace, device: Any, folder: Path) -> Work:
    import torch

    from dataflex.probe.batches import length_batches

    probe = probe_of(options, device)
    decoder = probe.model().get_decoder()
    order = length_batches(probe.pool.lengths, probe.batch_tokens)
    batches = [probe.collate(probe.pool.rows(batch)) for batch in order]

    @torch.no_grad()
    def work() -> int:
        for batch in batches:
            inputs = {name: value.to(device) for name, value in batch.items() if name != "labels"}
            states, mask = decoder(**inputs, use_cache=False).last_hidden_state, inputs["attention_mask"].unsqueeze(-1)
            ((states * mask).sum(1) / mask.sum(1)).cpu()
        return options.samples

    return work


def measurement(options: argparse.Namespace, device: Any, folder: Path) -> Work:
    from dataflex import Embeddings

    probe = probe_of(options, device)

    def work() -> int:
        return len(probe.measure(Embeddings(), np.arange(options.samples)))

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
