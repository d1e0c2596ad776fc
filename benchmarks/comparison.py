"""Which way of choosing instruction data helps? Seven variants, three seeds, equal tokens, one `dataflex-cli compare`.

    python benchmarks/comparison.py --data FOLDER [--jobs 2]

FOLDER has gsm8k_train.jsonl, gpteacher_codegen.jsonl, dolly.jsonl and flan_cot.jsonl with instruction, input, output.
Of each, some samples of 32 to 96 tokens are trained on and others held out. The experiment file is written beside the
results, so that `dataflex-cli compare` alone can go on with it.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from overhead import machine

from dataflex import assets

KINDS = {
    "mathematics": "gsm8k_train.jsonl",
    "code": "gpteacher_codegen.jsonl",
    "questions": "dolly.jsonl",
    "reasoning": "flan_cot.jsonl",
}
SHORTEST, LONGEST = 32, 96
EACH, HELD_OUT = 48, 12
TOKENS = 7000
VARIANTS: dict[str, dict[str, Any]] = {
    "random": {"select": {"method": "random"}},
    "full": {"select": {"method": "full"}},
    "loss_high": {"select": {"method": "loss", "focus": "high"}},
    "loss_medium": {"select": {"method": "loss", "focus": "medium"}},
    "loss_low": {"select": {"method": "loss", "focus": "low"}},
    "delta_loss": {"select": {"method": "delta_loss"}},
    "loss_weights": {"weight": {"method": "loss"}},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("comparison"), help="folder of the experiment")
    parser.add_argument("--model", default="asset:smollm2-135m-instruct")
    parser.add_argument("--jobs", type=int, help="runs at once")
    parser.add_argument("--output", type=Path, help="JSON file of the results")
    options = parser.parse_args()
    model = assets.resolve(options.model)
    data = write_data(options.data, options.work / "data", model)
    experiment = options.work / "experiment.yaml"
    experiment.write_text(yaml.safe_dump(settings(model, data, options.work / "result"), sort_keys=False))
    command = [sys.executable, "-m", "dataflex", "compare", str(experiment)]
    began = time.monotonic()
    status = subprocess.run(command + (["--jobs", str(options.jobs)] if options.jobs else []), check=False).returncode
    comparison = options.work / "result" / "comparison.json"
    if options.output and comparison.is_file():
        result = {
            "command": " ".join(["python", *sys.argv]),
            "machine": machine(),
            "seconds": round(time.monotonic() - began),
            "settings": {"each": EACH, "held_out": HELD_OUT, "tokens": TOKENS, "variants": VARIANTS},
            "comparison": json.loads(comparison.read_text()),
        }
        options.output.write_text(json.dumps(result, indent=2) + "\n")
    sys.exit(status)


def write_data(source: Path, folder: Path, model: str) -> Path:
    """Write the training and the held-out samples of each kind as data sets."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    folder.mkdir(parents=True, exist_ok=True)
    info = {}
    for kind, file in KINDS.items():
        with (source / file).open(encoding="utf-8") as lines:
            samples = [json.loads(line) for line in lines]
        random.Random(kind).shuffle(samples)
        kept: list[dict[str, str]] = []
        for sample in samples:
            row = {key: sample.get(key) or "" for key in ("instruction", "input", "output")}
            if SHORTEST <= len(tokenizer(" ".join(row.values())).input_ids) <= LONGEST:
                kept.append(row)
            if len(kept) == EACH + HELD_OUT:
                break
        if len(kept) < EACH + HELD_OUT:
            sys.exit(f"{source / file}: {len(kept)} samples of {SHORTEST} to {LONGEST} tokens, not {EACH + HELD_OUT}")
        for name, part in ((kind, kept[:EACH]), (f"{kind}_val", kept[EACH:])):
            (folder / f"{name}.json").write_text(json.dumps(part))
            info[name] = {"file_name": f"{name}.json"}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


def settings(model: str, data: Path, output: Path) -> dict[str, Any]:
    """Return the experiment."""
    base = {
        "model_name_or_path": model,
        "stage": "sft",
        "do_train": True,
        "do_eval": True,
        "finetuning_type": "lora",
        "lora_rank": 8,
        "lora_target": "all",
        "dataset": ",".join(KINDS),
        "eval_dataset": ",".join(f"{kind}_val" for kind in KINDS),
        "dataset_dir": str(data.resolve()),
        "template": "default",
        "cutoff_len": LONGEST,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 8,
        "learning_rate": 5.0e-4,
        "lr_scheduler_type": "cosine",
        "logging_steps": 2,
        "save_strategy": "no",
        "report_to": "none",
        "dataflex": {"warmup_steps": 6, "update_steps": 10},
    }
    return {
        "base": base,
        "output_dir": str(output),
        "baseline": "random",
        "seeds": [1, 2, 3],
        "equal": {"tokens": TOKENS},
        "variants": {name: {"dataflex": section} for name, section in VARIANTS.items()},
    }


if __name__ == "__main__":
    main()
