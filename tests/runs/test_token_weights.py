"""Whole runs with weights of tokens: against a computation by hand, plain runs, a resume and other process counts."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import composed_loss
import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny

pytestmark = pytest.mark.launch

PLUGIN = str(Path(__file__).with_name("step_indices.py"))
STEP_OF_8 = {1: {"per_device_train_batch_size": 4}, 2: {"per_device_train_batch_size": 2}}
"""Keys of a step of 8 samples with two micro-batches, by the number of processes."""
SHARE = 0.29
PLAIN = {
    "rho1": {"method": "rho1", "share": 1},
    "rho1-sample": {"method": "rho1", "share": 1, "scope": "sample"},
    "focal": {"method": "focal", "gamma": 0},
    "evolving": {"method": "token_cleaning", "mode": "self_evolving", "parts": 3, "share": 1},
}
"""Weighters whose weights are all 1."""


def add_resumed(workshop: Any, name: str, weight: dict[str, Any], processes: int) -> None:
    """Add a run of 8 steps over 48 samples with dropout, the same run killed at step 5, and its end from step 3."""
    run = {"dropout": True, "gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 3}
    run |= {**STEP_OF_8[processes], "disable_shuffling": True, "dataflex": {"weight": weight}}
    workshop.add(f"{name}-whole-{processes}", **run)
    workshop.add(f"{name}-cut-{processes}", stop_at=5, **run)
    workshop.add(f"{name}-resumed-{processes}", into=f"{name}-cut-{processes}", **run)


EVOLVING = {"method": "token_cleaning", "mode": "self_evolving", "parts": 3, "share": 0.5}
"""Parts of 16 samples, which are two steps each."""


@pytest.fixture(scope="module")
def runs(workshop: Any) -> Any:
    reference = tiny.make_model(workshop.root.parent / "token-reference", seed=1)
    by_reference = {"share": SHARE, "reference_model": str(reference)}
    cleaning = {"method": "token_cleaning", **by_reference}
    for processes in (2, 1):
        shared = {**STEP_OF_8[processes], "gradient_accumulation_steps": 2, "max_steps": 4}
        whole = {"per_device_train_batch_size": 48 // processes, "max_steps": 1, "max_grad_norm": 0.0}
        whole |= {"finetuning_type": "full", "learning_rate": 0.0}
        for method in ("rho1", "token_cleaning"):
            weight = {"method": method, **by_reference}
            workshop.add(f"{method}-hand-{processes}", keep=0, **whole, dataflex={"weight": weight})
        for scope in ("batch", "sample"):
            weight = {"method": "rho1", "scope": scope, **by_reference}
            workshop.add(f"rho1-{scope}-{processes}", **shared, dataflex={"weight": weight})
        add_resumed(workshop, "evolving", EVOLVING, processes)
        section = {"weight": {"method": "test_step_indices", "file": str(workshop.root / f"indices-{processes}")}}
        workshop.add(f"indices-of-{processes}", **shared, dataflex={"plugins": [PLUGIN], **section})
        if processes == 1:
            add_resumed(workshop, "fixed", cleaning, 1)
            table = {**cleaning, "reference_losses": str(workshop.root / "cleaning-table")}
            workshop.add("fixed-table", **shared, dataflex={"weight": table})
            workshop.add("fixed-model", **shared, dataflex={"weight": cleaning})
        else:
            workshop.add("plain", plain=True, disable_shuffling=True, **shared)
            for name, weight in PLAIN.items():
                given = {"reference_model": str(reference)} if weight["method"] == "rho1" else {}
                workshop.add(
                    f"plain-{name}", disable_shuffling=True, **shared, dataflex={"weight": {**weight, **given}}
                )
        workshop.start(processes)
    return workshop


def gradient_by_hand(folder: Path, processes: int, model: Path) -> dict[str, torch.Tensor]:
    """Return the gradient of the mean loss of the tokens of the largest excess, from the samples of the step."""
    trained = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    frozen = AutoModelForCausalLM.from_pretrained(folder.parent.parent / "token-reference", dtype=torch.float32)
    losses, excess = [], []
    for batch in (batch for part in composed_loss.kept(folder, processes) for batch in part["batches"]):
        for row in range(len(batch["input_ids"])):
            real = batch["attention_mask"][row] != 0
            ids, labels = batch["input_ids"][row][real], batch["labels"][row][real]
            losses.append(composed_loss.token_losses(trained, ids, labels))
            with torch.no_grad():
                excess.append(losses[-1].detach() - composed_loss.token_losses(frozen, ids, labels))
    assert len(losses) == 48
    order = torch.cat(excess).argsort(descending=True)
    kept = order[: int(Fraction(str(SHARE)) * order.numel())]
    torch.cat(losses)[kept].mean().backward()
    return {name: value.grad for name, value in trained.named_parameters()}


@pytest.mark.parametrize("method", ["rho1", "token_cleaning"])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_step_of_the_whole_data_trains_on_the_mean_over_the_kept_tokens(
    runs: Any, method: str, processes: int
) -> None:
    """The base of token_cleaning is the model of this first step, so its scores are the excess losses of rho1."""
    folder = runs.root / f"{method}-hand-{processes}"
    expected = gradient_by_hand(folder, processes, runs.model)
    for part in composed_loss.kept(folder, processes):
        assert composed_loss.distance(part["gradients"], expected) < 1e-6


@pytest.mark.parametrize("scope", ["batch", "sample"])
def test_rho1_trains_alike_on_one_process_and_on_two(runs: Any, scope: str) -> None:
    one, two = (runs.trace(f"rho1-{scope}-{processes}") for processes in (1, 2))
    assert len(one["losses"]) == 4
    assert one["losses"] == pytest.approx(two["losses"], rel=2e-4)


@pytest.mark.parametrize("name", PLAIN)
def test_weights_that_are_all_one_train_as_without_a_weighter(runs: Any, name: str) -> None:
    plain, weighed = runs.trace("plain"), runs.trace(f"plain-{name}")
    assert weighed["weights"] == plain["weights"]
    assert weighed["losses"] == plain["losses"]


@pytest.mark.parametrize(("name", "processes"), [("evolving", 1), ("evolving", 2), ("fixed", 1)])
def test_a_resumed_run_cleans_the_same_tokens(runs: Any, name: str, processes: int) -> None:
    whole, resumed = (runs.trace(f"{name}-{part}-{processes}") for part in ("whole", "cut"))
    assert min(step for step, _ in resumed["micro_batches"]) == 3
    assert resumed["weights"] == whole["weights"]
    assert resumed["losses"] == whole["losses"]


def test_a_table_of_the_reference_gives_the_same_tokens(runs: Any) -> None:
    assert runs.trace("fixed-table")["losses"] == runs.trace("fixed-model")["losses"]


@pytest.mark.parametrize("processes", [1, 2])
def test_the_indices_of_a_step_are_known_before_it(runs: Any, processes: int) -> None:
    seen = [(runs.root / f"indices-{processes}-{rank}").read_text() for rank in range(processes)]
    assert len(set(seen)) == 1
    steps = [json.loads(line) for line in seen[0].splitlines()]
    assert [step for step, _ in steps] == [0, 1, 2, 3]
    ranks = [runs.trace(f"indices-of-{processes}", rank)["micro_batches"] for rank in range(processes)]
    for step, indices in steps:
        dealt = [[part for number, part in batches if number == step] for batches in ranks]
        assert indices == [index for turn in zip(*dealt, strict=True) for part in turn for index in part]
        assert len(set(indices)) == 8
