"""Mixers in whole runs: their logs and records, killed and resumed, on one process and on two.

All trainings happen in two starts, one of two processes and one of one process (see runner.py).
"""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import composed_loss
import numpy as np
import pytest

import tiny

pytestmark = pytest.mark.launch

SETS = {"dataset": "alpha,beta,gamma"}
PT = {"stage": "pt", "finetuning_type": "full", "dataset": "texts,pages", "cutoff_len": 24, "packing": True}


EXCESS_TOKENS = Path(__file__).parent.parent / "plugins" / "excess_tokens.py"
COMPOSED = (
    ("sft", 1, False),
    ("sft", 4, False),
    ("pt", 1, False),
    ("pt", 4, False),
    ("sft", 1, True),
    ("sft", 4, True),
    ("pt", 4, True),
)
"""Stage, micro-batches of a step, and whether the loss is fused, of the runs whose loss several components weigh."""
HEADS = {
    "full": {"finetuning_type": "full"},
    "adapter": {"lora_target": "q_proj,v_proj,lm_head"},
    "packed": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, **PT},
}
"""What the runs train whose loss is plain and fused in turn."""
FUSED = {"one": list(HEADS), "ddp": ["packed"], "zero3": ["full", "adapter"], "fsdp2": ["full"]}
"""Kind of processes -> what is trained in this way."""


def methods(reference: Path, table: Path) -> dict[str, dict[str, Any]]:
    """Return the mixers whose state a checkpoint has to hold."""
    validation = {"validation": ["held", "gamma"]}
    return {
        "odm": {"method": "odm"},
        "odm_official": {"method": "odm", "variant": "official"},
        "ado": {"method": "ado", "start_step": 2, "fit_steps": 2},
        "aioli": {"method": "aioli", "lp_rounds": 1, "exploit_rounds": 1, **validation},
        "skill_it": {"method": "skill_it", "validation": ["alpha", "beta", "gamma"]},
        "schedule": {
            "method": "schedule",
            "points": [
                {"step": 0, "proportions": [1, 1, 0]},
                {"step": 6, "proportions": {"alpha": 0, "beta": 1, "gamma": 2}},
            ],
        },
        "group_dro": {"method": "group_dro", "eta": 0.5},
        "doremi": {"method": "doremi", "reference_model": str(reference)},
        "doremi_table": {"method": "doremi", "reference_model": str(reference), "reference_losses": str(table)},
        "doremi_previous": {"method": "doremi", "reference_model": str(reference), "weights": "previous"},
        "doge": {"method": "doge", "proj_dim": 64},
        "regmix": {
            "method": "regmix",
            "regressor": "linear",
            **{key: str(table.with_name(f"{key}.csv")) for key in CSVS},
        },
        "moe_balance": {"method": "moe_balance", "samples_per_domain": 4},
        "capped": {"method": "uniform", "max_epochs_per_domain": 1},
    }


CSVS = {
    "mixtures": "index,alpha,beta,gamma\n0,.8,.1,.1\n1,.1,.8,.1\n2,.1,.1,.8\n3,.4,.3,.3\n4,.2,.5,.3\n",
    "losses": "index,held\n0,2.1\n1,2.9\n2,3.1\n3,2.6\n4,2.8\n",
}
"""Proxy runs, where the first domain helps most."""
SPREAD = ("doremi", "doremi_table", "group_dro", "doge")
"""Methods also trained under ZeRO-3."""
WEIGHING = ("group_dro", "doremi", "doremi_table", "doremi_previous", "doge")
NAMES = tuple(methods(Path("reference"), Path("table")))


def mixed(mix: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A run of 8 steps with checkpoints at 3 and 6, whose rounds are 1 + 2 + 2 + 2 + 1 steps long."""
    return {
        **SETS,
        "dataflex": {"warmup_steps": 1, "update_steps": 2, "mix": mix},
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "max_steps": 8,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 3,
        **changes,
    }


@pytest.fixture(scope="session")
def runs(workshop: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    inputs = tmp_path_factory.mktemp("mixing")
    reference = tiny.make_model(inputs / "reference", seed=1)
    (workshop.root / "reference.txt").write_text(str(reference))
    for name, text in CSVS.items():
        (inputs / f"{name}.csv").write_text(text)
    found = methods(reference, inputs / "table")
    experts = {"model_name_or_path": str(tiny.make_experts(inputs / "experts")), "lora_target": "q_proj,v_proj"}
    of_model = {"moe_balance": experts}
    for name, mix in found.items():
        workshop.add(f"{name}-two", **mixed(mix, per_device_train_batch_size=4, **of_model.get(name, {})))
    for name in SPREAD:
        workshop.add(f"{name}-zero3", **mixed(found[name], per_device_train_batch_size=4, **tiny.zero(inputs, 3)))
    add_composed_runs(workshop, reference, 2)
    add_fused_runs(workshop, {"ddp": {}, "zero3": tiny.zero(inputs, 3), "fsdp2": tiny.FSDP2})
    add_excess_runs(workshop, reference, 2)
    workshop.add("pt-two", **mixed({**found["doremi"], "weights": "current"}, **PT, per_device_train_batch_size=2))
    workshop.start(2)
    for name, mix in found.items():
        run = mixed(mix, **of_model.get(name, {}))
        workshop.add(f"{name}-whole", **run)
        workshop.add(f"{name}-cut", stop_at=5, **run)
        workshop.add(f"{name}-resumed", into=f"{name}-cut", **run)
    for name in ("doremi", "doremi_previous", "group_dro", "doge"):
        accumulated = mixed(found[name], per_device_train_batch_size=2, gradient_accumulation_steps=4)
        workshop.add(f"{name}-accumulated", **accumulated)
    adapter = {"method": "doremi", "reference_model": str(workshop.root / "capped-whole")}
    workshop.add("adapter-whole", **mixed(adapter))
    workshop.add("seldom-logged", **mixed(found["odm"], logging_steps=4, save_strategy="no"))
    workshop.add("pt-one", **mixed(found["doremi"], **PT, per_device_train_batch_size=4))
    alone = {"dataset": "alpha", "max_steps": 4, "save_strategy": "no"}
    workshop.add("alone-weighed", **mixed(found["doremi"], **alone))
    workshop.add("alone-plain", **mixed({"method": "uniform"}, **alone))
    add_noise_runs(workshop, make_noise(inputs / "noise"))
    add_composed_runs(workshop, reference, 1)
    add_fused_runs(workshop, {"one": {}})
    add_excess_runs(workshop, reference, 1)
    workshop.start(1)
    return workshop


def add_composed_runs(workshop: Any, reference: Path, processes: int) -> None:
    """Add runs of two steps, of which the gradient of the second is kept: the first one after the warm-up."""
    section = composed_loss.section(reference, EXCESS_TOKENS)
    for name, accumulation, fused in COMPOSED:
        kind = PT if name == "pt" else {"finetuning_type": "full"}
        run = mixed(
            {},
            per_device_train_batch_size=8 // (processes * accumulation),
            gradient_accumulation_steps=accumulation,
            max_steps=2,
            save_strategy="no",
            max_grad_norm=0.0,
            learning_rate=0.0,
        )
        workshop.add(
            f"composed-{name}-{accumulation}-{fused}-{processes}",
            keep=1,
            **{**run, **kind, "dataflex": {**section, "fused_loss": fused}},
        )


def add_fused_runs(workshop: Any, modes: dict[str, dict[str, Any]]) -> None:
    """Add runs without weights, whose loss is plain and fused in turn."""
    for mode, settings in modes.items():
        for head in FUSED[mode]:
            run = mixed({}, **{"per_device_train_batch_size": 4, "max_steps": 3, "save_strategy": "no", **HEADS[head]})
            for fused in (True, False):
                section = {"update_steps": 2, "mix": {"method": "uniform"}, "fused_loss": fused}
                workshop.add(f"{head}-{fused}-{mode}", **{**run, **settings, "dataflex": section})


def add_excess_runs(workshop: Any, reference: Path, processes: int) -> None:
    """Add runs of a selector that compares with a reference, a model or a table, and sees the losses of every step."""
    table = {"reference_losses": str(workshop.root / "select-table")}
    for name, given in {"model": {}, "table": table}.items():
        run = f"excess-{name}-{processes}"
        select = {"method": "test_excess_samples", "reference_model": str(reference), **given}
        section = {
            "plugins": [str(Path(__file__).with_name("excess_samples.py"))],
            "update_steps": 2,
            "select": {**select, "file": str(workshop.root / f"{run}.jsonl")},
        }
        accumulated = {"per_device_train_batch_size": 4 // processes, "gradient_accumulation_steps": 2}
        workshop.add(run, **{**mixed({}, max_steps=4, save_strategy="no", **accumulated), "dataflex": section})


def make_noise(folder: Path) -> Path:
    """Write two pt data sets of equal size: words in a fixed order from a random start, and random words."""
    folder.mkdir()
    rng = random.Random(0)
    for name in ("order", "noise"):
        rows = []
        for _ in range(400):
            start = rng.randrange(len(tiny.WORDS))
            chosen = [
                tiny.WORDS[(start + i) % len(tiny.WORDS)] if name == "order" else rng.choice(tiny.WORDS)
                for i in range(24)
            ]
            rows.append({"text": " ".join(chosen)})
        tiny.add_data(folder, name, rows, columns={"prompt": "text"})
    return folder


def add_noise_runs(workshop: Any, data: Path) -> None:
    common = {
        "stage": "pt",
        "finetuning_type": "full",
        "dataset_dir": str(data),
        "dataset": "order,noise",
        "cutoff_len": 24,
        "learning_rate": 1e-2,
        "max_steps": 60,
        "save_strategy": "no",
    }
    reference = workshop.add("noise-reference", **mixed({"method": "proportional"}, **common))
    for name, mix in {
        "noise-doremi": {"method": "doremi", "reference_model": str(reference), "reweight_eta": 0.1},
        "noise-odm": {"method": "odm"},
        "noise-odm_official": {"method": "odm", "variant": "official"},
    }.items():
        workshop.add(name, **mixed(mix, **common))


def weights_of(workshop: Any, name: str) -> tuple[list[str], np.ndarray]:
    """Return the header and the rows of a run's loss weights."""
    with (workshop.root / name / "dataflex" / "loss_weights.csv").open(newline="") as stream:
        head, *rows = csv.reader(stream)
    return head, np.array(rows, dtype=np.float64)


@pytest.mark.parametrize("name", NAMES)
def test_a_killed_and_resumed_run_equals_an_uninterrupted_run(runs: Any, name: str) -> None:
    whole, resumed = runs.trace(f"{name}-whole"), runs.trace(f"{name}-cut")
    assert resumed["micro_batches"][0][0] == 3
    assert runs.plan_digests(f"{name}-cut") == runs.plan_digests(f"{name}-whole")
    assert resumed["weights"] == whole["weights"] is not None
    shares = [line["proportions"] for line in runs.rounds(f"{name}-whole")]
    assert [line["proportions"] for line in runs.rounds(f"{name}-cut")] == shares
    folder = runs.root / f"{name}-whole" / "dataflex"
    for file in ("loss_weights.csv", "domain_weights.json"):
        assert (folder / file).exists() == (name in WEIGHING)
        if name in WEIGHING:
            assert (folder / file).read_text() == (runs.root / f"{name}-cut" / "dataflex" / file).read_text()


@pytest.mark.parametrize("name", NAMES)
def test_one_process_and_two_give_the_same_run(runs: Any, name: str) -> None:
    runs.trace(f"{name}-two", 1)
    one, two = runs.rounds(f"{name}-whole"), runs.rounds(f"{name}-two")
    for ours, theirs in zip(one, two, strict=True):
        np.testing.assert_allclose(
            list(ours["proportions"].values()), list(theirs["proportions"].values()), rtol=1e-4, atol=1e-6
        )
        assert ours["domains"] == theirs["domains"]
    np.testing.assert_allclose(runs.trace(f"{name}-whole")["losses"], runs.trace(f"{name}-two")["losses"], rtol=1e-4)
    if name in WEIGHING:
        np.testing.assert_allclose(weights_of(runs, f"{name}-whole")[1], weights_of(runs, f"{name}-two")[1], rtol=1e-4)


@pytest.mark.parametrize("name", SPREAD)
def test_zero_3_gives_the_run_of_ddp(runs: Any, name: str) -> None:
    assert "stage 3" in runs.trace(f"{name}-zero3", 1)["wrapper"]
    assert runs.plan_digests(f"{name}-zero3") == runs.plan_digests(f"{name}-two")
    ours, theirs = weights_of(runs, f"{name}-zero3")[1], weights_of(runs, f"{name}-two")[1]
    np.testing.assert_allclose(ours, theirs, rtol=1e-3)
    losses = runs.trace(f"{name}-zero3")["losses"]
    np.testing.assert_allclose(losses, runs.trace(f"{name}-two")["losses"], rtol=1e-3)


@pytest.mark.parametrize("name", ["doremi", "doremi_previous", "group_dro", "doge"])
def test_accumulation_does_not_change_the_run(runs: Any, name: str) -> None:
    assert runs.plan_digests(f"{name}-accumulated") == runs.plan_digests(f"{name}-whole")
    ours, theirs = weights_of(runs, f"{name}-accumulated")[1], weights_of(runs, f"{name}-whole")[1]
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    losses = runs.trace(f"{name}-accumulated")["losses"]
    np.testing.assert_allclose(losses, runs.trace(f"{name}-whole")["losses"], rtol=1e-4)


OTHERS = ("doremi-accumulated", "adapter-whole", "pt-one", "pt-two")


@pytest.mark.parametrize("name", [*(f"{name}-{kind}" for name in WEIGHING for kind in ("whole", "two")), *OTHERS])
def test_the_loss_is_the_weighted_sum_of_the_domains(runs: Any, name: str) -> None:
    entries = [entry for entry in runs.trace(name)["history"] if "loss" in entry]
    assert len(entries) == 8
    domains = list(runs.rounds(name)[0]["pool"])
    head, rows = weights_of(runs, name)
    assert head == ["step", *domains]
    assert rows[:, 0].tolist() == list(range(2, 9))  # the first step is warm-up
    seen = dict.fromkeys(domains, 0)
    for entry in entries[1:]:
        used = rows[entry["step"] - 2, 1:]
        losses = [entry.get(f"dataflex/loss/{domain}", 0.0) for domain in domains]
        assert entry["loss"] == pytest.approx(float(used @ losses), rel=2e-4)
        for domain in domains:
            tokens = entry[f"dataflex/domain_tokens/{domain}"]
            assert tokens >= seen[domain]
            seen[domain] = tokens
    assert min(seen.values()) > 0
    assert np.ptp(rows[:, 1]) > 0


def test_a_table_of_reference_losses_equals_the_losses_of_the_model(runs: Any) -> None:
    model, table = weights_of(runs, "doremi-whole")[1], weights_of(runs, "doremi_table-whole")[1]
    np.testing.assert_allclose(model, table, rtol=1e-5)


def test_the_recorded_average_is_the_mean_over_the_steps(runs: Any) -> None:
    found = json.loads((runs.root / "doremi-whole" / "dataflex" / "domain_weights.json").read_text())
    head, rows = weights_of(runs, "doremi-whole")
    assert list(found["proportions"]) == head[1:]
    np.testing.assert_allclose(list(found["proportions"].values()), rows[:, 1:].mean(0), rtol=1e-12)
    np.testing.assert_allclose(list(found["last"].values()), rows[-1, 1:], rtol=1e-12)
    assert found["steps"] == 7


def test_excess_loss_does_not_prefer_noise_and_raw_loss_does(runs: Any) -> None:
    """Two domains of equal size, one of random words: what cannot be learned has a high loss and no excess loss."""
    losses = [entry for entry in runs.trace("noise-reference")["history"] if "loss" in entry][-1]
    assert losses["dataflex/loss/noise"] > 3 * losses["dataflex/loss/order"]
    found = json.loads((runs.root / "noise-doremi" / "dataflex" / "domain_weights.json").read_text())
    assert found["proportions"]["noise"] < 0.5
    assert 0.35 < found["last"]["noise"] < 0.65
    shares = {name: runs.rounds(name)[-1]["proportions"]["noise"] for name in ("noise-odm", "noise-odm_official")}
    assert shares["noise-odm"] > 0.53
    assert shares["noise-odm_official"] > 0.75


def test_one_domain_is_plain_training(runs: Any) -> None:
    np.testing.assert_allclose(runs.trace("alone-weighed")["losses"], runs.trace("alone-plain")["losses"], rtol=1e-6)


def test_every_change_of_proportions_is_logged(runs: Any) -> None:
    history = runs.trace("odm-whole")["history"]
    for line in runs.rounds("odm-whole"):
        entry = next(entry for entry in history if entry["step"] == line["start_step"] + 1)
        for domain, share in line["proportions"].items():
            assert entry[f"dataflex/proportion/{domain}"] == pytest.approx(share)


def test_a_round_is_logged_even_if_none_of_its_steps_is(runs: Any) -> None:
    history = [entry for entry in runs.trace("seldom-logged")["history"] if "dataflex/round" in entry]
    assert [entry["step"] for entry in history if "loss" in entry] == [4, 8]
    starts = [line["start_step"] + 1 for line in runs.rounds("seldom-logged")]
    assert starts == [1, 2, 4, 6, 8]
    assert [entry["step"] for entry in history] == starts
    size = sum(runs.rounds("seldom-logged")[0]["pool"].values())
    assert [entry["epoch"] for entry in history] == pytest.approx([8 * step / size for step in starts], abs=1e-3)


def test_logged_epochs_count_the_samples_that_were_trained(runs: Any) -> None:
    rounds = runs.rounds("capped-whole")
    sizes = rounds[0]["pool"]
    for domain, size in sizes.items():
        planned = sum(line["domains"][domain] for line in rounds)
        assert rounds[-1]["epochs"][domain] == pytest.approx(planned / size)
        assert planned <= size
    assert any(line["clipped_shares"] for line in rounds)
    last = [entry for entry in runs.trace("capped-whole")["history"] if "loss" in entry][-1]
    assert {domain: last[f"dataflex/epochs/{domain}"] for domain in sizes} == pytest.approx(rounds[-1]["epochs"])


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(("name", "accumulation", "fused"), COMPOSED)
def test_loss_coefficients_are_the_product_of_all_that_weigh(
    runs: Any, name: str, accumulation: int, fused: bool, processes: int
) -> None:
    run = f"composed-{name}-{accumulation}-{fused}-{processes}"
    runs.trace(run)
    reference = Path(runs.root.joinpath("reference.txt").read_text())
    expected = composed_loss.gradient_by_hand(runs.root / run, processes, runs.model, reference)
    for part in composed_loss.kept(runs.root / run, processes):
        assert composed_loss.distance(part["gradients"], expected) < 1e-6
    if (accumulation, fused, processes) == (4, False, 1):
        for factor in ("samples", "tokens", "domains", "means"):
            other = composed_loss.gradient_by_hand(runs.root / run, processes, runs.model, reference, without=factor)
            assert composed_loss.distance(other, expected) > 1e-2, factor


@pytest.mark.parametrize(("mode", "head"), [(mode, head) for mode, heads in FUSED.items() for head in heads])
def test_a_fused_loss_without_weights_is_plain_training(runs: Any, head: str, mode: str) -> None:
    plain, fused = (
        [entry for entry in runs.trace(f"{head}-{each}-{mode}")["history"] if "loss" in entry] for each in (False, True)
    )
    assert len(plain) == 3
    for mine, theirs in zip(fused, plain, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)


def test_a_selector_compares_with_a_reference_and_sees_the_losses_of_every_step(runs: Any) -> None:
    seen = {}
    for run in ("excess-model-1", "excess-table-1", "excess-model-2", "excess-table-2"):
        runs.trace(run)
        seen[run] = [json.loads(line) for line in (runs.root / f"{run}.jsonl").read_text().splitlines()]
        assert [line["step"] for line in seen[run]] == [1, 2, 3, 4]
        for line in seen[run]:
            assert line["losses"] == pytest.approx(line["means"], rel=1e-5)
            assert line["total"] == pytest.approx(line["domain"], rel=1e-5)
    trained = [index for _, indices in runs.trace("excess-model-1")["micro_batches"] for index in indices]
    assert [index for line in seen["excess-model-1"] for index in line["indices"]] == trained
    for run, lines in seen.items():
        for ours, theirs in zip(lines, seen["excess-model-1"], strict=True):
            assert ours["indices"] == theirs["indices"], run
            assert ours["tokens"] == theirs["tokens"]
            assert ours["losses"] == pytest.approx(theirs["losses"], abs=1e-3)
