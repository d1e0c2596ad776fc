"""Runs that write losses, margins and gradients of preference samples, and the same values by hand in float64."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pairs_by_hand import BETA, Reward, log_probability
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from workshop import Workshop

import pairs
import tiny

PLUGIN = str(Path(__file__).parent.parent / "plugins" / "keep_pairs.py")
FULL = {"finetuning_type": "full", "learning_rate": 0.002}
REJECTED_WEIGHT = 0.7
"""Weight of a rejected response in stage kto."""
# name -> (stage, changes to the run, modes of two processes)
KINDS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "dpo": ("dpo", {}, ["ddp", "zero3", "fsdp2"]),
    "dpo-full": ("dpo", FULL, ["zero3"]),
    "rm": ("rm", {}, ["ddp", "zero3"]),
    "rm-full": ("rm", FULL, ["zero3"]),
    "kto": ("kto", {"kto_rejected_weight": REJECTED_WEIGHT}, ["ddp", "zero3"]),
}
SPREAD = [(kind, mode) for kind, (_, _, modes) in KINDS.items() for mode in modes]


def folder_of(runs: Workshop, kind: str) -> Path:
    return runs.root / f"probe-{kind}-one"


def measured(runs: Workshop, kind: str, mode: str) -> dict[str, Any]:
    """Return what a run measured."""
    assert runs.trace(f"probe-{kind}-{mode}")["error"] is None
    found: dict[str, Any] = torch.load(runs.root / f"probe-{kind}-{mode}.pt", weights_only=True)
    return found


def add_runs(workshop: Workshop, model: Path, reference: Path, processes: int) -> None:
    """Add the runs of a number of processes."""
    if processes == 1:
        modes: dict[str, dict[str, Any]] = {"one": {"per_device_train_batch_size": 4}}
    else:
        modes = {"ddp": {}, "zero3": tiny.zero(workshop.root, 3), "fsdp2": tiny.FSDP2}
    for kind, (stage, changes, spread) in KINDS.items():
        for mode in modes:
            if mode in ["one", *spread]:
                select = {"method": "keep_pairs", "file": str(workshop.root / f"probe-{kind}-{mode}.pt")}
                section = {"warmup_steps": 1, "update_steps": 1, "select": select, "plugins": [PLUGIN]}
                frozen = {"ref_model": str(reference)} if kind == "dpo-full" else {}
                run = {"lora_target": "q_proj,down_proj", **modes[mode], **pairs.STAGES[stage], **changes, **frozen}
                run |= {"model_name_or_path": str(model), "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
                workshop.add(f"probe-{kind}-{mode}", **run, dataflex=section)


class RewardOfAdapter(Reward):
    """A reward model over a model with an adapter."""

    def score(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        states = self.pretrained_model(input_ids=ids[mask != 0][None], output_hidden_states=True).hidden_states
        return self.summary(states[-1][0, -1])[0]


def model_of(runs: Workshop, kind: str, start: Path) -> torch.nn.Module:
    """Return the model in float64 as it was when the samples were measured."""
    folder = folder_of(runs, kind) / "checkpoint-1"
    if kind.endswith("-full"):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    else:
        base = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float64)
        model = PeftModel.from_pretrained(base, folder, is_trainable=True).double()
    model.eval()
    if not kind.startswith("rm"):
        return model
    head = load_file(folder / "value_head.safetensors")
    return RewardOfAdapter(model, {key.removeprefix("v_head.summary."): head[key].double() for key in head})


def losses_by_hand(
    kind: str, model: torch.nn.Module, frozen: torch.nn.Module | None, row: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the loss of one sample, and its margin if it is a pair."""

    def fields(prefix: str) -> list[torch.Tensor]:
        return [torch.tensor(row[f"{prefix}{name}"]) for name in ("input_ids", "attention_mask", "labels")]

    def ratio(prefix: str) -> torch.Tensor:
        with torch.no_grad(), contextlib.nullcontext() if frozen is not None else model.disable_adapter():
            before = log_probability(model if frozen is None else frozen, *fields(prefix))
        return log_probability(model, *fields(prefix)) - before

    if kind == "kto":
        own, distance = ratio(""), ratio("kl_").detach().clamp(min=0)
        good = row["kto_tags"]
        gain = own - distance if good else distance - own
        return (1.0 if good else REJECTED_WEIGHT) * (1 - torch.sigmoid(BETA * gain)), None
    if kind.startswith("rm"):
        margin = model.score(*fields("chosen_")[:2]) - model.score(*fields("rejected_")[:2])
    else:
        margin = BETA * (ratio("chosen_") - ratio("rejected_"))
    return -F.logsigmoid(margin), margin.detach()
