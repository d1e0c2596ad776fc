"""A fault on one of two processes: both end soon with the same error, in whichever call the other one waits."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import tiny

HERE = Path(__file__).parent
pytestmark = pytest.mark.launch

# name -> the fault of the second process in its decision, and words of the error
FAULTS: dict[str, tuple[str, list[str]]] = {
    "gradient": ("gradient", ["in the decision of round 0, after step 0, the gradient of pool index", "diverged"]),
    "file": ("file", ["nowhere has no manifest.json"]),
    "exception": ("exception", ["selector 'test_fault' failed in choose", "FileNotFoundError", "traceback.txt"]),
    "late": ("late exception", ["selector 'test_fault' failed in choose", "KeyError: 'weight'", "traceback.txt"]),
    "batch": ("batch", ["in the decision of round 0, after step 0, a number of a sample of"]),
    "shape": ("shape", ["measurement 'test_broken'", "returned a tensor of shape"]),
}
SHARDED = {f"{name}-zero3": FAULTS[name] for name in ("batch", "shape")}
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None


@pytest.fixture(scope="module")
def errors(workshop: Any) -> dict[str, list[str]]:
    """The error of each process, by run; a process that nobody tells of a fault waits for half an hour."""
    cases = {**FAULTS, **(SHARDED if HAS_DEEPSPEED else {})}
    for name, (fault, _) in cases.items():
        section: dict[str, Any] = {"plugins": [str(HERE / "failing_components.py")], "update_steps": 2}
        section["probe_batch_tokens"] = 64  # several batches on each process
        section["select"] = {"method": "test_fault", "fault": fault}
        changes = tiny.zero(workshop.data, 3) if name in SHARDED else {}
        workshop.add(f"fault-{name}", max_steps=2, dataflex=section, **changes)
    workshop.start(2)
    traces = {name: [workshop.root / f"fault-{name}" / f"trace-{rank}.json" for rank in range(2)] for name in cases}
    return {name: [json.loads(path.read_text())["error"] for path in paths] for name, paths in traces.items()}


@pytest.mark.parametrize("name", [*FAULTS, *SHARDED])
def test_an_error_on_one_process_ends_both_with_its_message(errors: dict[str, list[str]], name: str) -> None:
    if name not in errors:
        pytest.skip("needs deepspeed")
    first, second = (error.partition(": ") for error in errors[name])
    assert first[0].endswith("Error")
    assert first[2] == second[2]
    for word in {**FAULTS, **SHARDED}[name][1]:
        assert word in first[2]


@pytest.mark.timeout(300)
def test_an_error_in_a_step_on_one_node_ends_both_with_its_message(workshop: Any, tmp_path: Path) -> None:
    """Two launchers, as on two machines: nobody but the processes themselves tells one node of the other's end."""
    section = {"plugins": [str(HERE / "failing_components.py")], "weight": {"method": "test_stumble"}}
    args = tiny.arguments(workshop.model, workshop.data, tmp_path / "out", dataflex=section)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(args))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "1", "NNODES": "2", "OMP_NUM_THREADS": "1"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LLAMAFACTORY_VERBOSITY": "WARN"}
    nodes = [
        subprocess.Popen(
            [sys.executable, "-m", "dataflex", "train", "run.yaml"],
            cwd=tmp_path, env={**environment, "NODE_RANK": str(node)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for node in range(2)
    ]  # fmt: skip
    try:
        said = [node.communicate(timeout=240)[1] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [2, 2], said
    line = "dataflex: weighter 'test_stumble' failed in weigh"
    errors = [[text for text in each.splitlines() if text.startswith(line)] for each in said]
    assert errors[0] == errors[1], said
    assert len(errors[0]) == 1
    assert "KeyError: 'no such weight'" in errors[0][0]
