"""Runs with the methods for preference pairs, and the margins of their steps by hand."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pairs_by_hand
import torch
from composed_loss import kept
from preference_runs import frozen_part
from transformers import AutoModelForCausalLM
from workshop import Workshop

import pairs
import tiny
from records import plan_table

COLUMNS = {"method": "external_margin", "chosen": "good", "rejected": "bad"}
BOUNDS = [[-1, 1], [-2, 2], [-0.5, 0.5]]
FLIPPED = {
    "small": {"method": "dpo_gap", "prefer": "small"},
    "large": {"method": "dpo_gap", "prefer": "large"},
    "easy": {"method": "hard_pairs"},
}
"""Name of a run on pairs of which some are flipped -> its selector."""


def add_flipped(folder: Path) -> None:
    """Write pairs of which two in five have swapped responses."""
    rng = random.Random("flipped")
    rows = []
    for number in range(60):
        good, bad = (f"{tiny.sentence(rng, 2, 6)} {word}" for word in ("cat", "dog"))
        flipped = number % 5 < 2
        row = {"instruction": tiny.sentence(rng), "chosen": bad if flipped else good}
        rows.append({**row, "rejected": good if flipped else bad})
    tiny.add_data(folder, "flipped", rows, **pairs.ENTRY)


def still(reference: Path) -> dict[str, Any]:
    """Return the settings of a run whose model does not move."""
    return {**pairs.DPO, **frozen_part("dpo", reference), "max_grad_norm": 0.0, "learning_rate": 0.0, "max_steps": 4}


def add_both(workshop: Workshop, reference: Path, processes: int) -> None:
    """Add the runs that are made on one process and on two. Those on two processes are also killed and resumed."""
    run = {**still(reference), "per_device_train_batch_size": 2 // processes, "gradient_accumulation_steps": 2}
    gap = {"method": "dpo_gap", "prefer": "small"}
    workshop.add(f"gap-small-{processes}", keep=1, **run, dataflex={"update_steps": 2, "select": gap})
    weight = {"method": "beta_dpo", "ratio": 0.25}
    workshop.add(f"beta-{processes}", keep=1, **run, dataflex={"weight": weight})
    select = {"method": "half", "half": "second", "folder": str(workshop.root / f"held-out-{processes}")}
    several = {"weight": weight, "select": select, "update_steps": 2}
    run |= {"save_strategy": "steps", "save_steps": 2, "max_steps": 8, "learning_rate": 0.01}
    workshop.add(f"half-whole-{processes}", **run, dataflex=several)
    if processes == 2:
        several = {**several, "select": {**select, "folder": str(workshop.root / "held-out-cut")}}
        workshop.add("half-cut", stop_at=5, **run, dataflex=several)
        workshop.add("half-resumed", into="half-cut", **run, dataflex=several)


def add_runs(workshop: Workshop, reference: Path, processes: int) -> None:
    """Add the runs of a number of processes."""
    add_both(workshop, reference, processes)
    if processes == 2:
        return
    run = {**pairs.DPO, "per_device_train_batch_size": 4, "max_steps": 4}
    frozen = {**still(reference), "per_device_train_batch_size": 4}
    large = {"method": "dpo_gap", "prefer": "large"}
    workshop.add("gap-large-1", **frozen, dataflex={"update_steps": 2, "select": large})
    given = {"method": "external_margin", "margin": "margin"}
    workshop.add("margin", **run, dataflex={"update_steps": 2, "select": given})
    workshop.add("rewards", **run, dataflex={"update_steps": 2, "select": {**COLUMNS, "prefer": "small"}})
    select = {**COLUMNS, "margin": "margin", "implicit": True, "bounds": BOUNDS}
    workshop.add("combined", **frozen, dataflex={"update_steps": 2, "select": select})
    easy = {"select": {"method": "hard_pairs", "column": "hard"}}
    easy["order"] = {"method": "sort", "by": "selection", "descending": True}
    workshop.add("easy", **{**run, "max_steps": -1, "num_train_epochs": 0.5}, dataflex=easy)
    filtered = [{"method": "hard_pairs", "keep": 0.5}, {"method": "random"}]
    workshop.add("losses", **run, dataflex={"warmup_steps": 1, "update_steps": 3, "select": filtered})
    table = [str(workshop.root / f"held-out-{number}" / "difficulties.parquet") for number in (1, 2)]
    workshop.add("incomplete", **run, dataflex={"select": {"method": "hard_pairs", "difficulties": table}})
    of_rewards = {"update_steps": 2, "select": {"method": "dpo_gap"}, "weight": {"method": "beta_dpo"}}
    workshop.add("reward-model", **{**run, **pairs.RM}, dataflex=of_rewards)
    run = {**pairs.DPO, "dataset": "flipped", "per_device_train_batch_size": 8, "max_steps": 18}
    run |= {"learning_rate": 0.002, "lr_scheduler_type": "constant"}
    for name, select in FLIPPED.items():
        section = {"warmup_steps": 15, "update_steps": 3, "select": select}
        workshop.add(f"flipped-{name}", **run, dataflex=section)


def scores_of(runs: Workshop, name: str) -> dict[int, float]:
    """Return the recorded score of every pair that a run chose."""
    runs.trace(name)
    found: dict[int, float] = {}
    for line in runs.rounds(name):
        table = plan_table(runs.root / name, line["round"])
        found |= dict(zip(table.column("index").to_pylist(), table.column("score").to_pylist(), strict=True))
    return found


def columns(runs: Workshop, name: str) -> np.ndarray[Any, Any]:
    """Return a column of all pairs in the order of the pool."""
    return np.array([row[name] for part in ("first", "second") for row in tiny.rows_of(runs.data, part)])


def models_of(runs: Workshop, reference: Path) -> list[torch.nn.Module]:
    """Return the model that a run starts from, and the reference, in float64."""
    return [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64) for path in (runs.model, reference)]


def margins_by_hand(runs: Workshop, reference: Path, name: str, processes: int) -> dict[int, float]:
    """Return the margins of the pairs of a kept step, one pair at a time in float64."""
    found = {}
    models = models_of(runs, reference)
    with torch.no_grad():
        for part in kept(runs.root / name, processes):
            for batch in part["batches"]:
                losses = pairs_by_hand.pair_losses("dpo", *models, batch)
                for place, loss in zip(batch["dataflex_index"].tolist(), losses, strict=True):
                    found[place] = -float(torch.log(torch.expm1(loss)))
    return found
