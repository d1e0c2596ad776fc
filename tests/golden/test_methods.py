"""A few runs reproduce the recorded numbers. ``make golden`` compares the runs of every method."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.launch

SOME = (
    "select-less-adam",
    "select-loss-medium",
    "mix-odm-paper",
    "mix-doremi-current-2",
    "mix-doge-paper-1",
    "weight-loss-sample-2",
    "select-list",
    "select-mix-order",
    "pt-everything",
)


def test_runs_reproduce_the_recorded_numbers() -> None:
    command = [sys.executable, str(Path(__file__).with_name("methods.py")), "--check", "--only", ",".join(SOME)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    assert f"{len(SOME)} runs compared" in done.stdout
