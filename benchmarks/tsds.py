"""TSDS against the steps of its authors' code: seconds, peak memory and the difference of the probabilities.

    python benchmarks/tsds.py                     # 10^6 x 384 vectors, 1,000 queries
    python benchmarks/tsds.py --size 100000

The steps are those of ZifanL/TSDS: faiss's IVFFlat (sqrt(N) / 2 lists, 10 of them probed) finds the neighbours of the
queries, and then those of all candidates found among themselves; a Python heap finds s. They need faiss (``pip install
faiss-cpu``). With ``--exact`` they use faiss's flat index, whose neighbours are those of ours.

The vectors are of length 1, in 200 topics; queries are of ``--topics`` of them. A twentieth of the vectors are
near-duplicates of others. Each side is a process of its own, one after the other; data is made before the clock starts.
"""

from __future__ import annotations

import argparse
import heapq
import json
import multiprocessing
import os
import platform
import resource
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ALPHA, C, SIGMA, MAX_K, KDE_K = 0.5, 5.0, 0.75, 5000, 1000
TOPICS = 200


def unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows


def make_data(folder: Path, size: int, queries: int, topics: int, seed: int) -> None:
    """Write ``base.npy`` and ``queries.npy``."""
    rng = np.random.default_rng(seed)
    width = 384
    centres = unit(rng.standard_normal((TOPICS, width), dtype=np.float32))

    def drawn(count: int, of: int) -> NDArray[np.float32]:
        rows = rng.standard_normal((count, width), dtype=np.float32) / np.sqrt(width, dtype=np.float32)
        rows += centres[rng.integers(of, size=count)]
        return unit(rows)

    base = drawn(size, TOPICS)
    copies = rng.permutation(size)[: size // 20]
    of = copies[rng.integers(max(1, copies.size // 50), size=copies.size)]
    base[copies] = unit(base[of] + 0.01 * rng.standard_normal((copies.size, width), dtype=np.float32))
    np.save(folder / "base.npy", base)
    np.save(folder / "queries.npy", drawn(queries, topics))


def index_of(vectors: NDArray[np.float32], exact: bool) -> Any:
    import faiss

    width = vectors.shape[1]
    if exact:
        index = faiss.IndexFlatL2(width)
    else:
        index = faiss.IndexIVFFlat(faiss.IndexFlatL2(width), width, int(np.sqrt(len(vectors))) // 2, faiss.METRIC_L2)
        index.train(vectors)
        index.nprobe = 10
    index.add(vectors)
    return index


def theirs(queries: NDArray[np.float32], base: NDArray[np.float32], exact: bool) -> tuple[NDArray[np.float64], Any]:
    """Return the probabilities by the steps of the authors' code, and the seconds of each."""
    marks = [("start", time.perf_counter())]
    size = len(base)
    max_k, kde_k = min(MAX_K, size // 10), min(KDE_K, size // 10)
    squares, ids = index_of(base, exact).search(queries, max_k)
    d = np.sqrt(np.maximum(squares, 0))
    marks.append(("neighbours", time.perf_counter()))
    known = np.unique(ids[ids >= 0])
    among = base[known]
    squares, others = index_of(among, exact).search(among, kde_k)
    kernel = np.where(others >= 0, np.maximum(0, 1 - squares / SIGMA**2), 0)
    rho_of = np.ones(size)
    rho_of[known] = kernel.sum(axis=1, dtype=np.float64)
    rho = rho_of[ids]
    marks.append(("densities", time.perf_counter()))
    shares = by_heap(d.astype(np.float64), ids, rho, size)
    marks.append(("heap", time.perf_counter()))
    return shares, {name: now - before for (_, before), (name, now) in pairwise(marks)}


def by_heap(d: NDArray[np.float64], ids: NDArray[np.int64], rho: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """Return the probabilities by a heap of the queries."""
    number, width = d.shape
    mass, weighted = 1 / rho[:, 0], d[:, 0] / rho[:, 0]
    costs, last = np.zeros(number), np.full(number, -1)
    heap = [(mass[i], 0, i) for i in range(number)]
    heapq.heapify(heap)
    total, level = 0.0, 1.0
    while heap:
        level, k, i = heapq.heappop(heap)
        cost = d[i, k + 1] * level - weighted[i]
        total += cost - costs[i]
        costs[i] = cost
        if ALPHA / C * total >= (1 - ALPHA) * number:
            break
        last[i] = k
        if k < width - 2:
            mass[i] += 1 / rho[i, k + 1]
            weighted[i] += d[i, k + 1] / rho[i, k + 1]
            heapq.heappush(heap, (mass[i], k + 1, i))
    shares = np.zeros(size)
    for i in range(number):
        left = 1 / number
        for k in range(last[i] + 1):
            part = min(left, 1 / number / level / rho[i, k])
            shares[ids[i, k]] += part
            left -= part
        shares[ids[i, last[i] + 1]] += left
    return shares


def ours(queries: NDArray[np.float32], base: NDArray[np.float32], exact: bool) -> tuple[NDArray[np.float64], Any]:
    """Return the probabilities by the selector's own function."""
    from dataflex import nearest
    from dataflex.selectors.tsds import TsdsParams, probabilities

    size = len(base)
    params = TsdsParams(
        alpha=ALPHA, c=C, sigma=SIGMA, max_k=min(MAX_K, size // 10), kde_k=min(KDE_K, size // 10), encoder="made before"
    )
    began = time.perf_counter()
    ids, distances = nearest(queries, base, params.max_k, metric="l2", measured=1000)
    found = time.perf_counter()
    shares = probabilities(ids, distances, base, params)
    return shares, {"neighbours": found - began, "densities and level": time.perf_counter() - found}


def run(folder: str, which: str, exact: bool, pipe: Any) -> None:
    """Compute one side and send what it took."""
    import torch

    base, queries = (np.load(Path(folder) / f"{name}.npy") for name in ("base", "queries"))
    function = {"ours": ours, "theirs": theirs}[which]
    if which == "theirs":
        import faiss

        faiss.omp_set_num_threads(torch.get_num_threads())
    began, cpu = time.perf_counter(), time.process_time()
    shares, parts = function(queries, base, exact)
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    np.save(Path(folder) / f"{which}.npy", shares)
    numbers = {"seconds": seconds, "processor_seconds": cpu, "parts": parts}
    pipe.send({**numbers, "memory_gb": peak / 2**20, "positive": int(np.count_nonzero(shares))})


def measured(folder: Path, which: str, exact: bool) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=run, args=(str(folder), which, exact, there))
    process.start()
    there.close()
    found: dict[str, Any] = here.recv()
    process.join()
    return found


def main() -> int:
    """Measure both and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--topics", type=int, default=20, help="topics of the queries")
    parser.add_argument("--exact", action="store_true", help="give the authors' steps exact neighbours")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/tsds-benchmark"))
    parser.add_argument("--only", choices=["ours", "theirs"], help="measure one side, on the data that is there")
    parser.add_argument("--output", type=Path, help="JSON file for the numbers")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.only:
        print(json.dumps(measured(options.folder, options.only, options.exact), indent=2))
        return 0
    make_data(options.folder, options.size, options.queries, options.topics, 0)
    found: dict[str, Any] = {which: measured(options.folder, which, options.exact) for which in ("ours", "theirs")}
    shares = [np.load(options.folder / f"{which}.npy") for which in ("ours", "theirs")]
    found["total_variation"] = float(np.abs(shares[0] - shares[1]).sum() / 2)
    for unit_of in ("seconds", "processor_seconds"):
        found[f"ratio_of_{unit_of}"] = found["theirs"][unit_of] / found["ours"][unit_of]
    found["load"] = os.getloadavg()
    print(json.dumps(found, indent=2))
    if options.output:
        machine = {"machine": platform.machine(), "cores": os.cpu_count(), "command": " ".join(sys.argv)}
        options.output.write_text(json.dumps({**machine, **found}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
