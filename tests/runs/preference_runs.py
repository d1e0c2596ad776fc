"""Runs in the preference stages dpo, rm and kto: plain, weighed, killed and resumed, on one process and two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pairs_by_hand
from workshop import Workshop

import pairs
import tiny

FURTHER = {
    "orpo": {**pairs.DPO, "pref_loss": "orpo", "pref_ftx": 0.2},
    "simpo": {**pairs.DPO, "pref_loss": "simpo"},
    "bco": {**pairs.DPO, "pref_bco_weight": 0.3, "dpo_label_smoothing": 0.1, "ld_alpha": 0.5},
}
"""Settings of further losses of stage dpo."""
PLAIN = {**pairs.STAGES, **FURTHER}
"""Settings of the runs that are compared with LLaMA-Factory's own."""
FORMS = ((1, 1), (4, 1), (4, 2))
"""Accumulation and processes of steps of 8 samples."""
COMPOSED = [(stage, *form) for stage in pairs.STAGES for form in FORMS]
COMPARED = [*COMPOSED, *((name, 4, 1) for name in FURTHER)]
UNIFORM: dict[str, Any] = {"weight": {"method": "uniform"}}
"""A section whose weights are all 1."""
SECTIONS: dict[str, dict[str, Any]] = {
    "dpo": {
        **pairs.DPO,
        "pref_bco_weight": 0.3,
        "dataflex": {
            "warmup_steps": 1,
            "update_steps": 2,
            "precompute_ref_log_probs": True,
            "select": {"method": "less", "validation": ["held_pairs"], "proj_dim": 64},
            "mix": {"method": "odm"},
            "weight": {"method": "loss"},
        },
    },
    "rm": {
        **pairs.RM,
        "dataflex": {
            "warmup_steps": 1,
            "update_steps": 2,
            "select": {"method": "loss"},
            "order": {"method": "sort"},
        },
    },
    "rm_full": {
        **pairs.RM,
        "finetuning_type": "full",
        "use_reentrant_gc": False,
        "dataflex": {"warmup_steps": 1, "update_steps": 2, "mix": {"method": "odm"}, "weight": {"method": "loss"}},
    },
    "kto": {
        **pairs.KTO,
        "dataflex": {
            "warmup_steps": 1,
            "update_steps": 2,
            "select": [{"method": "loss", "keep": 0.5}, {"method": "grand"}],
            "mix": {"method": "group_dro"},
        },
    },
}
"""Settings of the runs that are killed and resumed. Their rounds are step 0, steps 1 and 2, 3 and 4, and so on."""
SPREAD = [*((name, "two") for name in SECTIONS), ("dpo", "zero3"), ("rm_full", "zero3"), ("kto", "zero3")]
"""Those runs on two processes. The runs of ZeRO-3 are slow, and end with the third round."""


def step_of_8(accumulation: int, processes: int) -> dict[str, Any]:
    """Return the keys of a step of 8 samples."""
    batch = 8 // (accumulation * processes)
    return {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}


def frozen_part(stage: str, reference: Path) -> dict[str, Any]:
    """Return the settings of a full training in a stage, with its reference model."""
    # With reentrant checkpointing LLaMA-Factory cannot train a whole reward model under DDP, because the loss does not
    # use the language-model head.
    frozen = {"use_reentrant_gc": False} if stage == "rm" else {"ref_model": str(reference)}
    return {"finetuning_type": "full", **frozen}


def add_resumed(workshop: Workshop, model: Path, processes: int) -> None:
    """Add the runs of one process, with the killed ones, or those that are spread over two processes."""
    sharded = tiny.zero(workshop.root, 3)
    for name, settings in SECTIONS.items():
        run = {
            **settings,
            "model_name_or_path": str(model),
            "per_device_train_batch_size": 4 // processes,
            "gradient_accumulation_steps": 2,
            "lr_scheduler_type": "constant",
            "max_steps": 7,
        }
        saved = {"save_strategy": "steps", "save_steps": 3}
        if processes == 1:
            workshop.add(f"{name}-whole", **run, **saved)
            workshop.add(f"{name}-killed", stop_at=4, into=f"{name}-cut", **run, **saved)
            workshop.add(f"{name}-cut", **run, **saved)
            continue
        workshop.add(f"{name}-two", **run)
        if (name, "zero3") in SPREAD:
            workshop.add(f"{name}-zero3", **{**run, **sharded, "max_steps": 5})


def add_runs(workshop: Workshop, model: Path, reference: Path, processes: int) -> None:
    """Add the runs of a number of processes.

    Args:
        workshop: Collection of the runs.
        model: Model whose head of rewards has no dropout.
        reference: Frozen model of full trainings, which differs from their model from the first step on.
        processes: Number of processes.
    """
    for name, accumulation, needed in COMPARED:
        if needed == processes:
            run = {**PLAIN[name], **step_of_8(accumulation, processes), "max_steps": 3}
            workshop.add(f"{name}-lf-{accumulation}-{processes}", plain=True, **run)
            workshop.add(f"{name}-ones-{accumulation}-{processes}", **run, dataflex=UNIFORM)
    for stage, accumulation, needed in COMPOSED:
        if needed == processes:
            run = {**pairs.STAGES[stage], **frozen_part(stage, reference), **step_of_8(accumulation, processes)}
            run |= {"model_name_or_path": str(model), "dataflex": pairs_by_hand.section()}
            run |= {"max_steps": 2, "max_grad_norm": 0.0, "learning_rate": 0.0}
            workshop.add(f"{stage}-composed-{accumulation}-{processes}", keep=1, **run)
    add_resumed(workshop, model, processes)
    if processes == 2:
        return
    for name in ("dpo", "kto"):
        section = {**UNIFORM, "precompute_ref_log_probs": True}
        workshop.add(f"{name}-kept", **pairs.STAGES[name], **step_of_8(4, 1), max_steps=3, dataflex=section)
