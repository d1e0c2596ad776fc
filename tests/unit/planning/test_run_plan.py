"""The plan of a run: steps and costs equal a count by hand, rows of data files equal those that datasets reads."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from dataflex.config import processes
from dataflex.config.checks.plan import planned, problems_of_plan, problems_of_work, trainer_keys
from dataflex.config.checks.rows import rows_of, training_samples
from dataflex.config.loading import RunConfig, split_config

ROWS = [{"instruction": f"question {number}\nline", "input": "", "output": "yes"} for number in range(25)]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    (folder / "many").mkdir(parents=True)
    (folder / "array.json").write_text(json.dumps(ROWS, indent=1))
    lines = "\n".join(map(json.dumps, ROWS))
    (folder / "lines.jsonl").write_text(lines)
    (folder / "lines.json").write_text(f"{lines}\n")
    with (folder / "table.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(ROWS[0]))
        writer.writeheader()
        writer.writerows(ROWS)
    table = pa.Table.from_pylist(ROWS)
    pq.write_table(table, folder / "table.parquet", row_group_size=7)
    with pa.OSFile(str(folder / "table.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    for number in range(3):
        (folder / "many" / f"{number}.jsonl").write_text(lines + "\n")
    (folder / "broken.json").write_text('[{"instruction": ')
    info: dict[str, Any] = {
        path.name: {"file_name": path.name} for path in folder.iterdir() if path.name != "dataset_info.json"
    }
    info["some"] = {"file_name": "array.json", "num_samples": 40}
    info["hub"] = {"hf_hub_url": "somebody/something"}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


def config(data: Path, section: dict[str, Any] | None = None, **keys: Any) -> RunConfig:
    given = {"dataset_dir": str(data), "dataset": "array.json", "do_train": True, "per_device_train_batch_size": 2}
    given |= keys
    return split_config(given if section is None else {**given, "dataflex": section})


@pytest.mark.parametrize(
    "name, rows",
    [
        ("array.json", 25),
        ("lines.json", 25),
        ("lines.jsonl", 25),
        ("table.csv", 25),
        ("table.parquet", 25),
        ("table.arrow", 25),
        ("many", 75),
        ("some", 40),
        ("hub", None),
        ("broken.json", None),
        ("nowhere", None),
    ],
)
def test_rows_of_a_data_set_are_counted(data: Path, name: str, rows: int | None) -> None:
    assert rows_of(config(data), name) == rows
    if rows is not None:
        assert rows_of(config(data, max_samples=10), name) == 10


@pytest.mark.parametrize(
    "keys, samples",
    [
        ({}, {"array.json": 25}),
        ({"dataset": "array.json,many"}, {"array.json": 25, "many": 75}),
        ({"val_size": 0.1}, {"array.json": 22}),
        ({"val_size": 5}, {"array.json": 20}),
        ({"dataset": "array.json,hub"}, {}),
        ({"packing": True}, {}),
        ({"stage": "pt"}, {}),
        ({"stage": "pt", "packing": False}, {"array.json": 25}),
        ({"streaming": True}, {}),
        ({"tokenized_path": "somewhere"}, {}),
        ({"mix_strategy": "interleave_over"}, {}),
    ],
)
def test_training_samples_are_counted(data: Path, keys: dict[str, Any], samples: dict[str, int]) -> None:
    found, reason = training_samples(config(data, **keys))
    assert found == samples
    assert bool(reason) == (not samples)


@pytest.mark.parametrize("val_size, kept", [(0.8, 5), (0.28, 17), (0.1, 22), (0.92, 2), (5, 20)])
def test_a_split_leaves_as_many_training_samples_as_in_datasets(data: Path, val_size: float, kept: int) -> None:
    rows = Dataset.from_list(ROWS).train_test_split(test_size=val_size)["train"].num_rows
    assert training_samples(config(data, val_size=val_size))[0] == {"array.json": rows} == {"array.json": kept}


def lines(data: Path, section: dict[str, Any] | None = None, **keys: Any) -> dict[str, str]:
    text = planned(config(data, section, **keys)).lines()
    return dict(line.strip().split(None, 1) for line in text)


def test_a_part_of_an_epoch_is_its_share_of_the_steps_and_not_its_rounding_error(data: Path) -> None:
    section, keys = {"select": {"method": "random"}, "update_steps": 5}, {"per_device_train_batch_size": 1}
    assert lines(data, section, **keys, num_train_epochs=0.28)["steps"].startswith("about 7,")
    cycles = section | {"warmup_steps": 65, "updates": 7}  # of 100 steps
    assert lines(data, cycles, **keys, num_train_epochs=1.1)["steps"].startswith("110,")


def test_the_plan_says_that_the_loss_is_fused(data: Path) -> None:
    section = {"select": {"method": "random"}, "update_steps": 5}
    assert "in chunks of tokens" in lines(data, {**section, "fused_loss": True})["loss"]
    assert "in chunks of tokens" in lines(data, section, enable_liger_kernel=True)["loss"]
    assert "loss" not in lines(data, section)
    assert "loss" not in lines(data, {**section, "fused_loss": False}, enable_liger_kernel=True)


def test_the_plan_of_a_composed_run_has_its_rounds_and_costs(data: Path) -> None:
    """75 samples in steps of 4: 25 + 2 x 10 steps in a cycle, three times."""
    found = lines(
        data,
        {
            "warmup_steps": 5,
            "update_steps": 10,
            "updates": 2,
            "select": {"method": "less", "validation": "array.json"},
            "mix": {"method": "odm"},
        },
        dataset="array.json,lines.json,table.csv",
        gradient_accumulation_steps=2,
        eval_strategy="steps",
        eval_steps=20,
        eval_dataset="lines.jsonl",
        save_steps=0.4,
    )
    assert found["data"] == "about 75 samples in 3 domains: array.json 25, lines.json 25, table.csv 25"
    assert found["steps"].startswith("75, each of 4 samples (2 per device x 2 accumulated x 1 process): about 4 passes")
    assert "num_train_epochs counts cycles here: 3 x 25 steps (updates: 2)" in found["steps"]
    assert found["warm-up"].startswith("5 steps at the start of every cycle")
    assert found["rounds"] == "9, each of 10 steps and 40 samples, about 53 % of the pool"
    assert found["decisions"] == "6: select less, mix odm"
    assert found["evaluations"] == "3 (every 20 steps) during training, and one at the end"
    assert found["checkpoints"] == "3 (every 30 steps)"
    # 6 decisions on 75 + 25 samples, forward and backward as 3, against 75 steps of 4 samples at 3
    assert found["cost"].startswith("select less: 2 times the work of training (1,800 forward passes")


def test_the_plan_separates_weights_from_decisions_and_filters_from_the_limit(data: Path) -> None:
    filtered = [
        {"method": "el2n", "keep": 0.5},
        {"method": "el2n", "focus": "low", "max_overhead": 0.25},
    ]
    section = {"warmup_steps": 5, "update_steps": 10, "select": filtered, "weight": {"method": "loss"}}
    found = lines(data, section, per_device_train_batch_size=1, max_steps=25)
    assert found["decisions"] == "2: select.0 el2n (keeps 50 %), select.1 el2n"
    assert found["weights"] == "in every step after warm-up, 20: weight loss"
    # 2 decisions on 25 samples and on 12, against 25 steps of one sample at 3; the last line of each name is looked at
    assert found["cost"].startswith("select.1 el2n: 0.32 times the work of training if all candidates were scored")
    assert found["limit"] == (
        "max_overhead: decisions may take 0.25 times the time of training, and the selectors before select.1, which "
        "have no limit, take about 0.67"
    )


def test_the_plan_of_a_run_without_update_steps_has_default_rounds(data: Path) -> None:
    found = lines(data, {"select": {"method": "loss"}})
    assert found["steps"].startswith("about 38, each of 2 samples")  # 37.5
    assert "cycles" not in found["steps"]
    assert found["rounds"] == "13, each of 3 steps (the default of update_steps) and 6 samples, about 24 % of the pool"
    assert found["decisions"] == "13: select loss"


@pytest.mark.parametrize(
    "keys, evaluations, checkpoints",
    [
        ({"max_steps": 100}, "none", "one, at the last step"),  # the Trainer saves the last step
        ({"max_steps": 1000}, "none", "2 (every 500 steps)"),
        ({"do_eval": True, "save_strategy": "no"}, "one, at the end", "none but the model at the end"),
        (
            {"eval_strategy": "steps", "logging_steps": 10, "max_steps": 100},
            "10 (every 10 steps) during",
            "one, at the last",
        ),
        ({"eval_strategy": "epoch", "save_strategy": "epoch"}, "3 (after every pass", "3 (after every pass"),
    ],
)
def test_a_plain_run_has_events_but_no_decisions(
    data: Path, keys: dict[str, Any], evaluations: str, checkpoints: str
) -> None:
    found = lines(data, **keys)
    assert found["evaluations"].startswith(evaluations)
    assert found["checkpoints"].startswith(checkpoints)
    assert "decisions" not in found


def test_a_plan_without_the_data_has_the_known_parts(data: Path) -> None:
    found = lines(data, {"warmup_steps": 3, "select": {"method": "loss"}}, dataset="hub", max_steps=20)
    assert found["data"].startswith("samples not known before the data is loaded: the rows of 'hub'")
    assert found["steps"].startswith("20, each of 2 samples")
    assert found["decisions"] == "select loss"
    assert lines(data, {"select": {"method": "loss"}}, dataset="hub")["steps"].startswith("not known before")


@pytest.mark.parametrize(
    "section, keys, words",
    [
        ({"warmup_steps": 20, "select": {"method": "loss"}}, {"max_steps": 20}, ["dataflex.warmup_steps", "20 steps"]),
        ({"warmup_steps": 20, "mix": {"method": "odm"}}, {"dataset": "hub", "max_steps": 20}, ["mix odm"]),
        ({"warmup_steps": 38, "order": {"method": "sort"}}, {}, ["38 steps, all of them warm-up", "order sort"]),
        ({"warmup_steps": 39, "weight": {"method": "loss"}}, {}, ["39 steps, all of them warm-up", "weight loss"]),
        ({"update_steps": 13, "select": {"method": "loss"}}, {}, ["dataflex.update_steps", "26 samples", "at most 12"]),
        ({"select": {"method": "loss"}}, {"per_device_train_batch_size": 25}, ["per_device_train_batch_size", "25"]),
    ],
)
def test_a_section_that_could_decide_nothing_is_refused(
    data: Path, section: dict[str, Any], keys: dict[str, Any], words: list[str]
) -> None:
    (problem,) = problems_of_plan(config(data, section, **keys))
    for word in words:
        assert word in str(problem), problem
    shorter = {**section, "warmup_steps": 0, "update_steps": None}
    assert problems_of_plan(config(data, shorter, **{**keys, "per_device_train_batch_size": 2})) == []


LESS = {"select": {"method": "loss"}}


@pytest.mark.parametrize(
    "section, keys, words",
    [
        (LESS, {"do_train": None}, ["do_train: not set", "dataflex.select (loss) would never decide"]),
        (LESS, {"do_train": False, "do_predict": True}, ["do_train: not true", "only evaluates or predicts"]),
        (LESS, {"do_train": None, "tokenized_path": "t"}, ["do_train", "would never decide"]),
        (None, {"do_train": None}, ["do_train", "nothing would be done"]),
        ({}, {"do_train": None}, ["do_train", "nothing would be done"]),
        (LESS, {"num_train_epochs": 0}, ["num_train_epochs: must be above 0, got 0"]),
        (LESS, {"num_train_epochs": -1.0}, ["num_train_epochs: must be above 0, got -1.0"]),
        ({}, {"num_train_epochs": 0}, ["num_train_epochs"]),
    ],
)
def test_a_run_without_any_work_is_refused(
    data: Path, section: dict[str, Any] | None, keys: dict[str, Any], words: list[str]
) -> None:
    (problem,) = problems_of_work(config(data, section, **keys))
    for word in words:
        assert word in str(problem), problem


@pytest.mark.parametrize(
    "section, keys",
    [
        (LESS, {}),
        (None, {"do_train": None, "tokenized_path": "t"}),
        (None, {"do_train": None, "do_predict": True}),
        ({}, {"do_train": None, "do_eval": True}),
        ({}, {"do_train": None, "eval_strategy": "steps"}),
        (LESS, {"num_train_epochs": 0, "max_steps": 5}),
        ({**LESS, "train_steps": 5}, {"num_train_epochs": 0}),
        (None, {"num_train_epochs": 0}),  # without a section the run is LLaMA-Factory's own
    ],
)
def test_a_run_with_some_work_is_accepted(data: Path, section: dict[str, Any] | None, keys: dict[str, Any]) -> None:
    assert list(problems_of_work(config(data, section, **keys))) == []


@pytest.mark.parametrize(
    "environment, number",
    [
        ({}, 1),
        ({"NPROC_PER_NODE": "4"}, 1),
        ({"FORCE_TORCHRUN": "1"}, 1),
        ({"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "4"}, 4),
        ({"FORCE_TORCHRUN": "true", "NPROC_PER_NODE": "4", "NNODES": "2"}, 8),
        ({"LOCAL_RANK": "0", "WORLD_SIZE": "16"}, 16),
    ],
)
def test_the_number_of_processes_is_found(
    data: Path, environment: dict[str, str], number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("FORCE_TORCHRUN", "NPROC_PER_NODE", "NNODES", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(processes, "_visible_devices", lambda: 0)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert trainer_keys(config(data)).global_batch_size == 2 * number


def test_accelerators_that_are_only_visible_make_no_error(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight of them would make 5 steps of 37: all warm-up. torch may see fewer."""
    for name in ("FORCE_TORCHRUN", "NPROC_PER_NODE", "NNODES", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(processes, "_visible_devices", lambda: 8)
    section = {"warmup_steps": 10, "order": {"method": "sort"}}
    assert planned(config(data, section)).total == 5
    assert problems_of_plan(config(data, section)) == []
    monkeypatch.setenv("FORCE_TORCHRUN", "1")
    monkeypatch.setenv("NPROC_PER_NODE", "8")
    (problem,) = problems_of_plan(config(data, section))
    assert "5 steps, all of them warm-up" in str(problem)


def test_filters_that_leave_too_few_samples_are_refused_before_loading(data: Path) -> None:
    def said(*keeps: float, steps: int = 4) -> list[tuple[str, str]]:
        chain = [{"method": "el2n", "keep": keep} for keep in keeps]
        section = {"update_steps": steps, "select": [*chain, {"method": "loss"}]}
        return [(each.key, each.message) for each in problems_of_plan(config(data, section, max_steps=8))]

    assert said(0.5) == []  # 12 of 25, and a round takes 8
    ((key, message),) = said(0.5, steps=6)
    assert key == "dataflex.select.0.keep"
    assert "el2n leaves 12 samples, and a round takes 12" in message
    ((key, message),) = said(0.8, 0.3)
    assert key == "dataflex.select.1.keep"
    assert "leaves 6 samples" in message
    ((key, message),) = said(25)
    assert "25 samples are to be left, and 25 come to el2n" in message
    assert said(24) == []


def test_the_plan_describes_each_selector_of_a_chain(data: Path) -> None:
    chain = [{"method": "el2n", "keep": 0.5, "every": 4}, {"method": "grand", "every": 2}]
    plan = planned(config(data, {"update_steps": 2, "select": chain}, max_steps=16))
    text = "\n".join(plan.lines())
    assert "8: select.0 el2n (keeps 50 %, one decision in 4), select.1 grand (one decision in 2)" in text
    assert "select.0 el2n: 0.52 times the work of training (50 forward passes" in text  # 25 samples, twice
    assert "select.1 grand: 1.5 times the work of training (144 forward passes" in text  # 12 samples, 4 times, 3 each
