"""What a table of reference losses costs to make, what it takes on the disk, and the error of a byte.

    python benchmarks/reference_table.py --model asset:smollm2-135m-instruct --tokens 1000000

Two passes over the same samples take turns, in one process. ``bare forward`` is the forward pass of the same
length-sorted batches without gradient, with the head in chunks. ``table`` is the whole making of
a table: digests, losses, coding and files. The texts are the sources of the standard library, or with ``--data FOLDER``
the texts of ``FOLDER/pretrain/*_train.jsonl``, in samples of 64 to 1024 tokens that are all trained on.

The error of an excess loss (loss minus reference loss) is that of the reference loss, negated. It is measured
against the float32 losses that the table was made from. Results are printed and, with ``--output``, written as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from overhead import machine
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

from dataflex import assets
from dataflex.api.reference import read_table
from dataflex.data.pool import Pool
from dataflex.probe.batches import inputs_of, length_batches
from dataflex.probe.collation import Collation
from dataflex.probe.head import chunked_values
from dataflex.probe.reference import Advance, ReferenceModel, losses_of
from dataflex.probe.table_maker import TableMaker, part_ranges

SHORTEST, LONGEST = 64, 1024
"""Tokens of a sample."""


def texts(data: Path | None) -> Iterator[str]:
    """Yield the texts of a folder of data, or of the standard library."""
    if data is None:
        for source in sorted(Path(os.__file__).parent.rglob("*.py")):
            yield source.read_text(encoding="utf-8", errors="replace")
        return
    for file in sorted((data / "pretrain").glob("*_train.jsonl")):
        with file.open(encoding="utf-8") as stream:
            for line in stream:
                yield json.loads(line)["text"]


def samples_of(tokenizer: Any, tokens: int, data: Path | None) -> Pool:
    """Return samples of random lengths with about ``tokens`` tokens together, cut from texts one after another."""
    rng, rows, left = np.random.default_rng(0), [], tokens
    for text in texts(data):
        whole = tokenizer(text, add_special_tokens=False)["input_ids"]
        while len(whole) > SHORTEST and left > 0:
            length = int(rng.integers(SHORTEST, LONGEST + 1))
            cut, whole = whole[:length], whole[length:]
            rows.append({"input_ids": cut, "attention_mask": [1] * len(cut), "labels": cut})
            left -= len(cut)
        if left <= 0:
            break
    else:
        sys.exit(f"the texts have only {tokens - left} tokens; give --data, or fewer --tokens")
    return Pool.concatenate({"texts": Dataset.from_list(rows)})


def measure(model: str, tokens: int, batch_tokens: int, repeats: int, data: Path | None) -> dict[str, Any]:
    """Time both passes in turn, and read what the table says about itself."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind = torch.bfloat16 if device.type == "cuda" else torch.float32
    path = assets.resolve(model)
    tokenizer = AutoTokenizer.from_pretrained(path)
    language_model = AutoModelForCausalLM.from_pretrained(path, dtype=kind).to(device).eval().requires_grad_(False)
    pool = samples_of(tokenizer, tokens, data)
    collation = Collation(DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8))
    reference = ReferenceModel(language_model, torch.no_grad)

    def bare() -> None:
        total = torch.zeros((), device=device)
        with torch.no_grad():
            for first, last in part_ranges(pool.lengths):
                for batch in length_batches(pool.lengths[first:last], batch_tokens):
                    inputs, labels = inputs_of(collation.of(pool, first + batch), device)
                    total += chunked_values(language_model, inputs, labels)[2].sum()
        assert np.isfinite(total.item())

    def compute(indices: np.ndarray, advance: Advance) -> tuple[np.ndarray, np.ndarray]:
        return losses_of(pool, indices, reference, collation, device, batch_tokens, advance)

    with tempfile.TemporaryDirectory() as root:
        folders = iter(Path(root) / str(number) for number in range(repeats + 1))
        made: list[Path] = []

        def table() -> None:
            made.append(next(folders))
            TableMaker(made[-1], pool, "--output", "byte").make(["texts"], compute, path)

        losses_of(pool, np.arange(8), reference, collation, device, batch_tokens)  # chooses the head's path
        seconds = in_turn({"bare forward": bare, "table": table}, repeats)
        found = read_table(made[-1])
        assert found is not None
        entry = found["domains"]["texts"]
        size = sum(file.stat().st_size for file in made[-1].iterdir() if file.suffix in (".u8", ".npy"))
    counted = int(pool.lengths.sum())
    return {
        "device": str(device),
        "samples": pool.size,
        "tokens": counted,
        "tokens_per_second": {name: counted / value for name, value in seconds.items()},
        "relative_to_bare_forward": seconds["bare forward"] / seconds["table"],
        "bytes_per_token": size / entry["tokens"],
        "error_of_excess_loss": {**entry["error"], "mean": -entry["error"]["mean"]},
    }


def in_turn(functions: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Return the median seconds of each function, called in alternating order."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(repeats):
        for name in list(functions) if repeat % 2 == 0 else list(functions)[::-1]:
            began = time.perf_counter()
            functions[name]()
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="asset:smollm2-135m-instruct")
    parser.add_argument("--tokens", type=int, default=10**6)
    parser.add_argument("--batch-tokens", type=int, default=8192, help="tokens of a forward pass, padding counted")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="folder of data files")
    parser.add_argument("--output", type=Path, help="JSON file that the result is added to")
    options = parser.parse_args()
    found = measure(options.model, options.tokens, options.batch_tokens, options.repeats, options.data)
    result = {"command": " ".join(["python", *sys.argv]), **found}
    print(json.dumps(result, indent=2))
    if options.output is not None:
        known = json.loads(options.output.read_text()) if options.output.exists() else {"machine": machine()}
        options.output.write_text(json.dumps({**known, "reference_table": result}, indent=2) + "\n")


if __name__ == "__main__":
    main()
