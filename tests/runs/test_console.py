"""The terminal of a run, a stop and the same command again, the losses in the log.

All runs happen one after another in one process, through the function of the command line.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file

import tiny
from launch import run_script
from records import plan_table, round_lines

pytestmark = pytest.mark.launch

STOPPING = """
import os, signal, time
from pathlib import Path
from dataflex import Selector, register
from dataflex.probe.losses import Losses

here = Path(__file__).parent
if "LOCAL_RANK" in os.environ:  # one of two processes: never come to anything
    (here / ("waiting-" + os.environ["LOCAL_RANK"])).touch()
    time.sleep(300)


@register("selector", "test_stopped")
class Stopped(Selector):
    def on_step(self, statistics):
        told = list(here.glob("STOP-*"))
        if told and statistics.step == 5:
            told[0].unlink()
            os.kill(os.getpid(), signal.SIGINT)

    def score(self, ctx, candidates):
        return ctx.probe.measure(Losses(), candidates)


@register("selector", "test_late")
class Late(Selector):
    def score(self, ctx, candidates):
        return ctx.probe.measure(Losses(), candidates) * (float("nan") if ctx.update else 1)
"""

RUN_ALL = """
import contextlib, io, json, os, sys
os.environ["LLAMAFACTORY_VERBOSITY"] = "WARN"
from dataflex import cli
sys.stdin = io.StringIO("the cat sees\\nexit\\n")  # what is typed in the chat
results = {}
for name, arguments in json.load(open(sys.argv[1])):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = cli.main(arguments)
        except BaseException as error:
            status = f"{type(error).__name__}: {error}"
    results[name] = [status, out.getvalue(), err.getvalue()]
json.dump(results, open(sys.argv[2], "w"))
"""

LOGGED = {"logging_steps": 3, "gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 4}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("console")
    tiny.make_model(root / "model")
    tiny.make_data(root / "data")
    (root / "stopping.py").write_text(STOPPING)
    for number in (1, 2):
        (root / f"STOP-{number}").touch()
    return root


@pytest.fixture(scope="session")
def outcomes(folder: Path) -> dict[str, list[Any]]:
    """Return the exit status of every command, and what it printed to standard output and error."""

    def write(name: str, **changes: Any) -> str:
        arguments = tiny.arguments(folder / "model", folder / "data", folder / "out" / name, **changes)
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(arguments))
        return str(path)

    stopped = {"update_steps": 3, "select": {"method": "test_stopped"}, "plugins": [str(folder / "stopping.py")]}
    one = write("one", dataflex=stopped, **LOGGED)
    section = {"warmup_steps": 2, "update_steps": 3, "select": {"method": "loss"}, "mix": {"method": "proportional"}}
    evaluated = {"eval_dataset": "held,gamma", "eval_strategy": "steps", "eval_steps": 4}
    two = write("two", dataset="alpha,beta", dataflex=section, **LOGGED, **evaluated)
    run = folder / "out" / "two"
    again = [f"dataset_dir={folder / 'exported'}", "dataset=alpha,beta", f"output_dir={folder / 'out' / 'again'}"]
    commands = [
        ("stopped", ["train", one]),
        ("stopped too", ["train", one, f"output_dir={folder / 'out' / 'many'}"]),
        ("goes on", ["train", one]),
        ("two", ["train", two, "disable_tqdm=true"]),
        ("top", ["explain", str(run), "--top", "3", "--round", "1"]),
        ("export", ["export", str(run), "--output", str(folder / "exported")]),
        ("export round", ["export", str(run), "--output", str(folder / "exported-1"), "--round", "1"]),
        ("export again", ["export", str(run), "--output", str(folder / "exported")]),
        ("exported", ["train", two, "dataflex=null", *again, "max_steps=1", "gradient_accumulation_steps=1"]),
        ("plain", ["train", two, "dataflex=null", f"output_dir={folder / 'out' / 'plain'}", "disable_tqdm=true"]),
        ("error", ["train", one, "dataflex.select.method=test_late", f"output_dir={folder / 'out' / 'late'}"]),
        ("merged", ["export", two, f"export_dir={folder / 'merged'}"]),
        ("chat", ["chat", two, "max_new_tokens=4"]),
        ("not merged", ["export", two, "adapter_name_or_path=null"]),
        ("env", ["env"]),
        ("version", ["version"]),
    ]
    script, spec, result = folder / "run_all.py", folder / "in.json", folder / "result.json"
    script.write_text(RUN_ALL)
    spec.write_text(json.dumps(commands))
    # Warnings stay on, because they would be seen in the terminal, too.
    run_script(script, spec, result, log=folder / "log", cwd=folder, environment={"OMP_NUM_THREADS": "1"})
    return json.loads(result.read_text())


def losses(run: Path) -> list[dict[str, Any]]:
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "loss" in entry]


def test_after_ctrl_c_the_same_command_resumes(folder: Path, outcomes: dict[str, list[Any]]) -> None:
    status, _, error = outcomes["stopped"]
    assert status == 130, error
    assert "Traceback" not in error
    assert error.splitlines()[-1] == "dataflex: stopped; the same command resumes from step 4."
    status, _, error = outcomes["goes on"]
    assert status == 0, error
    assert [line["round"] for line in round_lines(folder / "out" / "one")] == [0, 1, 2]


def test_after_ctrl_c_two_processes_print_one_line(folder: Path, outcomes: dict[str, list[Any]]) -> None:
    assert outcomes["stopped too"][0] == 130
    command = ["train", str(folder / "one.yaml"), f"output_dir={folder / 'out' / 'many'}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "dataflex", *command],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    while not all((folder / f"waiting-{rank}").exists() for rank in (0, 1)):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does; torchrun's workers are in groups of their own
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert [line for line in output.splitlines() if "stopped" in line] == [
        "dataflex: stopped; the same command resumes from step 4."
    ]
    assert output.splitlines()[-1].startswith("dataflex: stopped")


def test_the_loss_of_the_only_domain_equals_the_logged_loss_also_after_a_resume(
    folder: Path, outcomes: dict[str, list[Any]]
) -> None:
    assert outcomes["goes on"][0] == 0
    entries = losses(folder / "out" / "one")
    assert [entry["step"] for entry in entries] == [3, 6]  # step 6: since the resume at step 4
    for entry in entries:
        assert entry["dataflex/loss/alpha"] == pytest.approx(entry["loss"], rel=1e-5)


def test_the_logged_loss_lies_between_the_losses_of_the_domains(folder: Path, outcomes: dict[str, list[Any]]) -> None:
    assert outcomes["two"][0] == 0, outcomes["two"][2]
    entries = losses(folder / "out" / "two")
    assert [entry["step"] for entry in entries] == [3, 6]
    for entry in entries:
        low, high = sorted(entry[f"dataflex/loss/{name}"] for name in ("alpha", "beta"))
        assert low < entry["loss"] < high


def test_the_terminal_is_short_and_the_log_is_whole(folder: Path, outcomes: dict[str, list[Any]]) -> None:
    status, out, error = outcomes["two"]
    assert status == 0, error
    lines = out.splitlines()
    rounds = [line for line in lines if line.startswith("round ")]
    shape = r"round (\d) ?(\(warm-up\))?, steps (\d)-(\d): (\d+) of 80: alpha (\d+), beta (\d+); \d+\.\d s"
    found = [re.fullmatch(shape, line) for line in rounds]
    assert all(found), rounds
    record = round_lines(folder / "out" / "two")
    assert [(int(match[1]), int(match[3]), int(match[4]), int(match[6])) for match in found if match] == [
        (line["round"], line["start_step"] + 1, line["start_step"] + line["steps"], line["domains"]["alpha"])
        for line in record
    ]
    assert [bool(match[2]) for match in found if match] == [True, False, False]
    steps = [line for line in lines if line.startswith("step ")]
    assert [re.sub(r"[\d.]+(e-\d+)?", "#", line) for line in steps] == [
        "step # of #: loss #, learning rate #, epoch #",
        "step # of #: evaluation loss #: held #, gamma #",
        "step # of #: loss #, learning rate #, epoch #",
        "step # of #: evaluation loss #: held #, gamma #",
        "step # of #: evaluation loss #: held #, gamma #",  # LLaMA-Factory's own, after the training
    ]
    assert "dataflex/" not in out
    assert "_perplexity" not in out
    assert re.search(r"^ +eval_held_loss +=", out, re.MULTILINE)
    results = json.loads((folder / "out" / "two" / "eval_results.json").read_text())
    assert {"eval_held_perplexity", "dataflex/tokens"} <= set(results)
    assert {"dataflex/round", "dataflex/tokens", "dataflex/loss/beta"} <= set(losses(folder / "out" / "two")[-1])
    run = folder / "out" / "two"
    assert lines[-2:] == [
        f"dataflex: the run on one page: dataflex-cli report {run}",
        f"dataflex: the chosen samples and the reasons: dataflex-cli explain {run} --top 5",
    ]


def test_a_run_without_a_section_prints_what_llamafactory_prints(outcomes: dict[str, list[Any]]) -> None:
    status, out, error = outcomes["plain"]
    assert status == 0, error
    assert "{'loss': '" in out
    assert "round " not in out
    assert "dataflex-cli" not in out


def test_an_error_in_the_middle_of_a_run_begins_a_line(outcomes: dict[str, list[Any]]) -> None:
    status, out, error = outcomes["error"]
    assert status == 2
    assert "round 0, steps 1-3" in out
    assert "/8 [" in error  # the progress bar
    assert error.split("\n")[-2].startswith("dataflex: selector 'test_late'"), error


def planned(run: Path, number: int) -> Any:
    return plan_table(run, number).to_pandas()


def test_plans_and_explain_name_the_raw_row_of_a_sample(folder: Path, outcomes: dict[str, list[Any]]) -> None:
    plan = planned(folder / "out" / "two", 1)
    offset = plan["domain"].map({"alpha": 0, "beta": 48}).astype(int)
    assert (plan["row"] == plan["index"] - offset).all()
    status, out, error = outcomes["top"]
    assert status == 0, error
    best = plan.sort_values("score", ascending=False, kind="stable").head(3)[["index", "domain", "row"]]
    told = re.findall(r"Sample (\d+) \((\w+) row (\d+)\), score", out)
    assert told == [tuple(map(str, row)) for row in best.itertuples(index=False)]


def test_selected_samples_are_exported_as_a_data_set(folder: Path, outcomes: dict[str, list[Any]]) -> None:
    run = folder / "out" / "two"
    for name, target, numbers in (("export", "exported", [1, 2]), ("export round", "exported-1", [1])):
        status, out, error = outcomes[name]
        assert status == 0, error
        plans = pd.concat([planned(run, number) for number in numbers])
        table = pq.read_table(folder / target / "selected.parquet").to_pandas().set_index("index")
        assert table["times"].to_dict() == plans["index"].value_counts().to_dict() == table["trained"].to_dict()
        assert table["score"].to_dict() == plans.groupby("index")["score"].last().to_dict()
        assert f"{len(table)} samples, planned {len(plans)} times" in out
        for domain in ("alpha", "beta"):
            raw = json.loads((folder / "data" / f"{domain}.json").read_text())
            lines = (folder / target / f"{domain}.jsonl").read_text().splitlines()
            rows = sorted(set(plans[plans["domain"] == domain]["row"]))
            assert [json.loads(line) for line in lines] == [raw[row] for row in rows]
        last = f"dataflex: to train on them: dataflex-cli train YAML dataset_dir={folder / target} dataset=alpha,beta"
        assert out.splitlines()[-1] == last
    status, _, error = outcomes["export again"]
    assert status == 2
    assert "--output" in error
    assert outcomes["exported"][0] == 0, outcomes["exported"][2]
    assert (folder / "out" / "again" / "eval_results.json").is_file()  # on the evaluation sets of before


def test_llamafactorys_commands_use_the_result_of_the_run(folder: Path, outcomes: dict[str, list[Any]]) -> None:
    """``W + alpha / r B A`` is the merged weight, with alpha = 2 r, LLaMA-Factory's default."""
    status, _, error = outcomes["merged"]
    assert status == 0, error
    assert f"the model is the result of the training: adapter_name_or_path={folder / 'out' / 'two'}" in error
    base = load_file(folder / "model" / "model.safetensors")
    adapter = load_file(folder / "out" / "two" / "adapter_model.safetensors")
    merged = load_file(folder / "merged" / "model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    down, up = (adapter[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    assert up.abs().max() > 0
    expected = (base[f"{name}.weight"] + 2 * up @ down).to(merged[f"{name}.weight"].dtype)
    torch.testing.assert_close(merged[f"{name}.weight"], expected)
    assert (folder / "merged" / "tokenizer_config.json").is_file()
    status, out, error = outcomes["chat"]
    assert status == 0, error
    assert re.search(r"User: Assistant: .*\n\nUser: $", out), out


def test_llamafactorys_commands_end_as_they_do_alone(outcomes: dict[str, list[Any]]) -> None:
    assert outcomes["not merged"][0] == "ValueError: Please specify `export_dir` to save model."
    status, out, _ = outcomes["env"]
    assert status == 0
    version = re.search(r"- `llamafactory` version: (\S+)", out)
    assert version is not None
    status, out, _ = outcomes["version"]
    assert status == 0
    assert f"llamafactory {version[1]}" in out.splitlines()
    assert out.startswith("dataflex ")
