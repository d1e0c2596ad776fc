"""What does the loss cost in chunks, with and without token weights, against the cross entropy of all logits?

    python benchmarks/fused_loss.py                                     # about 5 minutes on two cores
    python benchmarks/fused_loss.py --device cuda --dtype bfloat16 --tokens 16384 --width 4096
    python benchmarks/fused_loss.py --tokens 64 --width 16 --vocabularies 1000 --repeats 2    # tries the script itself

One step is the loss of random hidden states behind a random head, and its gradients, for a trained and a frozen head:

    plain       F.cross_entropy of all logits in float32
    unweighted  the fused loss, every coefficient 1
    known       the fused loss, coefficients known before
    decided     the fused loss, coefficients decided from the losses of the same step: every token counts
    chosen      the same, and the 60 % of the tokens with the highest losses count (Rho-1 keeps that share)

Times: all variants run in turn, in alternating order, in one process for each vocabulary and head. Each ratio compares
the same repeat; the median, the lowest and the highest are printed. Memory: each variant runs once in a process of its
own. Counted is its peak beyond the inputs and their gradients: of resident memory on a CPU, after a step on few tokens
and a small vocabulary; of allocated memory on a GPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from overhead import machine

from dataflex.probe.head import AfterHead
from dataflex.trainer.fused_loss import linear_losses, weighted_linear_loss

CHOSEN = 0.6
WARM_UP = (16, 100)
"""Tokens and vocabulary of the step before memory is measured. It loads libraries and starts threads."""
PRODUCTS = {
    "trained": {"plain": 3, "unweighted": 3, "known": 3, "decided": 4, "chosen": 1 + 3 * CHOSEN},
    "frozen": {"plain": 2, "unweighted": 2, "known": 2, "decided": 2, "chosen": 2},
}
"""Products with the head in a step."""
GOALS = {
    "of_unweighted_speed": {"at_least": 0.97},
    "of_unweighted_memory": {"at_most": 1.02},
    "of_the_logits": {"at_most": 0.25, "vocabulary": 131_072},
}


class Step:
    """The loss of some tokens and its gradients.

    Args:
        tokens: number of tokens.
        width: width of the hidden states.
        vocabulary: number of rows of the head.
        trained: whether the head is trained.
        device: the device.
        dtype: number type of the hidden states and the head.
    """

    def __init__(
        self, tokens: int, width: int, vocabulary: int, trained: bool, device: torch.device, dtype: torch.dtype
    ) -> None:
        generator = torch.Generator(device).manual_seed(0)
        self.hidden = torch.randn(tokens, width, device=device, dtype=dtype, generator=generator).requires_grad_()
        # torch.nn.Linear fills its weight by itself, which costs time.
        with torch.device("meta"):
            self.head = torch.nn.Linear(width, vocabulary, bias=False)
        weight = torch.empty(vocabulary, width, device=device, dtype=dtype)
        weight.normal_(std=width**-0.5, generator=generator)
        self.head.weight = torch.nn.Parameter(weight, requires_grad=trained)
        self.labels = torch.randint(0, vocabulary, (tokens,), device=device, generator=generator)
        self.given = torch.rand(tokens, device=device, generator=generator) + 0.5
        self.ones = torch.ones(tokens, device=device)

    def run(self, variant: str) -> None:
        """Compute the gradients of a variant. The last ones are dropped before."""
        self.hidden.grad = self.head.weight.grad = None
        self._loss(variant).backward()

    def _loss(self, variant: str) -> torch.Tensor:
        if variant == "plain":
            return F.cross_entropy(self.head(self.hidden).float(), self.labels)
        if variant in ("unweighted", "known"):
            coefficients = self.ones if variant == "unweighted" else self.given
            total, _ = weighted_linear_loss(self.head, self.hidden, self.labels, coefficients, AfterHead())
            return total / self.labels.numel()
        losses, _ = linear_losses(self.head, self.hidden, self.labels, AfterHead())
        known = losses.detach()
        if variant == "decided":
            return (known.softmax(0) * losses).sum()
        return ((known >= known.quantile(1 - CHOSEN)) * losses).sum() / known.numel()

    def gradient_bytes(self) -> int:
        """Return the size of the gradients."""
        return sum(each.grad.nbytes for each in (self.hidden, self.head.weight) if each.grad is not None)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def times(step: Step, device: torch.device, repeats: int) -> dict[str, list[float]]:
    """Return the seconds of every variant, in turn, after one step of each that is not timed."""
    seconds: dict[str, list[float]] = {name: [] for name in PRODUCTS["trained"]}
    for repeat in range(-1, repeats):
        for name in list(seconds) if repeat % 2 == 0 else list(seconds)[::-1]:
            wait(device)
            began = time.perf_counter()
            step.run(name)
            wait(device)
            if repeat >= 0:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def peak(device: torch.device) -> int:
    """Return the highest memory of this process until now, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory(make: Callable[[int, int], Step], sizes: tuple[int, int], variant: str, device: torch.device) -> int:
    """Return the peak memory of a variant beyond the inputs and their gradients, in bytes."""
    make(*WARM_UP).run(variant)
    gc.collect()
    step = make(*sizes)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = peak(device)
    step.run(variant)
    wait(device)
    return peak(device) - before - step.gradient_bytes()


def one(what: str, options: argparse.Namespace) -> Any:
    """Return the times of all variants, or the memory of one, for one vocabulary and head."""
    device, (vocabulary,), (head,) = torch.device(options.device), options.vocabularies, options.heads
    dtype = getattr(torch, options.dtype)

    def make(tokens: int, rows: int) -> Step:
        return Step(tokens, options.width, rows, head == "trained", device, dtype)

    sizes = (options.tokens, vocabulary)
    return times(make(*sizes), device, options.repeats) if what == "times" else memory(make, sizes, what, device)


def apart(what: str, head: str, vocabulary: int, options: argparse.Namespace) -> Any:
    """Measure in a process of its own."""
    command = [sys.executable, __file__, "--one", what, "--heads", head, "--vocabularies", str(vocabulary)]
    for name in ("tokens", "width", "repeats", "device", "dtype"):
        command += [f"--{name}", str(getattr(options, name))]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def ratios(values: list[float], floors: list[float]) -> dict[str, Any]:
    """Return the median and the range of the ratios of floors to values, repeat by repeat."""
    each = [floor / value for value, floor in zip(values, floors, strict=True)]
    return {"median": round(statistics.median(each), 3), "range": [round(min(each), 3), round(max(each), 3)]}


def summary(head: str, vocabulary: int, options: argparse.Namespace) -> dict[str, Any]:
    """Measure all variants for one vocabulary and head, and compare them."""
    seconds = apart("times", head, vocabulary, options)
    peaks = {name: apart(name, head, vocabulary, options) for name in seconds}
    logits, found = options.tokens * vocabulary * 4, {}
    for name, values in seconds.items():
        found[name] = {
            "products": PRODUCTS[head][name],
            "tokens_per_second": round(options.tokens / statistics.median(values), 1),
            "seconds": [round(value, 4) for value in values],
            "of_plain_speed": ratios(values, seconds["plain"]),
            "of_unweighted_speed": ratios(values, seconds["unweighted"]),
            "peak_bytes": peaks[name],
            "of_unweighted_memory": round(peaks[name] / peaks["unweighted"], 3),
            "of_the_logits": round(peaks[name] / logits, 3),
        }
    return found


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[32_000, 131_072])
    parser.add_argument("--heads", nargs="+", choices=list(PRODUCTS), default=list(PRODUCTS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--output", type=Path, help="JSON file of the results")
    parser.add_argument("--one", choices=["times", *PRODUCTS["trained"]], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(options.one, options)))
        return 0
    results: dict[str, Any] = {}
    settings = {name: getattr(options, name) for name in ("tokens", "width", "repeats", "device", "dtype")}
    whole = {"command": " ".join(["python", *sys.argv]), "machine": machine(), "settings": settings}
    whole |= {"goals": GOALS, "results": results}
    for vocabulary in options.vocabularies:
        for head in options.heads:
            results[f"{vocabulary}, {head}"] = summary(head, vocabulary, options)
            print(f"{vocabulary}, {head}", json.dumps(results[f"{vocabulary}, {head}"], indent=2), flush=True)
            if options.output:
                options.output.write_text(json.dumps(whole, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
