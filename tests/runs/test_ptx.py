"""Preference runs that also train on text: their gradient by hand, on one process and two, under ZeRO, and resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from composed_loss import distance, kept, token_losses
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import pairs
import tiny

pytestmark = pytest.mark.launch

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


@pytest.fixture(scope="module")
def runs(workshop: Any) -> Any:
    pairs.make_pairs(workshop.data)
    reference = tiny.make_model(workshop.root / "frozen", seed=5)
    file = tiny.make_model(workshop.root / "without_dropout") / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "summary_dropout_prob": 0.0}))
    still = {"finetuning_type": "full", "learning_rate": 0.0, "max_grad_norm": 0.0, "max_steps": 2, "keep": 1}
    short = {"finetuning_type": "full", "max_steps": 4, "lr_scheduler_type": "constant", "learning_rate": 1e-3}
    for processes in (1, 2):
        names = [name for name in FORMS if FORMS[name][0] == processes]
        for stage, ptx in TEXTS.items():
            # As in the tests of preference runs, see there.
            frozen = {"use_reentrant_gc": False, "model_name_or_path": str(file.parent)}
            frozen = frozen if stage == "rm" else {"ref_model": str(reference)}
            for name in names:
                if f"{stage}-{name}" in COMPARED:
                    run = {**pairs.STAGES[stage], **still, **frozen, **form(name, workshop.root)}
                    workshop.add(f"{stage}-{name}-without", **run, dataflex=STEPS)
                    workshop.add(f"{stage}-{name}", **run, dataflex={**STEPS, "ptx": ptx})
        for name in names:
            run = {**pairs.DPO, **short, "ref_model": str(reference), **form(name, workshop.root)}
            workshop.add(f"trained-{name}", **run, dataflex={**STEPS, "ptx": PT})
        saved = {**pairs.DPO, "max_steps": 6, "save_strategy": "steps", "save_steps": 2}
        saved |= form("one" if processes == 1 else "two", workshop.root)
        resumed = {"dataflex": {**STEPS, "ptx": PT}, **saved, "into": f"resumed-{processes}"}
        workshop.add(f"whole-{processes}", **saved, dataflex={**STEPS, "ptx": PT})
        workshop.add(f"killed-{processes}", **resumed, stop_at=5)
        workshop.add(f"resumed-{processes}", **resumed)
        if processes == 1:
            other = {**saved, "into": "other"}
            workshop.add("before", **other, stop_at=3, dataflex={**STEPS, "ptx": PT})
            workshop.add("other", **other, dataflex={**STEPS, "ptx": {**PT, "dataset": "texts"}})
            workshop.add("alone", **pairs.DPO, max_steps=2, dataflex={"ptx": PT})
        workshop.start(processes)
    return workshop


def text_gradient(runs: Any, stage: str, name: str) -> dict[str, torch.Tensor]:
    """Return the gradient of the mean token loss of the step's text, one row at a time in float64."""
    model = AutoModelForCausalLM.from_pretrained(runs.model, dtype=torch.float64)
    losses = []
    for batch in (batch for part in kept(runs.root / f"{stage}-{name}", FORMS[name][0]) for batch in part["texts"]):
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
            losses.append(token_losses(model, ids[mask != 0], labels[mask != 0]))
    torch.cat(losses).mean().backward()
    return {key: value.grad for key, value in model.named_parameters()}


@pytest.mark.parametrize("case", COMPARED)
def test_the_gradient_is_the_sum_of_both(runs: Any, case: str) -> None:
    stage, name = case.split("-")
    for run in (f"{stage}-{name}", f"{stage}-{name}-without"):
        runs.trace(run)
    both, alone = (kept(runs.root / f"{stage}-{name}{end}", 1)[0]["gradients"] for end in ("", "-without"))
    prefix = "pretrained_model." if stage == "rm" else ""
    wanted = {f"{prefix}{key}": COEFFICIENT * value for key, value in text_gradient(runs, stage, name).items()}
    found = {key: both[key] - alone[key] if key in alone else both[key] for key in wanted}
    assert distance(found, wanted) < 2e-5
    assert set(both) >= set(alone)
    for key in set(both) - set(wanted):  # the head of rewards reads no text
        torch.testing.assert_close(both[key], alone[key])


def test_processes_and_accumulation_share_the_same_text(runs: Any) -> None:
    rows = {}
    for name in ("one", "accumulated", "two"):
        parts = kept(runs.root / f"dpo-{name}", FORMS[name][0])
        batches = [batch for part in parts for batch in part["texts"]]
        rows[name] = sorted(tuple(row) for batch in batches for row in batch["input_ids"].tolist())
        gradients = [part["gradients"] for part in parts]
        assert all(distance(each, gradients[0]) < 1e-12 for each in gradients)
    assert len(rows["one"]) == 4
    assert rows["one"] == rows["accumulated"] == rows["two"]


def test_the_sft_text_has_its_own_batch_size(runs: Any) -> None:
    [part] = kept(runs.root / "kto-one", 1)
    assert [batch["input_ids"].shape[0] for batch in part["texts"]] == [3]
    assert (part["texts"][0]["labels"] == -100).any()  # of the prompts


def test_processes_and_zero_train_the_same_model(runs: Any) -> None:
    weights = {}
    for name in FORMS:
        trace = runs.trace(f"trained-{name}")
        weights[name] = load_file(runs.root / f"trained-{name}" / "model.safetensors")
        if name.startswith("zero"):
            assert f"stage {name[-1]}" in trace["wrapper"]
    before = load_file(runs.model / "model.safetensors")
    moved = {key: value - before[key] for key, value in weights["one"].items()}
    for name in FORMS:
        assert distance({key: value - before[key] for key, value in weights[name].items()}, moved) < 1e-3


def test_the_loss_of_the_text_is_logged_beside_the_preference_loss(runs: Any) -> None:
    losses = {}
    for name in ("one", "accumulated", "two", "zero3"):
        history = runs.trace(f"trained-{name}")["history"]
        losses[name] = [entry["dataflex/ptx_loss"] for entry in history if "loss" in entry]
        assert len(losses[name]) == 4
        assert losses[name] == pytest.approx(losses["one"], rel=1e-4)
    assert 3 < losses["one"][0] < 8  # the random model knows nothing about some 130 words
    assert losses["one"][-1] < losses["one"][0]
    first = runs.trace("trained-one")["history"][0]["loss"]
    assert first == pytest.approx(runs.trace("dpo-one-without")["losses"][0], rel=1e-4)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_resumed_run_is_the_uninterrupted_run(runs: Any, processes: int) -> None:
    whole, resumed = runs.trace(f"whole-{processes}"), runs.trace(f"resumed-{processes}")
    assert resumed["micro_batches"][0][0] == 4
    assert resumed["weights"] == whole["weights"]
    texts = [
        [entry["dataflex/ptx_loss"] for entry in each["history"] if "loss" in entry and entry["step"] > 4]
        for each in (whole, resumed)
    ]
    assert len(texts[0]) == 2
    assert texts[0] == texts[1]


def test_other_text_is_refused_at_a_resume(runs: Any) -> None:
    said = json.loads((runs.root / "other" / "trace-0.json").read_text())["error"]
    assert "dataflex.ptx.dataset" in said


def test_text_without_methods_is_trained_on(runs: Any) -> None:
    assert all("dataflex/ptx_loss" in entry for entry in runs.trace("alone")["history"] if "loss" in entry)
