"""The command line as a user meets it: two processes, the README's component, a kill, a torn checkpoint."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

import tiny

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.launch


def readme_block(language: str, containing: str) -> str:
    blocks = re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (found,) = [block for block in blocks if containing in block]
    return found


def start(folder: Path, *overrides: str, processes: int = 2) -> subprocess.Popen[str]:
    environment = {**os.environ, "LLAMAFACTORY_VERBOSITY": "WARN"}
    if processes > 1:
        environment |= {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": str(processes)}
    command = [sys.executable, "-m", "dataflex", "train", "run.yaml", *overrides]
    return subprocess.Popen(
        command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-4000:]
    return output


def rounds(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "dataflex" / "rounds.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A newcomer's folder: the README's component and section, and a YAML."""
    folder = tmp_path_factory.mktemp("newcomer")
    (folder / "near_loss.py").write_text(readme_block("python", "near_loss"))
    section = yaml.safe_load(readme_block("yaml", "plugins:"))
    args = tiny.arguments(
        tiny.make_model(folder / "model", dropout=0.1),
        tiny.make_data(folder / "data"),
        folder / "whole",
        dataset="alpha,beta",
        gradient_accumulation_steps=2,
        max_steps=40,
        save_strategy="steps",
        save_steps=3,
    )
    (folder / "run.yaml").write_text(yaml.safe_dump({**args, **section}))
    return folder


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


def test_a_newcomers_component_survives_a_kill_on_two_processes(folder: Path) -> None:
    assert len(readme_block("python", "near_loss").splitlines()) < 40
    finish(start(folder))

    cut = folder / "cut"
    process = start(folder, f"output_dir={cut}")
    wait_for_checkpoint(process, cut, "checkpoint-6")
    kill(process)
    assert not (cut / "dataflex" / "summary.json").exists()
    # A checkpoint whose writing was cut off: the newest one by name, without its marker and with half of a file.
    torn = cut / "checkpoint-100"
    shutil.copytree(cut / "checkpoint-6", torn)
    (torn / "dataflex_complete.json").unlink()
    (torn / "optimizer.pt").write_bytes(b"half")

    output = finish(start(folder, f"output_dir={cut}"))
    assert f"{torn} is not used" in output
    assert [line["round"] for line in rounds(cut)] == list(range(10))
    assert [line["plan_sha256"] for line in rounds(cut)] == [line["plan_sha256"] for line in rounds(folder / "whole")]
    weights = [(run / "adapter_model.safetensors").read_bytes() for run in (folder / "whole", cut)]
    assert weights[0] == weights[1]
    assert json.loads((cut / "dataflex" / "summary.json").read_text())["rounds"] == 10


def test_a_failing_worker_is_our_exit_status(folder: Path) -> None:
    process = start(folder, f"output_dir={folder / 'failing'}", "dataflex.update_steps=400", "max_steps=400")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 2, output[-4000:]
    assert output.count("dataflex.update_steps: a round of 400 steps needs 3200 samples") == 1
    assert "Traceback" not in output
