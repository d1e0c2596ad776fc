"""Losses, margins and gradients of preference samples in LLaMA-Factory's run: one process, DDP, ZeRO-3 and FSDP2.

All trainings happen in two starts, one of one process and one of two (see runner.py).
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pairs_by_hand import Reward, log_probability
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import pairs
import tiny
from dataflex.probe.gradients import canonical

pytestmark = [pytest.mark.launch, pytest.mark.timeout(900)]

KEEP = str(Path(__file__).parent.parent / "plugins" / "keep_pairs.py")
FULL = {"finetuning_type": "full", "learning_rate": 0.002}
WEIGHT = 0.7
"""Weight of a rejected response in stage kto."""
BETA = 0.5
# name -> (stage, changes to the run, modes of two processes)
KINDS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "dpo": ("dpo", {}, ["ddp", "zero3", "fsdp2"]),
    "dpo-full": ("dpo", FULL, ["zero3"]),
    "rm": ("rm", {}, ["ddp", "zero3"]),
    "rm-full": ("rm", FULL, ["zero3"]),
    "kto": ("kto", {"kto_rejected_weight": WEIGHT}, ["ddp", "zero3"]),
}
CASES = [(kind, mode) for kind, (_, _, modes) in KINDS.items() for mode in modes]


def less(**changes: Any) -> dict[str, Any]:
    select = {"method": "less", "validation": "held_pairs", "proj_dim": 256}
    return {
        **pairs.DPO,
        "dataflex": {"warmup_steps": 2, "update_steps": 3, "select": select},
        "max_steps": 8,
        **changes,
    }


def add_runs(workshop: Any, settings: dict[str, dict[str, Any]], model: Path, reference: Path) -> None:
    for kind, (stage, changes, modes) in KINDS.items():
        for mode in settings:
            if mode in ["one", *modes]:
                select = {"method": "keep_pairs", "file": str(workshop.root / f"{kind}-{mode}.pt")}
                section = {"warmup_steps": 1, "update_steps": 1, "select": select, "plugins": [KEEP]}
                frozen = {"ref_model": str(reference)} if kind == "dpo-full" else {}
                run = {**settings[mode], **pairs.STAGES[stage], **changes, **frozen, "max_steps": 2}
                run |= {"model_name_or_path": str(model), "save_strategy": "steps", "save_steps": 1}
                workshop.add(f"{kind}-{mode}", **run, dataflex=section)
    for mode in settings:
        if mode in ("one", "ddp", "zero3"):
            workshop.add(f"less-{mode}", **less(**settings[mode]))
    if "one" in settings:
        saving = {"save_strategy": "steps", "save_steps": 3}
        workshop.add("less-cut", stop_at=5, **less(**settings["one"], **saving))
        workshop.add("less-resumed", into="less-cut", **less(**settings["one"], **saving))


@pytest.fixture(scope="module")
def reference(workshop: Any) -> Path:
    return tiny.make_model(workshop.root / "reference", seed=5)


@pytest.fixture(scope="module")
def model(workshop: Any) -> Path:
    """A model whose head of rewards has no dropout, so that one process and two train the same."""
    folder = tiny.make_model(workshop.root / "without_dropout")
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "summary_dropout_prob": 0.0}))
    return folder


@pytest.fixture(scope="module")
def runs(workshop: Any, model: Path, reference: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    pairs.make_pairs(workshop.data)
    folder = tmp_path_factory.mktemp("deepspeed")
    base = {"lora_target": "q_proj,down_proj"}
    add_runs(workshop, {"one": {**base, "per_device_train_batch_size": 4}}, model, reference)
    workshop.start(1)
    modes = {"ddp": {}, "zero3": tiny.zero(folder, 3), "fsdp2": tiny.FSDP2}
    add_runs(workshop, {mode: {**base, **changes} for mode, changes in modes.items()}, model, reference)
    workshop.start(2)
    return workshop


def model_of(runs: Any, kind: str, start: Path) -> torch.nn.Module:
    """Return the model in float64 as it was when the samples were measured."""
    folder = runs.root / f"{kind}-one" / "checkpoint-1"
    if kind.endswith("-full"):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    else:
        base = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float64)
        model = PeftModel.from_pretrained(base, folder, is_trainable=True).double()
    return model.eval()


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
        return (1.0 if good else WEIGHT) * (1 - torch.sigmoid(BETA * gain)), None
    if kind.startswith("rm"):
        margin = model.score(*fields("chosen_")[:2]) - model.score(*fields("rejected_")[:2])
    else:
        margin = BETA * (ratio("chosen_") - ratio("rejected_"))
    return -F.logsigmoid(margin), margin.detach()


class RewardOfAdapter(Reward):
    """A reward model over a model with an adapter."""

    def score(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        states = self.pretrained_model(input_ids=ids[mask != 0][None], output_hidden_states=True).hidden_states
        return self.summary(states[-1][0, -1])[0]


@pytest.mark.parametrize("kind", KINDS)
def test_values_equal_one_sample_at_a_time(runs: Any, kind: str, model: Path, reference: Path) -> None:
    assert runs.trace(f"{kind}-one")["error"] is None
    kept = torch.load(runs.root / f"{kind}-one.pt", weights_only=True)
    trained, prefix = model_of(runs, kind, model), ""
    frozen = AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float64) if kind == "dpo-full" else None
    if kind.startswith("rm"):
        head = load_file(runs.root / f"{kind}-one" / "checkpoint-1" / "value_head.safetensors")
        trained = RewardOfAdapter(trained, {key.removeprefix("v_head.summary."): head[key].double() for key in head})
        prefix = "v_head."
    parameters = dict(trained.named_parameters())
    names = [canonical(name).removeprefix(prefix) for name in kept["names"]]
    wanted = [parameters[name] for name in names]
    for number, row in enumerate(kept["rows"]):
        loss, margin = losses_by_hand(kind, trained, frozen, row)
        assert float(kept["losses"][number]) == pytest.approx(float(loss.detach()), rel=1e-5)
        if margin is not None:
            assert float(kept["margins"][number]) == pytest.approx(float(margin), rel=1e-4, abs=1e-5)
        found = torch.autograd.grad(loss, wanted, allow_unused=True)
        filled = [torch.zeros_like(p) if g is None else g for p, g in zip(wanted, found, strict=True)]
        expected = torch.cat([each.flatten() for each in filled])
        assert expected.norm() > 1e-3
        assert (kept["gradients"][number] - expected).norm() <= 2e-5 * expected.norm()


@pytest.mark.parametrize(("kind", "mode"), CASES)
def test_one_process_and_two_measure_the_same(runs: Any, kind: str, mode: str) -> None:
    assert runs.trace(f"{kind}-{mode}")["error"] is None
    one, two = (torch.load(runs.root / f"{kind}-{each}.pt", weights_only=True) for each in ("one", mode))
    assert one["rows"] == two["rows"]
    assert one["names"] == two["names"]
    for name in ("losses", "margins", "gradients", "embeddings"):
        if name in one:
            assert (two[name] - one[name]).norm() <= 1e-3 * one[name].norm(), name


@pytest.mark.parametrize("mode", ["ddp", "zero3"])
def test_less_chooses_the_same_pairs_on_two_processes(runs: Any, mode: str) -> None:
    assert runs.plan_digests(f"less-{mode}") == runs.plan_digests("less-one")


def test_a_killed_and_resumed_run_equals_an_uninterrupted_run(runs: Any) -> None:
    whole, resumed = runs.trace("less-one"), runs.trace("less-cut")
    assert resumed["error"] is None
    assert min(step for step, _ in resumed["micro_batches"]) == 3
    assert runs.plan_digests("less-cut") == runs.plan_digests("less-one")
    assert resumed["losses"] == whole["losses"]
    assert resumed["weights"] == whole["weights"]


@pytest.mark.parametrize("kind", ["dpo", "rm", "kto"])
def test_the_values_of_the_reference_are_in_the_record(runs: Any, kind: str) -> None:
    folder = runs.root / f"{kind}-one" / "dataflex" / "reference"
    files = list(folder.iterdir()) if folder.is_dir() else []
    assert len(files) == (kind != "rm")
    for file in files:
        with np.load(file) as stored:
            assert stored["values"].shape == (64, 2)
            assert np.isfinite(stored["values"]).all()
