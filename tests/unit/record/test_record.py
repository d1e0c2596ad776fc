"""The run record: what is written, what a resumed run keeps, and that an earlier record is never lost."""

from __future__ import annotations

import csv
import json
import math
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from transformers import Trainer

from dataflex.api.schedule import RoundSlot
from dataflex.errors import ConfigError
from dataflex.planning.planner import Plan
from dataflex.probe.cost import Cost
from dataflex.record.reader import read_run
from dataflex.record.writer import RunWriter
from dataflex.trainer.mixin import DynamicTrainerMixin
from unit.fakes import make_pool

POOL = make_pool({"a": 6, "b\u00e9": 4})
COST = Cost(1.5, 10, 70)


def plan(number: int, indices: list[int], scores: list[float] | None = None, **changes) -> Plan:
    slot = RoundSlot(number, 2 * number, 2, changes.pop("update", number))
    array = None if scores is None else np.array(scores, dtype=np.float32)
    return Plan(slot, np.array(indices), array, np.array([0.25, 0.75]), **changes)


def rounds(output: Path, folder: str = "dataflex") -> list[int]:
    lines = (output / folder / "rounds.jsonl").read_text().splitlines()
    return [json.loads(line)["round"] for line in lines]


def write(output: Path, first: int, stop: int, kept: int | None) -> RunWriter:
    """Train rounds from ``first`` to ``stop`` in a run that was started or resumed."""
    writer = RunWriter(output)
    if kept is None:
        writer.open_new()
    writer.begin({"dataflex": {"seed": first}}, kept)
    for number in range(first, stop):
        writer.round(plan(number, [number, 9]), POOL, {"select": "loss"}, COST)
    return writer


def test_a_round_is_one_line_and_one_table(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path)
    writer.begin({"stage": "sft", "dataflex": {"seed": 3}}, None)
    writer.round(plan(0, [3, 7, 7, 0], update=None), POOL, {}, Cost())
    ranked = {"ranks": np.array([3, 0, 1, 7]), "candidates": {"pool": 7}}
    writer.round(plan(1, [9, 1, 1, 2], [0.5, np.nan, 2, -1], unscored=3, **ranked), POOL, {"select": "loss"}, COST)
    first, second = map(json.loads, (tmp_path / "dataflex" / "rounds.jsonl").read_text().splitlines())
    assert first["warmup"] is True
    assert first["domains"] == {"a": 2, "b\u00e9": 2}
    assert first["components"] == {}
    assert "unscored" not in first
    assert "candidates" not in first
    assert first["pool"] == {"a": 6, "b\u00e9": 4}
    assert second == {
        "round": 1,
        "start_step": 2,
        "steps": 2,
        "size": 4,
        "plan_sha256": plan(1, [9, 1, 1, 2]).sha256,
        "pool": {"a": 6, "b\u00e9": 4},
        "domains": {"a": 3, "b\u00e9": 1},
        "proportions": {"a": 0.25, "b\u00e9": 0.75},
        "components": {"select": "loss"},
        "cost": {"seconds": 1.5, "samples": 10, "tokens": 70},
        "unscored": 3,
        "candidates": {"pool": 7},
    }
    table = pq.read_table(tmp_path / "dataflex" / "plans" / "round-00001.parquet").to_pydict()
    assert table == {
        "position": [0, 1, 2, 3],
        "index": [9, 1, 1, 2],
        "domain": ["b\u00e9", "a", "a", "a"],
        "score": [0.5, None, 2.0, -1.0],
        "rank": [3, None, 1, 7],
    }
    assert not {"score", "rank"} & set(pq.read_schema(tmp_path / "dataflex" / "plans" / "round-00000.parquet").names)


def test_configuration_environment_and_summary(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path)
    writer.begin({"stage": "sft", "dataflex": {"mix": {"proportions": [0.5, 0.5]}}}, None, start={"step": 0})
    record = tmp_path / "dataflex"
    written = yaml.safe_load((record / "config.yaml").read_text())
    assert written == {"stage": "sft", "dataflex": {"mix": {"proportions": [0.5, 0.5]}}}
    writer.summary({"rounds": 3})
    assert json.loads((record / "summary.json").read_text()) == {"rounds": 3}
    (start,) = json.loads((record / "environment.json").read_text())["starts"]
    assert start["step"] == 0
    assert datetime.fromisoformat(start["finished"]).tzinfo is not None
    assert sorted(path.name for path in record.iterdir()) == [
        "config.yaml", "environment.json", "plans", "summary.json",
    ]  # fmt: skip


def strict(text: str) -> dict[str, Any]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_what_is_not_finite_is_null_on_record_and_read_as_missing(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path)
    writer.begin({"dataflex": {}}, None)
    nan = float("nan")
    empty = {"loss": nan, "perplexity": float("inf"), "bits_per_byte": None}
    line = {
        "step": 3, "tokens": 10, "train_seconds": 1.0, "decision_seconds": 1.0, "evaluate_seconds": 1.0,
        "fingerprint": "ab", "domains": {"a": {**empty, "tokens": 0, "bytes": 0, "samples": 1}},
        "token_weighted": empty, "unweighted": empty,
    }  # fmt: skip
    writer.evaluation(line)
    writer.summary({**SUMMARY, "evaluation": line})
    for name in ("evaluations.jsonl", "summary.json"):
        strict((tmp_path / "dataflex" / name).read_text())
    assert strict((tmp_path / "dataflex" / "evaluations.jsonl").read_text())["domains"]["a"]["loss"] is None
    read = read_run(tmp_path)
    assert read.summary is not None
    for found in (read.evaluations[0], read.summary.evaluation):
        assert found is not None
        assert math.isnan(found.domains["a"].loss)
        assert math.isnan(found.unweighted.perplexity)
        assert found.unweighted.bits_per_byte is None


SUMMARY = {
    "train_seconds": 1.0, "decision_seconds": 1.0, "overhead_fraction": 1.0, "rounds": 1, "tokens": 1, "steps": 3,
}  # fmt: skip


def test_logs_hold_no_number_of_ours_that_is_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    logged = {}

    def log(trainer: Trainer, logs: dict[str, float]) -> None:
        logged.update(logs)
        logs["epoch"] = 0.5

    monkeypatch.setattr(Trainer, "log", log)
    trainer = object.__new__(DynamicTrainerMixin)
    trainer.dataflex = SimpleNamespace(progress_logs=lambda: {"dataflex/tokens": 5})
    metrics = {"eval_loss": float("nan"), "eval_a_perplexity": float("inf"), "eval_b_loss": 2.0, "eval_name": "x"}
    trainer.log(metrics)
    assert logged == {"eval_b_loss": 2.0, "eval_name": "x", "dataflex/tokens": 5}
    assert math.isnan(metrics["eval_loss"])  # whoever asked for the evaluation still has it
    assert metrics["epoch"] == 0.5


def test_a_resumed_run_has_every_round_once(tmp_path: Path) -> None:
    write(tmp_path, 0, 5, None)
    write(tmp_path, 2, 7, 2)  # from a checkpoint in round 1
    assert rounds(tmp_path) == list(range(7))
    write(tmp_path, 7, 8, 7)  # from the last checkpoint
    assert rounds(tmp_path) == list(range(8))
    tables = sorted(path.name for path in (tmp_path / "dataflex" / "plans").iterdir())
    assert tables == [f"round-{number:05d}.parquet" for number in range(8)]
    assert yaml.safe_load((tmp_path / "dataflex" / "config.yaml").read_text())["dataflex"] == {"seed": 7}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dataflex"]


def test_a_resumed_run_keeps_the_evaluations_so_far(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path)
    assert writer.begin({"dataflex": {}}, None) is None
    for step in (2, 4, 4, 6):
        writer.evaluation({"step": step, "tokens": 10 * step})
    assert writer.begin({"dataflex": {}}, 1, step=4) == {"step": 4, "tokens": 40}
    lines = (tmp_path / "dataflex" / "evaluations.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4, 4]


def test_a_line_that_was_cut_off_is_dropped(tmp_path: Path) -> None:
    write(tmp_path, 0, 3, None)
    path = tmp_path / "dataflex" / "rounds.jsonl"
    path.write_text(path.read_text()[:-20])
    write(tmp_path, 2, 4, 2)
    assert rounds(tmp_path) == list(range(4))


def test_a_run_resumed_into_a_new_folder_stays_without_duplicates(tmp_path: Path) -> None:
    write(tmp_path, 5, 9, 5)  # the checkpoint came from elsewhere: rounds 0 to 4 are recorded there
    assert rounds(tmp_path) == [5, 6, 7, 8]
    write(tmp_path, 7, 10, 7)
    assert rounds(tmp_path) == [5, 6, 7, 8, 9]


def test_a_new_run_sets_an_earlier_record_aside(tmp_path: Path) -> None:
    for count in (3, 2, 4):
        write(tmp_path, 0, count, None).summary({"rounds": count})
    assert rounds(tmp_path) == [0, 1, 2, 3]
    assert rounds(tmp_path, "dataflex-earlier-1") == [0, 1, 2]
    assert rounds(tmp_path, "dataflex-earlier-2") == [0, 1]
    for name, count in [("dataflex", 4), ("dataflex-earlier-1", 3), ("dataflex-earlier-2", 2)]:
        assert len(list((tmp_path / name / "plans").glob("*.parquet"))) == count
        assert json.loads((tmp_path / name / "summary.json").read_text()) == {"rounds": count}


def test_a_resumed_run_has_no_summary_of_the_run_before(tmp_path: Path) -> None:
    write(tmp_path, 0, 3, None).summary({"rounds": 3})
    write(tmp_path, 3, 4, 3)
    assert not (tmp_path / "dataflex" / "summary.json").exists()


def test_task_results_of_the_model_before_are_set_aside(tmp_path: Path) -> None:
    tasks = tmp_path / "dataflex" / "tasks"
    write(tmp_path, 0, 3, None)
    for text in ("first", "second"):
        tasks.mkdir()
        (tasks / "quiz.json").write_text(text)
        write(tmp_path, 3, 4, 3)  # the finished run is trained for longer
        assert not tasks.exists()
    kept = sorted((tmp_path / "dataflex").glob("tasks-earlier-*/quiz.json"))
    assert [(path.parent.name, path.read_text()) for path in kept] == [
        ("tasks-earlier-1", "first"),
        ("tasks-earlier-2", "second"),
    ]
    tasks.mkdir()
    write(tmp_path, 0, 1, None)  # a new run
    assert sorted(path.name for path in (tmp_path / "dataflex-earlier-1").glob("tasks*")) == [
        "tasks",
        "tasks-earlier-1",
        "tasks-earlier-2",
    ]
    assert not list((tmp_path / "dataflex").glob("tasks*"))


def test_a_folder_that_cannot_be_written_to_is_a_configuration_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"output_dir: .*cannot be written to"):
        RunWriter(tmp_path / "file")


def test_loss_weights_go_on_after_a_checkpoint(tmp_path: Path) -> None:
    names = ("plain", 'with "quotes", a comma', "two\nlines", "a\u2028b")
    writer = RunWriter(tmp_path)
    for step in range(1, 7):
        writer.loss_weights(step, names, np.full(4, step / 7))
    path = writer.folder / "loss_weights.csv"
    with path.open("a") as stream:
        stream.write("7,0.3")  # cut off
    writer.begin({}, 1, 4)
    writer.loss_weights(5, names, np.full(4, 0.5))
    with path.open(newline="") as stream:
        head, *rows = csv.reader(stream)
    assert head == ["step", *names]
    assert [int(row[0]) for row in rows] == [1, 2, 3, 4, 5]
    assert [float(row[1]) for row in rows] == [1 / 7, 2 / 7, 3 / 7, 4 / 7, 0.5]
    path.write_bytes(b"")  # cut off before the header
    writer.begin({}, 1, 4)
    writer.loss_weights(5, names, np.full(4, 0.5))
    with path.open(newline="") as stream:
        assert next(csv.reader(stream)) == ["step", *names]


def test_a_round_does_not_name_a_method_that_decided_nothing(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path)
    writer.begin({"dataflex": {"seed": 3}}, None)
    undecided = {"select": "every sample is taken"}
    methods = {"select": "loss", "mix": "odm"}
    writer.round(plan(0, [0, 1, 2, 3], undecided=undecided, not_chosen={"a": "it"}), POOL, methods, COST)
    (line,) = map(json.loads, (tmp_path / "dataflex" / "rounds.jsonl").read_text().splitlines())
    assert line["components"] == {"mix": "odm"}
    assert line["undecided"] == undecided
    assert line["not_chosen"] == {"a": "it"}
