"""Do selectors find the samples a target needs, and does training on them help? Two targets, at equal tokens.

    python benchmarks/target_selection.py --data FOLDER               # the comparison: 36 runs
    python benchmarks/target_selection.py --data FOLDER --what copies # near-duplicates: 3 runs

The pool has seven kinds of samples; a sixth is grade-school mathematics and a sixth are questions with choices. The
targets are GSM8K and ARC-easy: validation and held-out samples come from their test sets. Each variant trains a few
steps on random samples, then selects once for one of the targets and trains on what it selected.
``dataflex-cli compare`` makes the runs and judges the held-out losses.

For ``copies`` the pool also has 100 near-duplicates of each of 20 samples of mathematics, in which some words were
left out, and the question is how many different samples a selector takes.

FOLDER has ``instruct`` and ``eval`` with the files named below.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from overhead import machine

from dataflex import assets
from dataflex.record.reader import read_run

Row = dict[str, str]

POOL = {
    "mathematics": ("gsm8k_train", 40),
    "questions": ("flan_cot", 40),
    "dolly": ("dolly", 40),
    "code": ("gpteacher_codegen", 30),
    "dialogue": ("gpteacher_roleplay", 30),
    "tools": ("gpteacher_toolformer", 30),
    "nlp": ("p3_sample", 30),
}
"""Data set of the pool -> its file and how many samples."""
WANTED = {"gsm8k": "mathematics", "arc_easy": "questions"}
"""Target -> the kind of samples it needs."""
ENCODER = "asset:all-minilm-l6-v2"
SELECTORS: dict[str, dict[str, Any]] = {
    "near_minilm": {"method": "near", "encoder": ENCODER},
    "tsds_minilm": {"method": "tsds", "encoder": ENCODER},
    "rds_plus_model": {"method": "rds_plus"},
    "dsir": {"method": "dsir", "min_words": 1},
    "less": {"method": "less"},
}
TOKENS = (24, 96)
"""Fewest and most tokens of a sample."""
VALIDATION, HELD_OUT = 16, 32
BATCH, WARMUP_STEPS, UPDATE_STEPS = 2, 4, 20
TRAINED_TOKENS = 3000
"""Of a run; a step has some 150, so that runs are equal to within a twentieth."""
ORIGINALS, COPIES, TAKEN = 20, 100, 40
BASELINE = "random"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--what", choices=("comparison", "copies"), default="comparison")
    parser.add_argument("--work", type=Path, default=Path("target-selection"), help="folder of the runs")
    parser.add_argument("--model", default="asset:smollm2-135m-instruct")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--output", type=Path, help="JSON file of the results")
    options = parser.parse_args()
    began = time.perf_counter()
    data = write_data(options.data, options.work / "data", assets.resolve(options.model))
    found = (compared if options.what == "comparison" else with_copies)(options, data)
    result = {
        "command": " ".join(["python", *sys.argv]),
        "machine": machine(),
        "seconds": round(time.perf_counter() - began),
        **found,
    }
    print(json.dumps(found, indent=2))
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n")


def rows_of(file: Path) -> list[dict[str, Any]]:
    with file.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def instruction(row: dict[str, Any]) -> Row:
    return {key: row.get(key) or "" for key in ("instruction", "input", "output")}


def question(row: dict[str, Any]) -> Row:
    """Return a multiple-choice question, whose answer is the letter and the text of the right choice."""
    choices = [f"{letter}. {text}" for letter, text in zip("ABCDE", row["choices"], strict=False)]
    text = "\n".join([row["question"], *choices])
    return {"instruction": text, "input": "", "output": choices["ABCDE".index(row["answer"])]}


def write_data(source: Path, folder: Path, model: str) -> Path:
    """Write the pool, the copies, and the validation and held-out samples of the targets as data sets."""
    from transformers import AutoTokenizer

    if (folder / "dataset_info.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(model)

    def drawn(name: str, rows: list[Row], count: int) -> list[Row]:
        random.Random(name).shuffle(rows)
        fitting = (
            row for row in rows if TOKENS[0] <= len(tokenizer("\n".join(row.values())).input_ids) <= TOKENS[1] - 8
        )
        found = [row for row, _ in zip(fitting, range(count), strict=False)]
        if len(found) < count:
            raise SystemExit(
                f"{name}: {len(found)} samples of {TOKENS[0]} to {TOKENS[1] - 8} tokens, and {count} are needed"
            )
        return found

    sets: dict[str, list[Row]] = {}
    for name, (file, count) in POOL.items():
        rows = rows_of(source / "instruct" / f"{file}.jsonl")
        if name == "questions":
            rows = [row for row in rows if row["domain"] in ("reasoning/ecqa", "reasoning/qasc")]
        sets[name] = drawn(name, [instruction(row) for row in rows], count)
    tests = {
        "gsm8k": [instruction(row) for row in rows_of(source / "eval" / "gsm8k_test.jsonl")],
        "arc_easy": [question(row) for row in rows_of(source / "eval" / "arc_easy_test.jsonl")],
    }
    for target, rows in tests.items():
        rows = drawn(target, rows, VALIDATION + HELD_OUT)
        sets |= {f"{target}_validation": rows[:VALIDATION], f"{target}_held_out": rows[VALIDATION:]}
    sets["copies"] = list(near_duplicates(sets["mathematics"][:ORIGINALS]))
    for name, rows in sets.items():
        (folder / f"{name}.json").write_text(json.dumps(rows))
    info = {name: {"file_name": f"{name}.json"} for name in sets}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


def near_duplicates(originals: list[Row]) -> Iterator[dict[str, str]]:
    """Yield copies of each sample, from each of which up to three words of the instruction are left out."""
    rng = random.Random("copies")
    for number, row in enumerate(originals):
        for _ in range(COPIES):
            words = row["instruction"].split()
            for _ in range(rng.randint(1, 3)):
                del words[rng.randrange(len(words))]
            yield {**row, "instruction": " ".join(words), "original": str(number)}


def base(options: argparse.Namespace, data: Path) -> dict[str, Any]:
    return {
        "model_name_or_path": options.model,
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_rank": 8,
        "lora_target": "all",
        "dataset": ",".join(POOL),
        "dataset_dir": str(data.resolve()),
        "template": "default",
        "cutoff_len": TOKENS[1],
        "per_device_train_batch_size": BATCH,
        "per_device_eval_batch_size": 8,
        "learning_rate": 5.0e-4,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
    }


def compared(options: argparse.Namespace, data: Path) -> dict[str, Any]:
    """Compare all selectors for both targets and return shares of the wanted kind and held-out losses."""
    section = {"warmup_steps": WARMUP_STEPS, "update_steps": UPDATE_STEPS}
    vectors = str((options.work / "embeddings").resolve())
    variants: dict[str, Any] = {
        "full": {"dataflex": {}},
        BASELINE: {"dataflex": {**section, "select": {"method": "random"}}},
    }
    for target in WANTED:
        for name, given in SELECTORS.items():
            select = {**given, "validation": [f"{target}_validation"]}
            if "encoder" in given:
                select["embedding_folder"] = vectors
            variants[f"{name}-{target}"] = {"dataflex": {**section, "select": select}}
    experiment = {
        "base": {**base(options, data), "eval_dataset": ",".join(f"{target}_held_out" for target in WANTED)},
        "output_dir": str((options.work / "compare").resolve()),
        "baseline": BASELINE,
        "variants": variants,
        "seeds": options.seeds,
        "equal": {"tokens": TRAINED_TOKENS},
        "metrics": [f"{target}_held_out_loss" for target in WANTED],
    }
    file = options.work / "experiment.yaml"
    file.write_text(yaml.safe_dump(experiment, sort_keys=False))
    command = [sys.executable, "-m", "dataflex", "compare", str(file), "--jobs", str(options.jobs)]
    subprocess.run(command, check=True)
    stored = json.loads((options.work / "compare" / "comparison.json").read_text())
    shares: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
    for run in stored["runs"]:
        shares[run["variant"]].append(kinds_of(Path(run["folder"])))
    sizes = {name: count for name, (_, count) in POOL.items()}
    return {
        "pool": sizes,
        "steps": {"warmup": WARMUP_STEPS, "of_a_choice": UPDATE_STEPS, "batch": BATCH},
        "tokens": TRAINED_TOKENS,
        "shares": {
            name: {kind: float(np.mean([each.get(kind, 0) for each in found])) for kind in WANTED.values()}
            for name, found in shares.items()
            if name != "full"
        },
        "shares_by_run": shares,
        "costs": {name: each["costs"] for name, each in stored["variants"].items()},
        "means": {name: each["means"] for name, each in stored["variants"].items()},
        "differences": stored["differences"],
        "sentences": stored["sentences"],
    }


def kinds_of(folder: Path) -> dict[str, float]:
    """Return the share of each kind among the samples of a run's decisions."""
    rounds = [each for each in read_run(folder).rounds if not each.warmup]
    total = sum(each.size for each in rounds)
    return {kind: sum(each.domains[kind] for each in rounds) / total for kind in POOL} if total else {}


def with_copies(options: argparse.Namespace, data: Path) -> dict[str, Any]:
    """Return how many different samples selectors take from a pool with near-duplicates."""
    found: dict[str, Any] = {}
    for name, select in {
        "random": {"method": "random"},
        **{name: SELECTORS[name] | {"validation": ["gsm8k_validation"]} for name in ("near_minilm", "tsds_minilm")},
    }.items():
        folder = options.work / "copies" / name
        steps = TAKEN // BATCH
        section = {"warmup_steps": 0, "update_steps": steps, "updates": 1, "select": dict(select)}
        if "encoder" in select:
            section["select"]["embedding_folder"] = str((options.work / "embeddings").resolve())
        config = {**base(options, data), "output_dir": str(folder), "overwrite_output_dir": True}
        config |= {"dataset": ",".join([*POOL, "copies"]), "max_steps": steps, "dataflex": section}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "run.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        with (folder / "log.txt").open("w") as log:
            for command in (
                ["train", str(folder / "run.yaml")],
                ["export", str(folder), "--output", str(folder / "chosen")],
            ):
                subprocess.run([sys.executable, "-m", "dataflex", *command], stdout=log, stderr=log, check=True)
        copies = folder / "chosen" / "copies.jsonl"
        originals = [row["original"] for row in rows_of(copies)] if copies.exists() else []
        taken = sum(len(rows_of(file)) for file in (folder / "chosen").glob("*.jsonl"))
        kept = folder / "chosen" / "mathematics.jsonl"
        found[name] = {
            "taken": taken,
            "near_duplicates": len(originals),
            "of_originals": len(set(originals)),
            "other_mathematics": len(rows_of(kept)) if kept.exists() else 0,
            "different_samples": taken - len(originals) + len(set(originals)),
        }
    return {
        "pool": {"others": sum(count for _, count in POOL.values()), "copies": ORIGINALS * COPIES},
        "selectors": found,
    }


if __name__ == "__main__":
    main()
