"""What it takes to read a long run back: seconds and peak memory of the commands that look at run records.

    python benchmarks/report.py
    python benchmarks/report.py --rounds 100 --size 1000

Writes records of ``--rounds`` rounds with plans of ``--size`` rows, 10^7 rows by default, from a pool of 10^7 samples
in eight domains, with 2,000 logged steps and 100 evaluations; then times ``dataflex-cli report`` on one run and on
three, and ``dataflex-cli explain`` on one sample and on the whole run. The page's size is printed too. Peak memory
below the 0.15 GB of the benchmark itself does not show. With ``--output`` the numbers are written as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import yaml

DOMAINS = 8
POOL = 10_000_000
STEPS, EVALUATIONS = 2000, 100


def write_run(run: Path, rounds: int, size: int, seed: int) -> Path:
    """Write a record in which later rounds come more and more from a part of the pool."""
    rng = np.random.default_rng(seed)
    names = [f"domain {i}" for i in range(DOMAINS)]
    folder = run / "dataflex"
    (folder / "plans").mkdir(parents=True)
    config = {"stage": "sft", "dataflex": {"select": {"method": "loss"}}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    pool = dict.fromkeys(names, POOL // DOMAINS)
    with (folder / "rounds.jsonl").open("w") as stream:
        for number in range(rounds):
            indices = rng.integers(0, max(size, POOL // (1 + number // 10)), size)
            ids = indices // (POOL // DOMAINS)
            columns = {
                "position": pyarrow.array(np.arange(size)),
                "index": pyarrow.array(indices),
                "domain": pyarrow.DictionaryArray.from_arrays(ids.astype(np.int32), names),
                "score": pyarrow.array(rng.normal(size=size).astype(np.float32)),
                "rank": pyarrow.array(rng.permutation(size) + 1),
            }
            pyarrow.parquet.write_table(pyarrow.table(columns), folder / "plans" / f"round-{number:05d}.parquet")
            counts = dict(zip(names, np.bincount(ids, minlength=DOMAINS).tolist(), strict=True))
            line = {
                "round": number, "start_step": number, "steps": 1, "size": size, "plan_sha256": "", "pool": pool,
                "domains": counts, "proportions": {name: count / size for name, count in counts.items()},
                "components": {"select": "loss"}, "cost": {"seconds": 1.0, "samples": size, "tokens": size},
                "candidates": {"pool": POOL},
            }  # fmt: skip
            stream.write(json.dumps(line) + "\n")
    history = []
    for step in range(1, STEPS + 1):
        seconds = {f"dataflex/{name}_seconds": float(step) for name in ("train", "decision", "evaluate")}
        losses = {
            f"dataflex/loss/{name}": float(loss) for name, loss in zip(names, rng.normal(size=DOMAINS), strict=True)
        }
        history.append({"step": step, "loss": float(rng.normal()), "dataflex/tokens": 1000 * step, **seconds, **losses})
    (run / "trainer_state.json").write_text(json.dumps({"global_step": STEPS, "log_history": history}))
    lines = [evaluation(step, names, rng) for step in range(STEPS // EVALUATIONS, STEPS + 1, STEPS // EVALUATIONS)]
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    cost = {"train_seconds": 2000.0, "decision_seconds": 2000.0, "evaluate_seconds": 2000.0, "overhead_fraction": 1.0}
    summary = {**cost, "rounds": rounds, "tokens": 1000 * STEPS, "steps": STEPS, "evaluation": lines[-1]}
    (folder / "summary.json").write_text(json.dumps(summary))
    return run


def evaluation(step: int, names: list[str], rng: np.random.Generator) -> dict[str, Any]:
    measures = {"loss": float(rng.uniform(1, 3)), "perplexity": 5.0, "bits_per_byte": 1.0}
    sizes = {"tokens": 1000, "bytes": 4000, "samples": 20}
    return {
        "step": step, "tokens": 1000 * step, "train_seconds": float(step), "decision_seconds": float(step),
        "evaluate_seconds": float(step), "fingerprint": "ab", "token_weighted": measures, "unweighted": measures,
        "domains": {name: {**measures, "loss": float(rng.uniform(1, 3)), **sizes} for name in names},
    }  # fmt: skip


def measure(arguments: list[str], log: Path) -> dict[str, float]:
    """Run a command in a separate process and return its seconds and its peak memory in GB."""
    begin = time.perf_counter()
    process = os.fork()
    if process == 0:
        with log.open("wb") as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
        os.execv(sys.executable, [sys.executable, "-m", "dataflex", *arguments])
    _, status, usage = os.wait4(process, 0)
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"dataflex-cli {arguments[0]} failed:\n{log.read_text()[-2000:]}")
    return {"seconds": round(time.perf_counter() - begin, 2), "peak_gb": round(usage.ru_maxrss / 1e6, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--size", type=int, default=10_000, help="rows of each plan")
    parser.add_argument("--output", type=Path, help="JSON file of the numbers")
    options = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        runs = [str(write_run(folder / f"run-{i}", options.rounds, options.size, i)) for i in range(3)]
        print(f"written: 3 runs, {options.rounds:,} rounds of {options.size:,} rows each", flush=True)
        page, several = folder / "one.html", folder / "three.html"
        for title, arguments in (
            ("report, one run", ["report", runs[0], "--output", str(page)]),
            ("report, three runs", ["report", *runs, "--output", str(several)]),
            ("explain --index 5", ["explain", runs[0], "--index", "5", "--no-text"]),
            ("explain, the whole run", ["explain", runs[0], "--no-text"]),
        ):
            found[title] = measure(arguments, folder / "log.txt")
            print(f"{title:24} {found[title]['seconds']:7.2f} s  {found[title]['peak_gb']:6.3f} GB", flush=True)
        found["page_mb"] = {"one run": page.stat().st_size / 1e6, "three runs": several.stat().st_size / 1e6}
        print(", ".join(f"page of {runs}: {size:.2f} MB" for runs, size in found["page_mb"].items()))
    if options.output:
        machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
        result = {"machine": machine, "rounds": options.rounds, "size": options.size, **found}
        options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
