"""Runs in the preference stages dpo, rm and kto: their losses and weights, on one process and two, killed and resumed.

All trainings happen in two starts, one of one process and one of two (see runner.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pairs_by_hand
import pytest
import torch
from composed_loss import distance
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import pairs
import tiny

pytestmark = pytest.mark.launch

PLAIN = {
    **pairs.STAGES,
    "orpo": {**pairs.DPO, "pref_loss": "orpo", "pref_ftx": 0.2},
    "simpo": {**pairs.DPO, "pref_loss": "simpo"},
    "bco": {**pairs.DPO, "pref_bco_weight": 0.3, "dpo_label_smoothing": 0.1, "ld_alpha": 0.5},
}
"""Settings of the runs that are compared with LLaMA-Factory's own."""
COMPOSED = [
    (stage, accumulation, processes) for stage in pairs.STAGES for accumulation in (1, 4) for processes in (1, 2)
]


def ones() -> dict[str, Any]:
    return {"weight": {"method": "uniform"}}


def composed(stage: str, model: Path, reference: Path) -> dict[str, Any]:
    """Return the settings of a full training whose model differs from its reference from the first step on."""
    # With reentrant checkpointing LLaMA-Factory cannot train a whole reward model under DDP, because the loss does not
    # use the language-model head.
    frozen = {"use_reentrant_gc": False} if stage == "rm" else {"ref_model": str(reference)}
    return {
        **pairs.STAGES[stage],
        "finetuning_type": "full",
        "model_name_or_path": str(model),
        **frozen,
        "dataflex": pairs_by_hand.section(),
    }


def add_plain(workshop: Any, processes: int) -> None:
    for name, settings in PLAIN.items():
        for accumulation in (1, 4) if processes == 1 or name in pairs.STAGES else ():
            run = {
                **settings,
                "per_device_train_batch_size": 8 // (accumulation * processes),
                "gradient_accumulation_steps": accumulation,
                "max_steps": 3,
            }
            workshop.add(f"{name}-lf-{accumulation}-{processes}", plain=True, **run)
            workshop.add(f"{name}-ones-{accumulation}-{processes}", **run, dataflex=ones())


def add_composed(workshop: Any, model: Path, reference: Path, processes: int) -> None:
    for stage, accumulation, number in COMPOSED:
        if number == processes:
            run = {
                **composed(stage, model, reference),
                "per_device_train_batch_size": 8 // (processes * accumulation),
                "gradient_accumulation_steps": accumulation,
                "max_steps": 2,
                "max_grad_norm": 0.0,
                "learning_rate": 0.0,
            }
            workshop.add(f"{stage}-composed-{accumulation}-{processes}", keep=1, **run)


def sections() -> dict[str, dict[str, Any]]:
    """Return settings of the runs that are killed and resumed, by name."""
    less = {"method": "less", "validation": ["held_pairs"], "proj_dim": 64}
    return {
        "dpo": {
            **pairs.DPO,
            "pref_bco_weight": 0.3,
            "dataflex": {
                "warmup_steps": 1,
                "update_steps": 2,
                "precompute_ref_log_probs": True,
                "select": less,
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
            "dataflex": {"update_steps": 2, "mix": {"method": "odm"}, "weight": {"method": "loss"}},
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


def add_resumed(workshop: Any, model: Path, processes: int, **more: Any) -> None:
    for name, settings in sections().items():
        run = {
            **settings,
            "model_name_or_path": str(model),
            **more,
            "per_device_train_batch_size": 4 // processes,
            "gradient_accumulation_steps": 2,
            "max_steps": 7,
        }
        if processes == 2:
            workshop.add(f"{name}-{'zero3' if more else 'two'}", **run)
            continue
        saved = {"save_strategy": "steps", "save_steps": 3}
        workshop.add(f"{name}-whole", **run, **saved)
        workshop.add(f"{name}-killed", stop_at=4, into=f"{name}-cut", **run, **saved)
        workshop.add(f"{name}-cut", **run, **saved)


def add_kept(workshop: Any) -> None:
    """Add runs that compute the reference's log probabilities before training, beside those of `add_plain`."""
    for name in ("dpo", "kto"):
        for accumulation in (1, 4):
            section = {**ones(), "precompute_ref_log_probs": True}
            run = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
            workshop.add(f"{name}-kept-{accumulation}", **pairs.STAGES[name], **run, max_steps=3, dataflex=section)


@pytest.fixture(scope="module")
def reference(workshop: Any) -> Path:
    return tiny.make_model(workshop.root / "reference", seed=5)


@pytest.fixture(scope="module")
def model(workshop: Any) -> Path:
    """A model whose head of rewards has no dropout."""
    folder = tiny.make_model(workshop.root / "without_dropout")
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "summary_dropout_prob": 0.0}))
    return folder


@pytest.fixture(scope="module")
def runs(workshop: Any, model: Path, reference: Path) -> Any:
    pairs.make_pairs(workshop.data)
    for processes in (1, 2):
        add_plain(workshop, processes)
        add_composed(workshop, model, reference, processes)
        add_resumed(workshop, model, processes)
        if processes == 1:
            add_kept(workshop)
        else:
            add_resumed(workshop, model, processes, **tiny.zero(workshop.root, 3))
        workshop.start(processes)
    return workshop


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("name", PLAIN)
def test_weight_1_is_llamafactorys_own_run(runs: Any, name: str, accumulation: int, processes: int) -> None:
    if processes == 2 and name not in pairs.STAGES:
        pytest.skip("losses of further kinds run on one process")
    plain, weighed = (runs.trace(f"{name}-{kind}-{accumulation}-{processes}") for kind in ("lf", "ones"))
    assert len(plain["losses"]) == 3
    np.testing.assert_allclose(weighed["losses"], plain["losses"], rtol=1e-6)
    assert weighed["micro_batches"]  # the run was DataFlex's


@pytest.mark.parametrize(("stage", "accumulation", "processes"), COMPOSED)
def test_the_gradient_of_a_weighed_step_equals_one_pair_at_a_time(
    runs: Any, model: Path, reference: Path, stage: str, accumulation: int, processes: int
) -> None:
    name = f"{stage}-composed-{accumulation}-{processes}"
    runs.trace(name)
    trained = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    prefix = ""
    if stage == "rm":
        head = load_file(runs.root / name / "value_head.safetensors")
        of_head = {key.removeprefix("v_head.summary."): value.double() for key, value in head.items()}
        trained, prefix = pairs_by_hand.Reward(trained, of_head), "v_head."
    wanted = pairs_by_hand.gradient_by_hand(stage, runs.root / name, processes, trained, reference)
    wanted = {f"{prefix}{key}" if key.startswith("summary") else key: value for key, value in wanted.items()}
    found = pairs_by_hand.kept(runs.root / name, processes)[0]["gradients"]
    found = {key: value for key, value in found.items() if key in wanted}
    # LLaMA-Factory rounds logits to float32, and the loss of kto has the smallest differences between samples.
    assert distance(found, wanted) < (3e-5 if stage == "kto" else 1e-5)


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_log_probabilities_of_the_reference_may_be_computed_before_training(
    runs: Any, name: str, accumulation: int
) -> None:
    kept, plain = (runs.trace(run)["losses"] for run in (f"{name}-kept-{accumulation}", f"{name}-lf-{accumulation}-1"))
    np.testing.assert_allclose(kept, plain, rtol=1e-5)


@pytest.mark.parametrize("name", sections())
def test_a_killed_and_resumed_run_equals_an_uninterrupted_run(runs: Any, name: str) -> None:
    whole, resumed = runs.trace(f"{name}-whole"), runs.trace(f"{name}-cut")
    assert resumed["micro_batches"][0][0] == 3
    assert runs.plan_digests(f"{name}-cut") == runs.plan_digests(f"{name}-whole")
    assert resumed["losses"] == whole["losses"]
    assert resumed["weights"] == whole["weights"] is not None


@pytest.mark.parametrize("kind", ["two", "zero3"])
@pytest.mark.parametrize("name", sections())
def test_two_processes_and_zero_3_give_the_run_of_one_process(runs: Any, name: str, kind: str) -> None:
    one, two = runs.trace(f"{name}-whole"), runs.trace(f"{name}-{kind}")
    runs.trace(f"{name}-{kind}", 1)
    assert runs.plan_digests(f"{name}-{kind}") == runs.plan_digests(f"{name}-whole")
    np.testing.assert_allclose(two["losses"], one["losses"], rtol=1e-4)
