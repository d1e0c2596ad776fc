"""Preference runs that also train on text, and the gradient of the text by hand in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from composed_loss import kept, token_losses
from preference_runs import frozen_part
from transformers import AutoModelForCausalLM
from workshop import Workshop

import pairs
import tiny

COEFFICIENT = 0.3
PT = {"dataset": "texts,pages", "coefficient": COEFFICIENT}
SFT = {"dataset": "gamma", "coefficient": COEFFICIENT, "stage": "sft", "batch_size": 3}
TEXTS = {"dpo": PT, "kto": SFT, "rm": PT}
STEPS = {"select": {"method": "random"}, "update_steps": 2}
FORMS = {"one": (1, 4), "accumulated": (1, 1), "two": (2, 2), "zero2": (2, 2), "zero3": (2, 1)}
"""Name -> processes and samples of a micro-batch, for runs with a global batch of 4."""
COMPARED = ("dpo-one", "dpo-accumulated", "dpo-two", "kto-one", "kto-two", "rm-one", "rm-two")
"""Stage and form of the runs whose gradient is computed by hand."""


def form(name: str, folder: Path) -> dict[str, Any]:
    processes, batch = FORMS[name]
    sharded = tiny.zero(folder, int(name[-1])) if name.startswith("zero") else {}
    accumulation = 4 // (processes * batch)
    return {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation, **sharded}


def add_runs(workshop: Workshop, model: Path, reference: Path, processes: int) -> None:
    """Add the runs of a number of processes. Those on two processes are also killed and resumed."""
    still = {"learning_rate": 0.0, "max_grad_norm": 0.0, "max_steps": 2, "keep": 1, "model_name_or_path": str(model)}
    short = {"max_steps": 4, "lr_scheduler_type": "constant", "learning_rate": 1e-3}
    both = {**STEPS, "ptx": PT}
    for name in (name for name in FORMS if FORMS[name][0] == processes):
        of_form = form(name, workshop.root)
        for stage, ptx in TEXTS.items():
            if f"{stage}-{name}" in COMPARED:
                run = {**pairs.STAGES[stage], **frozen_part(stage, reference), **still, **of_form}
                workshop.add(f"ptx-{stage}-{name}-without", **run, dataflex=STEPS)
                workshop.add(f"ptx-{stage}-{name}", **run, dataflex={**STEPS, "ptx": ptx})
        run = {**pairs.DPO, **frozen_part("dpo", reference), **short, **of_form}
        workshop.add(f"ptx-trained-{name}", **run, dataflex=both)
    saved = {**pairs.DPO, "max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    saved |= form("one" if processes == 1 else "two", workshop.root)
    if processes == 2:
        workshop.add("ptx-whole", **saved, dataflex=both)
        workshop.add("ptx-killed", into="ptx-cut", stop_at=5, **saved, dataflex=both)
        workshop.add("ptx-cut", **saved, dataflex=both)
        return
    workshop.add("ptx-before", into="ptx-other", stop_at=3, **saved, dataflex=both)
    workshop.add("ptx-other", **saved, dataflex={**STEPS, "ptx": {**PT, "dataset": "texts"}})
    workshop.add("ptx-alone", **pairs.DPO, max_steps=2, dataflex={"ptx": PT})


def batches_of(runs: Workshop, stage: str, name: str) -> list[dict[str, torch.Tensor]]:
    """Return the text of all processes in the kept step."""
    parts = kept(runs.root / f"ptx-{stage}-{name}", FORMS[name][0])
    return [batch for part in parts for batch in part["texts"]]


def text_gradient(runs: Workshop, stage: str, name: str) -> dict[str, torch.Tensor]:
    """Return the gradient of the mean token loss of the step's text, one row at a time in float64."""
    model = AutoModelForCausalLM.from_pretrained(runs.model, dtype=torch.float64)
    losses = []
    for batch in batches_of(runs, stage, name):
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
            losses.append(token_losses(model, ids[mask != 0], labels[mask != 0]))
    torch.cat(losses).mean().backward()
    return {key: value.grad for key, value in model.named_parameters()}
