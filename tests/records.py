"""Rounds and plans of a run's record, in the form that tests compare."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa

from dataflex.record.reader import read_header, read_rounds, read_run


def round_lines(run: Path) -> list[dict[str, Any]]:
    """Return the recorded rounds of a run, with the names of the domains and the methods."""
    folder = run / "dataflex"
    return [asdict(each) for each in read_rounds(folder, read_header(folder))]


def plan_table(run: Path, number: int) -> pa.Table:
    """Return the plan of a round."""
    return read_run(run).plan(number)
