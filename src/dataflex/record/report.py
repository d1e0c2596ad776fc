"""The report: the numbers of some runs in the terminal, their curves in one HTML file."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from dataflex.errors import ConfigError
from dataflex.record.charts import charts
from dataflex.record.measure import measure
from dataflex.record.page import GENERATOR, page
from dataflex.record.reader import read_run
from dataflex.record.tables import tables, to_text

_MARK_WITHIN = 1000
"""Bytes at the beginning of a page in which :data:`GENERATOR` stands."""


def report(runs: Sequence[Path], output: Path | None = None) -> Path:
    """Print the numbers of the runs and write the page with their curves.

    Args:
        runs: run folders; one given twice counts once.
        output: the file to write; by default ``dataflex/report.html`` in the folder of a single run, and
            ``dataflex-report.html`` in the working directory for several.

    Returns:
        The file written.

    Raises:
        ConfigError: if a run cannot be read, the file may not be replaced, or Plotly is not installed (the
            numbers are printed then all the same).
    """
    folders = list({path.resolve(): path for path in runs}.values())
    if not folders:
        raise ConfigError("report needs at least one run folder.")
    records = [read_run(path) for path in folders]
    if output is None:
        single = len(folders) == 1
        output = folders[0] / "dataflex" / "report.html" if single else Path("dataflex-report.html")
    _check_output(output)
    measured = measure(records)
    found = tables(measured)
    width = shutil.get_terminal_size(fallback=(120, 24)).columns
    print("\n".join(to_text(table, width) for table in found))
    plotly_js = _plotly_js()
    title = f"Run {measured[0].label}" if len(measured) == 1 else f"{len(measured)} runs"
    _write(output, page(f"{title} - DataFlex report", found, charts(measured), plotly_js))
    return output


def _plotly_js() -> str:
    """Return the source of plotly.js, which the Python package carries."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ConfigError('the page needs Plotly, which is not installed: pip install "dataflex[report]".') from error
    return str(get_plotlyjs())


def _check_output(path: Path) -> None:
    """Refuse to replace anything but an earlier report."""
    if not path.parent.is_dir():
        raise ConfigError(f"{path.parent} is not a folder; expected one to write {path.name} into.")
    if not path.exists():
        return
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; expected the name of the file to write.")
    with path.open("rb") as stream:
        if GENERATOR.encode() not in stream.read(_MARK_WITHIN):
            raise ConfigError(f"{path} exists and is not a DataFlex report; choose another --output.")


def _write(path: Path, content: str) -> None:
    """Write under a temporary name and rename, so that no half-written page is ever seen."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(content, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error}).") from error
    finally:
        part.unlink(missing_ok=True)
