"""``dataflex-cli reference`` and runs that read its tables. All commands run in one process, one after another."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import tiny
from dataflex.api.reference import TABLE_FILE
from launch import ON_THE_CPU, run_script

pytestmark = [pytest.mark.launch, pytest.mark.timeout(900)]

COMMANDS = """
import contextlib, io, json, os, sys, traceback
os.environ["LLAMAFACTORY_VERBOSITY"] = "WARN"
from pathlib import Path
from dataflex import cli
from dataflex.integrations.llamafactory import reference_run

loads, load = [], reference_run.load_reference


def loading(name, *args):
    loads.append(name)
    return load(name, *args)


reference_run.load_reference = loading
results = {}
for name, arguments in json.load(open(sys.argv[1])).items():
    out, err = io.StringIO(), io.StringIO()
    loads.clear()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = cli.main(arguments)
        except SystemExit as error:
            status = error.code
        except BaseException:
            status = traceback.format_exc()
    results[name] = {"status": status, "out": out.getvalue(), "err": err.getvalue(), "loads": list(loads)}
Path(sys.argv[2]).write_text(json.dumps(results))
"""


def write_inputs(root: Path) -> None:
    tiny.make_model(root / "model", dropout=0.1)
    tiny.make_model(root / "reference", seed=5)
    data = tiny.make_data(root / "data")
    base = tiny.arguments(root / "model", data, root / "out", dataset="alpha,beta", save_strategy="no")
    full = {**base, "finetuning_type": "full"}
    for key in ("lora_rank", "lora_target"):
        del full[key]
    excess = Path(__file__).parents[1] / "plugins" / "excess_tokens.py"
    sections: dict[str, Any] = {
        "plain": None,
        "doremi": {"mix": {"method": "doremi", "reference_losses": str(root / "table")}},
        "rho": {"update_steps": 2, "select": {"method": "rho_loss", "reference_losses": str(root / "table")}},
        "weight": {
            "plugins": [str(excess)],
            "weight": {"method": "excess_tokens", "reference_losses": str(root / "table")},
        },
    }
    for name, section in sections.items():
        section = {} if section is None else {"dataflex": section}
        (root / f"{name}.yaml").write_text(yaml.safe_dump({**full, "output_dir": str(root / name), **section}))


def commands(root: Path) -> dict[str, list[str]]:
    plain, doremi, rho, weight = (str(root / f"{name}.yaml") for name in ("plain", "doremi", "rho", "weight"))
    of = ["--model", str(root / "reference"), "--output"]
    table, floats = str(root / "table"), str(root / "floats")
    key = "dataflex.mix.reference_losses"
    return {
        "check without a table": ["check", doremi],
        "made": ["reference", doremi, *of, table],
        "again": ["reference", plain, *of, table],
        "check": ["check", doremi],
        "floats": ["reference", plain, *of, floats, "--type", "float32"],
        "in a run": [
            "train", doremi, f"dataflex.mix.reference_model={root / 'reference'}", f"{key}={root / 'in-run'}",
            f"output_dir={root / 'in-run-out'}", "max_steps=1",
        ],
        "doremi of bytes": ["train", doremi],
        "doremi of floats": ["train", doremi, f"{key}={floats}", f"output_dir={root / 'doremi-floats'}"],
        "rho": ["train", rho],
        "rho of floats": [
            "train", rho, f"dataflex.select.reference_losses={floats}", f"output_dir={root / 'rho-floats'}",
        ],
        "weight": ["train", weight],
        "weight, a table of its own": ["reference", weight, *of, str(root / "whole")],
        "low precision": ["reference", plain, *of, str(root / "bf16"), "bf16=true", "use_cpu=true"],
        "own model": ["reference", plain, "dataset=gamma", "--output", str(root / "own"), "deepspeed=nothing.json"],
        "texts": [
            "reference", plain, "stage=pt", "dataset=texts,pages", "packing=true", *of, str(root / "texts"),
        ],
        "other data": ["train", doremi, "cutoff_len=24", f"output_dir={root / 'other'}"],
        "other samples": ["reference", doremi, "cutoff_len=24", *of, table],
        "other type": ["reference", doremi, *of, table, "--type", "float32"],
        "other model": ["reference", doremi, "--output", table],
        "no model": ["reference", doremi, "--model", str(root / "data"), "--output", str(root / "none")],
        "no words": ["reference", doremi, "--type", "word", *of, str(root / "none")],
        "streaming": ["reference", doremi, "streaming=true", *of, str(root / "none")],
        "no output": ["reference", doremi],
        "wrong key": ["reference", doremi, "cutoff_lenn=3", *of, str(root / "none")],
        "check of lost domains": ["check", doremi, "dataset=alpha,gamma"],
    }  # fmt: skip


class Outcomes:
    """What every command left."""

    def __init__(self, root: Path, results: dict[str, dict[str, Any]]) -> None:
        self.root, self.results = root, results

    def text(self, name: str, status: Any = 0) -> str:
        """Return what a command printed, after a look at its exit status."""
        result = self.results[name]
        assert result["status"] == status, (name, result["status"], result["out"][-500:], result["err"][-3000:])
        return result["out"] if status == 0 else result["err"]

    def table(self, name: str) -> dict[str, Any]:
        return json.loads((self.root / name / TABLE_FILE).read_text())


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    root = tmp_path_factory.mktemp("reference")
    write_inputs(root)
    script, spec, result = root / "commands.py", root / "in.json", root / "out.json"
    script.write_text(COMMANDS)
    spec.write_text(json.dumps(commands(root)))
    run_script(script, spec, result, log=root / "log", cwd=root)
    return Outcomes(root, json.loads(result.read_text()))


def test_the_command_says_what_the_table_holds(outcomes: Outcomes) -> None:
    out, table = outcomes.text("made"), outcomes.table("table")
    assert (table["type"], list(table["domains"])) == ("byte", ["alpha", "beta"])
    tokens = sum(entry["tokens"] for entry in table["domains"].values())
    assert f"reference losses of 80 samples, {tokens} tokens as byte (" in out
    assert "error of a loss l: at most sqrt(l m) / 253 + m / 256000, m: the largest of 128 losses in a row" in out
    (rms,) = re.findall(r"measured against float32: mean .*, rms ([\d.]+), largest [\d.]+", out)
    assert 0.001 < float(rms) < 0.02
    folder = outcomes.root / "table"
    last = f"dataflex: to use the table, add this line to a component of dataflex: reference_losses: {folder}"
    assert out.splitlines()[-1] == last
    size = sum(path.stat().st_size for path in folder.iterdir() if path.suffix in (".u8", ".npy"))
    assert f"({size / tokens:.3f} bytes a token)" in out
    assert outcomes.results["made"]["loads"] == [str(outcomes.root / "reference")]


def test_a_finished_table_is_kept(outcomes: Outcomes) -> None:
    assert outcomes.text("again").splitlines()[-4:] == outcomes.text("made").splitlines()[-4:]
    assert outcomes.results["again"]["loads"] == []  # not even the model is loaded


def test_a_table_is_checked_before_anything_is_loaded(outcomes: Outcomes) -> None:
    assert "holds no table of reference losses" in outcomes.text("check without a table", 2)
    assert "no problems (mix: doremi)" in outcomes.text("check")
    assert "has no losses of gamma (it has alpha, beta)" in outcomes.text("check of lost domains", 2)


def test_the_command_computes_what_a_run_computes(outcomes: Outcomes) -> None:
    outcomes.text("floats"), outcomes.text("in a run")
    ours, theirs = outcomes.root / "floats", outcomes.root / "in-run"
    assert outcomes.table("floats")["domains"] == outcomes.table("in-run")["domains"]
    assert len(list(theirs.glob("*.f32"))) == 2
    for path in theirs.glob("*.[fn][3p][2y]"):
        assert (ours / path.name).read_bytes() == path.read_bytes()


def weights(folder: Path) -> np.ndarray:
    with (folder / "dataflex" / "loss_weights.csv").open() as stream:
        return np.array([[float(value) for value in row] for row in list(csv.reader(stream))[1:]])


def test_doremi_reads_a_table_of_bytes(outcomes: Outcomes) -> None:
    """A step moves the logarithm of a weight by the error of its domain's excess loss, and of their normalisation."""
    outcomes.text("doremi of bytes"), outcomes.text("doremi of floats")
    ours, theirs = weights(outcomes.root / "doremi"), weights(outcomes.root / "doremi-floats")
    assert ours.shape == theirs.shape == (8, 3)
    error = max(entry["error"]["max"] for entry in outcomes.table("table")["domains"].values())
    assert 0 < error < 0.05
    steps = np.arange(1, 9)[:, None]
    assert (np.abs(np.log(ours[:, 1:] / theirs[:, 1:])) <= 2 * steps * error).all()
    assert not np.array_equal(ours, theirs)
    np.testing.assert_allclose(ours, theirs, atol=0.01)


def test_means_of_samples_are_exact(outcomes: Outcomes) -> None:
    """So a selector that reads means chooses the same samples with either type."""
    outcomes.text("rho"), outcomes.text("rho of floats")
    plans = [
        [json.loads(line)["plan_sha256"] for line in (outcomes.root / name / "dataflex" / "rounds.jsonl").open()]
        for name in ("rho", "rho-floats")
    ]
    assert len(plans[0]) == 4
    assert plans[0] == plans[1]


def test_a_run_of_weights_alone_reads_a_table_of_its_data_sets(outcomes: Outcomes) -> None:
    outcomes.text("weight"), outcomes.text("weight, a table of its own")
    whole, parts = outcomes.table("whole")["domains"], outcomes.table("table")["domains"]
    assert list(whole) == ["dataset"]
    assert whole["dataset"]["tokens"] == sum(entry["tokens"] for entry in parts.values())


def test_other_models_stages_and_precisions(outcomes: Outcomes) -> None:
    assert outcomes.text("own model")
    assert outcomes.table("own")["name"] == str(outcomes.root / "model")
    outcomes.text("texts")
    texts = outcomes.table("texts")["domains"]
    assert list(texts) == ["texts", "pages"]
    assert all(entry["tokens"] > entry["samples"] for entry in texts.values())
    outcomes.text("low precision")
    for path in (outcomes.root / "table").glob("*-means.npy"):
        low, full = np.load(outcomes.root / "bf16" / path.name), np.load(path)
        assert not np.array_equal(low, full)
        np.testing.assert_allclose(low, full, rtol=0.02)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("other data", "other samples of 'alpha'"),
        ("other samples", "--output: the table in .* was made for other samples of 'alpha'"),
        ("other type", "--output: the table in .* holds losses as byte and not as float32"),
        ("other model", "--output: the table in .* was made with another reference"),
        ("no model", r"--model: no model in .* \(it has no config.json\)"),
        ("no words", "invalid choice: 'word'"),
        ("streaming", "streaming: a table stores losses by the index of a sample"),
        ("no output", "the following arguments are required: --output"),
        ("wrong key", "cutoff_lenn.*cutoff_len"),
    ],
)
def test_errors_name_the_setting(outcomes: Outcomes, name: str, said: str) -> None:
    assert re.search(said, " ".join(outcomes.text(name, 2).split()))
    assert not (outcomes.root / "none").exists()


def test_two_processes_make_the_table_of_one(outcomes: Outcomes) -> None:
    root = outcomes.root
    arguments = [
        "reference",
        str(root / "plain.yaml"),
        "--model",
        str(root / "reference"),
        "--output",
        str(root / "two"),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "dataflex", *arguments],
        env={**os.environ, **ON_THE_CPU, "FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("reference losses of 80 samples") == 1
    one, two = outcomes.table("table")["domains"], outcomes.table("two")["domains"]
    for name, entry in one.items():
        assert {**two[name], "error": None} == {**entry, "error": None}
        assert math.isclose(two[name]["error"]["rms"], entry["error"]["rms"], rel_tol=0.2)
        means = [np.load(root / folder / f"{entry['file']}-means.npy") for folder in ("table", "two")]
        np.testing.assert_allclose(*means, rtol=1e-5)
