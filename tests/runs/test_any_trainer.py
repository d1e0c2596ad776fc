"""Runs of a plain Trainer and of TRL's trainers, beside the same runs of LLaMA-Factory."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from any_trainer_runs import Run
from workshop import Workshop

import example_files
import tiny
from dataflex.record.reader import read_run
from launch import run_script
from records import round_lines

pytestmark = pytest.mark.launch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
COMPOSED = {
    "warmup_steps": 1,
    "update_steps": 3,
    "select": {"method": "loss"},
    "mix": {"method": "proportional", "temperature": 2.0},
    "order": {"method": "sort", "by": "length"},
    "weight": {"method": "loss"},
}
UNIFORM = {"weight": {"method": "uniform"}}
LESS = {
    "warmup_steps": 1,
    "update_steps": 3,
    "domain_column": "topic",
    "columns": ["quality"],
    "select": {"method": "less"},
    "order": {"method": "score_column", "column": "quality"},
}
OF_PAIRS = {"warmup_steps": 1, "update_steps": 3, "select": {"method": "less"}, "mix": {"method": "proportional"}}
OF_PAIRS |= {"weight": {"method": "loss"}, "precompute_ref_log_probs": True}


class Runs:
    """Runs of scripts, started together, and their traces."""

    def __init__(self, root: Path, model: Path, tokens: Path) -> None:
        self.root, self.model, self.tokens = root, model, tokens
        self.specs: list[Run] = []

    def add(self, name: str, kind: str, *, into: str = "", tokenized: bool = False, **given: Any) -> None:
        output, tokens = self.root / (into or name), str(self.tokens) if tokenized else ""
        self.specs.append(Run(name, kind, str(self.model), str(output), tokens=tokens, **given))

    def add_resumed(self, name: str, kind: str, **given: Any) -> None:
        self.add(f"{name}-cut", kind, stop_at=5, **given)
        self.add(f"{name}-resumed", kind, into=f"{name}-cut", resume=True, **given)

    def start(self, processes: int = 1) -> None:
        spec = self.root / f"spec-{len(list(self.root.glob('spec-*.json')))}.json"
        spec.write_text(json.dumps([asdict(run) for run in self.specs]))
        self.specs = []
        run_script(HERE / "any_trainer_runs.py", spec, log=spec.with_suffix(".log"), processes=processes)

    def trace(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.root / name / "trace-0.json").read_text())
        assert found["error"] is None, found["error"]
        return found

    def plans(self, name: str) -> list[str]:
        return [line["plan_sha256"] for line in round_lines(self.root / name)]


def add_llamafactory(runs: Runs, workshop: Workshop) -> None:
    """Add the runs of LLaMA-Factory that write the tokens which the other runs read."""
    given = {
        "dataset": "alpha,beta",
        "finetuning_type": "full",
        "dataflex": COMPOSED,
        "save_strategy": "steps",
        "save_steps": 3,
        "tokenized_path": str(runs.tokens),
    }
    workshop.add("any-trainer-lf", **given)
    workshop.add("any-trainer-lf-cut", stop_at=5, **given)
    workshop.add("any-trainer-lf-resumed", into="any-trainer-lf-cut", **given)
    for item in workshop.specs:
        runs.specs.append(Run(item["name"], "llamafactory", "", item["args"]["output_dir"], item=item))
    workshop.specs = []


def example(name: str, model: Path, data: Path) -> str:
    """Return an example with a tiny tokenizer and tiny data instead of the assets."""
    text = (ROOT / "examples/any_trainer" / f"{name}.py").read_text()
    return text.replace("asset:smollm2-135m-instruct", str(model)).replace("asset:python-docs", str(data))


@pytest.fixture(scope="module")
def runs(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    examples_data = tiny.make_data(tmp_path_factory.mktemp("data"), dict.fromkeys(example_files.DATA_SETS, 32))
    found = Runs(tmp_path_factory.mktemp("scripts"), workshop.model, workshop.root / "any-trainer-tokens")
    # TRL's DPOTrainer can be imported only in a process that has imported LLaMA-Factory before TRL.
    page = (ROOT / "docs/any-trainer.md").read_text()
    (block,) = re.findall(r"```python\n(import llamafactory.*?)```", page, re.DOTALL)
    found.add("page-dpo", "code", code=block)
    found.add("example-dpo", "code", code=example("dpo", found.model, examples_data))
    found.add("dpo-whole", "dpo", section=OF_PAIRS)
    found.add_resumed("dpo", "dpo", section=OF_PAIRS)
    found.add("dpo-without", "dpo", without=True)
    found.add("dpo-uniform", "dpo", section=UNIFORM)
    add_llamafactory(found, workshop)
    found.start()
    for kind in ("plain", "sft"):
        found.add(f"{kind}-composed", kind, section=COMPOSED, tokenized=True)
        found.add_resumed(kind, kind, section=COMPOSED, tokenized=True)
        found.add(f"{kind}-none", kind, tokenized=True)
        found.add(f"{kind}-without", kind, without=True, tokenized=True)
        found.add(f"{kind}-uniform", kind, section=UNIFORM, tokenized=True)
    found.add("sft-less", "sft", section=LESS, args={"eval_strategy": "steps", "eval_steps": 4})
    for name in ("README.md", "docs/any-trainer.md"):
        for number, block in enumerate(re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)):
            if "import dynamic" in block and "DPOTrainer" not in block:
                found.add(f"{Path(name).stem}-{number}", "code", code=block)
    for name in ("trainer", "sft"):
        found.add(f"example-{name}", "code", code=example(name, found.model, examples_data))
    found.start()
    found.add("plain-2", "plain", section=COMPOSED, tokenized=True, args={"per_device_train_batch_size": 1})
    found.add("sft-2", "sft", section=COMPOSED, tokenized=True, args={"per_device_train_batch_size": 1})
    found.start(2)
    return found


def test_all_routes_make_the_same_plans(workshop: Workshop, runs: Runs) -> None:
    plans = workshop.plan_digests("any-trainer-lf")
    assert len(plans) == 4
    losses = workshop.trace("any-trainer-lf")["losses"]
    for kind in ("plain", "sft"):
        assert runs.plans(f"{kind}-composed") == plans
        assert runs.trace(f"{kind}-composed")["losses"] == pytest.approx(losses, rel=1e-6)


@pytest.mark.parametrize("kind", ["plain", "sft"])
def test_two_processes_make_the_plans_of_one(runs: Runs, kind: str) -> None:
    assert runs.plans(f"{kind}-2") == runs.plans(f"{kind}-composed")
    assert runs.trace(f"{kind}-2")["losses"] == pytest.approx(runs.trace(f"{kind}-composed")["losses"], rel=1e-4)


def test_a_resume_is_exact(workshop: Workshop, runs: Runs) -> None:
    whole, resumed = (workshop.trace(f"any-trainer-lf{end}") for end in ("", "-cut"))
    assert resumed["weights"] == whole["weights"]
    for kind, name in (("plain", "plain-composed"), ("sft", "sft-composed"), ("dpo", "dpo-whole")):
        assert runs.trace(f"{kind}-cut")["weights"] == runs.trace(name)["weights"]
        assert runs.plans(f"{kind}-cut") == runs.plans(name)


@pytest.mark.parametrize("kind", ["plain", "sft", "dpo"])
def test_uniform_weights_are_the_plain_run(runs: Runs, kind: str) -> None:
    plain, uniform = runs.trace(f"{kind}-without"), runs.trace(f"{kind}-uniform")
    assert uniform["weights"] == plain["weights"]
    assert uniform["losses"] == pytest.approx(plain["losses"], rel=1e-6)


@pytest.mark.parametrize("kind", ["plain", "sft"])
def test_without_a_section_the_plain_class_trains(runs: Runs, kind: str) -> None:
    none, plain = runs.trace(f"{kind}-none"), runs.trace(f"{kind}-without")
    assert (none["weights"], none["losses"], none["class"]) == (plain["weights"], plain["losses"], plain["class"])
    assert not (runs.root / f"{kind}-none" / "dataflex").exists()


def test_runs_do_not_import_llamafactory(runs: Runs) -> None:
    for name in ("plain-composed", "plain-cut", "sft-uniform", "sft-less"):
        assert not runs.trace(name)["llamafactory"], name
    assert runs.trace("dpo-whole")["llamafactory"]


def test_trl_prepares_the_samples_of_each_domain_and_their_columns(runs: Runs) -> None:
    trace, record = runs.trace("sft-less"), read_run(runs.root / "sft-less")
    assert set(trace["columns"]) == {"input_ids", "labels", "completion_mask"}
    assert record.pool.keys() == {"wiki/x", "wiki/y", "code/x", "code/y"}
    assert sum(record.pool.values()) == 40
    assert {"eval_held_out_loss", "eval_loss"} <= trace["metrics"].keys() or record.evaluations
    assert record.components == {"select": "less", "order": "score_column"}
    assert record.config["trainer_class"] == "trl.trainer.sft_trainer.SFTTrainer"


def test_the_code_of_the_pages_and_the_examples_trains(runs: Runs) -> None:
    folders = ["script", "sft", "dpo", *(f"examples/any_trainer/{name}" for name in ("trainer", "sft", "dpo"))]
    for folder in folders:
        record = read_run(runs.root / "saves" / folder)
        assert record.summary is not None, folder
        assert record.summary.steps in (12, 24, 40), folder
        assert len(record.rounds) >= 3, folder
