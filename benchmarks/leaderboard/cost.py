"""Track C: what methods cost, side by side with the steps of other implementations, in one run on one machine.

    python benchmarks/leaderboard/cost.py --data FOLDER --output costs.json [--only doremi losses] [--peer PYTHON]

    less_lora_8, less_lora_128, less_full
                LESS as its authors' pipeline does it, against ``dataflex-cli features`` and ``score``
    doremi      DoReMi's step with a live reference as its authors do it, against the mixer with a reference or a table
    features    gradient features of linear layers, against bergson in the environment of ``--peer``; see
                ``peers/bergson_features.py``
    losses      losses of samples as the earlier DataFlex release measures them, against the loss probe

The steps of others are written in our own words; each module names its facts. FOLDER has
``instruct/pool_permissive.jsonl`` and ``eval/mmlu_val_alpaca.jsonl``. Every variant runs in a separate process after a
warm-up, and the variants take turns. A ratio is the seconds of the other implementation divided by those of this
package: the median of the pairs, the least and the most. ``reckoned`` marks seconds of which a part was reckoned from a
smaller measurement. Each part is written as soon as it is measured; ``--only`` leaves the other parts of the file as
they are. Run nothing else meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cost_doremi
import cost_features
import cost_less
import cost_losses

PARTS: dict[str, Callable[[Any, Path], dict[str, Any]]] = {
    **{f"less_{tuning}": partial(cost_less.measure, tuning=tuning) for tuning in cost_less.TUNINGS},
    "doremi": cost_doremi.measure,
    "features": cost_features.measure,
    "losses": cost_losses.measure,
}
FILES = ("instruct/pool_permissive.jsonl", "eval/mmlu_val_alpaca.jsonl")


@dataclass(frozen=True)
class Settings:
    """What the parts are asked.

    Attributes:
        data: folder of the data files.
        model: name or asset of the model of all parts but ``doremi``.
        samples: samples of LESS's pool; the other parts scale with it.
        repeats: timed requests of each variant. LESS has one for each checkpoint instead.
        peer: interpreter of an environment with bergson.
        device: ``cpu`` or ``cuda``.
        commands: tunings of LESS of which the commands are measured, too, with the starts of their processes.
    """

    data: Path
    model: str
    samples: int
    repeats: int
    peer: Path | None
    device: str
    commands: tuple[str, ...]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True, help="JSON file of the results")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="only these parts")
    parser.add_argument("--peer", type=Path, help="interpreter of an environment with bergson")
    parser.add_argument("--model", default="asset:smollm2-135m-instruct")
    parser.add_argument(
        "--commands",
        nargs="*",
        choices=cost_less.TUNINGS,
        default=["lora_8"],
        help="tunings of LESS of which the commands are measured as a user runs them, too (default: lora_8)",
    )
    parser.add_argument("--samples", type=int, default=4, help="samples of LESS's pool, a multiple of 4; others scale")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args()
    missing = [name for name in FILES if not (options.data / name).is_file()]
    if missing:
        parser.error(f"--data: {options.data} has no {' and no '.join(missing)}")
    if options.samples < 4 or options.samples % 4:
        parser.error(f"--samples: {options.samples} is not a multiple of 4")
    if options.peer is not None and not options.peer.is_file():
        parser.error(f"--peer: there is no file {options.peer}. Name a Python interpreter")
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # for all processes
    elif not has_cuda():
        parser.error("--device: cuda, but PyTorch finds no CUDA device")
    sys.path.append(str(Path(__file__).parents[1]))  # the other benchmarks, also for the processes of the variants
    settings = Settings(
        options.data.resolve(),
        options.model,
        options.samples,
        options.repeats,
        options.peer,
        options.device,
        tuple(options.commands),
    )
    for name in options.only:
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            parts = PARTS[name](settings, Path(folder))
        add(options.output, name, parts, time.perf_counter() - began)
    print(table(json.loads(options.output.read_text())["parts"]))


def has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def add(file: Path, name: str, parts: dict[str, Any], seconds: float) -> None:
    """Add measured parts to the file, with the command and the machine of this run."""
    from overhead import machine

    from dataflex.files import write_atomically

    known = json.loads(file.read_text()) if file.exists() else {"parts": {}, "measured": {}, "skipped": {}}
    known["skipped"].pop(name, None)
    if "skipped" in parts:
        known["skipped"][name] = parts["skipped"]
        parts = {}
    known["parts"] |= parts
    known["measured"][name] = {
        "command": " ".join(["python", *sys.argv]), "machine": machine(), "seconds": round(seconds, 1),
    }  # fmt: skip
    write_atomically(file, (json.dumps(known, indent=2) + "\n").encode())


def table(parts: dict[str, Any]) -> str:
    """Return all ratios as lines of a table; ~ marks a reckoned one."""
    lines = ["", f"{'part':<12} {'ratio of seconds':<46} {'median':>8} {'least':>8} {'most':>8}"]
    for name, part in parts.items():
        for pair, found in part["ratios"].items():
            mark = "~" if found["reckoned"] else " "
            numbers = " ".join(f"{mark}{found[key]:>7.2f}" for key in ("median", "low", "high"))
            lines.append(f"{name:<12} {pair:<46} {numbers}")
    lines += ["", f"{'part':<12} {'variant':<28} {'seconds':>9} {'peak GB':>8} {'samples':>8}"]
    for name, part in parts.items():
        for variant, found in part["variants"].items():
            mark = "~" if found["reckoned"] else " "
            middle = sorted(found["seconds"])[len(found["seconds"]) // 2]
            peak = f"{found['peak_bytes'] / 1e9:.2f}" if found["peak_bytes"] is not None else "-"
            lines.append(f"{name:<12} {variant:<28} {mark}{middle:>8.2f} {peak:>8} {found['samples']:>8}")
    lines += ["", "~ a part of these seconds was reckoned from a smaller measurement; agreement:"]
    for name, part in parts.items():
        lines += [f"  {name}, {what}: {json.dumps(found)}" for what, found in part["agreement"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
