"""Gradient selection in LLaMA-Factory's run: two processes under DDP, ZeRO and FSDP2 equal one process.

All trainings happen in two starts, one of two processes and one of one process (see runner.py).
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from records import plan_table

pytestmark = [
    pytest.mark.launch,
    pytest.mark.timeout(1200),  # the first test waits for all trainings
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed"),
]

PLUGIN = str(Path(__file__).with_name("plugin.py"))
NEAR_VALIDATION = str(Path(__file__).parent.parent / "plugins" / "near_validation.py")
WRAPPERS = {
    "ddp": "DistributedDataParallel",
    "zero2": "stage 2",
    "zero3": "stage 3",
    "fsdp2": "FSDPModule",
}
MODES = list(WRAPPERS)


def less(**params: Any) -> dict[str, Any]:
    return {"method": "less", "validation": "held", "proj_dim": 256, **params}


FULL = {"finetuning_type": "full", "learning_rate": 0.002}
TWICE = {"gradient_accumulation_steps": 2}
# name -> (selector, changes to the run, modes of two processes)
METHODS: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "less-lora-adam": (less(), {}, MODES),
    "less-lora-none": (less(preconditioner="none"), TWICE, ["ddp", "fsdp2"]),
    "less-full-adam": (less(proj_dim=1024), {**FULL, **TWICE}, MODES),
    "less-full-none": (less(proj_dim=1024, preconditioner="none"), FULL, ["zero2", "zero3"]),
    "grand": ({"method": "grand", "preconditioner": "adam"}, FULL, ["zero3"]),
    "greats": ({"method": "greats", "validation": "held"}, {}, ["ddp", "zero3"]),
    "nearest": ({"method": "near", "validation": "held", "max_k": 4}, {}, ["zero3", "fsdp2"]),
    "nearest-encoder": (
        {"method": "near", "validation": "held", "max_k": 4, "encoder": "the model"},
        {},
        ["ddp", "zero3", "fsdp2"],
    ),
    "tsds-encoder": ({"method": "tsds", "validation": "held", "encoder": "the model"}, {}, ["ddp"]),
    "rds_plus": ({"method": "rds_plus", "validation": "held,gamma"}, {}, ["ddp"]),
    "diversity": ({"method": "diversity"}, {}, ["ddp"]),
    "icons": ({"method": "icons", "validation": "held,gamma", "proj_dim": 256}, {}, ["ddp"]),
    "cluster_less": (
        {"method": "cluster_less", "validation": "held", "proj_dim": 256, "cluster_size": 8, "representatives": 2},
        {},
        ["ddp"],
    ),
}
# A forward alone leaves FSDP2's parameters gathered there.
GATHERED = {**tiny.FSDP2, "fsdp_config": {**tiny.FSDP2["fsdp_config"], "reshard_after_forward": False}}
# FSDP's own checkpointing, which is active in evaluation mode, too.
WRAPPED = {
    **tiny.FSDP2,
    "fsdp_config": {**tiny.FSDP2["fsdp_config"], "activation_checkpointing": True},
    "disable_gradient_checkpointing": True,
}
METHOD_CASES = [(method, mode) for method, (_, _, modes) in METHODS.items() for mode in modes]

LOOKS = ["losses", "error_norms", "embeddings", "norms", "gradients", "similarities", "products", "generate"]
DROPOUT = {"lora_dropout": 0.1, "dropout": True}
NEUTRAL: dict[str, tuple[dict[str, Any], list[str]]] = {
    "lora": ({**DROPOUT, **TWICE}, MODES),
    "full": ({**FULL, "dropout": True}, ["zero3", "fsdp2"]),
}
NEUTRAL_CASES = [(kind, mode) for kind, (_, modes) in NEUTRAL.items() for mode in ["one", *modes]]

RESUMED = {
    "one": DROPOUT,
    "ddp": DROPOUT,
    "zero3": DROPOUT,
    "fsdp2": {**FULL, "dropout": True},  # LLaMA-Factory alone does not take an adapter back there
}
# name -> saved after this step, killed before that one, where; rounds start at 0, 2, 5
CUTS = {"middle": (3, 5, ["one", "zero3", "fsdp2"]), "boundary": (5, 6, ["one", "ddp"])}
NEAR = ["one", "ddp"]
LISTED = ["near", "tsds"]
TILTED = ["one", "ddp", "zero3", "fsdp2"]
UNTRAINED = 4
ANCHORED = ["ddp", "zero3", "fsdp2"]
CUT_CASES = [(cut, mode) for cut, (_, _, modes) in CUTS.items() for mode in modes]


def section(select: dict[str, Any], **parts: Any) -> dict[str, Any]:
    base = {"warmup_steps": 2, "update_steps": 3, "probe_batch_tokens": 800, "select": select, "plugins": [PLUGIN]}
    return {"dataflex": {**base, **parts}}


def add_methods(workshop: Any, settings: dict[str, dict[str, Any]]) -> None:
    for method, (select, changes, modes) in METHODS.items():
        if "encoder" in select:
            select = {**select, "encoder": str(workshop.model)}
        for mode in settings:
            if mode in ["one", *modes]:
                workshop.add(f"{method}-{mode}", **settings[mode], **section(select), **changes)


def add_neutral(workshop: Any, settings: dict[str, dict[str, Any]]) -> None:
    for kind, (changes, modes) in NEUTRAL.items():
        for mode in settings:
            if mode in ["one", *modes]:
                for name, look in (("blind", []), ("looking", LOOKS)):
                    select = {"method": "test_blind", "look": look}
                    workshop.add(f"{name}-{kind}-{mode}", **settings[mode], **section(select), **changes)


def add_resumed(workshop: Any, settings: dict[str, dict[str, Any]]) -> None:
    for mode in settings:
        if mode in RESUMED:
            run = {**settings[mode], **section(less()), **RESUMED[mode]}
            workshop.add(f"whole-{mode}", **run)
            for cut, (saved, stop, modes) in CUTS.items():
                if mode in modes:
                    run |= {"save_strategy": "steps", "save_steps": saved}
                    workshop.add(f"{cut}-cut-{mode}", stop_at=stop, **run)
                    workshop.add(f"{cut}-resumed-{mode}", into=f"{cut}-cut-{mode}", **run)


def add_kept(workshop: Any, settings: dict[str, dict[str, Any]]) -> None:
    if "fsdp2" in settings:
        settings = {**settings, "gathered": {**settings["fsdp2"], **GATHERED}}
        settings["wrapped"] = {**settings["fsdp2"], **WRAPPED}
    for mode in settings:
        select = {"method": "test_keep", "file": str(workshop.root / f"kept-{mode}.pt")}
        run = {**settings[mode], **section(select, warmup_steps=0), **FULL, "max_steps": 1}
        workshop.add(f"kept-{mode}", **run)


def near(**params: Any) -> dict[str, Any]:
    """Return the changes of a run with the plug-in written from the documentation; shares change with every round."""
    select = {"method": "near_validation", "validation": "tagged", "subtask_column": "task", **params}
    points = [{"step": 0, "proportions": [0.6, 0.2, 0.2]}, {"step": 6, "proportions": [0.2, 0.2, 0.6]}]
    parts = {"plugins": [NEAR_VALIDATION], "mix": {"method": "schedule", "points": points}}
    return {"dataset": "alpha,beta,partly", **section(select, **parts)}


def add_near(workshop: Any, settings: dict[str, dict[str, Any]]) -> None:
    for mode in settings:
        if mode in NEAR:
            run = {**settings[mode], **near()}
            saving = {"save_strategy": "steps", "save_steps": 3}
            workshop.add(f"near-{mode}", **run)
            workshop.add(f"near-cut-{mode}", stop_at=5, **run, **saving)
            workshop.add(f"near-resumed-{mode}", into=f"near-cut-{mode}", **run, **saving)
            workshop.add(f"near-limited-{mode}", **{**settings[mode], **near(max_overhead=0.5)})


def add_tilted(workshop: Any, settings: dict[str, dict[str, Any]]) -> None:
    weight = {"method": "test_tilt", "validation": "held"}
    stored = {**weight, "encoder": str(workshop.model)}
    for mode in settings:
        if mode in TILTED:
            workshop.add(f"tilted-{mode}", **{**settings[mode], **section({"method": "random"}, weight=weight)})
    if "one" in settings:
        parts = {"warmup_steps": 1, "plugins": [PLUGIN], "weight": stored}
        workshop.add("tilted-alone", **{**settings["one"], "dataflex": parts})


def add_anchored(workshop: Any, settings: dict[str, dict[str, Any]]) -> None:
    """Runs that weigh samples by their hidden states in the step's own forward, or in the one before its backwards."""
    if "one" in settings:
        settings = {**settings, "twice": {**settings["one"], "per_device_train_batch_size": 2, **TWICE}}
    anchors = {"validation": "held", "anchors": 8, "center_samples": 16, "anchor_every": 2}
    weight = [{"method": "adapt", **anchors}, {"method": "joint_update_aware", "layer": 1, "every": 2, **anchors}]
    for mode in settings:
        if mode in ["one", "twice", *ANCHORED]:
            run = {**settings[mode], **FULL, "max_steps": 4}
            workshop.add(f"anchored-{mode}", dataflex={"warmup_steps": 1, "weight": weight}, **run)


def add_partly_trained_data(folder: Path) -> None:
    """Add a data set with samples whose prompts are so long that no token of the answer is left to train on."""
    rows = tiny.rows_of(folder, "gamma")
    long = {"instruction": "the cat sees " * 1000, "input": "", "output": "the dog likes " * 13}
    tiny.add_data(folder, "partly", [*rows[:3], *[long] * UNTRAINED, *rows[3:]])


def add_tagged_data(folder: Path) -> None:
    """Add two validation sets whose rows have a task each."""
    for name, source, tasks in (("tagged", "held", ["sums", "rhymes", "sums"]), ("labelled", "gamma", ["sums"])):
        rows = tiny.rows_of(folder, source)
        tagged = [{**row, "task": tasks[number % len(tasks)]} for number, row in enumerate(rows)]
        tiny.add_data(folder, name, tagged)


def add_listed(workshop: Any, settings: dict[str, dict[str, Any]]) -> None:
    for method in LISTED:
        select = {"method": method, "validation": "held", "encoder": str(workshop.model)}
        saving = {"save_strategy": "steps", "save_steps": 5}
        run = {**settings["one"], **section(select, warmup_steps=0, update_steps=2)}
        workshop.add(f"listed-{method}", **run)
        workshop.add(f"listed-cut-{method}", stop_at=6, **run, **saving)
        workshop.add(f"listed-resumed-{method}", into=f"listed-cut-{method}", **run, **saving)


@pytest.fixture(scope="module")
def runs(workshop: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("deepspeed")
    add_tagged_data(workshop.data)
    add_partly_trained_data(workshop.data)
    modes = {"ddp": {}, "zero2": tiny.zero(folder, 2), "zero3": tiny.zero(folder, 3), "fsdp2": tiny.FSDP2}
    # An adapter of each kind of layer: ZeRO-3 takes its time for every module.
    base = {"dataset": "alpha,beta", "max_steps": 7, "lora_target": "q_proj,down_proj"}
    two = {mode: {**base, **changes} for mode, changes in modes.items()}
    one = {"one": {**base, "per_device_train_batch_size": 4}}
    for settings, processes in ((two, 2), (one, 1)):
        add_methods(workshop, settings)
        add_neutral(workshop, settings)
        add_resumed(workshop, settings)
        add_kept(workshop, settings)
        add_near(workshop, settings)
        add_tilted(workshop, settings)
        add_anchored(workshop, settings)
        if processes == 1:
            add_listed(workshop, settings)
            tagged = {"validation": "tagged", "subtask_column": "task"}
            workshop.add("by-column", **one["one"], **section(less(**tagged)))
            workshop.add("by-columns", **one["one"], **section(less(**tagged | {"validation": "tagged,labelled"})))
        workshop.start(processes)
    return workshop


def plans(runs: Any, name: str) -> list[dict[int, float]]:
    """Return the score of every sample of each decided round, by index."""
    found = []
    for line in runs.rounds(name):
        if not line.get("warmup"):
            table = plan_table(runs.root / name, line["round"])
            found.append(dict(zip(table["index"].to_pylist(), table["score"].to_pylist(), strict=True)))
    return found


@pytest.mark.parametrize(("method", "mode"), METHOD_CASES)
def test_one_process_and_two_select_the_same_samples(runs: Any, method: str, mode: str) -> None:
    one, two = plans(runs, f"{method}-one"), plans(runs, f"{method}-{mode}")
    assert len(one) == len(two) == 2
    for first, second in zip(one, two, strict=True):
        assert first.keys() == second.keys()
        expected = np.array([first[index] for index in first])
        assert np.isfinite(expected).all()
        scale = min(1.0, np.abs(expected).max())
        np.testing.assert_allclose([second[index] for index in first], expected, rtol=1e-4, atol=1e-4 * scale)
    assert runs.plan_digests(f"{method}-{mode}") == runs.plan_digests(f"{method}-one")
    assert len({frozenset(plan) for plan in one}) == 2  # the model's training changes what is selected


@pytest.mark.parametrize("mode", ["ddp", "zero3", "fsdp2"])
def test_one_process_and_two_compute_the_same_embeddings(runs: Any, mode: str) -> None:
    one, two = (sorted((runs.root / f"nearest-encoder-{each}" / "embeddings").iterdir()) for each in ("one", mode))
    assert [folder.name for folder in one] == [folder.name for folder in two]
    assert len(one) == 2
    for first, second in zip(one, two, strict=True):
        np.testing.assert_array_equal(np.load(first / "embeddings.npy"), np.load(second / "embeddings.npy"))


@pytest.mark.parametrize(("method", "mode"), METHOD_CASES)
def test_each_run_is_wrapped_by_the_intended_class(runs: Any, method: str, mode: str) -> None:
    for rank in (0, 1):
        assert WRAPPERS[mode] in runs.trace(f"{method}-{mode}", rank)["wrapper"]


@pytest.mark.parametrize("mode", ["twice", *ANCHORED])
def test_weights_from_hidden_states_do_not_depend_on_processes_or_accumulation(runs: Any, mode: str) -> None:
    one, other = (runs.trace(f"anchored-{name}")["losses"] for name in ("one", mode))
    assert len(one) == 4
    assert one[1] < 0.8 * one[0]  # after the warm-up adapt's weights are below 1
    np.testing.assert_allclose(other, one, rtol=1e-4)


@pytest.mark.parametrize(("kind", "mode"), NEUTRAL_CASES)
def test_measurements_leave_the_training_unchanged(runs: Any, kind: str, mode: str) -> None:
    blind, looking = f"blind-{kind}-{mode}", f"looking-{kind}-{mode}"
    for rank in range(1 if mode == "one" else 2):
        expected, got = runs.trace(blind, rank), runs.trace(looking, rank)
        assert expected["weights"] is not None
        for key in ("weights", "losses", "micro_batches", "rng"):
            assert got[key] == expected[key], key
    assert runs.plan_digests(looking) == runs.plan_digests(blind)
    assert runs.rounds(looking)[1]["cost"]["samples"] > 5 * 80


@pytest.mark.parametrize(("cut", "mode"), CUT_CASES)
def test_a_killed_and_resumed_run_equals_an_uninterrupted_run(runs: Any, cut: str, mode: str) -> None:
    whole, resumed = runs.trace(f"whole-{mode}"), runs.trace(f"{cut}-cut-{mode}")
    assert resumed["error"] is None
    assert min(step for step, _ in resumed["micro_batches"]) == CUTS[cut][0]
    assert runs.plan_digests(f"{cut}-cut-{mode}") == runs.plan_digests(f"whole-{mode}")
    assert resumed["losses"] == whole["losses"]
    assert resumed["weights"] == whole["weights"]


@pytest.mark.parametrize("mode", ["one", *MODES, "gathered", "wrapped"])
def test_gradients_equal_plain_autograd(runs: Any, mode: str) -> None:
    from transformers import AutoModelForCausalLM

    assert runs.trace(f"kept-{mode}")["error"] is None
    kept = torch.load(runs.root / f"kept-{mode}.pt", weights_only=True)
    # LLaMA-Factory checkpoints activations by default; accelerate wraps the four parts of a layer one by one.
    assert kept["recomputed"] == (8 if mode == "wrapped" else 2)
    model = AutoModelForCausalLM.from_pretrained(runs.model, dtype=torch.float32).eval()
    for row, got in zip(kept["rows"], kept["gradients"], strict=True):
        inputs, labels = (torch.tensor([row[key]]) for key in ("input_ids", "labels"))
        loss = model(input_ids=inputs, labels=labels).loss
        expected = torch.autograd.grad(loss, list(model.parameters()))
        expected = torch.cat([part.reshape(-1) for part in expected])
        assert (got - expected).norm() <= 1e-5 * expected.norm()


def test_a_column_divides_the_validation_set(runs: Any) -> None:
    assert runs.trace("by-column")["targets"] == {"rhymes": 4, "sums": 8}
    expected = {"tagged/rhymes": 4, "tagged/sums": 8, "labelled/sums": 16}
    assert runs.trace("by-columns")["targets"] == expected
    assert all(np.isfinite(list(plan.values())).all() for plan in plans(runs, "by-columns"))


@pytest.mark.parametrize("mode", TILTED[1:])
def test_a_weighter_reads_the_same_embeddings_on_two_processes(runs: Any, mode: str) -> None:
    one, two = runs.trace("tilted-one"), runs.trace(f"tilted-{mode}")
    assert runs.plan_digests(f"tilted-{mode}") == runs.plan_digests("tilted-one")
    np.testing.assert_allclose(two["losses"], one["losses"], rtol=1e-4)


def test_a_weighter_alone_has_validation_samples_and_an_encoder(runs: Any) -> None:
    assert len(runs.trace("tilted-alone")["losses"]) == 7
    assert len(list((runs.root / "tilted-alone" / "embeddings").iterdir())) == 2


def trained_together(runs: Any, name: str, processes: int) -> list[list[int]]:
    """Return the samples of every step of a run, those of all its processes, ascending."""
    found: dict[int, list[int]] = {}
    for rank in range(processes):
        for step, indices in runs.trace(name, rank)["micro_batches"]:
            found.setdefault(step, []).extend(indices)
    return [sorted(found[step]) for step in sorted(found)]


def planned(runs: Any, name: str, batch: int = 4) -> list[list[int]]:
    """Return the samples of every step on a run's record, ascending."""
    steps = []
    for line in runs.rounds(name):
        indices = plan_table(runs.root / name, line["round"])["index"].to_pylist()
        steps += [sorted(indices[first : first + batch]) for first in range(0, len(indices), batch)]
    return steps


def test_a_plugin_with_its_own_pooling_never_selects_an_untrained_sample(runs: Any) -> None:
    untrained = set(range(48 + 32 + 3, 48 + 32 + 3 + UNTRAINED))
    decided = [line for line in runs.rounds("near-one") if not line.get("warmup")]
    assert [line["unscored"] for line in decided] == [UNTRAINED] * 2
    assert all(line["domains"]["partly"] > 0 for line in decided)
    assert decided[0]["proportions"] != decided[1]["proportions"]
    for plan in plans(runs, "near-one"):
        assert untrained.isdisjoint(plan)
        assert all(-1 <= score <= 1 for score in plan.values())


def test_a_plugin_with_its_own_pooling_selects_the_same_on_one_process_and_two(runs: Any) -> None:
    assert runs.plan_digests("near-ddp") == runs.plan_digests("near-one")
    for one, two in zip(plans(runs, "near-one"), plans(runs, "near-ddp"), strict=True):
        assert [two[index] for index in one] == pytest.approx(list(one.values()), abs=1e-4)


@pytest.mark.parametrize("mode", NEAR)
def test_a_plugin_with_its_own_pooling_resumes_exactly(runs: Any, mode: str) -> None:
    whole, resumed = runs.trace(f"near-{mode}"), runs.trace(f"near-cut-{mode}")
    assert min(step for step, _ in resumed["micro_batches"]) == 3
    assert runs.plan_digests(f"near-cut-{mode}") == runs.plan_digests(f"near-{mode}")
    assert plans(runs, f"near-cut-{mode}") == plans(runs, f"near-{mode}")
    assert resumed["weights"] == whole["weights"]


@pytest.mark.parametrize("method", LISTED)
def test_the_position_in_the_lists_of_neighbours_survives_a_resume(runs: Any, method: str) -> None:
    name = f"listed-cut-{method}"
    assert min(step for step, _ in runs.trace(name)["micro_batches"]) == 5
    assert runs.plan_digests(name) == runs.plan_digests(f"listed-{method}")
    assert runs.trace(name)["weights"] == runs.trace(f"listed-{method}")["weights"]
    chosen = [index for plan in plans(runs, name) for index in plan]
    assert len(chosen) == 28
    if method == "near":
        assert len(set(chosen)) == 28  # every decision goes on where the last one stopped


@pytest.mark.parametrize("mode", NEAR)
def test_a_plugin_with_its_own_pooling_keeps_to_an_overhead_limit(runs: Any, mode: str) -> None:
    name = f"near-limited-{mode}"
    assert trained_together(runs, name, NEAR.index(mode) + 1) == planned(runs, name)
    budgets = [line["budget"] for line in runs.rounds(name) if not line.get("warmup")]
    assert abs(budgets[0]["scored"] - 32) <= 1  # rounded in each domain; how many later is a matter of seconds
    summary = json.loads((runs.root / name / "dataflex" / "summary.json").read_text())
    limit = summary["overhead_limit"]
    assert (limit["max_overhead"], limit["decisions"]) == (0.5, 2)
    assert limit["scores"] == sum(budget["scored"] for budget in budgets)
    assert limit["kept"] == (summary["overhead_fraction"] <= 0.5)
