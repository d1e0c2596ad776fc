"""Does selection find the samples it is for, and does that help? LESS against random selection at equal tokens.

    python benchmarks/selection_quality.py less   --data FOLDER   # every candidate scored once
    python benchmarks/selection_quality.py budget --data FOLDER   # max_overhead 0.25, the whole pool ten times dearer

The pool holds as many samples of four kinds: grade-school mathematics, code, dialogue and general instructions; the
validation samples are mathematics. Every sample has the same number of tokens, so equal steps are equal tokens. FOLDER
has gsm8k_train.jsonl, gpteacher_codegen.jsonl, gpteacher_roleplay.jsonl and alpaca.jsonl with instruction, input and
output.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from overhead import machine
from scipy import stats

from dataflex import assets
from dataflex.record.reader import read_run

KINDS = {
    "mathematics": "gsm8k_train.jsonl",
    "code": "gpteacher_codegen.jsonl",
    "dialogue": "gpteacher_roleplay.jsonl",
    "general": "alpaca.jsonl",
}
TOKENS = 96
VALIDATION, HELD_OUT = 8, 48
SETTINGS = {
    "less": {"each": 60, "warmup_steps": 8, "update_steps": 15, "updates": 1, "steps": 23},
    "budget": {"each": 210, "warmup_steps": 12, "update_steps": 18, "updates": 4, "steps": 84},
}
BATCH = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=SETTINGS)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("selection-quality"), help="folder of the runs")
    parser.add_argument("--model", default="asset:smollm2-135m-instruct")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--output", type=Path, help="JSON file of the results")
    options = parser.parse_args()
    settings = SETTINGS[options.what]
    model = assets.resolve(options.model)
    rows = []
    for seed in options.seeds:
        data = write_data(options.data, options.work / options.what / f"data-{seed}", model, settings["each"], seed)
        for method in ("random", "less"):
            rows.append({"seed": seed, **one_run(options, settings, model, data, method, seed)})
            print(json.dumps(rows[-1]), flush=True)
    result = {
        "command": " ".join(["python", *sys.argv]),
        "machine": machine(),
        "settings": {**settings, "batch": BATCH, "tokens": TOKENS, "validation": VALIDATION, "held_out": HELD_OUT},
        "runs": rows,
        "summary": summary(rows),
    }
    print(json.dumps(result["summary"], indent=2))
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n")


def write_data(source: Path, folder: Path, model: str, each: int, seed: int) -> Path:
    """Write the pool, the validation and the held-out samples, all at least ``TOKENS`` long, as data sets."""
    from transformers import AutoTokenizer

    if (folder / "dataset_info.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(model)
    info = {}
    for kind, file in KINDS.items():
        with (source / file).open(encoding="utf-8") as lines:
            samples = [json.loads(line) for line in lines]
        random.Random(f"{seed} {kind}").shuffle(samples)
        wanted = each + (VALIDATION + HELD_OUT if kind == "mathematics" else 0)
        kept: list[dict[str, str]] = []
        for sample in samples:
            row = {key: sample.get(key) or "" for key in ("instruction", "input", "output")}
            if len(tokenizer(row["instruction"] + row["input"] + row["output"]).input_ids) >= TOKENS:
                kept.append(row)
            if len(kept) == wanted:
                break
        parts = {kind: kept[:each]}
        if kind == "mathematics":
            parts |= {"validation": kept[each : each + VALIDATION], "held_out": kept[each + VALIDATION :]}
        for name, part in parts.items():
            (folder / f"{name}.json").write_text(json.dumps(part))
            info[name] = {"file_name": f"{name}.json"}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


def one_run(
    options: argparse.Namespace, settings: dict[str, Any], model: str, data: Path, method: str, seed: int
) -> dict[str, Any]:
    """Train one variant and return what it selected and its held-out loss."""
    folder = options.work / options.what / f"{method}-{seed}"
    select: dict[str, Any] = {"method": method}
    if method == "less":
        select |= {"validation": ["validation"], "proj_dim": 8192}
        if options.what == "budget":
            select["max_overhead"] = 0.25
    config = {
        "model_name_or_path": model,
        "stage": "sft",
        "do_train": True,
        "do_eval": True,
        "finetuning_type": "lora",
        "lora_rank": 8,
        "lora_target": "all",
        "dataset": ",".join(KINDS),
        "dataset_dir": str(data),
        "eval_dataset": "held_out",
        "per_device_eval_batch_size": 8,
        "template": "default",
        "cutoff_len": TOKENS,
        "per_device_train_batch_size": BATCH,
        "learning_rate": 3.0e-4,
        "lr_scheduler_type": "cosine",
        "max_steps": settings["steps"],
        "logging_steps": 5,
        "save_strategy": "no",
        "report_to": "none",
        "overwrite_output_dir": True,
        "output_dir": str(folder),
        "seed": seed,
        "dataflex": {
            "warmup_steps": settings["warmup_steps"],
            "update_steps": settings["update_steps"],
            "updates": settings["updates"],
            "seed": seed,
            "select": select,
        },
    }
    if not (folder / "eval_results.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "run.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        with (folder / "log.txt").open("w") as log:
            command = [sys.executable, "-m", "dataflex", "train", str(folder / "run.yaml")]
            subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=True)
    chosen = [each for each in read_run(folder).rounds if not each.warmup]
    total = sum(each.size for each in chosen)
    run_summary = json.loads((folder / "dataflex" / "summary.json").read_text())
    return {
        "method": method,
        "held_out_loss": json.loads((folder / "eval_results.json").read_text())["eval_loss"],
        "mathematics_selected": sum(each.domains["mathematics"] for each in chosen) / total,
        "mathematics_in_pool": 1 / len(KINDS),
        "scored": sum(line["cost"]["samples"] for line in chosen),
        **{key: run_summary[key] for key in ("train_seconds", "decision_seconds", "overhead_fraction", "tokens")},
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return means by method, and the paired difference of held-out losses with its 95 % interval (t)."""
    by_method = {name: [row for row in rows if row["method"] == name] for name in ("random", "less")}
    found: dict[str, Any] = {
        name: {
            key: float(np.mean([row[key] for row in part]))
            for key in ("held_out_loss", "mathematics_selected", "overhead_fraction", "tokens")
        }
        for name, part in by_method.items()
    }
    pairs = zip(by_method["less"], by_method["random"], strict=True)
    differences = np.array([less["held_out_loss"] - plain["held_out_loss"] for less, plain in pairs])
    found["difference"] = {"mean": float(differences.mean()), "each": differences.tolist()}
    if differences.size > 1:
        half = stats.t.ppf(0.975, differences.size - 1) * differences.std(ddof=1) / np.sqrt(differences.size)
        found["difference"]["interval_95"] = [float(differences.mean() - half), float(differences.mean() + half)]
    return found


if __name__ == "__main__":
    main()
