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

ONES = Path(__file__).parent.parent / "plugins" / "ones.py"
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
    return {"plugins": [str(ONES)], "weight": {"method": "ones"}}


def composed(stage: str, model: Path, reference: Path) -> dict[str, Any]:
    """Return the settings of a full training whose model differs from its reference from the first step on."""
    # Without its own checkpointing of layers LLaMA-Factory cannot train a whole reward model under DDP: DDP waits for the
    # gradient of the language-model head, which the loss does not use.
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
