"""The exact search of nearest neighbours against the matrix product alone.

    python benchmarks/neighbours.py                    # 10^6 x 384 vectors, 1,000 queries
    python benchmarks/neighbours.py --size 200000 --repeats 5

Both are measured in turn: numpy's product of the queries with blocks of the vectors, whose values are not looked at,
and ``dataflex.nearest`` for several k and both metrics. Each search is compared with the product right before it,
because a machine's speed drifts, and the median of these ratios counts, of the clock and of the processor.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dataflex import nearest

BLOCK = 65_536


def seconds(function: Callable[[], Any]) -> tuple[float, float]:
    began, cpu = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - began, time.process_time() - cpu


def main() -> int:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--half", action="store_true", help="vectors in half precision, as embeddings are kept")
    parser.add_argument("--output", type=Path, help="JSON file for the numbers")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    base = rng.standard_normal((options.size, options.width), dtype=np.float32)
    base /= np.linalg.norm(base, axis=1, keepdims=True)
    queries = base[rng.choice(options.size, options.queries, replace=False)].copy()
    stored = base.astype(np.float16) if options.half else base

    def product() -> None:
        for begin in range(0, options.size, BLOCK):
            queries @ base[begin : begin + BLOCK].T

    def search(k: int, metric: Any) -> None:
        nearest(queries, stored, k, metric=metric, device="cpu")

    nearest(queries[:2], stored[:2000], 5)  # imports
    found: dict[str, dict[str, list[float]]] = {}
    for _ in range(options.repeats):
        for k, metric in [(k, metric) for k in (10, 100, 1000) for metric in ("cosine", "l2")]:
            floor, taken = seconds(product), seconds(partial(search, k, metric))
            of = found.setdefault(f"{metric}, k {k}", {"product": [], "seconds": [], "clock": [], "processor": []})
            of["product"].append(round(floor[0], 3))
            of["seconds"].append(round(taken[0], 3))
            of["clock"].append(round(taken[0] / floor[0], 3))
            of["processor"].append(round(taken[1] / floor[1], 3))
    medians = {
        name: {
            "seconds": statistics.median(of["seconds"]),
            "of_the_product": statistics.median(of["clock"]),
            "of_the_product_in_processor_time": statistics.median(of["processor"]),
        }
        for name, of in found.items()
    }
    result = {
        "command": " ".join(sys.argv),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "load": os.getloadavg(),
    }
    result |= {"numpy": np.__version__, "medians": medians, "repeats": found}
    print(json.dumps(result, indent=2))
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
