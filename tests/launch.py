"""Start of a Python script in one process or several, with the tests' helpers on its path."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ON_THE_CPU = {
    "OMP_NUM_THREADS": "1",
    "ACCELERATE_TORCH_DEVICE": "cpu",
    "DS_ACCELERATOR": "cpu",
    "PYTHONWARNINGS": "ignore",
}


def run_script(
    script: Path,
    *arguments: Path,
    log: Path,
    processes: int = 1,
    torchrun: bool = False,
    cwd: Path | None = None,
    environment: Mapping[str, str] = ON_THE_CPU,
) -> None:
    """Run a script to its end. If it fails, so does the test, with the end of the script's output.

    Args:
        script: File to run.
        arguments: Arguments of the script.
        log: File that the output of all processes is written to.
        processes: Number of processes. Torchrun starts them if there are several.
        torchrun: Whether torchrun also starts a single process.
        cwd: Working directory. None means that of the test.
        environment: Variables that are added to those of the test.
    """
    launcher = [sys.executable]
    if processes > 1 or torchrun:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    with log.open("w") as stream:
        done = subprocess.run(
            [*launcher, str(script), *map(str, arguments)],
            stdout=stream,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment, "PYTHONPATH": paths},
            cwd=cwd,
            check=False,
        )
    assert done.returncode == 0, log.read_text()[-6000:]
