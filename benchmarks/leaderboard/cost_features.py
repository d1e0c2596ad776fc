"""Gradient features of the linear layers of a model, against bergson in its own environment.

The measurement is that of ``gradient_features.py --tuning linear --texts --peer``: each request starts a process, which
warms up and times the features of the same samples. Both keep the gradients in memory.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from turns import Timed, ratio, row

VARIANTS = {
    "bergson": "peer",
    "dataflex, Kronecker sketch": "kronecker",
    "dataflex, Adam's direction and count sketch": "features",
}


def measure(settings: Any, folder: Path) -> dict[str, Any]:
    """Return the part; see ``cost.Settings``. Without a peer the part has one key, ``skipped``, with the reason."""
    if settings.peer is None or settings.device != "cpu":
        why = "no --peer names the interpreter of an environment with bergson"
        if settings.peer is not None:
            why = "peers/bergson_features.py runs on a CPU"
        print(f"features: skipped, because {why}", flush=True)
        return {"skipped": why}
    import gradient_features

    print("features", flush=True)
    asked = argparse.Namespace(
        model=settings.model, samples=2 * settings.samples, texts=True, batch_tokens=1024, dim=8192, rank=8, bf16=False,
        peer=settings.peer,
    )  # fmt: skip
    found = {name: Timed(0.0) for name in VARIANTS}
    for repeat in range(max(1, settings.repeats - 1)):
        for name in list(found) if repeat % 2 == 0 else list(found)[::-1]:
            run = gradient_features.apart(asked, "linear", VARIANTS[name])
            found[name].seconds.append(asked.samples / run["samples_per_second"])
            found[name].peak_bytes = max(found[name].peak_bytes, int(run["peak_memory_gb"] * 1e9))
            print(f"  {name}: {found[name].seconds[-1]:.2f} s", flush=True)
    rows = {name: row(timed, asked.samples) for name, timed in found.items()}
    return {
        "features": {
            "about": "seconds of the features of all samples, without the start of the process",
            "settings": {"samples": asked.samples, "batch_tokens": asked.batch_tokens, "dim": asked.dim},
            "variants": rows,
            "ratios": {f"bergson / {name}": ratio(rows["bergson"], rows[name]) for name in list(rows)[1:]},
            "agreement": {},
        }
    }
