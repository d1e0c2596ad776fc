"""Does rho1 leave out replaced tokens, and does that help? Text with 30 % random words, against plain training.

    python benchmarks/replaced_tokens.py --data FOLDER

FOLDER has ``book_train.jsonl`` and ``book_val.jsonl``, whose ``text`` is cut into samples of 63 words. A tokenizer has
one token for each of the 2,000 most frequent words. A reference is trained on clean samples. In other samples 30 % of
the words are replaced by random words of the vocabulary. A small model is trained on these from scratch: plainly, and
with rho1. ``dataflex-cli compare`` makes the runs and judges the loss on clean held-out samples, at equal tokens. The
share of clean tokens among the kept ones is counted in every step.
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

WORDS = 63
"""Words of a sample; a sample has one token more, the end."""
VOCABULARY, OTHER = 2000, "_"
"""Words with a token of their own, and the word that stands for all others."""
CLEAN, REPLACED, HELD_OUT = 3000, 3000, 200
"""Samples of the reference's training, of the training, and of the evaluation."""
SHARE_REPLACED, SHARE_KEPT = 0.3, 0.6
BATCH = 32
PLUGIN = Path(__file__).with_name("counted_rho1.py")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("replaced-tokens"), help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=200, help="steps of each run")
    parser.add_argument("--reference-steps", type=int, default=300)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--output", type=Path, help="JSON file of the results")
    options = parser.parse_args()
    write_inputs(options.data, options.work)
    train_reference(options)
    found = compared(options)
    result = {"command": " ".join(["python", *sys.argv]), "machine": machine(), **found}
    print(json.dumps(found, indent=2))
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n")


def words_of(file: Path) -> list[str]:
    """Return the words and punctuation marks of a file's texts, in lower case."""
    with file.open(encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    return [word for text in texts for word in re.findall(r"[a-z]+|[.,;!?]", text.lower())]


def write_inputs(source: Path, work: Path) -> None:
    """Write the data sets, the mask of the words that were not replaced, and the folder of an untrained model."""
    data, rng = work / "data", random.Random(0)
    if (work / "model" / "config.json").exists():
        return
    data.mkdir(parents=True, exist_ok=True)
    train, held = words_of(source / "book_train.jsonl"), words_of(source / "book_val.jsonl")
    vocabulary = [word for word, _ in Counter(train).most_common(VOCABULARY)]
    known = set(vocabulary)

    def samples_of(words: list[str], count: int) -> list[list[str]]:
        named = [word if word in known else OTHER for word in words]
        cut = [named[begin : begin + WORDS] for begin in range(0, len(named) - WORDS + 1, WORDS)]
        if len(cut) < count:
            raise SystemExit(f"{len(cut)} samples of {WORDS} words, and {count} are needed")
        rng.shuffle(cut)
        return cut[:count]

    drawn = samples_of(train, CLEAN + REPLACED)
    clean = np.ones((REPLACED, WORDS + 1), dtype=bool)
    for row, words in enumerate(drawn[CLEAN:]):
        for place in range(WORDS):
            if rng.random() < SHARE_REPLACED:
                words[place], clean[row, place] = rng.choice(vocabulary), False
    np.save(data / "clean.npy", clean)
    sets = {"clean": drawn[:CLEAN], "replaced": drawn[CLEAN:], "held_out": samples_of(held, HELD_OUT)}
    for name, rows in sets.items():
        (data / f"{name}.json").write_text(json.dumps([{"text": " ".join(words)} for words in rows]))
    info = {name: {"file_name": f"{name}.json", "columns": {"prompt": "text"}} for name in sets}
    (data / "dataset_info.json").write_text(json.dumps(info))
    write_model(work / "model", vocabulary)


def write_model(folder: Path, vocabulary: list[str]) -> None:
    """Write a tokenizer of whole words and a Llama of about 0.4 million parameters."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    specials = ["<s>", "</s>", "<pad>"]
    numbers = {token: number for number, token in enumerate([*specials, OTHER, *vocabulary])}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token=OTHER))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=OTHER, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(numbers),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=WORDS + 1,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def base(options: argparse.Namespace, dataset: str) -> dict[str, Any]:
    return {
        "model_name_or_path": str((options.work / "model").resolve()),
        "train_from_scratch": True,
        "stage": "pt",
        "do_train": True,
        "finetuning_type": "full",
        "dataset": dataset,
        "dataset_dir": str((options.work / "data").resolve()),
        "packing": False,
        "cutoff_len": WORDS + 1,
        "per_device_train_batch_size": BATCH,
        "per_device_eval_batch_size": BATCH,
        "learning_rate": 3.0e-3,
        "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.1,
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": "none",
    }


def train_reference(options: argparse.Namespace) -> None:
    """Train the reference on the clean samples."""
    folder = options.work / "reference"
    if (folder / "config.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    config = {**base(options, "clean"), "output_dir": str(folder), "overwrite_output_dir": True}
    (options.work / "reference.yaml").write_text(yaml.safe_dump({**config, "max_steps": options.reference_steps}))
    command = [sys.executable, "-m", "dataflex", "train", str(options.work / "reference.yaml")]
    with (options.work / "reference.log").open("w") as log:
        subprocess.run(command, stdout=log, stderr=log, check=True)


def compared(options: argparse.Namespace) -> dict[str, Any]:
    """Compare plain training with rho1; return the held-out losses and the shares of clean tokens."""
    counts = (options.work / "counts").resolve()
    rho1 = {
        "method": "counted_rho1",
        "share": SHARE_KEPT,
        "reference_model": str((options.work / "reference").resolve()),
        "clean": str((options.work / "data" / "clean.npy").resolve()),
        "counts": str(counts),
    }
    experiment = {
        "base": {**base(options, "replaced"), "eval_dataset": "held_out"},
        "output_dir": str((options.work / "compare").resolve()),
        "baseline": "plain",
        "variants": {
            "plain": {"dataflex": {"weight": {"method": "uniform"}}},
            "rho1": {"dataflex": {"plugins": [str(PLUGIN)], "weight": rho1}},
        },
        "seeds": options.seeds,
        "equal": {"tokens": options.steps * BATCH * (WORDS + 1)},
        "metrics": ["held_out_loss"],
    }
    file = options.work / "experiment.yaml"
    file.write_text(yaml.safe_dump(experiment, sort_keys=False))
    command = [sys.executable, "-m", "dataflex", "compare", str(file), "--jobs", str(options.jobs)]
    subprocess.run(command, check=True)
    stored = json.loads((options.work / "compare" / "comparison.json").read_text())
    return {
        "steps": options.steps,
        "tokens": experiment["equal"]["tokens"],
        "share_of_clean_tokens": shares_of(counts, options.steps),
        "costs": {name: each["costs"] for name, each in stored["variants"].items()},
        "means": {name: each["means"] for name, each in stored["variants"].items()},
        "differences": stored["differences"],
        "sentences": stored["sentences"],
    }


def shares_of(folder: Path, steps: int) -> dict[str, Any]:
    """Return the shares of clean tokens in the data and among the kept tokens, of all runs together and by run."""
    files = [[json.loads(line) for line in file.read_text().splitlines()] for file in sorted(folder.glob("*.jsonl"))]
    runs = [lines for lines in files if len(lines) >= steps]  # runs that were stopped are left out

    def share(part: str, whole: str, lines: list[dict[str, int]]) -> float:
        return round(sum(line[part] for line in lines) / sum(line[whole] for line in lines), 4)

    everything = [line for lines in runs for line in lines]
    return {
        "of_all": share("clean", "trained", everything),
        "of_kept": share("kept_clean", "kept", everything),
        "of_kept_by_run": [share("kept_clean", "kept", lines) for lines in runs],
        "of_kept_in_the_first_and_last_tenth": [
            share("kept_clean", "kept", [line for lines in runs for line in part(lines)])
            for part in (lambda lines: lines[: len(lines) // 10], lambda lines: lines[-(len(lines) // 10) :])
        ],
        "kept": share("kept", "trained", everything),
    }


if __name__ == "__main__":
    main()
