"""Do selectors find the questions of one kind in a pool of images with questions? Against random.

    python benchmarks/vision_selection.py                   # images and questions of easy-vqa
    python benchmarks/vision_selection.py --drawn           # images drawn here, if the package is not installed

The pool has questions of three kinds about images of a coloured shape: for the colour, for the shape, and whether
something is in the image. The target has questions for the colour. A small LLaVA of random weights first trains on
random samples, then each selector chooses for the target every ``UPDATE_STEPS`` steps. The package ``easy-vqa`` has the
data (``pip install easy-vqa``); it needs no hub. ``coincide`` has no target: it takes what is typical of each cluster.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from overhead import machine

from dataflex.record.reader import read_run

INPUTS = Path(__file__).parents[1] / "examples" / "vision" / "make_inputs.py"
KINDS = ("color", "shape", "present")
WANTED = "color"
SIZE, VALIDATION, HELD_OUT = 300, 24, 60
"""Samples of each kind in the pool, of the validation set, and of each held-out set."""
WARMUP_STEPS, UPDATE_STEPS, STEPS, BATCH = 60, 20, 140, 8
SELECTORS: dict[str, dict[str, Any]] = {
    "random": {"method": "random"},
    "less": {"method": "less", "validation": "target", "proj_dim": 2048},
    "icons": {"method": "icons", "validation": "target", "proj_dim": 2048},
    "coincide": {"method": "coincide", "clusters": 12},
    "coincide_image_and_text": {"method": "coincide", "clusters": 12, "embedding_text": "image_and_text"},
    "near": {"method": "near", "validation": "target"},
    "near_image_and_text": {"method": "near", "validation": "target", "embedding_text": "image_and_text"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drawn", action="store_true", help="draw the images instead of reading easy-vqa")
    parser.add_argument("--work", type=Path, default=Path("vision-selection"), help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--selectors", nargs="+", choices=SELECTORS, default=list(SELECTORS))
    parser.add_argument("--output", type=Path, help="JSON file of the results")
    options = parser.parse_args()
    began = time.perf_counter()
    make_inputs(options.work, options.drawn)
    found: dict[str, Any] = {}
    for name in options.selectors:
        runs = [train(options.work, name, seed) for seed in options.seeds]
        found[name] = {key: [run[key] for run in runs] for key in runs[0]}
        print(name, json.dumps(found[name]), flush=True)
    result = {
        "command": " ".join(["python", *sys.argv]),
        "machine": machine(),
        "seconds": round(time.perf_counter() - began),
        "selectors": found,
    }
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n")


def example() -> Any:
    """Return the module of the example, which makes the model and draws images."""
    spec = importlib.util.spec_from_file_location("vision_inputs", INPUTS)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_inputs(work: Path, drawn: bool) -> None:
    """Write the model, and the data sets of each kind, of the target and held out."""
    inputs, data = example(), work / "data"
    if (data / "dataset_info.json").exists():
        return
    data.mkdir(parents=True)
    wanted = {kind: SIZE + HELD_OUT + (VALIDATION if kind == WANTED else 0) for kind in KINDS}
    rows = {}
    for kind, count in wanted.items():
        rows[kind] = inputs.image_rows(data, kind, count, [kind]) if drawn else of_easy_vqa(inputs, data, kind, count)
    sets = {kind: rows[kind][:SIZE] for kind in KINDS}
    sets |= {f"{kind}_held_out": rows[kind][SIZE : SIZE + HELD_OUT] for kind in KINDS}
    sets["target"] = rows[WANTED][-VALIDATION:]
    for name, each in sets.items():
        (data / f"{name}.json").write_text(json.dumps(each))
    texts = [turn["content"] for each in rows.values() for row in each for turn in row["messages"]]
    inputs.make_model(work / "model", texts, hidden=128, layers=3)
    (data / "dataset_info.json").write_text(json.dumps({name: inputs.entry(name) for name in sets}))


def of_easy_vqa(inputs: Any, data: Path, kind: str, count: int) -> list[dict[str, Any]]:
    """Return rows of a kind from the package easy-vqa, each of another image, with copies of the images."""
    try:
        import easy_vqa
    except ImportError:
        raise SystemExit("the package easy-vqa is not installed: pip install easy-vqa, or give --drawn") from None
    questions, answers, numbers = easy_vqa.get_train_questions()
    paths = easy_vqa.get_train_image_paths()
    chosen: dict[int, tuple[str, str]] = {}
    triples = list(zip(questions, answers, numbers, strict=True))
    random.Random(kind).shuffle(triples)
    for asked, answer, number in triples:
        if kind_of(asked, answer) == kind and len(chosen) < count:
            chosen.setdefault(number, (asked, answer))
    (data / kind).mkdir()
    rows = []
    for number, (asked, answer) in chosen.items():
        shutil.copy(paths[number], data / kind / f"{number}.png")
        rows.append(inputs.row(f"<image> {asked}", answer, [f"{kind}/{number}.png"], kind))
    return rows


def kind_of(asked: str, answer: str) -> str:
    """Return the kind of a question of easy-vqa."""
    if answer in ("yes", "no"):
        return "present"
    return "color" if re.search(r"\bcolor\b", asked) else "shape"


def train(work: Path, name: str, seed: int) -> dict[str, Any]:
    """Train with a selector; return the share of the wanted kind among the chosen samples, and held-out losses."""
    output = work / "runs" / f"{name}-{seed}"
    args = {
        "model_name_or_path": str(work / "model"),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "full",
        "freeze_vision_tower": True,
        "freeze_multi_modal_projector": False,
        "dataset": ",".join(KINDS),
        "eval_dataset": ",".join(f"{kind}_held_out" for kind in KINDS),
        "do_eval": True,
        "dataset_dir": str(work / "data"),
        "media_dir": str(work / "data"),
        "template": "llava",
        "cutoff_len": 128,
        "output_dir": str(output),
        "per_device_train_batch_size": BATCH,
        "learning_rate": 1.0e-3,
        "max_steps": STEPS,
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": "none",
        "seed": seed,
        "dataflex": {
            "seed": seed,
            "warmup_steps": WARMUP_STEPS,
            "update_steps": UPDATE_STEPS,
            "select": SELECTORS[name],
        },
    }
    file = output.with_name(f"{output.name}.yaml")  # JSON is YAML, too
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(args))
    log = output.with_suffix(".log")
    with log.open("w") as stream:
        command = [sys.executable, "-m", "dataflex", "train", str(file)]
        done = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise SystemExit(f"{name}: the run failed, see {log}")
    run = read_run(output)
    decided = [each for each in run.rounds if not each.warmup]
    chosen = np.sum([[each.domains[kind] for kind in KINDS] for each in decided], axis=0)
    measured = json.loads((output / "all_results.json").read_text())
    losses = {f"loss_{kind}": round(measured[f"eval_{kind}_held_out_loss"], 3) for kind in KINDS}
    return {f"share_of_{WANTED}": round(float(chosen[KINDS.index(WANTED)] / chosen.sum()), 3), **losses}


if __name__ == "__main__":
    main()
