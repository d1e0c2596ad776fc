"""Do IFD and perplexity agree with ratings of quality? Areas under the curve against the ratings of Alpaca's rows.

    python benchmarks/score_quality.py --data FOLDER
    python benchmarks/score_quality.py --data FOLDER --model MODELS/stories260K-hf --template default

FOLDER has alpaca.jsonl, whose ``quality`` says which published selections chose a row. Of the rows drawn at random
(``random9k``), those that a language model rated 4.5 or better (``claude_t45``) are the good ones. As many good rows
as others are drawn, scored by ``dataflex-cli score``, and each score's area under the curve is the probability that a
good row has the larger one, with a bootstrap interval over the rows; 0.5 is chance. Lengths stand beside the scores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import yaml
from overhead import machine
from scipy import stats

from dataflex import assets

DRAWN, GOOD = "random9k", "claude_t45"
RESAMPLES = 2000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("score-quality"), help="folder of the runs")
    parser.add_argument("--model", default="asset:smollm2-135m-instruct")
    parser.add_argument("--template", default="smollm2")
    parser.add_argument("--each", type=int, default=200, help="good rows, and as many others")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, help="JSON file of the results")
    options = parser.parse_args()
    began = time.perf_counter()
    folder = options.work / Path(options.model).name.replace(":", "-")
    is_good = write_data(options.data / "alpaca.jsonl", folder / "data", options.each, options.seed)
    losses, lengths = scored(options, folder, {"method": "perplexity", "focus": "high"})
    ratios, _ = scored(options, folder, {"method": "ifd", "limit": None})
    found = areas(measures(losses, ratios, lengths), is_good, options.seed)
    result = {
        "command": " ".join(["python", *sys.argv]),
        "machine": machine(),
        "seconds": round(time.perf_counter() - began, 1),
        "rows": {"good": int(is_good.sum()), "others": int((~is_good).sum())},
        "ratios_above_1": int((ratios > 1).sum()),
        "areas": found,
    }
    print(json.dumps(result, indent=2))
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n")


def write_data(source: Path, folder: Path, each: int, seed: int) -> np.ndarray:
    """Write as many good rows as others, mixed, as a data set, and return which are good."""
    with source.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    drawn = [row for row in rows if DRAWN in row["quality"].split("+")]
    kinds = [[row for row in drawn if (GOOD in row["quality"].split("+")) == good] for good in (True, False)]
    rng = np.random.default_rng(seed)
    chosen = [
        (kind[index], number == 0) for number, kind in enumerate(kinds) for index in rng.permutation(len(kind))[:each]
    ]
    chosen = [chosen[index] for index in rng.permutation(len(chosen))]
    folder.mkdir(parents=True, exist_ok=True)
    kept = [{key: row[key] or "" for key in ("instruction", "input", "output")} for row, _ in chosen]
    (folder / "alpaca.json").write_text(json.dumps(kept))
    (folder / "dataset_info.json").write_text(json.dumps({"alpaca": {"file_name": "alpaca.json"}}))
    return np.array([good for _, good in chosen])


def scored(options: argparse.Namespace, folder: Path, select: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Return the score and the length of every row."""
    name = select["method"]
    config = {
        "model_name_or_path": assets.resolve(options.model),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "dataset": "alpaca",
        "dataset_dir": str(folder / "data"),
        "template": options.template,
        "cutoff_len": 512,
        "per_device_train_batch_size": 4,
        "output_dir": str(folder / name),
        "dataflex": {"select": select},
    }
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(config))
    subprocess.run([sys.executable, "-m", "dataflex", "score", str(file)], check=True)
    table = pq.read_table(folder / name / "scores" / "scores.parquet").sort_by("row")
    return table["score"].to_numpy().astype(float), table["tokens"].to_numpy().astype(float)


def measures(losses: np.ndarray, ratios: np.ndarray, lengths: np.ndarray) -> dict[str, np.ndarray]:
    """Return what rows are ranked by, larger first; NaN for a row that a rule leaves out."""
    alone = losses / ratios
    ranks = stats.rankdata(losses, nan_policy="omit")
    return {
        "IFD (cherry), ratios up to 1": np.where(ratios <= 1, ratios, np.nan),
        "IFD (cherry), all rows": ratios,
        "IFD (superfiltering), all rows": np.exp(losses - alone),
        "perplexity, low first": -losses,
        "perplexity, middle first": -np.abs(ranks - np.nanmean(ranks)),
        "loss of the answer alone, low first": -alone,
        "tokens, long first": lengths,
    }


def areas(values: dict[str, np.ndarray], is_good: np.ndarray, seed: int) -> dict[str, Any]:
    """Return the area under the curve of each measure, with an interval of 95 %."""
    found = {}
    for name, each in values.items():
        known = ~np.isnan(each)
        scores, good = each[known], is_good[known]
        rng = np.random.default_rng(seed)
        drawn = [area(scores[rows], good[rows]) for rows in rng.integers(good.size, size=(RESAMPLES, good.size))]
        low, high = np.quantile(drawn, [0.025, 0.975])
        found[name] = {
            "area": round(area(scores, good), 3),
            "interval": [round(float(low), 3), round(float(high), 3)],
            "rows": int(known.sum()),
        }
    return found


def area(scores: np.ndarray, good: np.ndarray) -> float:
    """Return the probability that a good row's score is above another's, ties counted half."""
    ranks, count = stats.rankdata(scores), int(good.sum())
    return float((ranks[good].sum() - count * (count + 1) / 2) / (count * (good.size - count)))


if __name__ == "__main__":
    main()
