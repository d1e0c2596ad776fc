"""What do per-sample gradient features cost? Against the forward and backward no such method can avoid.

    python benchmarks/gradient_features.py            # LoRA and full fine-tuning of SmolLM2-135M
    python benchmarks/gradient_features.py --tuning linear --texts --samples 48 --peer peer/bin/python

Samples per second of

    floor       forward and backward of the same length-sorted batches, no per-sample gradient
    features    per-sample gradients in Adam's direction, count-sketched to k = 8192 (this project)
    plain       the same without Adam
    kronecker   per-sample gradients without Adam, inputs and output gradients projected before they are multiplied
    one by one  one backward per sample, Adam's direction, not projected
    dense       the same, and a dense Rademacher projection to k of 16 gradients at a time; of more than 4 million
                elements the first 4 million are projected and timed, and the others' time is reckoned from theirs
    peer        bergson's gradients of the body's linear layers, in the environment of its interpreter (``--peer``);
                see peers/bergson_features.py

Every variant runs in a separate process, which also measures the peak memory. The processes take turns.
"""

from __future__ import annotations

import argparse
import contextlib
import json
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
from overhead import _sample, machine

VARIANTS = ("floor", "features", "plain", "kronecker", "one by one", "dense")
PEER = Path(__file__).parent / "peers" / "bergson_features.py"
PROJECTED_TOGETHER = 16
PROJECTED_ELEMENTS = 4_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="asset:smollm2-135m-instruct")
    parser.add_argument(
        "--tuning",
        nargs="+",
        choices=["lora", "full", "linear"],
        default=["lora", "full"],
        help="linear: full tuning of the linear layers without the head",
    )
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--rank", type=int, default=8, help="of LoRA")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--texts", action="store_true", help="every token counts, as in pre-training")
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--dim", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--bf16", action="store_true", help="bfloat16 weights, as on an accelerator")
    parser.add_argument("--peer", type=Path, help="interpreter of an environment with bergson, measured in turn")
    parser.add_argument("--output", type=Path, help="JSON file of the results")
    parser.add_argument("--one", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(options)))
        return
    results: dict[str, Any] = {}
    names = [*options.variants, *(["peer"] if options.peer else [])]
    for tuning in options.tuning:
        found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for repeat in range(options.repeats):
            for name in names if repeat % 2 == 0 else names[::-1]:
                if name in ("one by one", "dense") and repeat:
                    continue  # slow, and far from the others
                found[name].append(apart(options, tuning, name))
                print(tuning, name, found[name][-1], flush=True)
        results[tuning] = summary(found)
    result = {"command": " ".join(["python", *sys.argv]), "machine": machine(), "results": results}
    print(json.dumps(results, indent=2))
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n")


def apart(options: argparse.Namespace, tuning: str, name: str) -> dict[str, float]:
    """Run one variant in a separate process."""
    if name == "peer":
        return peer(options)
    command = [sys.executable, __file__, "--one", name, "--tuning", tuning, "--model", options.model]
    command += ["--samples", str(options.samples), "--batch-tokens", str(options.batch_tokens)]
    command += ["--dim", str(options.dim), "--rank", str(options.rank)]
    command += [*(["--bf16"] if options.bf16 else []), *(["--texts"] if options.texts else [])]
    return _answer(command)


def peer(options: argparse.Namespace) -> dict[str, float]:
    """Run bergson on the same samples, in its own environment."""
    from transformers import AutoTokenizer

    from dataflex import assets

    path = assets.resolve(options.model)
    samples = make_samples(options, AutoTokenizer.from_pretrained(path).vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "samples.jsonl"
        file.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
        command = [str(options.peer), str(PEER), "--model", str(path), "--samples", str(file)]
        command += ["--batch-tokens", str(options.batch_tokens)]
        return _answer(command)


def _answer(command: list[str]) -> dict[str, float]:
    """Run a command and return its last line, a JSON object. The errors of the command are shown."""
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def make_samples(options: argparse.Namespace, vocabulary: int) -> list[dict[str, Any]]:
    """Return the samples all variants measure."""
    rng = np.random.default_rng(0)
    samples = [_sample(rng, vocabulary) for _ in range(options.samples)]
    return [{**sample, "labels": sample["input_ids"]} for sample in samples] if options.texts else samples


def summary(found: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Return medians, and each variant's speed relative to the floor and to the dense projection."""
    speed = {name: statistics.median(run["samples_per_second"] for run in runs) for name, runs in found.items() if runs}
    return {
        "samples_per_second": speed,
        "relative_to_floor": {name: value / speed["floor"] for name, value in speed.items() if "floor" in speed},
        "relative_to_dense": {name: value / speed["dense"] for name, value in speed.items() if "dense" in speed},
        "relative_to_peer": {name: value / speed["peer"] for name, value in speed.items() if "peer" in speed},
        "peak_memory_gb": {name: max(run["peak_memory_gb"] for run in runs) for name, runs in found.items() if runs},
        "runs": found,
    }


def one(options: argparse.Namespace) -> dict[str, float]:
    """Measure one variant here."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

    from dataflex import assets
    from dataflex.api.probe import GradientSettings
    from dataflex.data.pool import Pool
    from dataflex.probe.batches import length_batches
    from dataflex.probe.gradient_features import GradientSimilarities
    from dataflex.probe.model import ModelProbe
    from dataflex.probe.moments import read_moments

    path = assets.resolve(options.model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if options.bf16 else torch.float32
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device)
    if options.tuning[0] == "lora":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=options.rank, target_modules="all-linear", task_type="CAUSAL_LM"))
    elif options.tuning[0] == "linear":
        body = {id(part.weight) for part in model.base_model.modules() if isinstance(part, torch.nn.Linear)}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in body)
    tokenizer = AutoTokenizer.from_pretrained(path)
    pool = Pool.concatenate({"samples": Dataset.from_list(make_samples(options, tokenizer.vocab_size))})
    collate = DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4)
    everyone = np.arange(options.samples)

    def inputs_of(rows: np.ndarray) -> dict[str, Any]:
        return {key: value.to(device) for key, value in collate(pool.rows(rows)).items()}

    model(**inputs_of(everyone[:2]), use_cache=False).loss.backward()  # the moments of a first step
    optimizer.step()
    optimizer.zero_grad()
    model.eval()
    probe = ModelProbe(
        pool,
        lambda: model,
        collate,
        contextlib.nullcontext,
        device,
        options.batch_tokens,
        moments=lambda: read_moments(optimizer, model),
    )

    def floor() -> int:
        for batch in length_batches(pool.lengths, options.batch_tokens):
            model(**inputs_of(everyone[batch]), use_cache=False).loss.backward()
            optimizer.zero_grad()
        return options.samples

    def features(settings: GradientSettings) -> int:
        probe.measure(GradientSimilarities(settings, np.zeros((1, settings.dim), dtype=np.float32)), everyone)
        return options.samples

    def singly(project: bool) -> float:
        """Return how many samples would have been done in the time this takes."""
        began = time.perf_counter()
        count = PROJECTED_TOGETHER
        rows = np.argsort(pool.lengths, kind="stable")[np.linspace(0, options.samples - 1, count).astype(int)]
        from dataflex.probe.preconditioners import AdamPreconditioner
        from dataflex.probe.projections import RademacherProjection

        direction = AdamPreconditioner(read_moments(optimizer, model), less=False)
        names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        size = sum(parameter.numel() for parameter in trainable)
        kept = torch.empty(count if project else 1, size, device=device)
        for number, row in enumerate(rows):
            loss = model(**inputs_of(row[None]), use_cache=False).loss
            begin = 0
            for name, gradient in zip(names, torch.autograd.grad(loss, trainable), strict=True):
                end = begin + gradient.numel()
                kept[number if project else 0, begin:end] = direction(name, 0, gradient.reshape(1, -1).float())
                begin = end
        if not project:
            return count
        if device.type == "cuda":
            torch.cuda.synchronize()
        middle = time.perf_counter()
        out = torch.zeros(count, options.dim, device=device)
        part = min(size, PROJECTED_ELEMENTS)
        RademacherProjection(options.dim, 0, device).add(out, "all", 0, kept[:, :part], part)
        if device.type == "cuda":
            torch.cuda.synchronize()
        end = time.perf_counter()
        return count * (end - began) / (middle - began + (end - middle) * size / part)

    work: dict[str, Callable[[], float]] = {
        "floor": floor,
        "features": partial(features, GradientSettings("adam", "count", options.dim)),
        "plain": partial(features, GradientSettings("none", "count", options.dim)),
        "kronecker": partial(features, GradientSettings("none", "kronecker", options.dim)),
        "one by one": partial(singly, False),
        "dense": partial(singly, True),
    }
    if options.one in ("floor", "features", "plain", "kronecker"):
        work[options.one]()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    done = work[options.one]()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    return {"samples_per_second": done / seconds, "peak_memory_gb": round(peak / 1e9, 3)}


if __name__ == "__main__":
    main()
