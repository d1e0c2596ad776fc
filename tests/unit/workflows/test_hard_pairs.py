"""The workflow hard-pairs: its stages, their results and what changes train again.

A small program stands in for the trainings. It writes the losses of the other half that a training would measure.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

import tiny
from dataflex.errors import ConfigError
from dataflex.selectors.base_difficulties import read_difficulties
from dataflex.workflows.hard_pairs import hard_pairs, load
from pairs import make_pairs

PROGRAM = """
import json, sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

assert sys.argv[1] == "train"
folder = Path(sys.argv[2]).parent
config = yaml.safe_load((folder / "run.yaml").read_text())
data = Path(config["dataset_dir"])
name, select = folder.name, config["dataflex"]["select"]
with (data / "launches.txt").open("a") as stream:
    stream.write(name + "\\n")
behaviour = json.loads((data / "behaviour.json").read_text()).get(name, "")
record = folder / "dataflex"
record.mkdir(parents=True, exist_ok=True)
(record / "config.yaml").write_text("{}")
if behaviour == "crash":
    print("RuntimeError: out of luck")
    sys.exit(1)
if select["method"] == "half" and behaviour != "no table":
    rows = [row for row in range(8) if (row + select["split_seed"]) % 2 == (select["half"] == "first")]
    losses = [0.1 * row + select["split_seed"] for row in rows]
    held = Path(select["folder"])
    held.mkdir(parents=True, exist_ok=True)
    table = pa.table({"dataset": ["first"] * len(rows), "row": rows, "difficulty": losses})
    pq.write_table(table, held / "difficulties.parquet")
if select["method"] == "hard_pairs":
    (path,) = select["difficulties"]
    assert pq.read_table(path).num_rows == 8
for file in ("config.json", "model.safetensors", "adapter_config.json", "adapter_model.safetensors"):
    (folder / file).write_text("{}")
(folder / "trainer_state.json").write_text(json.dumps({"log_history": [], "global_step": 4}))
costs = {"train_seconds": 8.0, "decision_seconds": 1.0, "evaluate_seconds": 0.5, "tokens": 100, "steps": 4}
(record / "summary.json").write_text(json.dumps({**costs, "saved": ["model"]}))
"""

NAMES = ["seed-1-first", "seed-1-second", "seed-2-first", "seed-2-second", "final"]


class Lab:
    """A folder with a workflow's file, and the program that stands for a training."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.output, self.file = folder, folder / "out", folder / "workflow.yaml"
        self.data = make_pairs(tiny.make_data(folder / "data"))
        (folder / "model").mkdir()
        config = {"model_type": "llama", "vocab_size": 60, "hidden_size": 32, "num_attention_heads": 4}
        (folder / "model" / "config.json").write_text(json.dumps(config))
        (folder / "program.py").write_text(PROGRAM)
        self.base = tiny.arguments(folder / "model", self.data, folder / "unused", stage="dpo", dataset="first")
        self.settings: dict[str, Any] = {"output_dir": str(self.output), "seeds": [1, 2], "keep": 0.25}
        self.behave({})
        self.write()

    def write(self, **changes: Any) -> None:
        self.settings |= changes
        self.file.write_text(yaml.safe_dump({"base": self.base, **self.settings}))

    def behave(self, behaviour: dict[str, str]) -> None:
        (self.data / "behaviour.json").write_text(json.dumps(behaviour))

    def run(self, **options: Any) -> int:
        return hard_pairs(self.file, program=(sys.executable, str(self.folder / "program.py")), **options)

    def launches(self) -> list[str]:
        """Return the names of the trainings since the last call."""
        file = self.data / "launches.txt"
        names = file.read_text().split() if file.is_file() else []
        file.unlink(missing_ok=True)
        return names

    def trained(self, name: str) -> dict[str, Any]:
        content: dict[str, Any] = yaml.safe_load((self.output / name / "run.yaml").read_text())
        return content


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


def test_halves_are_trained_and_the_easiest_pairs_are_kept(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    lab.base["dataflex"] = {"select": [{"method": "random"}], "update_steps": 2, "order": {"method": "shuffle"}}
    lab.write(halves={"learning_rate": 0.5}, measurements=3)
    assert lab.run() == 0
    assert lab.launches() == NAMES
    first = lab.trained("seed-2-second")
    assert (first["seed"], first["num_train_epochs"], first["max_steps"], first["learning_rate"]) == (2, 0.5, -1, 0.5)
    assert first["dataflex"]["select"] == {
        "method": "half",
        "half": "second",
        "split_seed": 2,
        "measurements": 3,
        "folder": str(lab.output / "seed-2-second" / "held_out"),
    }
    assert "order" not in first["dataflex"]
    assert first["dataflex"]["update_steps"] is None
    final = lab.trained("final")
    assert (final["num_train_epochs"], final["max_steps"], final["learning_rate"]) == (0.25, -1, 0.01)
    assert final["dataflex"]["select"]["difficulties"] == [str(lab.output / "difficulties.parquet")]
    assert final["dataflex"]["order"]["method"] == "sort"
    assert (final["dataflex"]["order"]["by"], final["dataflex"]["order"]["descending"]) == ("selection", True)
    table = read_difficulties(lab.output / "difficulties.parquet")
    assert table.column("row").to_pylist() == list(range(8))
    np.testing.assert_allclose(table.column("difficulty").to_numpy(), 0.1 * np.arange(8) + 1.5)
    captured = capsys.readouterr()
    rows = [line.split() for line in captured.out.splitlines()]
    assert ["1", "1.3500", "0.2291", "1.0000"] in rows
    assert "dataflex.select" in captured.err
    assert lab.run() == 0
    assert lab.launches() == []


def test_a_failed_stage_ends_the_command_and_is_made_again(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    lab.behave({"seed-1-second": "crash"})
    assert lab.run() == 1
    assert "seed-1-second failed: training: RuntimeError: out of luck" in capsys.readouterr().err
    assert lab.launches() == NAMES[:2]
    lab.behave({"seed-2-first": "no table"})
    assert lab.run() == 1
    assert "difficulties.parquet is missing; remove" in capsys.readouterr().err
    assert lab.launches() == NAMES[1:3]
    assert lab.run(dry_run=True) == 0
    rows = [line.split()[:3] for line in capsys.readouterr().out.splitlines()]
    assert ["seed-1-first", "complete"] in [row[:2] for row in rows]
    assert ["final", "after", "seed-2-second"] in rows
    assert lab.launches() == []


def test_only_the_stages_that_a_change_concerns_are_trained_again(lab: Lab) -> None:
    assert lab.run() == 0
    lab.launches()
    lab.write(final={"learning_rate": 0.5})
    assert lab.run() == 0
    assert lab.launches() == ["final"]
    lab.write(seeds=[1, 2, 4])
    assert lab.run() == 0
    assert lab.launches() == ["seed-4-first", "seed-4-second", "final"]
    lab.write(keep=0.5)
    assert lab.run() == 0
    assert lab.launches() == ["final"]
    lab.write(seeds=[1, 2])
    assert lab.run() == 0
    assert lab.launches() == ["final"]
    rows = json.loads((lab.data / "first.json").read_text())
    (lab.data / "first.json").write_text(json.dumps(rows[1:]))
    assert lab.run() == 0
    assert lab.launches() == NAMES
    assert (lab.output / "seed-1-first-changed-1").is_dir()


@pytest.mark.parametrize(
    "base, changes, key, said",
    [
        ({"stage": "sft", "dataset": "alpha"}, {}, "halves.stage", "no pairs of responses; use dpo or rm"),
        ({}, {"halves": {"seed": 3}}, "halves.seed", "set by the command itself"),
        ({}, {"halves": {"dataflex.select.half": "first"}}, "halves.dataflex.select.half", "set by the command"),
        ({}, {"final": {"max_steps": 3}}, "final.max_steps", "one pass over the easiest pairs"),
        ({}, {"final": {"dataset": "second"}}, "final.dataset", "must be the same in all trainings"),
        ({}, {"halves": {"learning_rat": 3}}, "halves.learning_rat", "did you mean 'learning_rate'"),
        ({}, {"seeds": [1, 1]}, "seeds", "different whole numbers"),
        ({}, {"keep": 1}, "keep", "less than 1"),
        ({}, {"measurement": 1}, "measurement", "did you mean 'measurements'"),
    ],
)
def test_a_problem_is_reported_once_before_any_training(
    base: dict[str, Any], changes: dict[str, Any], key: str, said: str, lab: Lab
) -> None:
    lab.base |= base
    lab.write(**changes)
    with pytest.raises(ConfigError) as error:
        lab.run()
    found = {problem.key: problem.message for problem in error.value.problems}
    assert len(found) == len(error.value.problems)
    assert said in found[key], found
    assert not lab.output.exists()


def test_seeds_that_measured_other_pairs_are_refused(lab: Lab) -> None:
    assert lab.run() == 0
    file = lab.output / "seed-2-first" / "held_out" / "difficulties.parquet"
    pq.write_table(pq.read_table(file).slice(1), file)
    with pytest.raises(ConfigError, match="measured different pairs"):
        lab.run()


def test_the_halves_of_a_plan_are_those_of_each_seed(lab: Lab) -> None:
    plan = load(lab.file)
    assert [stage.name for stage in plan.all_halves] == NAMES[:-1]
    assert list(plan.halves) == [1, 2]
