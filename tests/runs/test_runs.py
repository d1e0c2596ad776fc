"""Whole runs through LLaMA-Factory on a tiny model: what a run with a ``dataflex:`` section promises.

All trainings happen in two starts, one of two processes and one of one (see runner.py), but for those at the end, which
are started by the command line as a user meets it.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import earlier_files
import numpy as np
import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoTokenizer

import earlier
import tiny
from dataflex.cli import main
from dataflex.record.reader import read_run
from records import plan_table, round_lines

pytestmark = pytest.mark.launch

ROOT = Path(__file__).parents[2]
PLUGIN = str(Path(__file__).with_name("plugin.py"))
TWO_SETS = {"dataset": "alpha,beta"}
PT = {"stage": "pt", "finetuning_type": "full", "dataset": "texts", "cutoff_len": 16}

FAMILIES: dict[str, dict[str, Any]] = {
    "select": {"select": {"method": "loss", "focus": "high"}},
    "delta": {"select": {"method": "delta_loss"}},
    "mix": {"mix": {"method": "random"}},
    "order": {"order": {"method": "sort", "by": "loss"}},
    "weight": {"weight": {"method": "loss"}},
    "anchored": {"weight": {"method": "adapt", "validation": "held", "anchors": 5, "anchor_every": 4}},
    "composed": {
        "select": {"method": "loss"},
        "mix": {"method": "proportional", "temperature": 2.0},
        "order": {"method": "sort", "by": "length"},
        "weight": {"method": "loss"},
    },
}


def section(**parts: Any) -> dict[str, Any]:
    return {"dataflex": {"warmup_steps": 1, "update_steps": 3, **parts}}


def resumable(family: str, accumulation: int = 2) -> dict[str, Any]:
    """A run of 8 steps with checkpoints at 3 and 6 and dropout, whose rounds are 1 + 3 + 3 + 1 steps long."""
    return {
        **TWO_SETS,
        **section(**FAMILIES[family]),
        "dropout": True,
        "gradient_accumulation_steps": accumulation,
        "save_strategy": "steps",
        "save_steps": 3,
        "dataloader_num_workers": 2 if family in ("select", "mix") else 0,
    }


def add_uniform_pair(workshop: Any, name: str, processes: int, **changes: Any) -> None:
    workshop.add(f"{name}-plain-{processes}", plain=True, **changes)
    workshop.add(f"{name}-uniform-{processes}", dataflex={"weight": {"method": "uniform"}}, **changes)


UNIFORM_CASES = {
    "sft-lora-1": {"gradient_accumulation_steps": 1, **TWO_SETS},
    "sft-lora-4": {"gradient_accumulation_steps": 4, **TWO_SETS, "max_steps": 4},
    "sft-full-1": {"finetuning_type": "full", **TWO_SETS, "max_steps": 4},
    "pt-full-1": {**PT, "max_steps": 4},
    "pt-full-4": {**PT, "gradient_accumulation_steps": 4, "max_steps": 2},
}


def add_boundaries(workshop: Any, processes: int) -> None:
    for accumulation in (1, 2):
        for workers in (0, 2):
            workshop.add(
                f"boundary-{accumulation}-{workers}-{processes}",
                **TWO_SETS,
                **section(select={"method": "random"}),
                gradient_accumulation_steps=accumulation,
                dataloader_num_workers=workers,
            )


def add_families(workshop: Any, families: list[str], processes: int) -> None:
    for family in families:
        run = resumable(family)
        workshop.add(f"{family}-whole-{processes}", **run)
        workshop.add(f"{family}-cut-{processes}", stop_at=5, **run)
        workshop.add(f"{family}-resumed-{processes}", into=f"{family}-cut-{processes}", **run)


@pytest.fixture(scope="session")
def runs(workshop: Any) -> Any:
    for name, changes in UNIFORM_CASES.items():
        add_uniform_pair(workshop, name, 2, **changes)
    add_boundaries(workshop, 2)
    add_families(workshop, ["select", "mix", "order", "weight"], 2)
    add_chains(workshop, 2)
    add_walks(workshop, 2)
    workshop.add("scored-cut", stop_at=5, **scored(2))
    workshop.add("scored-resumed", into="scored-cut", **scored(2))
    elastic = {**resumable("composed", accumulation=1), "dropout": False}
    workshop.add("elastic-whole", **elastic)
    workshop.add("elastic-cut", stop_at=5, **elastic)
    workshop.add("one-or-two-2", **TWO_SETS, **section(select={"method": "loss"}), per_device_train_batch_size=2)
    workshop.add("diverged-steps", **TWO_SETS, **section(order={"method": "shuffle"}), learning_rate=1e30)
    workshop.add("diverged-scores", **TWO_SETS, dataflex={"select": {"method": "loss"}}, learning_rate=1e30)
    add_newcomer(workshop)
    add_strategies(workshop, 2)
    workshop.start(2)

    workshop.copy("elastic-cut", "elastic-resumed")
    workshop.add("elastic-resumed", **{**elastic, "gradient_accumulation_steps": 2})
    workshop.copy("walk-cut-2", "walk-elastic")
    workshop.add("walk-elastic", **walking(1))
    workshop.add("scored-whole", **scored(1))
    workshop.add("one-or-two-1", **TWO_SETS, **section(select={"method": "loss"}), per_device_train_batch_size=4)
    workshop.add("no-section-lora", **UNIFORM_CASES["sft-lora-1"])
    workshop.add("no-section-pt", **UNIFORM_CASES["pt-full-1"])
    for name, changes in UNIFORM_CASES.items():
        add_uniform_pair(workshop, name, 1, **changes)
    passes = {**TWO_SETS, "max_steps": -1, "num_train_epochs": 1.0, "per_device_train_batch_size": 4}
    passes |= {"gradient_accumulation_steps": 2, "disable_shuffling": True}
    workshop.add("sequential-plain", plain=True, **passes)
    workshop.add("sequential-full", dataflex={"update_steps": 4, "select": {"method": "full"}}, **passes)
    add_boundaries(workshop, 1)
    add_families(workshop, list(FAMILIES), 1)
    add_chains(workshop, 1)
    add_walks(workshop, 1)
    for name, look in (("probe-no", []), ("probe-yes", ["losses"])):
        selector = {"select": {"method": "test_blind", "look": look}, "plugins": [PLUGIN]}
        workshop.add(name, **TWO_SETS, **section(**selector), dropout=True)
    workshop.repeat("probe-yes-again", "probe-yes")
    add_variants(workshop)
    add_defaults(workshop)
    add_strategies(workshop, 1)
    add_deaths(workshop)
    add_resumes(workshop)
    with earlier_files.judge() as address:
        earlier_files.add_earlier(workshop, address)
        workshop.start(1)
    return workshop


def readme_block(language: str, containing: str) -> str:
    blocks = re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (found,) = [block for block in blocks if containing in block]
    return found


def add_newcomer(workshop: Any) -> None:
    """A run of the README's component and section, and the folder of somebody who starts it with the command line."""
    folder = workshop.root.parent / "newcomer"
    folder.mkdir()
    (folder / "near_loss.py").write_text(readme_block("python", "near_loss"))
    section = yaml.safe_load(readme_block("yaml", "plugins: [near_loss.py]"))["dataflex"]
    whole = section | {"plugins": [str(folder / "near_loss.py")]}
    run = {**TWO_SETS, "gradient_accumulation_steps": 2, "max_steps": 40, "save_strategy": "steps", "save_steps": 3}
    workshop.add("newcomer", dropout=True, dataflex=whole, **run)
    args = tiny.arguments(workshop.dropout_model, workshop.data, folder / "cut", **run, dataflex=section)
    (folder / "run.yaml").write_text(yaml.safe_dump(args))
    (folder / "by_loss.py").write_text(readme_block("python", "by_loss"))
    mixing = yaml.safe_load(readme_block("yaml", "plugins: [by_loss.py]"))["dataflex"]
    workshop.add("readme-mixer", **TWO_SETS, dataflex=mixing | {"plugins": [str(folder / "by_loss.py")]})


def add_variants(workshop: Any) -> None:
    """Runs with one of LLaMA-Factory's own settings each, to see that it keeps its meaning."""
    mixed = section(mix={"method": "uniform"})
    workshop.add("packed", **TWO_SETS, **mixed, packing=True)
    workshop.add("pretraining", **{**PT, "dataset": "texts,pages"}, **section(select={"method": "loss"}))
    grouped = section(select={"method": "random"})
    workshop.add("grouped", **TWO_SETS, **grouped, train_sampling_strategy="group_by_length", max_steps=13)
    workshop.add("held-out", **TWO_SETS, **mixed, val_size=0.25, eval_strategy="steps", eval_steps=4)
    passes = {"max_steps": -1, "num_train_epochs": 2.0, "per_device_train_batch_size": 8, "save_strategy": "epoch"}
    workshop.add("passes", dataflex={"select": {"method": "full"}}, **passes)
    cycles = {"warmup_steps": 1, "update_steps": 2, "updates": 2, "select": {"method": "random"}}
    workshop.add("cycles", dataflex=cycles, max_steps=-1, num_train_epochs=2.0)
    flat = {"train_type": "dynamic_select", "component_name": "loss", "warmup_step": 1, "update_step": 3}
    workshop.add("flat-keys", **TWO_SETS, **flat, update_times=-1)
    workshop.add("native-keys", **TWO_SETS, **section(select={"method": "loss"}))
    workshop.add("sample-means", dataflex={"weight": {"method": "uniform", "normalization": "sample"}}, max_steps=2)
    further = workshop.root.parent / "further-ends"
    shutil.copytree(workshop.model, further)
    tokenizer = AutoTokenizer.from_pretrained(further)
    tokenizer.add_special_tokens({"extra_special_tokens": ["red", "blue", "</s>"]})
    tokenizer.save_pretrained(further)
    workshop.add("further-ends", **section(select={"method": "loss"}), model_name_or_path=str(further), max_steps=2)


def chained(processes: int, **last: Any) -> dict[str, Any]:
    """A run of 8 steps whose filter decides in rounds 1 and 3, and which is saved inside round 2."""
    select = [{"method": "el2n", "keep": 0.5, "every": 2}, {"method": "grand", **last}]
    parts = {"warmup_steps": 1, "update_steps": 2, "select": select}
    run = {**TWO_SETS, "per_device_train_batch_size": 4 // processes, "save_strategy": "steps", "save_steps": 4}
    return {**run, "dataflex": parts}


def add_chains(workshop: Any, processes: int) -> None:
    workshop.add(f"chain-whole-{processes}", **chained(processes))
    for name, last in (("chain", {}), ("chain-limited", {"max_overhead": 0.9})):
        run = chained(processes, **last)
        workshop.add(f"{name}-cut-{processes}", stop_at=5, **run)
        workshop.add(f"{name}-resumed-{processes}", into=f"{name}-cut-{processes}", **run)


def scored(processes: int) -> dict[str, Any]:
    """A run of 8 steps whose selectors read texts, the losses of steps, and the samples trained last."""
    select = [
        {"method": "dsir", "validation": ["held"], "min_words": 2, "keep": 0.8, "every": 2},
        {"method": "s2l", "clusters": 3, "points": 2, "within": "domain", "keep": 0.7},
        {"method": "uds", "alpha": 1.0, "memory": 10, "within": "domain"},
    ]
    run = {**TWO_SETS, "per_device_train_batch_size": 4 // processes, "save_strategy": "steps", "save_steps": 4}
    return {**run, "dataflex": {"warmup_steps": 1, "update_steps": 2, "select": select}}


def walking(processes: int) -> dict[str, Any]:
    """A run of 128 samples along passes of 80, each in three sweeps by the loss; the second one begins in round 2."""
    order = {"method": "fold", "by": "loss", "layers": 3, "scope": "run", "passes": "new", "jit": 4}
    run = {**TWO_SETS, **section(order=order), "save_strategy": "steps", "save_steps": 3}
    return {**run, "per_device_train_batch_size": 8 // processes, "gradient_accumulation_steps": 2}


def add_walks(workshop: Any, processes: int) -> None:
    workshop.add(f"walk-whole-{processes}", **walking(processes))
    if processes == 2:
        workshop.add("walk-cut-2", stop_at=5, **walking(2))
        workshop.add("walk-again-2", stop_at=5, **walking(2))
        workshop.add("walk-resumed-2", into="walk-again-2", **walking(2))


EVALUATED = {"eval_dataset": "held", "eval_strategy": "steps", "eval_steps": 2}
DEATHS = 20
MOMENTS = 45
"""A start is killed at one of its first so many moments, which are about three steps."""


def add_strategies(workshop: Any, processes: int) -> None:
    """Runs of 80 samples in steps of 8, so of 10 steps a pass; a round begins with the last step of the first one."""
    run = {**TWO_SETS, "per_device_train_batch_size": 8 // processes, "eval_dataset": "held"}
    run["dataflex"] = {"update_steps": 3, "mix": {"method": "uniform"}}
    epochs = {"eval_strategy": "epoch", "save_strategy": "epoch", "logging_strategy": "epoch"}
    two, more = {"max_steps": -1, "num_train_epochs": 2.0}, {"max_steps": 13}
    workshop.add(f"epochs-{processes}", **run, **epochs, **two)
    workshop.add(f"epochs-logged-{processes}", **run, **two)
    if processes == 1:
        workshop.add("epochs-cut", **run, **epochs, **more)
        workshop.add("epochs-delay", **run, **{**epochs, "save_strategy": "no"}, eval_delay=1.5, **two)
        cadence = {"save_strategy": "steps", "save_steps": 3, "logging_steps": 4, "max_steps": 9}
        workshop.add("steps", **{**run, **EVALUATED, **cadence})


def add_deaths(workshop: Any) -> None:
    """One run killed at twenty random moments, one after another, and the same run never killed."""
    run = {**resumable("composed"), **EVALUATED, "save_steps": 1, "save_total_limit": 1, "max_steps": 24}
    workshop.add("deaths-whole", **run)
    for number, moment in enumerate(random.Random(0).choices(range(1, MOMENTS), k=DEATHS)):
        workshop.add(f"deaths-{number}", die_at=moment, into="deaths", **run)
    workshop.add("deaths-end", into="deaths", **run)


def add_resumes(workshop: Any) -> None:
    """Resumes with other settings, and into another folder."""
    static = {**TWO_SETS, "save_strategy": "steps", "save_steps": 2, "max_steps": 9}
    static["dataflex"] = {"update_steps": 3, "mix": {"method": "static", "proportions": [0.5, 0.5]}}
    workshop.add("changes", stop_at=4, **static)
    workshop.add("changes-whole", **static)
    other = {"update_steps": 3, "mix": {"method": "static", "proportions": [1.0, 0.0]}}
    changed = {"learning_rate": 0.5, "weight_decay": 0.5, "seed": 99, "save_steps": 5, "logging_steps": 2}
    workshop.add("changes-resumed", into="changes", **{**static, **changed, "dataflex": other})
    workshop.add("changes-method", stop_at=3, **{**static, "save_steps": 3})
    method = {"update_steps": 3, "mix": {"method": "uniform"}, "select": {"method": "loss"}}
    workshop.add("changes-method-resumed", into="changes-method", **{**static, "dataflex": method})
    plain = {**static, "dataflex": {"weight": {"method": "uniform"}}, "learning_rate": 0.5, "weight_decay": 0.5}
    workshop.add("weight", stop_at=3, **{**plain, "learning_rate": 0.01, "weight_decay": 0.0})
    workshop.add("weight-resumed", into="weight", **plain)
    workshop.add("elsewhere", resume_from_checkpoint=str(workshop.root / "changes-whole" / "checkpoint-4"), **static)
    workshop.add("only-model", stop_at=3, save_only_model=True, **static)
    workshop.add("only-model-resumed", into="only-model", save_only_model=True, **static)
    patient = {**static, **EVALUATED, "eval_steps": 1, "save_steps": 1, "learning_rate": 0.0, "early_stopping_steps": 3}
    patient |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    workshop.add("patient-whole", **patient)
    workshop.add("patient", stop_at=3, **patient)
    workshop.add("patient-resumed", into="patient", **patient)
    workshop.add("again", stop_at=3, **static)
    workshop.add("again-new", stop_at=1, overwrite_output_dir=True, into="again", **{**static, "learning_rate": 0.02})
    workshop.add("again-end", into="again", **{**static, "learning_rate": 0.02})
    workshop.add("again-whole", **{**static, "learning_rate": 0.02})


def add_defaults(workshop: Any) -> None:
    """Runs whose section names nothing but a method."""
    less = {"method": "less", "validation": "held", "preconditioner": "none", "proj_dim": 64}
    workshop.add("default-less", dataflex={"select": less})
    workshop.add("default-odm", **TWO_SETS, dataflex={"mix": {"method": "odm"}})
    workshop.add("default-ado", **TWO_SETS, dataflex={"mix": {"method": "ado"}}, max_steps=4)


def test_a_method_alone_decides_several_times(runs: Any) -> None:
    less = runs.rounds("default-less")
    assert [line["steps"] for line in less] == [2, 2, 2, 2]
    for line in less:
        assert line["components"] == {"select": "less"}
        assert line["candidates"] == {"pool": 48}
        assert line["cost"]["samples"] >= 48 + 12
        assert line["size"] <= 48 / 4
    first, *others = runs.rounds("default-odm")
    assert len(others) == 7
    assert first["undecided"]["mix"].startswith("exploration keeps the shares equal")
    assert first["components"] == {}
    assert others[-1]["components"] == {"mix": "odm"}
    assert others[-1]["proportions"]["alpha"] != others[-1]["proportions"]["beta"]


def test_a_method_that_cannot_act_says_so_on_record(runs: Any) -> None:
    summary = json.loads((runs.root / "default-ado" / "dataflex" / "summary.json").read_text())
    (note,) = summary["notes"]
    assert note.startswith("mix ado: laws are first fitted after start_step (1000) steps")
    for line in runs.rounds("default-ado"):
        assert line["undecided"] == {"mix": "there are no laws yet, the shares are the prior"}
    summary = json.loads((runs.root / "default-less" / "dataflex" / "summary.json").read_text())
    assert "notes" not in summary


@pytest.mark.parametrize("name", earlier.FILES)
def test_the_examples_of_the_earlier_release_train(runs: Any, name: str) -> None:
    run, keys = f"earlier-{name.replace('/', '-')}", earlier.shortened(earlier.FILES[name])
    trace = runs.trace(run)
    updates = max(keys.get("update_times", 2), 2)
    assert [entry["step"] for entry in trace["history"] if "loss" in entry] == list(range(1, 2 + 2 * updates))
    family, _, method = name.partition("/")
    lines = runs.rounds(run)
    assert [line["steps"] for line in lines] == ([] if family == "weighters" else [1, *[2] * updates])
    if family == "selectors":
        assert all(line["components"] == {"select": method} for line in lines[1:] if not line.get("undecided"))


@pytest.mark.parametrize(("ours", "plain"), [("no-section-lora", "sft-lora-1"), ("no-section-pt", "pt-full-1")])
def test_without_a_section_the_run_is_llamafactorys(runs: Any, ours: str, plain: str) -> None:
    assert runs.trace(ours)["weights"] == runs.trace(f"{plain}-plain-1")["weights"]
    assert not (runs.root / ours / "dataflex").exists()


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("case", UNIFORM_CASES)
def test_uniform_weights_are_plain_training(runs: Any, case: str, processes: int) -> None:
    plain = runs.trace(f"{case}-plain-{processes}")
    ours = runs.trace(f"{case}-uniform-{processes}")
    assert len(plain["losses"]) >= 2
    assert ours["losses"] == pytest.approx(plain["losses"], abs=1e-6)
    assert not runs.rounds(f"{case}-uniform-{processes}")  # the data path is LLaMA-Factory's own


def test_full_in_order_is_llamafactory_without_shuffling(runs: Any) -> None:
    assert runs.trace("sequential-full")["weights"] == runs.trace("sequential-plain")["weights"]
    assert len(runs.rounds("sequential-full")) == 3


def trained(runs: Any, name: str, processes: int) -> list[tuple[int, list[int]]]:
    """Return (step, indices) of every micro-batch of the whole group, in training order."""
    per_rank = [runs.trace(name, rank)["micro_batches"] for rank in range(processes)]
    assert len({len(batches) for batches in per_rank}) == 1
    return [(step, indices) for parts in zip(*per_rank, strict=True) for step, indices in parts]


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_rounds_train_exactly_their_plans(runs: Any, accumulation: int, workers: int, processes: int) -> None:
    name = f"boundary-{accumulation}-{workers}-{processes}"
    global_batch = 2 * accumulation * processes
    batches = trained(runs, name, processes)
    for line in runs.rounds(name):
        planned = plan_table(runs.root / name, line["round"]).column("index").to_pylist()
        assert len(planned) == line["size"] == line["steps"] * global_batch
        steps = range(line["start_step"], line["start_step"] + line["steps"])
        assert [index for step, indices in batches if step in steps for index in indices] == planned
    assert {step for step, _ in batches} == set(range(8))
    for rank in range(processes):
        decisions = runs.trace(name, rank)["decisions"]
        assert decisions == [[number, start, start] for number, start in enumerate([0, 1, 4, 7])]


@pytest.mark.parametrize(
    ("family", "processes"),
    [(family, 1) for family in FAMILIES] + [(family, 2) for family in ("select", "mix", "order", "weight")],
)
def test_killed_and_resumed_is_never_killed(runs: Any, family: str, processes: int) -> None:
    whole = f"{family}-whole-{processes}"
    resumed = f"{family}-cut-{processes}"
    first, second = runs.trace(whole), runs.trace(resumed)
    assert second["error"] is None
    assert second["weights"] == first["weights"]
    assert second["losses"] == first["losses"]
    if set(FAMILIES[family]) != {"weight"}:
        assert [line["round"] for line in runs.rounds(resumed)] == [0, 1, 2, 3]
        assert runs.plan_digests(resumed) == runs.plan_digests(whole)
        trained_again = [step for step, _ in second["micro_batches"]]
        assert min(trained_again) == 3  # it went on at the checkpoint, not at the start


def test_two_processes_resumed_by_one(runs: Any) -> None:
    assert runs.plan_digests("elastic-resumed") == runs.plan_digests("elastic-whole")
    whole = load_file(runs.root / "elastic-whole" / "adapter_model.safetensors")
    resumed = load_file(runs.root / "elastic-resumed" / "adapter_model.safetensors")
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, rtol=0, atol=1e-5)


def test_a_walk_is_the_same_on_one_process_on_two_and_after_a_resume_on_another_number(runs: Any) -> None:
    digests = runs.plan_digests("walk-whole-1")
    assert len(digests) == 4
    assert runs.plan_digests("walk-whole-2") == digests
    assert runs.plan_digests("walk-elastic") == digests
    assert runs.plan_digests("walk-again-2") == digests
    assert runs.trace("walk-again-2")["weights"] == runs.trace("walk-whole-2")["weights"]
    plans = [plan_table(runs.root / "walk-elastic", number).column("index").to_numpy() for number in range(4)]
    assert np.array_equal(np.sort(np.concatenate(plans)[:80]), np.arange(80))
    measured = [line["cost"]["samples"] for line in runs.rounds("walk-whole-1")]
    assert [count > 0 for count in measured] == [False, True, True, False]  # when a pass is put in order, and only then
    assert measured[2] - measured[1] == 16  # those of the warm-up round, which are not measured in the first pass


def test_one_process_and_two_make_the_same_plans(runs: Any) -> None:
    assert runs.plan_digests("one-or-two-1") == runs.plan_digests("one-or-two-2")
    assert plan_table(runs.root / "one-or-two-1", 1).column("score").null_count == 0


def filters_of(runs: Any, name: str) -> list[tuple[Any, ...]]:
    """Return each decision of a run's filter: round, counts, the samples it left and all that came to it."""
    record = read_run(runs.root / name)
    found = []
    for each in record.rounds:
        for one, table in record.filtered(each):
            indices = record.filters.indices(table).tolist()
            left, out = sorted(indices[: one.number_kept]), sorted(indices[one.number_kept :])
            found.append((each.round, one.method, one.candidates, one.kept, left, out))
    return found


def test_a_chain_resumed_and_on_two_processes_decides_the_same(runs: Any) -> None:
    expected, filters = runs.plan_digests("chain-whole-1"), filters_of(runs, "chain-whole-1")
    assert [(number, method, kept) for number, method, _, kept, _, _ in filters] == [
        (1, "el2n", {"pool": 40}), (3, "el2n", {"pool": 40})
    ]  # fmt: skip
    assert filters[0][4] != filters[1][4]  # the model has changed in between
    standing = [line["standing"] for line in runs.rounds("chain-whole-1")]
    assert standing == [[], [], ["select.0"], [], ["select.0"]]
    for name in ("chain-cut-1", "chain-whole-2", "chain-cut-2"):
        assert runs.plan_digests(name) == expected, name
        assert filters_of(runs, name) == filters, name
        assert [line["standing"] for line in runs.rounds(name)] == standing
    for processes in (1, 2):
        whole, resumed = runs.trace(f"chain-whole-{processes}"), runs.trace(f"chain-cut-{processes}")
        assert min(step for step, _ in resumed["micro_batches"]) == 4  # inside a round
        assert resumed["weights"] == whole["weights"]
    by_round = {number: set(left) for number, _, _, _, left, _ in filters}
    for number, since in ((1, 1), (2, 1), (3, 3), (4, 3)):
        assert set(plan_table(runs.root / "chain-whole-1", number).column("index").to_pylist()) <= by_round[since]


def test_scores_of_texts_and_of_steps_are_the_same_on_two_processes_and_after_a_resume(runs: Any) -> None:
    assert min(step for step, _ in runs.trace("scored-cut")["micro_batches"]) == 4
    assert runs.plan_digests("scored-cut") == runs.plan_digests("scored-whole")
    assert filters_of(runs, "scored-cut") == filters_of(runs, "scored-whole")
    counts = np.zeros(2)
    for line in runs.rounds("scored-whole")[1:]:
        assert list(line["candidates"]) == ["alpha", "beta"]
        counts += [line["domains"][name] for name in ("alpha", "beta")]
    assert abs(counts[0] - counts.sum() * 48 / 80) < 1


@pytest.mark.parametrize("processes", [1, 2])
def test_a_chain_under_an_overhead_limit_is_one_on_all_processes(runs: Any, processes: int) -> None:
    name = f"chain-limited-cut-{processes}"
    lines = runs.rounds(name)
    assert [line["round"] for line in lines] == [0, 1, 2, 3, 4]
    assert all("scored" in line["budget"] for line in lines[1:])
    assert lines[1]["budget"]["scored"] > 0
    by_round = {number: set(left) for number, _, _, _, left, _ in filters_of(runs, name)}
    assert list(by_round) == [1, 3]
    batches = trained(runs, name, processes)
    for line in lines:
        planned = plan_table(runs.root / name, line["round"]).column("index").to_pylist()
        steps = range(max(line["start_step"], 4), line["start_step"] + line["steps"])
        last = planned[-4 * len(steps) :] if steps else []
        assert [index for step, indices in batches if step in steps for index in indices] == last
        if line["round"]:
            assert set(planned) <= by_round[1 if line["round"] < 3 else 3]
    limit = json.loads((runs.root / name / "dataflex" / "summary.json").read_text())["overhead_limit"]
    assert (limit["max_overhead"], limit["decisions"]) == (0.9, 4)


def test_a_chain_is_explained(runs: Any, capsys: Any) -> None:
    name = "chain-cut-2"
    filters = filters_of(runs, name)
    _, _, _, kept, left, out = filters[0]
    assert main(["explain", str(runs.root / name), "--no-text", "--json", "--index", str(left[0]), str(out[0])]) == 0
    samples = json.loads(capsys.readouterr().out)["samples"]
    for sample, is_kept in zip(samples, (True, False), strict=True):
        first, second = sample["filtered"]
        assert (first["round"], first["until"], first["kept"], first["candidates"]) == (1, 2, is_kept, 80)
        assert (first["rank"] <= kept["pool"]) == is_kept
        assert (second["round"], second["until"]) == (3, 4)
        assert is_kept or not {place["round"] for place in sample["placements"]} & {1, 2}
    assert main(["explain", str(runs.root / name), "--no-text", "--top", "3", "--round", "2"]) == 0
    assert (
        "select.0 el2n left 40 of 80 samples in round 1, and this result holds\nselect.1 grand chose 8 of 40 samples\n"
        in (capsys.readouterr().out)
    )


def test_a_probe_leaves_no_trace(runs: Any) -> None:
    looking, blind = runs.trace("probe-yes"), runs.trace("probe-no")
    assert looking["weights"] == blind["weights"]
    assert looking["rng"] == blind["rng"]
    assert runs.rounds("probe-yes")[1]["cost"]["samples"] > 0 == runs.rounds("probe-no")[1]["cost"]["samples"]


def test_a_run_is_repeated_from_its_record(runs: Any) -> None:
    first, again = runs.trace("probe-yes"), runs.trace("probe-yes-again")
    assert again["weights"] == first["weights"]
    assert again["losses"] == first["losses"]
    assert runs.plan_digests("probe-yes-again") == runs.plan_digests("probe-yes")
    records = [runs.root / name / "dataflex" for name in ("probe-yes", "probe-yes-again")]
    configs = [yaml.safe_load((record / "config.yaml").read_text()) for record in records]
    assert configs[1].pop("output_dir") != configs[0].pop("output_dir")
    assert configs[1] == configs[0]
    (plugin,) = configs[0]["dataflex"]["plugins"]
    assert (records[0] / plugin).read_bytes() == (records[1] / plugin).read_bytes() == Path(PLUGIN).read_bytes()


@pytest.mark.parametrize("name", ["diverged-steps", "diverged-scores"])
def test_all_processes_stop_where_training_diverges(runs: Any, name: str) -> None:
    errors = [json.loads((runs.root / name / f"trace-{rank}.json").read_text())["error"] for rank in (0, 1)]
    assert errors[0].startswith("DivergenceError: ")
    assert "has training diverged?" in errors[0]
    assert errors[0] == errors[1]
    assert not (runs.root / name / "dataflex" / "summary.json").exists()


def test_domain_losses_are_logged_and_do_not_depend_on_processes(runs: Any) -> None:
    one, two = (runs.trace(name)["history"] for name in ("one-or-two-1", "one-or-two-2"))
    keys = {key for entry in one for key in entry if key.startswith("dataflex/")}
    assert {"dataflex/loss/alpha", "dataflex/loss/beta", "dataflex/round", "dataflex/proportion/alpha"} <= keys
    compared = 0
    for first, second in zip(one, two, strict=True):
        for key in ("dataflex/loss/alpha", "dataflex/loss/beta"):
            assert (key in first) == (key in second)
            if key in first:
                assert first[key] == pytest.approx(second[key], abs=1e-4)
                compared += 1
    assert compared > 8


def test_packing_and_pretraining_select_and_mix(runs: Any) -> None:
    for name in ("packed", "pretraining"):
        for line in runs.rounds(name):
            assert sum(line["domains"].values()) == line["size"] == 2 * line["steps"]
    assert runs.rounds("packed")[1]["domains"] == {"alpha": 3, "beta": 3}


def test_length_grouping_stays_inside_a_plan(runs: Any) -> None:
    batches = [indices for _, indices in trained(runs, "grouped", 1)]
    planned = [index for line in runs.rounds("grouped") for index in plan_of(runs, "grouped", line["round"])]
    assert [index for indices in batches for index in indices] == planned


def plan_of(runs: Any, name: str, number: int) -> list[int]:
    return plan_table(runs.root / name, number).column("index").to_pylist()


def test_a_fraction_is_held_out_of_every_data_set(runs: Any) -> None:
    history = runs.trace("held-out")["history"]
    assert [entry["step"] for entry in history if "eval_loss" in entry] == [4, 8]
    highest = max(index for line in runs.rounds("held-out") for index in plan_of(runs, "held-out", line["round"]))
    assert highest < 36 + 24  # a quarter of 48 and of 32 samples is not in the pool


def test_full_trains_every_sample_once_a_pass_and_saves_at_its_end(runs: Any) -> None:
    assert [line["steps"] for line in runs.rounds("passes")] == [6, 6]
    for number in (0, 1):
        assert sorted(plan_of(runs, "passes", number)) == list(range(48))
    assert plan_of(runs, "passes", 0) != plan_of(runs, "passes", 1)
    assert sorted(path.name for path in (runs.root / "passes").glob("checkpoint-*")) == [
        "checkpoint-12",
        "checkpoint-6",
    ]


def test_epochs_repeat_the_cycle(runs: Any) -> None:
    lines = runs.rounds("cycles")
    assert [(line["start_step"], line["steps"], line.get("warmup", False)) for line in lines] == [
        (0, 1, True), (1, 2, False), (3, 2, False), (5, 1, True), (6, 2, False), (8, 2, False),
    ]  # fmt: skip


def test_flat_keys_are_the_native_run(runs: Any) -> None:
    assert runs.plan_digests("flat-keys") == runs.plan_digests("native-keys")
    assert runs.trace("flat-keys")["weights"] == runs.trace("native-keys")["weights"]


def test_sample_means_are_another_normalisation(runs: Any) -> None:
    assert runs.trace("sample-means")["losses"] != pytest.approx(
        runs.trace("sft-lora-1-plain-1")["losses"][:2], abs=1e-4
    )


def test_responses_end_where_llamafactorys_own_generation_ends(runs: Any) -> None:
    """The trainer of LLaMA-Factory's workflow is given the tokens; the probe of a run has the same ones, each once."""
    tokenizer = AutoTokenizer.from_pretrained(runs.model)
    assert runs.trace("further-ends")["eos"] == tokenizer.convert_tokens_to_ids(["</s>", "red", "blue"])


def test_the_record_is_complete(runs: Any) -> None:
    folder = runs.root / "composed-whole-1" / "dataflex"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["rounds"] == len(runs.rounds("composed-whole-1")) == 4
    assert summary["overhead_fraction"] == pytest.approx(
        summary["decision_seconds"] / summary["train_seconds"], rel=0.01
    )
    assert summary["tokens"] > 0
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["dataflex"]["select"]["focus_weight"] == 5.0  # defaults are filled in
    assert config["lora_rank"] == 4
    (start,) = json.loads((folder / "environment.json").read_text())["starts"]
    assert {"python", "dataflex", "llamafactory", "torch"} <= set(start["versions"])
    assert start["processes"] == 1
    assert start["started"] <= start["finished"]
    (alpha,) = start["datasets"]["alpha"]["files"]
    data = runs.data / "alpha.json"
    assert alpha == str(data)
    assert start["datasets"]["alpha"]["files"][alpha] == {
        "bytes": data.stat().st_size, "sha256": hashlib.sha256(data.read_bytes()).hexdigest(),
    }  # fmt: skip
    weights = start["model"]["files"]["model.safetensors"]
    assert weights["bytes"] == (runs.dropout_model / "model.safetensors").stat().st_size
    assert len(start["fingerprints"]["dataset"]) == 64
    line = runs.rounds("composed-whole-1")[1]
    assert line["components"] == {"select": "loss", "mix": "proportional", "order": "sort", "weight": "loss"}
    assert line["cost"]["samples"] == 80
    assert line["cost"]["tokens"] > 80
    card = (folder.parent / "README.md").read_text()
    assert card.startswith("---\n"), "the Trainer's card, with its metadata"
    assert "`select: loss`, `mix: proportional`, `order: sort`, `weight: loss`" in card
    assert hashlib.sha256((folder / "config.yaml").read_bytes()).hexdigest() in card
    assert f"| tokens trained on | {summary['tokens']:,} |" in card
    assert "dataflex: begin" not in (runs.root / "no-section-lora" / "README.md").read_text()


def measured(runs: Any, name: str) -> list[tuple[int, float]]:
    """Return step and loss of every evaluation on record."""
    lines = (runs.root / name / "dataflex" / "evaluations.jsonl").read_text().splitlines()
    return [(line["step"], line["token_weighted"]["loss"]) for line in map(json.loads, lines)]


def without_costs(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key != "cost"} for line in lines]


def test_killed_at_twenty_moments_is_never_killed(runs: Any) -> None:
    whole, end = runs.trace("deaths-whole"), runs.trace("deaths")
    died_in = (runs.root / "deaths" / "deaths.txt").read_text().split()
    assert len(died_in) == DEATHS  # none of the starts came to its end
    assert {"save", "replace"} < set(died_in)
    assert len(set(died_in)) > 6
    assert end["error"] is None
    for key in ("weights", "losses", "rng"):
        assert end[key] == whole[key]
    assert without_costs(runs.rounds("deaths")) == without_costs(runs.rounds("deaths-whole"))
    assert measured(runs, "deaths") == measured(runs, "deaths-whole")
    numbers = [line["round"] for line in runs.rounds("deaths")]
    assert [plan_of(runs, "deaths", n) for n in numbers] == [plan_of(runs, "deaths-whole", n) for n in numbers]
    assert [path.name for path in (runs.root / "deaths").glob("*checkpoint-*")] == ["checkpoint-24"]  # a limit of one


@pytest.mark.parametrize("processes", [1, 2])
def test_a_pass_is_logged_evaluated_and_saved_once_at_its_end(runs: Any, processes: int) -> None:
    trace, logged = runs.trace(f"epochs-{processes}"), runs.trace(f"epochs-logged-{processes}")
    assert trace["events"][:-1] == [["evaluate", 10], ["save", 10], ["evaluate", 20], ["save", 20]]
    assert trace["events"][-1] == ["evaluate", 20]  # LLaMA-Factory's own, after training
    losses = {entry["step"]: entry["loss"] for entry in trace["history"] if "loss" in entry}
    each = logged["losses"]
    assert losses == pytest.approx({10: sum(each[:10]) / 10, 20: sum(each[10:]) / 10}, abs=1e-4)
    begun = [entry["step"] for entry in trace["history"] if "dataflex/round" in entry]
    assert begun == [1, 4, 7, 10, 13, 16, 19, 20]  # every round, and with the loss of each pass


def test_the_end_inside_a_pass_is_evaluated_and_saved_once(runs: Any) -> None:
    trace = runs.trace("epochs-cut")
    assert trace["events"] == [["evaluate", 10], ["save", 10], ["evaluate", 13], ["save", 13], ["evaluate", 13]]
    assert [entry["step"] for entry in trace["history"] if "loss" in entry] == [10, 13]
    assert runs.trace("epochs-delay")["events"] == [["evaluate", 20], ["evaluate", 20]]
    steps = [["evaluate", 2], ["save", 3], ["evaluate", 4], ["evaluate", 6], ["save", 6], ["evaluate", 8]]
    trace = runs.trace("steps")
    assert trace["events"] == [*steps, ["evaluate", 9], ["save", 9], ["evaluate", 9]]
    assert [entry["step"] for entry in trace["history"] if "loss" in entry] == [4, 8]


def on_record(runs: Any, name: str, file: str = "config.yaml") -> dict[str, Any]:
    return dict(yaml.safe_load((runs.root / name / "dataflex" / file).read_text()))


def test_other_settings_at_a_resume_do_what_the_record_says(runs: Any) -> None:
    whole, changed = runs.trace("changes-whole"), runs.trace("changes")
    rates = {entry["step"]: entry["learning_rate"] for entry in whole["history"] if "learning_rate" in entry}
    mine = {entry["step"]: entry["learning_rate"] for entry in changed["history"] if "learning_rate" in entry}
    assert mine == {step: rates[step] for step in (1, 2, 3, 4, 6, 8)}  # logging_steps is 2 from step 5 on
    assert sorted(path.name for path in (runs.root / "changes").glob("checkpoint-*")) == [
        "checkpoint-2", "checkpoint-4", "checkpoint-5", "checkpoint-9",
    ]  # fmt: skip
    lines = map(json.loads, (runs.root / "changes" / "dataflex" / "changes.jsonl").read_text().splitlines())
    found = {line["key"]: (line["before"], line["now"], line["step"], line["effect"]) for line in lines}
    here, none = "from this step on", "none, the earlier value stays"
    assert found == {
        "learning_rate": (0.01, 0.5, 4, none),
        "weight_decay": (0.0, 0.5, 4, none),
        "seed": (3, 99, 4, none),
        "save_steps": (2, 5, 4, here),
        "logging_steps": (1, 2, 4, here),
        "dataflex.mix.proportions": ([0.5, 0.5], [1.0, 0.0], 6, here),
    }
    assert [line["domains"] for line in runs.rounds("changes")] == [
        {"alpha": 3, "beta": 3}, {"alpha": 3, "beta": 3}, {"alpha": 6, "beta": 0},
    ]  # fmt: skip
    now, before = on_record(runs, "changes"), on_record(runs, "changes", "config-until-step-4.yaml")
    assert (now["learning_rate"], now["weight_decay"], now["seed"], now["save_steps"]) == (0.01, 0.0, 3, 5)
    assert (before["save_steps"], before["dataflex"]["mix"]["proportions"]) == (2, [0.5, 0.5])


def test_another_method_decides_from_a_rounds_end_on(runs: Any) -> None:
    first, second, _ = runs.rounds("changes-method")
    assert (first["components"], first["start_step"]) == ({"mix": "static"}, 0)
    assert (second["components"], second["start_step"]) == ({"select": "loss", "mix": "uniform"}, 3)
    assert runs.rounds("changes-whole")[0]["plan_sha256"] == first["plan_sha256"]


def test_llamafactorys_own_data_path_keeps_its_rates_too(runs: Any) -> None:
    rates = [entry["learning_rate"] for entry in runs.trace("weight")["history"] if "learning_rate" in entry]
    assert rates == pytest.approx([0.01 * (9 - step) / 9 for step in range(9)])


def test_a_run_in_a_new_folder_has_the_earlier_rounds_on_record(runs: Any) -> None:
    assert runs.trace("elsewhere")["weights"] == runs.trace("changes-whole")["weights"]
    assert runs.plan_digests("elsewhere") == runs.plan_digests("changes-whole")
    about = json.loads((runs.root / "elsewhere" / "dataflex" / "run.json").read_text())
    source = json.loads((runs.root / "changes-whole" / "dataflex" / "run.json").read_text())
    assert about["continues"]["run"] == source["id"] != about["id"]
    assert about["continues"]["step"] == 4


def test_a_run_that_saved_models_only_does_not_go_on(runs: Any) -> None:
    error = json.loads((runs.root / "only-model" / "trace-0.json").read_text())["error"]
    assert "save_only_model: true" in error
    assert "optimizer" in error


def test_early_stopping_counts_on(runs: Any) -> None:
    for name in ("patient-whole", "patient"):
        steps = [step for event, step in runs.trace(name)["events"] if event == "save"]
        assert max(steps) == 4  # nothing is better than at step 1, three times
    assert min(steps) == 4


def test_a_new_run_that_is_killed_goes_on_as_itself(runs: Any) -> None:
    """The earlier run in the folder had a checkpoint, which the new one had not reached when it was killed."""
    assert runs.trace("again")["weights"] == runs.trace("again-whole")["weights"]
    (earlier, other) = sorted((runs.root / "again").glob("dataflex-earlier-*"))
    assert [path.name for path in earlier.glob("checkpoint-*")] == ["checkpoint-2"]
    assert not list(other.glob("checkpoint-*"))


# The command line


def start(folder: Path, *overrides: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "LLAMAFACTORY_VERBOSITY": "WARN", "FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2"}
    command = [sys.executable, "-m", "dataflex", "train", "run.yaml", *overrides]
    return subprocess.Popen(
        command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-4000:]
    return output


def kill(process: subprocess.Popen[str]) -> None:
    """Kill the launcher and its workers, which lead process groups of their own."""
    everyone = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for one in everyone:
        one.kill()
    psutil.wait_procs(everyone)
    process.communicate()


def wait_for_checkpoint(process: subprocess.Popen[str], output: Path, name: str) -> None:
    for _ in range(20000):
        if (output / name / "dataflex_complete.json").exists():
            return
        assert process.poll() is None, process.communicate()[0][-4000:]
        time.sleep(0.01)
    raise AssertionError(f"{name} was not written")


@pytest.fixture
def newcomer(runs: Any) -> Path:
    return runs.root.parent / "newcomer"


def test_a_newcomers_component_survives_a_kill_on_two_processes(runs: Any, newcomer: Path) -> None:
    assert len(readme_block("python", "near_loss").splitlines()) < 40
    process, cut = start(newcomer), newcomer / "cut"
    wait_for_checkpoint(process, cut, "checkpoint-6")
    kill(process)
    assert not (cut / "dataflex" / "summary.json").exists()
    # A checkpoint whose writing was cut off: the newest one by name, without its marker and with half of a file.
    torn = cut / "checkpoint-100"
    shutil.copytree(cut / "checkpoint-6", torn)
    (torn / "dataflex_complete.json").unlink()
    (torn / "optimizer.pt").write_bytes(b"half")

    output = finish(start(newcomer))
    assert f"{torn} is not used" in output
    lines = round_lines(cut)
    assert [line["round"] for line in lines] == list(range(10))
    assert [line["plan_sha256"] for line in lines] == runs.plan_digests("newcomer")
    weights = [(run / "adapter_model.safetensors").read_bytes() for run in (runs.root / "newcomer", cut)]
    assert weights[0] == weights[1]
    assert json.loads((cut / "dataflex" / "summary.json").read_text())["rounds"] == 10


def test_the_mixer_of_the_readme_mixes_by_loss(runs: Any) -> None:
    body = readme_block("python", "by_loss").split("class ")[1]
    assert len(body.strip().splitlines()) <= 10  # its head, its docstring, and eight lines with the empty ones
    runs.trace("readme-mixer")
    rounds = runs.rounds("readme-mixer")
    shares = [[line["proportions"][name] for name in ("alpha", "beta")] for line in rounds]
    assert all(line["components"] == {"mix": "by_loss"} and sum(line["domains"].values()) for line in rounds)
    # Every sample of an untrained model has about the loss of a uniform guess.
    assert shares[0] == pytest.approx([0.5, 0.5], abs=0.05)
    assert len({tuple(share) for share in shares}) == len(shares) > 1


def test_a_failing_worker_is_our_exit_status(newcomer: Path) -> None:
    component = (
        "@register('order', 'failing')\nclass Failing(Order):\n    def arrange(self, ctx, selection):\n        ..."
    )
    text = f"import os\nfrom dataflex import Order, register\n{component}\nif 'LOCAL_RANK' in os.environ:\n    1 / 0\n"
    (newcomer / "failing.py").write_text(text)
    process = start(newcomer, f"output_dir={newcomer / 'failing'}", "dataflex.plugins=[near_loss.py, failing.py]")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 2, output[-4000:]
    assert len(re.findall(r"failing\.py.*ZeroDivisionError", output)) == 1, output
    assert "Traceback" not in output
