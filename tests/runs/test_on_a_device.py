"""Whole runs on a pretended accelerator: no operator that a device refuses, and few waits for the device in a step.

All trainings happen in one start (see device_runner.py).
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import tiny

pytestmark = pytest.mark.launch

STEPS = 4
HELD = {"validation": "held"}
TWICE = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
EVALUATED = {"eval_dataset": "held", "eval_strategy": "steps", "eval_steps": 2}
ANCHORS = {**HELD, "anchors": 4, "center_samples": 4, "anchor_every": 2}

REWARD = """
def reward(prompt, response, reference):
    return float(sum(map(ord, response)) % 97)
"""

BUDGETS: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "uniform": ({"mix": {"method": "uniform"}}, {}, 1),
    "static": ({"mix": {"method": "static", "proportions": [2, 1, 1]}}, {}, 1),
    "odm": ({"mix": {"method": "odm"}}, {}, 1),
    "ado": ({"mix": {"method": "ado", "start_step": 2, "fit_steps": 2}}, {}, 1),
    "group_dro": ({"mix": {"method": "group_dro"}}, {}, 2),
    "group_dro_twice": ({"mix": {"method": "group_dro"}}, TWICE, 4),
    "weight": ({"weight": {"method": "loss"}}, {}, 3),
    "weight_twice": ({"weight": {"method": "loss"}}, TWICE, 5),
    "doremi": ({"mix": {"method": "doremi", "reference_model": "the model that is trained"}}, {}, 5),
    "together": ({"weight": {"method": "joint_update_aware", **ANCHORS, "anchor_every": STEPS}}, {}, 4),
}
"""Name -> section, changes to the run, and the waits that a step may add to those of LLaMA-Factory's own.

Every run waits once for the statistics of its step, a weigher of domains once for what they are decided from, and
weighters for which losses are finite and for whether their weights are weights. Each forward of a model waits once.
"""


def others(reference: Path, folder: Path) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Return runs that must only end well: name -> section and changes to the run."""

    def select(method: str, **params: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        return {"select": {"method": method, **params}}, {}

    def mix(method: str, **params: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        return {"mix": {"method": method, **params}}, {}

    of_model = {"encoder": str(reference)}
    reward = folder / "reward.py"
    reward.write_text(REWARD)
    small = {**HELD, "proj_dim": 64}
    experts = {"model_name_or_path": str(tiny.make_experts(folder / "experts")), "lora_target": "q_proj,v_proj"}
    return {
        "loss": select("loss"),
        "delta_loss": select("delta_loss"),
        "less": select("less", **small),
        "cluster_less": select("cluster_less", **small, cluster_size=8, representatives=2),
        "icons": (select("icons", **small)[0], {"finetuning_type": "full"}),
        "grand": select("grand"),
        "el2n": select("el2n"),
        "greats": select("greats", **HELD),
        "nice": select(
            "nice",
            **small,
            reward={"type": "python", "path": str(reward), "function": "reward"},
            samples=2,
            max_new_tokens=4,
        ),
        "near": select("near", **HELD, max_k=4),
        "near_encoder": select("near", **HELD, max_k=4, **of_model),
        "rds_plus": select("rds_plus", **HELD),
        "tsds": select("tsds", **HELD),
        "diversity": select("diversity"),
        "coincide": select("coincide"),
        "ifd": select("ifd"),
        "rho_loss": select("rho_loss", reference_model=str(reference)),
        "s2l": select("s2l"),
        "uds": select("uds"),
        "capped": select("grand", max_overhead=5.0),
        "doge": mix("doge", proj_dim=64),
        "doremi_table": mix("doremi", reference_model=str(reference), reference_losses=str(folder / "table")),
        "doremi_twice": (mix("doremi", reference_model=str(reference))[0], TWICE),
        "aioli": mix("aioli", lp_rounds=1, exploit_rounds=1, **HELD),
        "skill_it": mix("skill_it", validation=["alpha", "beta", "gamma"]),
        "moe_balance": (mix("moe_balance", samples_per_domain=4)[0], experts),
        "adapt": ({"weight": {"method": "adapt", **ANCHORS}}, {}),
        "sort": ({"order": {"method": "sort", "by": "loss"}}, {}),
        "evaluated": ({"mix": {"method": "uniform"}}, EVALUATED),
    }


@pytest.fixture(scope="module")
def runs(workshop: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Counter[str]]]]:
    """Return what the device did in each step of each run, by what is counted."""
    folder = tmp_path_factory.mktemp("device")
    found = {name: each[:2] for name, each in BUDGETS.items()} | others(workshop.model, folder)
    found["doremi"] = ({"mix": {"method": "doremi", "reference_model": str(workshop.model)}}, {})
    base = {
        "dataset": "alpha,beta,gamma",
        "max_samples": 16,  # operators on the device are slow
        "per_device_train_batch_size": 4,
        "max_steps": STEPS,
        "logging_steps": 100,
        "optim": "adamw_torch",
        "dataloader_pin_memory": False,
        "disable_gradient_checkpointing": True,
    }
    workshop.add("device-plain", plain=True, **base)
    workshop.add("device-plain_twice", plain=True, **base | TWICE)
    rounds = {"warmup_steps": 1, "update_steps": 2, "probe_batch_tokens": 800}
    for name, (section, changes) in found.items():
        paced = section if set(section) == {"weight"} else {**rounds, **section}
        workshop.add(f"device-{name}", dataflex=paced, **base | changes)
    workshop.start(1, "device_runner.py")
    return {
        name: [
            {key: Counter(values) for key, values in step.items()}
            for step in json.loads((workshop.root / f"device-{name}" / "counts.json").read_text())
        ]
        for name in ["plain", "plain_twice", *found]
    }


def test_every_run_ends_without_an_error(workshop: Any, runs: dict[str, Any]) -> None:
    errors = {
        name: error
        for name in runs
        if (error := json.loads((workshop.root / f"device-{name}" / "trace-0.json").read_text())["error"]) is not None
    }
    assert not errors
    assert all(len(steps) == STEPS for steps in runs.values())


def test_no_run_adds_floats_in_an_order_that_depends_on_threads(runs: dict[str, Any]) -> None:
    """But what a model adds itself so, a mixture of experts."""
    lines = {line for steps in runs.values() for step in steps for line in step["unordered"]}
    assert not [line for line in lines if not line.startswith(("transformers/", "peft/"))]


@pytest.mark.parametrize("name", BUDGETS)
def test_a_step_waits_for_the_device_no_more_often_than_listed(name: str, runs: dict[str, Any]) -> None:
    def most(of: str) -> Counter[str]:
        return max((step["waits"] for step in runs[of][2:]), key=Counter.total)

    plain, found = most("plain_twice" if name.endswith("twice") else "plain"), most(name)
    assert plain.total()
    more = found.total() - plain.total()
    assert more <= BUDGETS[name][2], {line: count for line, count in found.items() if line not in plain}
