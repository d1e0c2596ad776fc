"""Comparisons: the plan, the runs that are made or made again, and the conclusions that intervals support.

A small program that writes the files of a training stands in for the runs. One test at the end compares two real ones.
"""

from __future__ import annotations

import base64
import contextlib
import csv
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import yaml
from filelock import FileLock
from scipy import stats

import pairs
import tiny
from dataflex.commands import compare as command
from dataflex.commands.compare import compare
from dataflex.compare import page
from dataflex.compare import tasks as compare_tasks
from dataflex.compare.experiment import load
from dataflex.compare.merging import merged
from dataflex.compare.outcome import budget_problem, gather
from dataflex.compare.page import cost_chart, forest_charts
from dataflex.compare.remaining import as_text, time_left
from dataflex.compare.result import state_of
from dataflex.compare.runner import Workers, workers
from dataflex.compare.statistics import number
from dataflex.config.checks.plan import trainer_keys
from dataflex.errors import ConfigError

PROGRAM = """
import json, os, random, sys, time
from functools import partial
from pathlib import Path

import yaml

command, target = sys.argv[1:3]
folder = Path(target) if command == "eval" else Path(target).parent
config = yaml.safe_load((folder / "run.yaml").read_text())
data = Path(config["dataset_dir"])
variant, seed = folder.parts[-2], config["seed"]
names = ("FORCE_TORCHRUN", "NPROC_PER_NODE", "MASTER_PORT", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
(data / f"environment-{command}-{variant}.json").write_text(json.dumps({n: os.environ.get(n) for n in names}))
with (data / "launches.txt").open("a") as stream:
    stream.write(json.dumps([command, variant, seed, sys.argv[3:], os.environ.get("OMP_NUM_THREADS")]) + "\\n")
behaviour = json.loads((data / "behaviour.json").read_text()).get(f"{variant}/{seed}", "")
record = folder / "dataflex"


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(value) if path.suffix == ".yaml" else json.dumps(value))


if command == "eval":
    for task in yaml.safe_load((folder / "tasks.yaml").read_text()):
        metrics = {"acc": {"value": 0.5 + seed / 100, "stderr": 0.01}, "acc_norm": {"value": 0.4, "stderr": None}}
        metrics["acc"]["higher_is_better"] = True  # of the other, nothing is said
        subjects = {"law": {"samples": 2, "metrics": {"acc": {"value": 1.0, "stderr": 0.0}}}}
        found = {"task": task["name"], "metrics": metrics, "subjects": subjects, "chance": 0.25, "seconds": 2.0}
        write(record / "tasks" / (task["name"] + ".json"), found)
    sys.exit()
if (folder / "adapter_model.safetensors").exists() and not list(folder.glob("checkpoint-*")):
    if "overwrite_output_dir=true" not in sys.argv:
        sys.exit("dataflex: output_dir holds a trained model")
write(record / "config.yaml", {**config, "dataflex": config["dataflex"] or {}})
(record / "summary.json").unlink(missing_ok=True)
if behaviour == "crash":
    print("Traceback (most recent call last):\\n  ...\\nRuntimeError: out of luck")
    sys.exit(1)
if behaviour == "edits":
    (data / "alpha.json").write_text("[]")
if behaviour == "slow" and not (folder / "checkpoint-2").exists():
    checkpoint = folder / "checkpoint-2"
    checkpoint.mkdir()
    names = ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]
    for name in [*names, "dataflex_state.npz"]:
        (checkpoint / name).touch()
    marker = {"run": "id", "step": 2, "config": {}, "local_processes": 1, "has_scaler": False}
    files = dict.fromkeys([*names, "dataflex_state.npz"], 0)
    (checkpoint / "dataflex_complete.json").write_text(json.dumps({**marker, "files": files}))
    (record / "run.json").write_text('{"id": "id"}')
    (data / "slow.pid").write_text(str(os.getpid()))
    time.sleep(60)
random.seed(f"{variant} {seed}")
loss = 2.0 + seed + {"better": -0.5, "worse": 0.5}.get(variant, 0.0) + random.uniform(-0.01, 0.01)
budget = config["dataflex"].get("train_tokens") or 1000
tokens = {"short": budget - 1, "long": budget + 400}.get(behaviour, budget + 3)
loss = float("nan") if behaviour == "diverges" else loss
numbers = {"loss": loss, "perplexity": 2.718281828 ** loss, "bits_per_byte": loss / 3}
numbers = dict.fromkeys(numbers) if behaviour == "diverges" else numbers  # the record has null for NaN
domain = {**numbers, "tokens": 10, "bytes": 30, "samples": 2}
means = {**numbers, "loss_stderr": 0.02}
costs = {"train_seconds": 8.0, "decision_seconds": 1.0, "evaluate_seconds": 0.5}
evaluation = {
    "step": 4,
    "tokens": tokens,
    **costs,
    "fingerprint": "other" if behaviour == "fingerprint" else "same",
    "domains": {"held": {**domain, "loss_stderr": 0.03}, "beta": {**domain, "bits_per_byte": None}},
    "token_weighted": means,
    "unweighted": means,
}
if config["stage"] == "dpo":
    of_pairs = {"loss": loss, "perplexity": None, "bits_per_byte": None, "accuracy": 1 - loss / 8, "margin": -loss}
    own = {**of_pairs, "tokens": None, "bytes": None, "samples": 2}
    evaluation |= {"domains": {"held_pairs": own, "second": own}, "token_weighted": of_pairs, "unweighted": of_pairs}
write(folder / "adapter_model.safetensors", 1)
history = [{"step": step, "loss": 2.0, "dataflex/tokens": tokens * step // 4} for step in (1, 2, 3, 4)]
write(folder / "trainer_state.json", {"log_history": history, "global_step": 4})
further = {"overhead_fraction": 0.125, "rounds": 0, "tokens": tokens, "steps": 4, "evaluation": evaluation}
further["saved"] = ["train", "model", "eval"]
write(record / "summary.json", {**costs, **further})
"""


class Lab:
    """A folder with an experiment, and the program that stands for a training."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "model").mkdir()
        (folder / "model" / "config.json").write_text("{}")
        self.data = tiny.make_data(folder / "data")
        (folder / "program.py").write_text(PROGRAM)
        self.program = (sys.executable, str(folder / "program.py"))
        self.base = tiny.arguments(folder / "model", self.data, folder / "unused", eval_dataset="held,beta")
        self.output = folder / "out"
        self.file = folder / "experiment.yaml"
        self.behave({})
        self.settings: dict[str, Any] = {
            "base": "base.yaml",
            "output_dir": str(self.output),
            "baseline": "plain",
            "variants": {
                "plain": {"dataflex": {}},
                "better": {"dataflex.select": {"method": "loss", "focus": "high"}},
                "worse": {"dataflex": {"select": {"method": "random"}}, "learning_rate": 0.1},
            },
            "seeds": [1, 2, 3],
            "equal": {"steps": 4},
            "metrics": ["token_weighted_loss"],
        }
        self.write()

    def write(self, **changes: Any) -> Path:
        self.settings |= changes
        (self.folder / "base.yaml").write_text(yaml.safe_dump(self.base))
        self.file.write_text(yaml.safe_dump(self.settings, sort_keys=False))
        return self.file

    def behave(self, behaviour: dict[str, str]) -> None:
        (self.data / "behaviour.json").write_text(json.dumps(behaviour))

    def compare(self, jobs: int = 2, **options: Any) -> int:
        return compare(self.file, program=self.program, at_once=Workers(jobs), **options)

    def launches(self) -> list[tuple[str, str, int]]:
        """Return command, variant and seed of every process since the last call."""
        file = self.data / "launches.txt"
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
        file.unlink(missing_ok=True)
        self.arguments = [(line[3], line[4]) for line in lines]
        return [(line[0], line[1], line[2]) for line in lines]

    def folder_of(self, variant: str, seed: int) -> Path:
        (found,) = [run.folder for run in load(self.file).of(variant) if run.seed == seed]
        return found

    def result(self) -> dict[str, Any]:
        return json.loads((self.output / "comparison.json").read_text())

    def rows(self) -> list[dict[str, str]]:
        return list(csv.DictReader((self.output / "comparison.csv").read_text().splitlines()))


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    monkeypatch.setattr(page, "write", lambda outcome: None)  # it takes a second
    return Lab(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Lab, str]:
    """A comparison that was run, with all its metrics and its page, and what it printed."""
    lab = Lab(tmp_path_factory.mktemp("whole"))
    lab.write(equal={"tokens": 500}, metrics=None)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert lab.compare(dry_run=True) == 0
        assert not lab.output.exists()
        assert lab.compare() == 0
    return lab, said.getvalue()


def test_runs_of_pairs_are_compared_by_their_accuracy(lab: Lab) -> None:
    pairs.make_pairs(lab.data)
    lab.base |= {**pairs.DPO, "eval_dataset": "held_pairs,second"}
    variants = {"plain": {"dataflex": {}}, "better": {"dataflex.select": {"method": "random"}}}
    lab.write(variants=variants, metrics=None)
    assert lab.compare() == 0
    claimed = {each["metric"]: each for each in lab.result()["differences"]}
    assert list(claimed) == ["token_weighted_loss", "unweighted_loss", "token_weighted_accuracy"]
    assert [each["finding"] for each in claimed.values()] == ["better"] * 3
    assert [each["higher_is_better"] for each in claimed.values()] == [False, False, True]
    (plain, *_) = lab.result()["runs"]
    measured = {"loss", "accuracy", "margin"}
    groups = ("held_pairs", "second", "token_weighted", "unweighted")
    assert plain["metrics"].keys() == {f"{group}_{measure}" for group in groups for measure in measured}
    assert len(forest_charts(gather(load(lab.file)))) == 2  # of losses and of accuracies
    lab.write(metrics=["held_pairs_margin", "second_accuracy"])
    assert lab.compare() == 0
    found = {each["metric"]: each["finding"] for each in lab.result()["differences"]}
    assert found == {"held_pairs_margin": "better", "second_accuracy": "better"}
    lab.write(metrics=["held_pairs_perplexity"])
    with pytest.raises(ConfigError, match="unknown metric 'held_pairs_perplexity'"):
        lab.compare()


def all_runs(*variants: str) -> list[tuple[str, str, int]]:
    return [("train", variant, seed) for variant in variants for seed in (1, 2, 3)]


# The plan.


def test_overrides_are_merged_and_null_removes_a_key() -> None:
    base = {"a": 1, "b": {"c": 2, "d": {"e": 3, "f": 4}}, "list": [1, 2]}
    change = {"b.d.e": 5, "b": {"c": None, "g": {"h": 6}}, "list": [7], "a": None, "new.key": "x"}
    assert merged(base, change) == {"b": {"d": {"e": 5, "f": 4}, "g": {"h": 6}}, "list": [7], "new": {"key": "x"}}
    assert base["b"]["c"] == 2


def test_another_method_drops_the_parameters_of_the_base() -> None:
    mix = {"method": "static", "weights": [1]}
    base = {"dataflex": {"select": {"method": "loss", "focus": "low"}, "mix": mix, "seed": 1}, "x": 1}

    def select(change: dict[str, Any]) -> Any:
        result = merged(base, change)
        assert (result["x"], result["dataflex"]["mix"], result["dataflex"]["seed"]) == (1, mix, 1)
        return result["dataflex"].get("select")

    assert select({"dataflex.select": {"method": "less", "rule": "sample"}}) == {"method": "less", "rule": "sample"}
    assert select({"dataflex.select.method": "random"}) == {"method": "random"}
    assert select({"dataflex.select": {"method": "loss", "rule": "sample"}}) == {
        **base["dataflex"]["select"],
        "rule": "sample",
    }
    assert select({"dataflex.select.focus": "high"}) == {"method": "loss", "focus": "high"}
    assert select({"dataflex": {}}) == {"method": "loss", "focus": "low"}
    assert select({"dataflex": {"select": None}}) is None


def test_a_run_is_trained_with_the_keys_of_its_variant(lab: Lab) -> None:
    lab.base |= {"num_train_epochs": 2, "seed": 9, "dataflex": {"mix": {"method": "uniform"}, "update_steps": 2}}
    lab.write(
        equal={"tokens": 500},
        variants={
            "plain": {"dataflex.mix": None},
            "mixed": {},
            "none": {"dataflex": {"mix": None, "update_steps": None}},
        },
    )
    experiment = load(lab.file)
    assert [run.name for run in experiment.runs] == [
        f"{v}/seed {s}" for v in ("plain", "mixed", "none") for s in (1, 2, 3)
    ]
    run = experiment.of("mixed")[1]
    keys = ("seed", "do_train", "do_eval", "num_train_epochs", "max_steps", "output_dir", "learning_rate")
    expected = [2, True, True, None, None, str(run.folder), 0.01]
    assert [run.configuration.get(key) for key in keys] == expected
    section = run.configuration["dataflex"]
    assert (section["seed"], section["train_tokens"], section["mix"]["method"]) == (2, 500, "uniform")
    assert "mix" not in experiment.of("plain")[0].configuration["dataflex"]
    assert experiment.of("none")[0].configuration["dataflex"]["update_steps"] is None
    assert "num_train_epochs: 2" in experiment.notes[0]
    assert "max_steps: 8" in experiment.notes[0]


def test_the_key_of_a_run_changes_with_everything_the_run_depends_on(lab: Lab) -> None:
    def keys() -> dict[str, str]:
        return {run.name: run.key for run in load(lab.file).runs}

    first = keys()
    assert len(set(first.values())) == 9
    lab.write(metrics=["held_loss"], output_dir=str(lab.folder / "elsewhere"))
    assert keys() == first
    big = "1" * 2**20
    changes = {
        "data/alpha.json": json.dumps([{"instruction": "x", "input": "", "output": "y"}] * 48),
        "data/held.json": '[{"instruction": "y", "input": "", "output": "x"}]',
        "model/config.json": '{"x": 1}',
        "model/chat_template.jinja": "1",
        "model/model.safetensors": big + "1" + big,
        "adapter/adapter_config.json": "{}",
        "other adapter/adapter_config.json": "{}",
    }
    for name in ("adapter", "other adapter"):
        (lab.folder / name).mkdir()
        (lab.folder / name / "adapter_config.json").write_text('{"r": 1}')
    lab.base["adapter_name_or_path"] = f"{lab.folder / 'adapter'}, {lab.folder / 'other adapter'}"
    lab.base["default_system"] = "~nobody_of_this_name/a\\0 " + "long " * 2000  # neither a file nor a reason to fail
    lab.write()
    first = keys()
    for name, content in [*changes.items(), ("model/model.safetensors", big + "1" + big[:-1] + "2")]:
        (lab.folder / name).parent.mkdir(exist_ok=True)
        (lab.folder / name).write_text(content)
        now = keys()
        assert not set(now.values()) & set(first.values()), name
        first = now
    # What a training into or below the folder of the model leaves, is no part of the model.
    left = (
        "trainer_state.json",
        "all_results.json",
        "training_args.bin",
        "log.txt",
        "report.html",
        "saves/config.json",
    )
    for name in left:
        (lab.folder / "model" / name).parent.mkdir(exist_ok=True)
        (lab.folder / "model" / name).write_text("1")
    assert keys() == first
    (lab.data / "gamma.json").write_text("[]")  # no run names it
    assert keys() == first
    lab.settings["variants"]["worse"]["learning_rate"] = 0.2
    lab.write()
    now = keys()
    assert {name for name in now if now[name] != first[name]} == {f"worse/seed {seed}" for seed in (1, 2, 3)}


@pytest.mark.parametrize(
    "mix", [{"method": "doge", "target": "validation"}, {"method": "skill_it"}, {"method": "aioli"}]
)
def test_the_key_of_a_run_changes_with_the_validation_data_of_a_mixer(lab: Lab, mix: dict[str, Any]) -> None:
    lab.base |= {"dataset": "alpha,beta", "dataflex": {"mix": {**mix, "validation": ["gamma", "held"]}}}
    lab.write(variants={"plain": {}, "without": {"dataflex": {"mix": {"method": "proportional"}}}}, seeds=[1])
    before, without = load(lab.file).runs
    (lab.data / "gamma.json").write_text('[{"instruction": "x", "input": "", "output": "y"}]')
    after, still_without = load(lab.file).runs
    assert after.key != before.key
    assert still_without.key == without.key


def test_the_key_of_a_run_changes_with_a_table_of_reference_losses(lab: Lab) -> None:
    table = lab.folder / "losses" / "reference.json"
    table.parent.mkdir()
    domains = {name: {"file": name, "samples": 1, "samples_sha256": ""} for name in ("alpha", "beta")}
    for name in domains:
        for file in (f"{name}.f32", f"{name}-counts.npy"):
            (table.parent / file).touch()
    content = {"format": 1, "domains": domains}
    table.write_text(json.dumps(content))
    lab.base |= {"dataset": "alpha,beta"}
    mix = {"method": "doremi", "reference_losses": str(table.parent)}
    lab.write(variants={"plain": {"dataflex.mix": mix}, "without": {"dataflex": {}}}, seeds=[1])
    before, without = load(lab.file).runs
    table.write_text(json.dumps({**content, "reference": "another"}))
    after, still_without = load(lab.file).runs
    assert after.key != before.key
    assert still_without.key == without.key
    mix["reference_model"] = str(lab.folder / "model")  # then the table is only what is kept of the model's losses
    lab.write()
    before = load(lab.file).runs[0]
    table.write_text(json.dumps(content))
    assert load(lab.file).runs[0].key == before.key


def variants(**changes: Any) -> dict[str, Any]:
    return {"variants": {"plain": {"dataflex": {}}, **changes}}


def tasks(*entries: Any) -> dict[str, Any]:
    return {"evaluate": {"tasks": list(entries)}}


PLAIN: dict[str, Any] = {"dataflex": {}}
RANDOM = {"dataflex.select.method": "random"}
BAD = [
    ({"baseline": "plan"}, "baseline: unknown variant 'plan'; did you mean 'plain'?"),
    ({"seeds": []}, "seeds: needs at least one seed"),
    ({"seeds": [1, 2, 1]}, "seeds: 1 is given more than once"),
    ({"seeds": [-1]}, "seeds: -1 is not between 0 and 4294967295"),
    ({"sedes": [1]}, "sedes: unknown key 'sedes'; did you mean 'seeds'?"),
    ({"equal": {"tokns": 3}}, "equal.tokns: unknown key 'tokns'; did you mean 'tokens'?"),
    ({"equal": {}}, "equal: needs exactly one of tokens, steps, wall_clock"),
    ({"equal": {"steps": 3, "tokens": 5}}, "equal: needs exactly one of"),
    ({"equal": {"steps": 0}}, "equal.steps: Input should be greater than or equal to 1, got 0"),
    ({"base": "bse.yaml"}, "base: no such file"),
    ({"metrics": ["token_weighted_los"]}, "unknown metric 'token_weighted_los'; did you mean 'token_weighted_loss'?"),
    ({"metrics": ["held_loss", "held_loss"]}, "metrics: must name one or more metrics, each once"),
    ({"metrics": ["held_loss_stderr"]}, "unknown metric 'held_loss_stderr'; did you mean 'held_loss'?"),
    (variants(), "variants: needs at least two variants"),
    (variants(**{"a/b": PLAIN}), "variants: 'a/b': a name becomes a folder"),
    (variants(Plain=PLAIN), "'plain' and 'Plain' would share a folder"),
    (variants(same={"dataflex": {"updates": -1}}), "variants.same: is the same run as 'plain'"),
    (variants(none={"learning_rate": 1}), "variants.none.dataflex: a run needs a dataflex: section"),
    (variants(own={**PLAIN, "seed": 3}), "variants.own.seed: is set by the comparison;"),
    (variants(own={"dataflex": {"train_steps": 3}}), "variants.own.dataflex.train_steps: is set by the comparison"),
    (
        variants(plain={**PLAIN, "do_eval": True}, own={**PLAIN, "do_eval": True}),  # not attributed to the base
        "variants.own.do_eval: is set by the comparison; variant 'own' may not set it",
    ),
    (
        variants(a={"dataflex.select.method": "los"}, b=RANDOM),
        "variants.a.dataflex.select.method: unknown selector 'los'",
    ),
    (variants(a=RANDOM, b={**PLAIN, "learnig_rate": 1}), "variants.b.learnig_rate: not a LLaMA-Factory argument; did"),
    (variants(a={**RANDOM, "cutoff_len": 32}), "variants.a.cutoff_len: 32 here and 64 in 'plain': the key changes the"),
    (
        variants(a={**RANDOM, "eval_dataset": "gamma"}),
        "variants.a.eval_dataset: 'gamma' here and 'held,beta' in 'plain'",
    ),
    (variants(a={**RANDOM, "load_best_model_at_end": True}), "variants.a.load_best_model_at_end: True is not allowed"),
    (
        variants(a={**RANDOM, "fsdp": "full_shard"}),
        "variants.a.fsdp: shards the model over processes, and each run has one process. Set processes",
    ),
    (
        variants(a={**RANDOM, "gradient_accumulation_steps": 2}),
        "variants.a: trains on 4 samples in a step (per_device_train_batch_size x gradient_accumulation_steps) and 'p",
    ),
    ({"processes": 0}, "processes: Input should be greater than or equal to 1, got 0"),
    (
        variants(a={**RANDOM, "gradient_accumulation_steps": 2}) | {"processes": 3},
        "variants.a: trains on 12 samples in a step (per_device_train_batch_size x gradient_accumulation_steps x pro",
    ),
    (
        variants(a={"selct": None, **PLAIN}),
        "variants.a.selct: removes a key that the base does not have; remove",
    ),
    (variants(a={**PLAIN, "lerning_rate": None}), "variants.a.lerning_rate: removes a key that the base does not"),
    (variants(a={**PLAIN, "lerning_rate": None}), "; did you mean 'learning_rate'?"),
    (variants(a={**PLAIN, "dataflex.mix": None}), "variants.a.dataflex.mix: removes a key that the base does not"),
    (variants(a={"dataflex": {"select": {"fokus": None}}}), "variants.a.dataflex.select.fokus: removes a key"),
    (variants(a={**RANDOM, "dataflex.select.fokus": "high"}), "variants.a.dataflex.select.fokus: unknown key 'fokus'"),
    (variants(a={**PLAIN, "learning_rate.x": 3}), "leads through 'learning_rate', which is 0.01 in the base"),
    (variants(a={**PLAIN, "dataset.0": "alpha"}), "leads through 'dataset', which is 'alpha' in the base"),
    (
        variants(a={"dataflex": {"select": {"method": "loss"}}, **RANDOM}),
        "variants.a.dataflex.select.method: is given twice, by 'dataflex' and by 'dataflex.select.method'",
    ),
    ({"variants": {True: PLAIN, "plain": PLAIN}}, "variants: the name True is read as bool; put it in quotes"),
    ({"seeds": [True]}, "seeds: must be whole numbers, got [True]"),
    ({"base": 3}, "base: must be the name of a file, or a mapping of keys, got 3"),
    (tasks({"file": "mmul.jsonl"}), "evaluate.tasks.0.mmul.file: no such file"),
    (tasks("nowhere.jsonl"), "evaluate.tasks.0"),
    (
        tasks({"file": "mmlu.jsonl", "fewshot_file": "dev.jsonl", "num_fewshot": 2}),
        "tasks.0.mmlu.fewshot_file: no such",
    ),
    (
        tasks({"file": "mmlu.jsonl", "limits": 2}),
        "evaluate.tasks.0.limits: unknown key 'limits'; did you mean 'limit'?",
    ),
    (tasks({"file": "mmlu.jsonl"}) | {"metrics": ["mmlu/ac"]}, "unknown metric 'mmlu/ac'; did you mean 'mmlu/acc'?"),
    (
        tasks({"file": "mmlu.jsonl"}) | {"metrics": ["mmlu/acc_stderr"]},
        "unknown metric 'mmlu/acc_stderr'; did you mean",
    ),
    ({"evaluate": {"task": []}}, "evaluate.task: unknown key 'task'; did you mean 'tasks'?"),
]


def question(text: str) -> str:
    return json.dumps({"question": text, "choices": ["cat", "dog"], "answer": "A", "subject": "law"}) + "\n"


def test_bad_input_is_named_before_anything_runs(lab: Lab) -> None:
    (lab.folder / "mmlu.jsonl").write_text(question("who ?"))
    good = dict(lab.settings)
    for changes, expected in BAD:
        lab.settings = dict(good)
        lab.write(**changes)
        with pytest.raises(ConfigError) as error:
            load(lab.file)
        assert expected in str(error.value), (changes, str(error.value))
    lab.settings = dict(good)
    lab.base |= {"model_name_or_path": "./nowhere", "val_size": 0.1}
    lab.write()
    with pytest.raises(ConfigError) as error:
        load(lab.file)
    assert str(error.value).count("base.model_name_or_path: no model in './nowhere'") == 1  # once, not for each variant
    assert "base.val_size: 0.1 is not allowed in a comparison" in str(error.value)
    del lab.base["eval_dataset"], lab.base["val_size"]
    lab.base["model_name_or_path"] = str(lab.folder / "model")
    lab.write()
    with pytest.raises(ConfigError, match=r"base.eval_dataset: nothing is measured"):
        load(lab.file)
    assert not lab.output.exists()


def test_a_missing_key_is_named_with_the_values_that_it_takes(tmp_path: Path) -> None:
    file = tmp_path / "experiment.yaml"
    file.write_text("base: base.yaml\n")
    with pytest.raises(ConfigError) as error:
        load(file)
    assert {problem.key: problem.message for problem in error.value.problems} == {
        "output_dir": "needed: folder of everything the comparison writes.",
        "baseline": "needed: name of the variant that the others are compared with.",
        "variants": "needed: a mapping of variant names to the keys that each variant changes in the base. For "
        "example: {random: {dataflex.select.method: random}, loss: {dataflex.select.method: loss}}.",
        "seeds": "needed: list of seeds. Every variant is trained with each of them. For example: [1, 2, 3].",
        "equal": "needed: the budget of every run: tokens, steps or wall_clock. For example: {steps: 200}.",
    }


def test_a_misspelt_key_that_a_variant_removes_is_named_with_the_nearest_key(lab: Lab) -> None:
    lab.base["dataflex"] = {"update_steps": 2, "select": {"method": "loss", "focus": "low"}}
    section = "dataflex.select"
    taken = {
        "selct": section, "dataflex.selct": section, "select": section, "dataflex.select.fokus": f"{section}.focus",
        "focus": f"{section}.focus", "update_step": "dataflex.update_steps",
    }  # fmt: skip
    lab.write(variants={"plain": {section: None}, **{f"v{at}": {key: None} for at, key in enumerate(taken)}})
    with pytest.raises(ConfigError) as error:
        load(lab.file)
    for at, (key, nearest) in enumerate(taken.items()):  # all variants together
        expected = f"variants.v{at}.{key}: removes a key that the base does not have; did you mean {nearest!r}?"
        assert expected in str(error.value)
    assert not lab.output.exists()


def test_notes_name_decisions_that_a_variant_does_not_make(lab: Lab) -> None:
    lab.write(variants={"plain": {"dataflex": {}}, "idle": {"dataflex": {"update_steps": 2}}, "better": RANDOM})
    assert [note for note in load(lab.file).notes if "no effect" in note] == [
        "idle: update_steps: without select, mix, order and weight nothing is decided, so it has no effect."
    ]
    lab.base["dataflex"] = {"update_steps": 2}
    lab.write(variants={"plain": {}, "other": {"learning_rate": 0.1}})
    assert [note for note in load(lab.file).notes if "no effect" in note] == [
        "update_steps: without select, mix, order and weight nothing is decided, so it has no effect."
    ]


def test_settings_of_budget_and_machine_are_checked(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    same = {**RANDOM, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    lab.write(output_dir="~/out", **variants(a=same))
    monkeypatch.setenv("HOME", str(lab.folder))
    assert load(lab.file).output == lab.folder / "out"  # as many samples in a step
    lab.write(equal={"tokens": 500}, **variants(a={**RANDOM, "gradient_accumulation_steps": 2}))
    load(lab.file)
    lab.write(equal={"wall_clock": 60})
    with pytest.raises(ConfigError, match=r"--jobs: 2 runs at the same time on 1 device slow each other down"):
        lab.compare(jobs=2)
    with pytest.raises(ConfigError, match=r"--jobs: 3 runs at the same time on 2 devices"):
        compare(lab.file, program=lab.program, at_once=Workers(3, ("0", "1")))
    assert lab.launches() == []
    (lab.folder / "mmlu.jsonl").write_text(question("who ?"))
    lab.write(**tasks("mmlu.jsonl"))
    monkeypatch.setattr(compare_tasks, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'evaluate: needs lm-evaluation-harness: pip install "dataflex\[eval\]"'):
        load(lab.file)


def test_a_run_of_several_processes_is_launched_on_as_many_devices(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setenv("NPROC_PER_NODE", "7")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7,GPU-a,2,3")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 5)
    assert workers(None, 2) == Workers(2, ("4,7", "GPU-a,2"))
    assert workers(1, 5) == Workers(1, ("4,7,GPU-a,2,3",))
    assert workers() == Workers(5, ("4", "7", "GPU-a", "2", "3"))
    (lab.folder / "ds.json").write_text(json.dumps(tiny.deepspeed_config(3)))
    sharded = {"dataflex": {}, "deepspeed": str(lab.folder / "ds.json")}
    (lab.folder / "mmlu.jsonl").write_text(question("who ?"))

    def environments(**changes: Any) -> list[dict[str, str | None]]:
        lab.write(seeds=[1], variants={"plain": PLAIN, "sharded": sharded}, **changes)
        assert compare(lab.file, program=lab.program) == 0
        names = ("train-plain", "train-sharded", "eval-plain")
        return [json.loads((lab.data / f"environment-{name}.json").read_text()) for name in names]

    alone = {"FORCE_TORCHRUN": None, "NPROC_PER_NODE": None, "MASTER_PORT": None}
    one, forced, _ = environments(**tasks("mmlu.jsonl"))
    assert one.items() >= (alone | {"CUDA_VISIBLE_DEVICES": "4"}).items()
    assert (forced["FORCE_TORCHRUN"], forced["NPROC_PER_NODE"], forced["CUDA_VISIBLE_DEVICES"]) == ("1", "1", "7")
    plain, _, evaluated = environments(processes=2)
    assert plain == {**alone, "FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2", "CUDA_VISIBLE_DEVICES": "4,7"} | {
        "OMP_NUM_THREADS": None
    }
    assert evaluated == {**alone, "CUDA_VISIBLE_DEVICES": "4", "OMP_NUM_THREADS": None}
    assert json.loads((lab.folder_of("plain", 1) / "key.json").read_text())["processes"] == 2
    lab.write(processes=6)
    with pytest.raises(ConfigError, match="processes: 6 needs as many devices, and 5 are visible"):
        compare(lab.file, program=lab.program)
    assert not lab.folder_of("plain", 1).exists()
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("dataflex.compare.runner._cores", lambda: 13)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert workers(None, 6) == Workers(1)
    assert [found["OMP_NUM_THREADS"] for found in environments(processes=6)] == ["2", "2", "13"]
    lab.write(processes=3)
    monkeypatch.setenv("NNODES", "2")
    with pytest.raises(ConfigError, match="NNODES or RDZV_ID: a comparison launches all processes of a run on this"):
        compare(lab.file, program=lab.program)


def test_the_number_of_processes_and_the_deepspeed_file_make_another_run(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = lab.folder / "ds.json"
    file.write_text(json.dumps(tiny.deepspeed_config(2)))
    lab.base["deepspeed"] = str(file)

    def keys(processes: int) -> set[str]:
        lab.write(processes=processes)
        return {run.key for run in load(lab.file).runs}

    seen = [keys(1), keys(2), keys(3)]
    file.write_text(json.dumps(tiny.deepspeed_config(3)))
    seen += [keys(1), keys(2)]
    assert len(set().union(*seen)) == 9 * len(seen)
    lab.compare(dry_run=True)
    assert "9 runs to go, each on 2 processes: 36 steps in all" in capsys.readouterr().out


def test_the_plan_of_a_run_has_its_processes_whatever_the_environment_says(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_TORCHRUN", "1")
    monkeypatch.setenv("NPROC_PER_NODE", "5")
    for processes in (1, 4):
        lab.write(processes=processes)
        assert trainer_keys(load(lab.file).configs["plain"]).processes == processes


@pytest.mark.parametrize(("processes", "excess", "said"), [(1, 129, "a step holds 128 at most"), (2, 129, None)])
def test_a_step_of_several_processes_holds_the_tokens_of_all(
    lab: Lab, processes: int, excess: int, said: str | None
) -> None:
    lab.write(equal={"tokens": 500}, processes=processes, seeds=[1])
    experiment = load(lab.file)

    def problem(excess: int) -> str | None:
        result: Any = SimpleNamespace(costs={"tokens": 500.0 + excess, "steps": 4.0}, spent_before=400.0)
        return budget_problem(experiment.runs[0], result, experiment)

    found = problem(excess)
    assert (found is None) if said is None else (found is not None and said in found)
    assert problem(128 * processes) is not None


def test_ctrl_c_while_the_experiment_is_read_ends_the_command(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "load", interrupted)
    assert lab.compare() == 130
    assert f"dataflex-cli compare {lab.file}" in capsys.readouterr().err


# Running.


def test_every_run_is_made_once_and_its_results_are_read(
    whole: tuple[Lab, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lab, out = whole
    monkeypatch.setattr(page, "write", lambda outcome: None)
    assert out.count("to run") == 10  # nine in the plan, and their number when they are begun
    assert "9 runs to go: 4,500 tokens in all; the seconds are unknown until a run is complete." in out
    assert sorted(lab.launches()) == sorted(all_runs("plain", "better", "worse"))
    assert {threads for _, threads in lab.arguments} <= {
        os.environ.get("OMP_NUM_THREADS"),
        str(max(1, len(os.sched_getaffinity(0)) // 2)),
    }
    losses = {}
    for variant, seed in itertools.product(("plain", "better", "worse"), (1, 2, 3)):
        summary = json.loads((lab.folder_of(variant, seed) / "dataflex" / "summary.json").read_text())
        losses[variant, seed] = summary["evaluation"]["token_weighted"]["loss"]
    for row in lab.rows():
        assert float(row["token_weighted_loss"]) == losses[row["variant"], int(row["seed"])]
        assert (row["status"], row["tokens"], row["steps"], row["train_seconds"]) == ("compared", "503", "4", "8.0")
        assert row["held_bits_per_byte"]
        assert "beta_bits_per_byte" not in row  # it has none
    result = lab.result()
    assert result["claims"] == ["token_weighted_loss", "unweighted_loss", "token_weighted_bits_per_byte"]
    for found in result["differences"]:
        if found["metric"] == "token_weighted_loss":
            own, others = ([losses[name, seed] for seed in (1, 2, 3)] for name in (found["variant"], "plain"))
            expected = stats.ttest_rel(own, others).confidence_interval(0.95)
            assert found["t_interval_95"] == pytest.approx([expected.low, expected.high])
            assert found["mean"] == pytest.approx(np.mean(own) - np.mean(others))
            assert found["p_value"] == pytest.approx(stats.ttest_rel(own, others).pvalue)
        assert found["finding"] == found["variant"]
    plain = [found["p_value"] for found in result["differences"]]
    smallest = int(np.argmin(plain))
    assert result["differences"][smallest]["p_holm"] == pytest.approx(6 * plain[smallest])
    errors = dict.fromkeys(["token_weighted_loss", "unweighted_loss"], pytest.approx(0.02))
    assert {name: each["stderr"] for name, each in result["variants"].items()} == {
        "plain": errors, "better": errors, "worse": errors,
    }  # fmt: skip
    assert {row["held_loss_stderr"] for row in lab.rows()} == {"0.03"}
    assert "beta_loss_stderr" not in lab.rows()[0]  # it has none
    text = (lab.output / "comparison.md").read_text()
    for line in (out, text):
        assert "better: token-weighted loss 0." in line
        assert "p (Holm)" in line
        assert "6 comparisons were made, and findings hold after Holm's correction for this number: if no" in line
    assert lab.compare() == 0
    assert "nothing to do: all 9 runs are complete." in capsys.readouterr().out
    assert lab.launches() == []
    assert lab.compare(dry_run=True) == 0
    assert "Nothing to do." in capsys.readouterr().out


def test_the_page_shows_the_differences(whole: tuple[Lab, str]) -> None:
    pytest.importorskip("plotly")
    lab, _ = whole
    assert "Comparison with plain" in (lab.output / "comparison.html").read_text()
    outcome = gather(load(lab.file))
    loss, bits = forest_charts(outcome)
    assert loss.figure is not None
    assert bits.figure is not None
    traces = loss.figure["data"]
    assert [trace["name"] for trace in traces] == ["better", "worse"]
    assert len({(trace["marker"]["color"], trace["marker"]["symbol"][0]) for trace in traces}) == 2
    assert len({trace["marker"]["symbol"][0] for trace in traces}) == 2  # told apart without colour
    for trace in traces:
        own = [each for each in outcome.differences if each.variant == trace["name"] and each.metric.endswith("loss")]
        means, above, below = (
            unpacked(part) for part in (trace["x"], trace["error_x"]["array"], trace["error_x"]["arrayminus"])
        )
        np.testing.assert_allclose(means, [each.mean for each in own])
        for each, said in zip(own, trace["text"], strict=True):
            assert f"p (Holm) {number(each.p_holm or 0)}" in said
        np.testing.assert_allclose(means + above, [each.interval[1] for each in own if each.interval])
        np.testing.assert_allclose(means - below, [each.interval[0] for each in own if each.interval])
    cost = cost_chart(outcome).figure
    assert cost is not None
    assert [(trace["name"], unpacked(trace["x"]).tolist()) for trace in cost["data"]] == [
        ("training", [8.0] * 3), ("decisions", [1.0] * 3), ("evaluation", [0.5] * 3),
    ]  # fmt: skip


def unpacked(values: dict[str, str]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(values["bdata"]), dtype=values["dtype"])


def test_only_missing_runs_are_made(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    lab.write(seeds=[1], **variants(better=RANDOM))
    assert lab.compare() == 0
    lab.launches()
    old = lab.folder_of("better", 1)
    lab.settings["variants"]["better"] = {"dataflex.select": {"method": "loss", "focus": "low"}}
    lab.write()
    assert lab.compare() == 0
    assert lab.launches() == [("train", "better", 1)]
    assert lab.folder_of("better", 1) != old
    assert (old / "complete.json").is_file()
    assert len(lab.rows()) == 2

    # Cut off between the training and its end.
    folder = lab.folder_of("plain", 1)
    (folder / "complete.json").write_text("{half")
    assert lab.compare(dry_run=True) == 0
    assert re.search(r"plain\s+1\s+to record\s+\S+\s+0\n", capsys.readouterr().out)
    assert lab.compare() == 0
    assert lab.launches() == []
    # The model was saved and the evaluation after it was not made: LLaMA-Factory refuses such a folder.
    summary = json.loads((folder / "dataflex" / "summary.json").read_text())
    (folder / "complete.json").unlink()
    (folder / "dataflex" / "summary.json").write_text(json.dumps({**summary, "evaluation": {}}))
    assert lab.compare() == 0
    assert lab.launches() == [("train", "plain", 1)]
    assert lab.arguments[0][0] == ["overwrite_output_dir=true"]

    # Folders of others.
    key = json.loads((folder / "key.json").read_text())
    (folder / "key.json").write_text(json.dumps({**key, "format": 3}))
    with pytest.raises(ConfigError, match=r"key.json: expected format 2 .* found format 3"):
        lab.compare()
    (folder / "key.json").write_text(json.dumps(key)[:20])
    with pytest.raises(ConfigError, match=r"key.json is not readable JSON"):
        lab.compare()


def test_a_run_whose_inputs_changed_is_not_compared(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    lab.write(seeds=[1], **variants(better=RANDOM, worse={"dataflex.mix.method": "uniform"}))
    before = (lab.data / "alpha.json").read_text()
    lab.behave({"better/1": "edits"})
    assert lab.compare(jobs=1) == 1
    assert lab.launches() == [("train", "plain", 1), ("train", "better", 1)]  # the third is not begun
    said = capsys.readouterr().err
    changed = re.escape(str(lab.data / "alpha.json")) + " changed while the command was running. Run the command again"
    assert len(re.findall(rf"(better|worse)/seed 1: failed after \d+ s: {changed}", said)) == 2
    assert "complete.json" not in " ".join(path.name for path in lab.output.glob("runs/better/*/*"))
    assert len(list(lab.output.glob("runs/better/*-changed-1/adapter_model.safetensors"))) == 1
    (lab.data / "alpha.json").write_text(before)
    lab.behave({})
    assert lab.compare(jobs=1) == 0  # what was trained on other data is not taken for this
    assert lab.launches() == [("train", "better", 1), ("train", "worse", 1)]


def test_files_that_cannot_be_written_are_named(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    lab.write(seeds=[1], **variants(better=RANDOM))
    folder = lab.folder_of("plain", 1)
    folder.parent.mkdir(parents=True)
    folder.write_text("in the way")
    assert lab.compare() == 1
    assert "plain/seed 1: failed after 0 s: [Errno" in capsys.readouterr().err
    assert [(row["variant"], row["status"]) for row in lab.rows()] == [("plain", "missing"), ("better", "compared")]
    (lab.output / "comparison.csv").unlink()
    (lab.output / "comparison.csv").mkdir()
    with pytest.raises(ConfigError, match=r"comparison.csv cannot be written"):
        lab.compare()


def test_a_failing_variant_is_named_and_the_others_finish(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    lab.write(seeds=[1, 2])
    lab.behave({"better/2": "crash"})
    assert lab.compare() == 1
    assert len(lab.launches()) == 6
    captured = capsys.readouterr()
    assert re.search(
        r"better/seed 2: failed after \d+ s: training: RuntimeError: out of luck \(status 1\); see", captured.err
    )
    rows = {(row["variant"], row["seed"]): row for row in lab.rows()}
    assert [rows["better", seed]["status"] for seed in "12"] == ["compared", "failed"]
    assert "out of luck" in rows["better", "2"]["problem"]
    sentences = " ".join(lab.result()["sentences"])
    assert "better (1 of 2 seeds): token-weighted loss 0.5" in sentences
    assert "no claim is possible from one seed" in sentences
    assert "worse: token-weighted loss" in sentences
    assert compare(lab.file, dry_run=True) == 0
    assert capsys.readouterr().out.count("failed before") == 1
    lab.behave({})
    assert lab.compare() == 0
    assert lab.launches() == [("train", "better", 2)]
    assert {row["status"] for row in lab.rows()} == {"compared"}


def ended(process: psutil.Process) -> bool:
    """Return whether a process has ended, also if no parent has read its status."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def stopped(lab: Lab, number: int) -> tuple[int | None, str]:
    """Stop a comparison in a process of its own while seed 2 of ``better`` trains; return its status and errors."""
    lab.behave({"better/2": "slow"})
    errors = lab.folder / "errors.txt"

    def work() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell has it for what runs in the background
        with errors.open("w") as sys.stderr:
            sys.exit(lab.compare(jobs=1))

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    for _ in range(1500):
        if (lab.data / "slow.pid").exists() and (lab.data / "slow.pid").read_text():
            break
        assert process.is_alive(), errors.read_text()
        time.sleep(0.02)
    trainer = psutil.Process(int((lab.data / "slow.pid").read_text()))
    assert process.pid is not None
    os.kill(process.pid, number)
    for _ in range(1500):
        if ended(trainer):
            break
        time.sleep(0.01)
    assert ended(trainer)
    process.join(20)
    return process.exitcode, errors.read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="processes end with their parent on Linux only")
def test_a_killed_comparison_resumes(lab: Lab) -> None:
    lab.settings["variants"].pop("worse")
    lab.write()
    assert stopped(lab, signal.SIGKILL)[0] == -signal.SIGKILL
    order = [("train", variant, seed) for seed in (1, 2, 3) for variant in ("plain", "better")]
    assert lab.launches() == order[:4]  # seed by seed
    assert lab.compare() == 0
    assert sorted(lab.launches()) == sorted(order[3:])
    assert all(arguments == [] for arguments, _ in lab.arguments)  # it went on from its checkpoint


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_runs_and_the_command_to_resume_is_printed(
    number: int, lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    lab.write(seeds=[2], variants={"plain": {"dataflex": {}}, "better": {"dataflex.select.method": "random"}})
    status, said = stopped(lab, number)
    assert status == 128 + number
    assert "stopped. Complete runs are kept" in said
    assert f"dataflex-cli compare {lab.file}" in said
    assert lab.compare(dry_run=True) == 0
    out = capsys.readouterr().out
    assert re.search(r"plain\s+2\s+complete", out)
    assert re.search(r"better\s+2\s+to resume", out)


def test_runs_are_counted_and_the_time_left_is_known_after_the_first(
    lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    lab.write(seeds=[1], **variants(better=RANDOM))
    assert lab.compare() == 0
    capsys.readouterr()
    lab.write(seeds=[1, 2, 3])
    assert lab.compare(jobs=1) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("run ")]
    known = r"(better|plain)/seed (2|3): complete after \d+ s"
    shapes = [
        r"run 3 of 6: plain/seed 2: training \(.*\)",
        rf"run 3 of 6: {known}; 3 to go, about [\d.]+ (s|min)( to [\d.]+ (s|min))? left",
        r"run 4 of 6: better/seed 2: training \(.*\)",
        rf"run 4 of 6: {known}; 2 to go, about .* left",
        r"run 5 of 6: plain/seed 3: training \(.*\)",
        rf"run 5 of 6: {known}; 1 to go, about .* left",
        r"run 6 of 6: better/seed 3: training \(.*\)",
        rf"run 6 of 6: {known}",
    ]
    assert len(said) == len(shapes), said
    for line, shape in zip(said, shapes, strict=True):
        assert re.fullmatch(shape, line), (line, shape)


def test_the_time_left_is_that_of_the_places_at_work() -> None:
    assert time_left({}, [("a", 5.0)], ["a"] * 9, 1) is None  # nothing has ended yet
    assert time_left({"a": [10.0]}, [], ["a"] * 4, 1) == (40.0, 40.0)
    assert time_left({"a": [10.0]}, [], ["a"] * 4, 3) == (20.0, 20.0)  # two of the three have one run
    assert time_left({"a": [10.0, 14.0]}, [("a", 4.0)], ["a"], 2) == (10.0, 14.0)
    assert time_left({"a": [10.0], "b": [30.0]}, [("a", 4.0)], ["b"], 1) == (36.0, 36.0)
    assert time_left({"a": [10.0], "b": [30.0]}, [], ["c"], 1) == (10.0, 30.0)  # another variant: as any run
    assert time_left({"a": [10.0]}, [("a", 25.0)], [], 2) == (0.0, 0.0)  # longer than expected already
    assert as_text(None) == as_text((0.0, 0.0)) == ""
    assert as_text((36.0, 36.0)) == as_text((34.0, 38.0)) == ", about 36 s left"
    assert as_text((60.0, 400.0)) == ", about 60 s to 6.7 min left"


def test_two_comparisons_at_once_are_refused(lab: Lab) -> None:
    lab.output.mkdir()
    with FileLock(lab.output / ".lock"), pytest.raises(ConfigError, match=r"another command is at work in"):
        lab.compare()
    assert lab.launches() == []
    lab.write(seeds=[1], **variants(better=RANDOM))
    assert lab.compare() == 0
    with FileLock(lab.output / ".lock", timeout=0):  # it was given back
        pass


def test_runs_that_cannot_be_compared_are_named_and_left_out(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    lab.write(equal={"tokens": 500}, metrics=None)
    lab.behave({"worse/2": "diverges", "worse/3": "long"})
    assert lab.compare() == 1
    assert "worse (1 of 3 seeds): token-weighted loss" in capsys.readouterr().out

    def edit(variant: str, seed: int, **changes: Any) -> None:
        file = lab.folder_of(variant, seed) / "complete.json"
        found = json.loads(file.read_text())
        changes = {name: {**found[name], **new} if isinstance(new, dict) else new for name, new in changes.items()}
        file.write_text(json.dumps({**found, **changes}))

    edit("better", 1, fingerprint="other")
    edit("better", 2, costs={"tokens": 499})
    edit("worse", 1, metrics={"unweighted_loss": math.nan})  # never written: then it lacks it
    stored = lab.folder_of("worse", 1) / "complete.json"
    found = json.loads(stored.read_text())
    del found["metrics"]["unweighted_loss"]
    stored.write_text(json.dumps(found))
    outcome = gather(load(lab.file))
    assert {row.run.name: row.problem for row in outcome.rows if row.problem} == {
        "better/seed 1": "its evaluation data differs: fingerprint other, and same in the other runs",
        "better/seed 2": "499 tokens trained on, fewer than the 500 of the budget",
        "worse/seed 1": "the run has no unweighted_loss, which other runs have",
        "worse/seed 2": "token_weighted_loss is not finite: training diverged",
        "worse/seed 3": "900 tokens trained on, more than one step over the budget of 500: 675 before the last step",
    }
    assert {row.status for row in outcome.rows if row.problem} == {"left out"}
    assert {found.variant: found.seeds for found in outcome.differences} == {"better": (3,), "worse": ()}


def test_tasks_are_evaluated_and_alone_again_when_they_change(lab: Lab) -> None:
    """The name of the first has "loss" in it, and "error" that of the second; more of both is better."""
    for name in ("glossary", "errors"):
        (lab.folder / f"{name}.jsonl").write_text(question("who ?"))
    glossary, errors = {"file": "glossary.jsonl", "limit": 1}, {"file": "errors.jsonl"}
    lab.write(seeds=[1], metrics=None, **variants(better=RANDOM), **tasks(glossary))
    assert lab.compare() == 0
    runs = [("better", 1), ("plain", 1)]
    assert sorted(lab.launches()) == sorted((command, *run) for command in ("eval", "train") for run in runs)
    assert lab.result()["claims"][-1] == "glossary/acc"
    for row in lab.rows():
        assert float(row["glossary/acc"]) == pytest.approx(0.51)
        assert (row["glossary/acc_stderr"], row["glossary/law/acc"], row["task_seconds"]) == ("0.01", "1.0", "2.0")

    def evaluated() -> list[tuple[str, str, int]]:
        assert lab.compare() == 0
        return sorted(lab.launches())

    def asked() -> list[str]:
        return [task["name"] for task in yaml.safe_load((lab.folder_of("plain", 1) / "tasks.yaml").read_text())]

    lab.write(metrics=["glossary/acc", "errors/acc", "errors/acc_norm"], **tasks(glossary, errors))
    assert {state_of(run, load(lab.file)) for run in load(lab.file).runs} == {"to evaluate"}
    assert evaluated() == [("eval", *run) for run in runs]
    assert asked() == ["errors"]
    assert {row["task_seconds"] for row in lab.rows()} == {"4.0"}
    found = {each["metric"]: each["higher_is_better"] for each in lab.result()["differences"]}
    assert found == {"glossary/acc": True, "errors/acc": True, "errors/acc_norm": None}
    assert {(each["p_value"], each["p_holm"]) for each in lab.result()["differences"]} == {(None, None)}  # one seed
    assert "errors acc_norm (direction not known)" in (lab.output / "comparison.md").read_text()
    assert lab.result()["variants"]["plain"]["stderr"] == {"glossary/acc": 0.01, "errors/acc": 0.01}
    lab.write(metrics=None, **tasks(errors))
    assert evaluated() == []
    assert "glossary/acc" not in lab.rows()[0]
    lab.write(**tasks(glossary, errors))
    assert evaluated() == []
    assert "glossary/acc" in lab.rows()[0]
    (lab.folder / "glossary.jsonl").write_text(question("what ?"))
    assert evaluated() == [("eval", *run) for run in runs]
    assert asked() == ["glossary"]


# Real runs.


def test_names_of_the_harness_are_checked_before_anything_runs(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    from dataflex.evaluation import harness

    known = tmp_tasks(lab, "hellaswag", "arc_easy")  # looking through all of the harness's own takes long
    manager = partial(harness.TaskManager, include_path=str(known), include_defaults=False)
    monkeypatch.setattr(harness, "TaskManager", manager)
    lab.write(**tasks("hellaswag", "helaswag", {"task": "arc_esy", "num_fewshot": 2}))
    with pytest.raises(ConfigError) as error:
        load(lab.file)
    said = "neither a file nor a task of lm-evaluation-harness"
    assert f"evaluate.tasks.1: {said}: 'helaswag'; did you mean 'hellaswag'?" in str(error.value)
    assert f"evaluate.tasks.2: {said}: 'arc_esy'; did you mean 'arc_easy'?" in str(error.value)
    assert "evaluate.tasks.0" not in str(error.value)
    lab.write(**tasks("hellaswag"), metrics=["hellaswag/acc"])  # its metrics are known when it has run
    load(lab.file)
    lab.write(metrics=["hellaswag/acc_stderr"])
    with pytest.raises(ConfigError, match=r"metrics: unknown metric 'hellaswag/acc_stderr'"):
        load(lab.file)


def tmp_tasks(lab: Lab, *names: str) -> Path:
    """Write tasks of these names as the harness knows them."""
    folder = lab.file.parent / "harness"
    folder.mkdir()
    for name in names:
        config = {"task": name, "dataset_path": "json", "output_type": "multiple_choice", "test_split": "test"}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.mark.launch
def test_a_comparison_of_two_real_runs_resumes_after_a_kill(tmp_path: Path) -> None:
    model, data = tiny.make_model(tmp_path / "model"), tiny.make_data(tmp_path / "data")
    base = tiny.arguments(model, data, tmp_path, dataset="alpha,beta", eval_dataset="held,gamma")
    base |= {"save_strategy": "steps", "save_steps": 20, "save_total_limit": 1, "logging_steps": 10}
    variants = {"plain": {"dataflex": {}}, "random": {"dataflex": {"update_steps": 40, "select": {"method": "random"}}}}
    settings = {"base": base, "output_dir": "out", "baseline": "plain", "variants": variants, "seeds": [1]}
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump({**settings, "equal": {"tokens": 10_000}}))
    command = [sys.executable, "-m", "dataflex", "compare", "experiment.yaml", "--jobs", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def begin() -> subprocess.Popen[str]:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes)

    process = begin()
    checkpoints: list[Path] = []
    while not checkpoints:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
        checkpoints = list(tmp_path.glob("out/runs/*/*/checkpoint-*/dataflex_complete.json"))
    children = psutil.Process(process.pid).children()
    assert len(children) == 2
    process.kill()
    process.communicate()
    _, alive = psutil.wait_procs(children, timeout=20)
    for child in alive:  # elsewhere than on Linux
        child.kill()
    assert not list(tmp_path.glob("out/runs/*/*/complete.json"))

    process = begin()
    said, _ = process.communicate(timeout=400)
    assert process.returncode == 0, said
    result = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert [run["status"] for run in result["runs"]] == ["compared", "compared"]
    assert "no claim is possible from one seed" in said
    for run in result["runs"]:
        folder = tmp_path / run["folder"]
        assert 10_000 <= run["costs"]["tokens"] < 10_000 + 2 * 64
        state = json.loads((folder / "trainer_state.json").read_text())
        assert state["global_step"] == run["costs"]["steps"] > 100
        lines = [json.loads(line) for line in (folder / "dataflex" / "evaluations.jsonl").read_text().splitlines()]
        assert run["metrics"]["held_loss"] == lines[-1]["domains"]["held"]["loss"]
        assert run["metrics"]["held_loss_stderr"] == lines[-1]["domains"]["held"]["loss_stderr"] > 0
        assert run["fingerprint"] == lines[-1]["fingerprint"]
    cut = checkpoints[0].parents[1]
    lines = [json.loads(line) for line in (cut / "trainer_log.jsonl").read_text().splitlines()]
    assert [line["current_steps"] for line in lines if "loss" in line].count(10) == 1  # it did not begin anew


@pytest.mark.launch
def test_two_processes_have_the_budget_and_the_result_of_one_with_the_same_global_batch(tmp_path: Path) -> None:
    model, data = tiny.make_model(tmp_path / "model"), tiny.make_data(tmp_path / "data")
    base = tiny.arguments(model, data, tmp_path, dataset="alpha,beta", eval_dataset="held,gamma")
    variants = {"plain": {"dataflex": {}}, "random": {"dataflex": {"update_steps": 10, "select": {"method": "random"}}}}
    settings = {"base": base, "baseline": "plain", "variants": variants, "seeds": [1], "equal": {"tokens": 2_000}}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = {}
    for processes in (2, 1):
        base["gradient_accumulation_steps"] = 2 // processes
        file = tmp_path / f"experiment-{processes}.yaml"
        file.write_text(yaml.safe_dump({**settings, "output_dir": f"out-{processes}", "processes": processes}))
        command = [sys.executable, "-m", "dataflex", "compare", file.name]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        running[processes] = subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes)
    found = []
    for processes, process in running.items():
        said, _ = process.communicate()
        assert process.returncode == 0, said
        found.append(json.loads((tmp_path / f"out-{processes}" / "comparison.json").read_text())["runs"])
        for run in found[-1]:
            assert (run["status"], 2_000 <= run["costs"]["tokens"] < 2_000 + 4 * 64) == ("compared", True)
            record = json.loads((tmp_path / run["folder"] / "dataflex" / "environment.json").read_text())
            assert f'"processes": {processes},' in json.dumps(record)
    for many, one in zip(*found, strict=True):
        assert [many["costs"][key] for key in ("tokens", "steps")] == [one["costs"][key] for key in ("tokens", "steps")]
        assert many["metrics"] == pytest.approx(one["metrics"], rel=1e-3)
