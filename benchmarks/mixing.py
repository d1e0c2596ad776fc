"""Which mixture of seven domains trains the better small model? DoReMi, ODM and ADO against the sizes and equal shares.

    python benchmarks/mixing.py --data FOLDER [--jobs 2] [--only prepare|doremi|compare|table]

FOLDER has NAME_train.jsonl and NAME_val.jsonl, rows with a ``text``, for arxiv, book, c4, commoncrawl, github,
stackexchange and wikipedia. A byte-level BPE tokenizer is trained on the training files and a small Llama from random
weights on packed blocks: first `dataflex-cli doremi` (reference, proxy, final), then `dataflex-cli compare` of five
variants with three seeds, every training on the same number of tokens. Both go on where they were stopped when the same
command is given again. All that is written lies below ``--output``; the table is made of what compare wrote, and kept
as benchmarks/results/DATE-mixing-cpu.json.

All validation samples are used. Those of arxiv are from 2 documents and those of commoncrawl from 3: their numbers are
exact for these documents and say little about the domain.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from overhead import machine

from dataflex.compare.statistics import t_interval
from dataflex.files import write_atomically

DOMAINS = ("arxiv", "book", "c4", "commoncrawl", "github", "stackexchange", "wikipedia")
VOCABULARY = 4096
BLOCK = 256
BATCH = 8
TOKENS = 700_000
SEEDS = [1, 2, 3]
WARMUP_STEPS, UPDATE_STEPS = 20, 10
BY_SIZE = {"method": "proportional", "size": "tokens"}
METRICS = [
    f"{part}_{measure}"
    for measure in ("bits_per_byte", "perplexity")
    for part in (*(f"{name}_val" for name in DOMAINS), "token_weighted", "unweighted")
]
PARTS = ("prepare", "doremi", "compare", "table")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="tokens of every training")
    parser.add_argument("--jobs", type=int, default=2, help="trainings of the comparison at once")
    parser.add_argument("--output", type=Path, default=Path("mixing"), help="folder of everything that is written")
    parser.add_argument("--only", choices=PARTS, help="one part; the parts before it must have been made")
    parser.add_argument("--results", type=Path, help="JSON file of the table")
    options = parser.parse_args()
    folder = options.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    today = datetime.datetime.now(datetime.UTC).date()
    results = options.results or Path(__file__).parent / "results" / f"{today}-mixing-cpu.json"
    commands = {
        "doremi": ["doremi", str(folder / "doremi.yaml")],
        "compare": ["compare", str(folder / "experiment.yaml"), "--jobs", str(options.jobs)],
    }
    for part in PARTS if options.only is None else (options.only,):
        began = time.monotonic()
        if part == "prepare":
            prepare(options.data.resolve(), folder, options.tokens)
        elif part == "table":
            write_table(folder, results)
            continue
        else:
            status = run(commands[part], folder)
            if status:
                sys.exit(status)
        add_time(folder, part, time.monotonic() - began)


def run(arguments: list[str], folder: Path) -> int:
    """Run dataflex-cli with its output in a log beside its results; return its exit status."""
    log = folder / f"{arguments[0]}.log"
    print(f"dataflex-cli {shlex.join(arguments)} > {log}", flush=True)
    with log.open("a") as file:
        command = [sys.executable, "-m", "dataflex", *arguments]
        status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    if status:
        print(f"exit status {status}; the end of {log}:\n" + log.read_text(errors="replace")[-3000:], file=sys.stderr)
    return status


def add_time(folder: Path, part: str, seconds: float) -> None:
    """Note the command and the seconds of a part, after those of earlier calls: a part may be stopped and go on."""
    file = folder / "parts.json"
    known: dict[str, list[dict[str, Any]]] = json.loads(file.read_text()) if file.exists() else {}
    known.setdefault(part, []).append({"command": " ".join(["python", *sys.argv]), "seconds": round(seconds, 1)})
    file.write_text(json.dumps(known, indent=2) + "\n")


def prepare(data: Path, folder: Path, tokens: int) -> None:
    """Write tokenizer, model configuration, data set registry and the two experiment files."""
    write_model(training_texts(data), folder / "model")
    write_registry(data, folder / "data")
    write_yaml(folder / "base.yaml", base_settings(folder))
    write_yaml(folder / "doremi.yaml", doremi_settings(folder, tokens))
    write_yaml(folder / "experiment.yaml", experiment_settings(folder, tokens))


def write_yaml(file: Path, content: dict[str, Any]) -> None:
    file.write_text(yaml.safe_dump(content, sort_keys=False))


def write_model(texts: Iterator[str], folder: Path) -> None:
    """Train the tokenizer on texts and write the configuration of the model; no weights."""
    os.environ["RAYON_NUM_THREADS"] = "1"
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    specials = ["<s>", "</s>", "<pad>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos, eos, pad = specials
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad)
    fast.save_pretrained(folder)
    LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=BLOCK,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)


def training_texts(data: Path) -> Iterator[str]:
    """Yield every training text."""
    for name in DOMAINS:
        with (data / f"{name}_train.jsonl").open(encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)["text"]


def write_registry(data: Path, folder: Path) -> None:
    """Register the training and the validation files where they are."""
    folder.mkdir(exist_ok=True)
    files = {name: f"{name}_train.jsonl" for name in DOMAINS} | {f"{name}_val": f"{name}_val.jsonl" for name in DOMAINS}
    info = {name: {"file_name": str(data / file), "columns": {"prompt": "text"}} for name, file in files.items()}
    (folder / "dataset_info.json").write_text(json.dumps(info, indent=2) + "\n")


def base_settings(folder: Path) -> dict[str, Any]:
    """Return what all trainings have in common.

    Rounds of ten steps, because ODM decides before every step and here a decision holds for a round.
    """
    return {
        "model_name_or_path": str(folder / "model"),
        "train_from_scratch": True,
        "stage": "pt",
        "do_train": True,
        "do_eval": True,
        "finetuning_type": "full",
        "dataset": ",".join(DOMAINS),
        "eval_dataset": ",".join(f"{name}_val" for name in DOMAINS),
        "dataset_dir": str(folder / "data"),
        "packing": True,
        "cutoff_len": BLOCK,
        "per_device_train_batch_size": BATCH,
        "per_device_eval_batch_size": 16,
        "learning_rate": 3.0e-3,
        "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.05,
        "weight_decay": 0.1,
        "adam_beta2": 0.95,
        "logging_steps": UPDATE_STEPS,
        "save_strategy": "no",
        "report_to": "none",
        "dataflex": {"warmup_steps": WARMUP_STEPS, "update_steps": UPDATE_STEPS},
    }


def doremi_settings(folder: Path, tokens: int) -> dict[str, Any]:
    """Return DoReMi's three trainings: all of one size, on equal tokens.

    The paper has a step size of 1, with 200,000 steps of 512 samples. In a few hundred steps of 8 samples from random
    weights the excess losses are large and noisy, hence 0.1, which the authors advise where weights collapse.
    """
    base = base_settings(folder)
    base["seed"] = SEEDS[0]
    base["dataflex"]["train_tokens"] = tokens
    return {
        "base": base,
        "output_dir": str(folder / "doremi"),
        "reference": {"dataflex.mix": BY_SIZE},
        "proxy": {"dataflex.mix": {"reweight_eta": 0.1}},
        "final": {},
    }


def experiment_settings(folder: Path, tokens: int) -> dict[str, Any]:
    """Return the comparison.

    ADO's numbers are for 60,000 steps: laws from step 500 to 5,000 on, anew every 1,000, losses smoothed over 101. Of
    some 340 steps the first 20 are not fitted to, in which the loss falls to that of single tokens; laws come with step
    60 and anew every 20. ODM's exploration falls with the steps made, as its formula says, and needs no setting.
    """
    weights = folder / "doremi" / "proxy" / "dataflex" / "domain_weights.json"
    mixers: dict[str, dict[str, Any]] = {
        "by_size": BY_SIZE,
        "uniform": {"method": "uniform"},
        "doremi": {"method": "static", "proportions": str(weights), "unit": "tokens"},
        "odm": {"method": "odm"},
        "ado": {
            "method": "ado",
            "ignore_steps": WARMUP_STEPS,
            "start_step": 3 * WARMUP_STEPS,
            "fit_steps": 2 * UPDATE_STEPS,
            "smoothing_steps": 21,
        },
    }
    return {
        "base": "base.yaml",
        "output_dir": str(folder / "compare"),
        "baseline": "by_size",
        "seeds": SEEDS,
        "equal": {"tokens": tokens},
        "metrics": METRICS,
        "variants": {name: {"dataflex.mix": mixer} for name, mixer in mixers.items()},
    }


def write_table(folder: Path, results: Path) -> None:
    """Write what the comparison found, per variant and metric with the interval of its mean, and print it."""
    comparison = json.loads((folder / "compare" / "comparison.json").read_text())
    compared = [run for run in comparison["runs"] if run["status"] == "compared"]
    table: dict[str, dict[str, Any]] = {}
    for variant in comparison["variants"]:
        runs = [run for run in compared if run["variant"] == variant]
        table[variant] = {metric: summary([run["metrics"][metric] for run in runs]) for metric in METRICS}
    result = {
        "command": " ".join(["python", *sys.argv]),
        "machine": machine(),
        "parts": json.loads((folder / "parts.json").read_text()),
        "settings": {
            "base": yaml.safe_load((folder / "base.yaml").read_text()),
            "doremi": yaml.safe_load((folder / "doremi.yaml").read_text()),
            "experiment": yaml.safe_load((folder / "experiment.yaml").read_text()),
        },
        "doremi": json.loads((folder / "doremi" / "proxy" / "dataflex" / "domain_weights.json").read_text()),
        "table": table,
        "comparison": comparison,
    }
    write_atomically(results, (json.dumps(result, indent=2) + "\n").encode())
    print(f"{results}\n")
    for kind in ("perplexity", "bits_per_byte"):
        print("\n".join(markdown(table, kind)) + "\n")


def summary(values: list[float]) -> dict[str, Any]:
    """Return the numbers of the seeds, their mean and its 95 % t interval (none of a single seed)."""
    interval = [float(end) for end in t_interval(np.array(values))] if len(values) > 1 else None
    return {"seeds": values, "mean": float(np.mean(values)) if values else None, "t_interval_95": interval}


def markdown(table: dict[str, dict[str, Any]], kind: str) -> list[str]:
    """Return the rows of one measure: domains down, variants across, mean and half of the interval."""
    rows = ["| " + " | ".join([kind.replace("_", " "), *table]) + " |", "|---" * (len(table) + 1) + "|"]
    for metric in METRICS:
        if metric.endswith(kind):
            cells = [metric.removesuffix(f"_{kind}").removesuffix("_val")]
            for metrics in table.values():
                mean, interval = metrics[metric]["mean"], metrics[metric]["t_interval_95"]
                half = f" ± {(interval[1] - interval[0]) / 2:.3g}" if interval else ""
                cells.append("-" if mean is None else f"{mean:.4g}{half}")
            rows.append("| " + " | ".join(cells) + " |")
    return rows


if __name__ == "__main__":
    main()
