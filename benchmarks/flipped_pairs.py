"""Which methods train on swapped preference pairs, and does it matter? 40 % swapped pairs, against random choice.

    python benchmarks/flipped_pairs.py --data FOLDER

FOLDER has ``instruct/alpaca.jsonl`` with published labels of quality. A pair has the prompt and the response of a row
that Claude rated 4.5 or better. Its rejected response is that of another row, without this label and of about the same
length, in which a part of the words is replaced. In 40 % of the training pairs the two responses are swapped. A small
model of whole words is trained from scratch on other prompts and responses (stage sft), and then on the pairs (stage
dpo), with each method. ``dataflex-cli compare`` makes the runs and judges accuracy, margin and loss on held-out pairs
that are not swapped. The share of swapped pairs among those trained on is read from the records.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from overhead import machine

from dataflex.record.reader import read_run

Words = list[str]

LONGEST = 24
"""Most words of a prompt, and of a response. A punctuation mark is a word."""
SHORTEST = 5
"""Fewest words of a response."""
VOCABULARY, OTHER = 2000, "_"
"""Words with a token of their own, and the word that stands for all others."""
KEPT = "claude_t45"
"""Label of the rows that the published filter kept."""
POOL, HELD_OUT = 640, 200
"""Pairs of the training, and of the evaluation."""
SHARE_FLIPPED, SHARE_REPLACED = 0.4, 0.3
BATCH, WARMUP, ROUND = 16, 20, 10
"""Pairs of a step, steps before the first decision, and steps of a decision."""
LEARNING_RATE = 1.0e-3
BOUNDS = [[-2, 2], [-2, 2]]
"""Bounds of the external and of the implicit margin, which hold most of them."""
RIGHT = 0.6745
"""Mean of the external margin in its standard deviations: positive for 75 % of the pairs if they are not flipped."""
BASELINE, UNFLIPPED = "random", "random_clean"
"""Random choice, and random choice from the same pairs without swapped ones."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("flipped-pairs"), help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--steps", type=int, default=50, help="steps of each run on pairs")
    parser.add_argument("--sft-steps", type=int, default=150)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--output", type=Path, help="JSON file of the results")
    options = parser.parse_args()
    write_inputs(options.data, options.work)
    train_reference(options)
    found = compared(options, measure_difficulties(options))
    result = {"command": " ".join(["python", *sys.argv]), "machine": machine(), **found}
    print(json.dumps(found, indent=2))
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n")


def words_of(text: str) -> Words:
    """Return the words, digits and punctuation marks of a text, in lower case."""
    return re.findall(r"[a-z]+|[0-9]|[.,;:!?]", text.lower())


def read_rows(file: Path) -> tuple[list[tuple[Words, Words]], list[tuple[Words, Words]]]:
    """Return the prompts and responses of the short rows: those that the filter kept, and the others."""
    kept, others = [], []
    with file.open(encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            prompt, response = words_of(f"{row['instruction']} {row['input']}"), words_of(row["output"])
            if 0 < len(prompt) <= LONGEST and SHORTEST <= len(response) <= LONGEST:
                (kept if KEPT in row["quality"] else others).append((prompt, response))
    return kept, others


def make_pairs(
    kept: list[tuple[Words, Words]], others: list[Words], vocabulary: Words, rng: random.Random
) -> list[dict[str, Any]]:
    """Return a pair for each kept row: its prompt and response, and a response of ``others``, which is taken out.

    The rejected response is the first of those with the closest length. Each of its words is replaced by a random word
    of the vocabulary with probability ``SHARE_REPLACED``. ``margin`` is an external margin with noise.
    """
    pairs = []
    for prompt, response in kept:
        place = min(range(len(others)), key=lambda each: abs(len(others[each]) - len(response)))
        rejected = [rng.choice(vocabulary) if rng.random() < SHARE_REPLACED else word for word in others.pop(place)]
        texts = {"instruction": " ".join(prompt), "chosen": " ".join(response), "rejected": " ".join(rejected)}
        pairs.append({**texts, "margin": RIGHT + rng.gauss(0, 1), "flipped": False})
    return pairs


def flip(pairs: list[dict[str, Any]], rng: random.Random) -> list[dict[str, Any]]:
    """Return the pairs with both responses swapped in a part of them. Margin and noise keep the side of the texts."""
    swapped = set(rng.sample(range(len(pairs)), round(SHARE_FLIPPED * len(pairs))))
    return [
        {**pair, "chosen": pair["rejected"], "rejected": pair["chosen"], "margin": -pair["margin"], "flipped": True}
        if number in swapped
        else pair
        for number, pair in enumerate(pairs)
    ]


def write_inputs(source: Path, work: Path) -> None:
    """Write the data sets and the folder of an untrained model."""
    data, rng = work / "data", random.Random(0)
    if (work / "untrained" / "config.json").exists():
        return
    data.mkdir(parents=True, exist_ok=True)
    kept, others = read_rows(source / "instruct" / "alpaca.jsonl")
    if min(len(kept), len(others)) < POOL + HELD_OUT:
        raise SystemExit(f"{len(kept)} and {len(others)} short rows, and {POOL + HELD_OUT} of each are needed")
    rng.shuffle(kept)
    rng.shuffle(others)
    words = Counter(word for row in kept + others for text in row for word in text)
    vocabulary = [word for word, _ in words.most_common(VOCABULARY)]
    rejected = [response for _, response in others]
    pairs = make_pairs(kept[: POOL + HELD_OUT], rejected, vocabulary, rng)
    rest = kept[POOL + HELD_OUT :]
    sets = {
        "sft": [{"instruction": " ".join(prompt), "output": " ".join(response)} for prompt, response in rest],
        "clean": pairs[:POOL],
        "pairs": flip(pairs[:POOL], rng),
        "held_out": pairs[POOL:],
    }
    for name, rows in sets.items():
        (data / f"{name}.json").write_text(json.dumps(rows))
    columns = {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}
    ranked = {
        name: {"file_name": f"{name}.json", "ranking": True, "columns": columns}
        for name in ("clean", "pairs", "held_out")
    }
    info = {"sft": {"file_name": "sft.json", "columns": {"prompt": "instruction", "response": "output"}}, **ranked}
    (data / "dataset_info.json").write_text(json.dumps(info))
    write_model(work / "untrained", vocabulary)


def write_model(folder: Path, vocabulary: Words) -> None:
    """Write a tokenizer of whole words and a Llama of about 0.2 million parameters."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    specials = ["<s>", "</s>", "<pad>", "Human:", "Assistant:"]
    numbers = {token: number for number, token in enumerate([*specials, OTHER, *vocabulary])}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token=OTHER))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=OTHER, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(numbers),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=96,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def base(options: argparse.Namespace) -> dict[str, Any]:
    """Return the keys that the trainings of both stages share."""
    return {
        "do_train": True,
        "finetuning_type": "full",
        "dataset_dir": str((options.work / "data").resolve()),
        "template": "default",
        "cutoff_len": 2 * LONGEST + 6,
        "per_device_eval_batch_size": 50,
        "lr_scheduler_type": "constant_with_warmup",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
    }


def of_pairs(options: argparse.Namespace) -> dict[str, Any]:
    """Return the keys of a training on the pairs."""
    return {
        **base(options),
        "model_name_or_path": str((options.work / "sft").resolve()),
        "stage": "dpo",
        "dataset": "pairs",
        "pref_beta": 0.1,
        "per_device_train_batch_size": BATCH,
        "learning_rate": LEARNING_RATE,
        "warmup_steps": 5,
    }


def trained(folder: Path, config: dict[str, Any]) -> None:
    """Train in a process of its own, with the log beside the folder. A complete folder is kept."""
    if (folder / "config.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    file = folder.with_suffix(".yaml")
    file.write_text(yaml.safe_dump({**config, "output_dir": str(folder.resolve()), "overwrite_output_dir": True}))
    with folder.with_suffix(".log").open("w") as log:
        subprocess.run([sys.executable, "-m", "dataflex", "train", str(file)], stdout=log, stderr=log, check=True)


def train_reference(options: argparse.Namespace) -> None:
    """Train the model from scratch on prompts and responses; all runs on pairs start from it."""
    trained(
        options.work / "sft",
        {
            **base(options),
            "model_name_or_path": str((options.work / "untrained").resolve()),
            "train_from_scratch": True,
            "stage": "sft",
            "dataset": "sft",
            "per_device_train_batch_size": 32,
            "learning_rate": 4.0e-3,
            "lr_scheduler_type": "cosine",
            "warmup_ratio": 0.1,
            "logging_steps": 10,
            "max_steps": options.sft_steps,
        },
    )


def measure_difficulties(options: argparse.Namespace) -> list[str]:
    """Train on each half of the pairs and return the tables of the losses of the other half."""
    tables = []
    for half in ("first", "second"):
        folder = options.work / f"half-{half}"
        measured = (folder / "held_out").resolve()
        select = {"method": "half", "half": half, "folder": str(measured)}
        trained(folder, {**of_pairs(options), "num_train_epochs": 0.5, "dataflex": {"select": select}})
        tables.append(str(measured / "difficulties.parquet"))
    return tables


def variants(tables: list[str]) -> dict[str, dict[str, Any]]:
    """Return the sections of the variants. Most draw at random from the half that a method keeps.

    ``loss_low`` draws nearly all pairs from the half with the lower losses. ``beta_dpo`` has the random choice,
    and weights from the first step on, so that its running mean follows the margins.
    """
    section = {"warmup_steps": WARMUP, "update_steps": ROUND}
    draw = {"method": "random"}
    external = {"method": "external_margin", "margin": "margin"}
    kept = {
        **{f"gap_{prefer}": {"method": "dpo_gap", "prefer": prefer} for prefer in ("small", "middle", "large")},
        "gap_small_absolute": {"method": "dpo_gap", "prefer": "small_absolute"},
        "external": external,
        "external_implicit": {**external, "implicit": True, "bounds": BOUNDS},
        "hard_pairs": {"method": "hard_pairs", "difficulties": tables},
    }
    chosen = {name: {**section, "select": [{**each, "keep": 0.5}, draw]} for name, each in kept.items()}
    low = {"method": "loss", "focus": "low", "quantiles": [0.5, 0.75], "focus_weight": 1000.0}
    sections = {
        BASELINE: {**section, "select": draw},
        **chosen,
        "loss_low": {**section, "select": low},
        "beta_dpo": {**section, "warmup_steps": 0, "select": draw, "weight": {"method": "beta_dpo"}},
    }
    changes = {name: {"dataflex": each} for name, each in sections.items()}
    return {**changes, UNFLIPPED: {"dataset": "clean", "dataflex": sections[BASELINE]}}


def compared(options: argparse.Namespace, tables: list[str]) -> dict[str, Any]:
    """Compare the methods with random choice; return shares of swapped pairs, and results on the held-out pairs."""
    measures = ("accuracy", "margin", "loss")
    experiment = {
        "base": {**of_pairs(options), "eval_dataset": "held_out"},
        "output_dir": str((options.work / "compare").resolve()),
        "baseline": BASELINE,
        "variants": variants(tables),
        "seeds": options.seeds,
        "equal": {"steps": options.steps},
        "metrics": [f"held_out_{measure}" for measure in measures],
    }
    file = options.work / "experiment.yaml"
    file.write_text(yaml.safe_dump(experiment, sort_keys=False))
    command = [sys.executable, "-m", "dataflex", "compare", str(file), "--jobs", str(options.jobs)]
    subprocess.run(command, check=True)
    stored = json.loads((options.work / "compare" / "comparison.json").read_text())
    pairs = json.loads((options.work / "data" / "pairs.json").read_text())
    flipped = np.array([pair["flipped"] for pair in pairs])
    shares: dict[str, list[float]] = {name: [] for name in experiment["variants"] if name != UNFLIPPED}
    for run in stored["runs"]:
        if run["variant"] != UNFLIPPED:
            shares[run["variant"]].append(share_of_flipped(Path(run["folder"]), flipped))
    return {
        "pairs": {"pool": POOL, "flipped": SHARE_FLIPPED, "held_out": HELD_OUT},
        "steps": {"all": options.steps, "warmup": WARMUP, "of_a_choice": ROUND, "batch": BATCH},
        "share_of_flipped": {name: round(float(np.mean(each)), 4) for name, each in shares.items()},
        "share_of_flipped_by_run": shares,
        "costs": {name: each["costs"] for name, each in stored["variants"].items()},
        "means": {name: each["means"] for name, each in stored["variants"].items()},
        "differences": stored["differences"],
        "sentences": stored["sentences"],
    }


def share_of_flipped(folder: Path, flipped: np.ndarray) -> float:
    """Return the share of swapped pairs among those that a run trained on after its first ``WARMUP`` steps.

    With a weighter the recorded samples of each step count, which are the first 8, if their weight is above 0.
    """
    run = read_run(folder)
    if run.token_samples:
        recorded = [sample for step in run.token_samples if step.step > WARMUP for sample in step.samples]
        trained_on = [sample.index for sample in recorded if max(sample.weights) > 0]
    else:
        trained_on = [
            index for each in run.rounds if each.start_step >= WARMUP for index in run.plan_indices(each.round)
        ]
    return round(float(flipped[trained_on].mean()), 4)


if __name__ == "__main__":
    main()
