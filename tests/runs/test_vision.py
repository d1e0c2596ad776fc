"""Runs through LLaMA-Factory on samples with images: one process, two processes, DDP and ZeRO-3.

The trainings happen in two starts, one of one process and one of two processes (see runner.py).
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from workshop import Workshop

import tiny
import vision
from dataflex.cli import main

pytestmark = [
    pytest.mark.launch,
    pytest.mark.timeout(1200),  # the first test waits for all trainings
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed"),
]

SELECTORS: dict[str, dict[str, Any]] = {
    "loss": {"method": "loss", "focus": "high"},
    "less": {"method": "less", "validation": "held", "proj_dim": 256},
    "icons": {"method": "icons", "validation": "held", "proj_dim": 256},
    "coincide": {"method": "coincide", "clusters": 4},
    "greats": {"method": "greats", "validation": "held"},
}
"""Selectors by losses, gradients and embeddings."""
SPREAD = [
    (name, mode) for mode in ("ddp", "zero3") for name in (*SELECTORS, "tower") if (name, mode) != ("icons", "zero3")
]
"""Runs on two processes. The gradients of icons are those of less, and the runs of ZeRO-3 are slow."""
STEADY = {"lr_scheduler_type": "constant", "learning_rate": 0.005}
"""Keys of the runs that are compared with each other: the first steps of a shorter run are those of a longer one."""
TARGETED = ("random", "less", "icons", "coincide")
"""Selectors that choose among questions of three kinds. The validation samples of two of them are of one kind."""


def section(**parts: Any) -> dict[str, Any]:
    return {"dataflex": {"warmup_steps": 2, "update_steps": 4, **parts}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    folder = tmp_path_factory.mktemp("vision")
    llava, qwen = vision.make_llava(folder / "llava"), vision.make_qwen2_vl(folder / "qwen")
    larger, mixtral = vision.make_llava(folder / "larger", hidden=64), tiny.make_experts(folder / "experts")
    data = vision.make_data(folder / "data")
    shop = Workshop(root=tmp_path_factory.mktemp("vision_runs"), model=llava, dropout_model=llava, data=data)
    of_qwen = {"model_name_or_path": str(qwen), "freeze_vision_tower": False}

    def add(name: str, template: str = "llava", **more: Any) -> None:
        shop.add(name, **vision.changes(data, template, **{"max_steps": 10, **more}))

    composed = {
        "dataset": "mixed,shapes",
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "eval_dataset": "held",
        "eval_strategy": "steps",
        "eval_steps": 5,
        "save_strategy": "steps",
        "save_steps": 5,
        **section(
            select={"method": "loss"},
            mix={"method": "static", "proportions": {"mixed": 2, "shapes": 1}},
            order={"method": "sort", "by": "loss"},
            weight={"method": "loss"},
        ),
    }

    def add_compared(name: str, mode: str, **how: Any) -> None:
        given = {**STEADY, **how, **section(select=SELECTORS.get(name, SELECTORS["less"]))}
        add(f"{name}-{mode}", **({"template": "qwen2_vl", **of_qwen} if name == "tower" else {}), **given)

    modes = {"ddp": {}, "zero3": {**tiny.zero(shop.root, 3), "max_steps": 6}}
    for name, mode in SPREAD:
        add_compared(name, mode, per_device_train_batch_size=1, **modes[mode])
    shop.start(2)

    for name in (*SELECTORS, "tower"):
        add_compared(name, "1")
    add("composed", **composed)
    shop.add("composed-cut", stop_at=7, **vision.changes(data, max_steps=10, **composed))
    shop.add("composed-resumed", into="composed-cut", **vision.changes(data, max_steps=10, **composed))
    shop.add("plain", plain=True, **vision.changes(data, max_steps=6))
    shop.add("uniform", **vision.changes(data, max_steps=6, dataflex={"weight": {"method": "uniform"}}))
    weighted = {"dataflex": {"weight": {"method": "loss"}}}
    shop.add("weighted", **vision.changes(data, max_steps=6, **weighted))
    fused = {"dataflex": {"weight": {"method": "loss"}, "fused_loss": True}}
    shop.add("fused", **vision.changes(data, max_steps=6, **fused))
    reference = {"method": "rho_loss", "reference_model": str(llava)}
    add("reference", **section(select=reference))
    for name, stop in (("experts", None), ("experts-cut", 5), ("experts-resumed", None)):
        into = "experts-cut" if stop is None and name != "experts" else name
        stored = {"save_strategy": "steps", "save_steps": 3, **section(select={"method": "loss"})}
        experts = {"model_name_or_path": str(mixtral), "finetuning_type": "full", "dataset": "alpha"}
        shop.add(name, into=into, stop_at=stop, **experts, **stored)
    for name in TARGETED:
        select = SELECTORS.get(name, {"method": name})
        select = {**select, "validation": "held"} if "validation" in select else select
        more = {"max_steps": 50, "per_device_train_batch_size": 8, "model_name_or_path": str(larger)}
        rounds = {"warmup_steps": 30, "update_steps": 10, "select": select}
        add(f"target-{name}", **{"dataset": ",".join(vision.KINDS), "learning_rate": 0.002, **more}, dataflex=rounds)
    shop.start(1)
    return shop


@pytest.mark.parametrize(("name", "mode"), SPREAD)
def test_two_processes_decide_as_one(runs: Workshop, name: str, mode: str) -> None:
    # After some steps the weights differ by rounding, and k-means may move a sample to another cluster.
    compared = slice(2 if name == "coincide" or mode == "zero3" else 3)
    assert len(runs.plan_digests(f"{name}-{mode}")) == (2 if mode == "zero3" else 3)
    assert runs.plan_digests(f"{name}-{mode}")[compared] == runs.plan_digests(f"{name}-1")[compared]
    assert len(runs.plan_digests(f"{name}-1")) == 3
    wrapper = runs.trace(f"{name}-{mode}")["wrapper"]
    assert any(("DistributedDataParallel" if mode == "ddp" else "stage 3") in each for each in wrapper)


def test_steps_with_images_on_one_process_alone_do_not_hang(runs: Workshop) -> None:
    rows = tiny.rows_of(runs.data, "mixed")
    seen = set()
    for name in (name for name, mode in SPREAD if mode == "zero3"):
        batches = [runs.trace(f"{name}-zero3", rank)["micro_batches"] for rank in (0, 1)]
        for pair in zip(*batches, strict=True):
            seen.add(tuple(any(rows[index]["images"] for index in indices) for _, indices in pair))
    assert {(True, False), (False, True)} <= seen


def test_a_resumed_run_equals_the_whole_one(runs: Workshop) -> None:
    whole, resumed = (runs.trace(name) for name in ("composed", "composed-cut"))
    assert resumed["weights"] == whole["weights"]
    assert runs.plan_digests("composed-cut") == runs.plan_digests("composed")


def test_a_resumed_model_with_stacked_experts_equals_the_whole_run(runs: Workshop) -> None:
    """Such models, too, are stored under other names than those of their parameters."""
    assert runs.trace("experts-cut")["weights"] == runs.trace("experts")["weights"]


def test_selection_by_gradients_finds_the_questions_of_the_target(runs: Workshop) -> None:
    shares = {}
    for name in TARGETED:
        chosen = [line["domains"] for line in runs.rounds(f"target-{name}") if not line["warmup"]]
        counts = {kind: sum(each.get(kind, 0) for each in chosen) for kind in vision.KINDS}
        shares[name] = counts["color"] / sum(counts.values())
    assert shares["random"] < 0.45
    assert shares["less"] > 1.5 * shares["random"], shares
    assert shares["icons"] > 1.5 * shares["random"], shares
    assert 0 < shares["coincide"] < 0.7, shares  # it has no target


def test_weight_1_is_plain_training(runs: Workshop) -> None:
    plain, uniform = runs.trace("plain"), runs.trace("uniform")
    assert uniform["weights"] == plain["weights"]
    assert uniform["losses"] == pytest.approx(plain["losses"], rel=1e-6)


def test_the_fused_loss_equals_the_plain_one(runs: Workshop) -> None:
    assert runs.trace("fused")["losses"] == pytest.approx(runs.trace("weighted")["losses"], rel=1e-4)


def test_a_frozen_vision_language_model_gives_reference_losses(runs: Workshop) -> None:
    assert len(runs.plan_digests("reference")) == 3


def test_explain_and_export_keep_the_images(runs: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = runs.root / "less-1"
    assert main(["explain", str(folder), "--top", "3"]) == 0
    shown = capsys.readouterr().out
    assert main(["export", str(folder), "--output", str(tmp_path / "chosen")]) == 0
    said = capsys.readouterr().out
    assert f"media_dir={runs.data}" in said
    chosen = [json.loads(line) for line in (tmp_path / "chosen" / "mixed.jsonl").read_text().splitlines()]
    given = tiny.rows_of(runs.data, "mixed")
    assert chosen
    assert all(row in given for row in chosen)
    assert "ASSISTANT" in shown
