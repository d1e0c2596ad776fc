"""The report: the tables of some runs in the terminal, their charts in one HTML file."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from dataflex.errors import ConfigError
from dataflex.files import write_atomically
from dataflex.record.reader import read_run
from dataflex.report.charts.chart import Chart
from dataflex.report.charts.sections import charts
from dataflex.report.measure import measure
from dataflex.report.page import GENERATOR, page
from dataflex.report.setup import setup_table, setup_texts
from dataflex.report.tables import Table, tables, to_text

_MARK_WITHIN = 1000
"""Number of bytes at the beginning of a page that contain :data:`GENERATOR`."""


def report(runs: Sequence[Path], output: Path | None = None) -> Path:
    """Print the tables of the runs and write the page with their charts.

    Args:
        runs: run folders. A folder given twice counts once.
        output: the file to write. None means ``dataflex/report.html`` in the folder of a single run, and
            ``dataflex-report.html`` in the working directory for several runs.

    Returns:
        The file that was written.

    Raises:
        ConfigError: if a run cannot be read, the file may not be replaced, or Plotly is not installed. In the last
            case the tables are printed all the same.
    """
    folders = list({path.resolve(): path for path in runs}.values())
    if not folders:
        raise ConfigError("report needs at least one run folder.")
    records = [read_run(path) for path in folders]
    if output is None:
        single = len(folders) == 1
        output = folders[0] / "dataflex" / "report.html" if single else Path("dataflex-report.html")
    check_output(output)
    measured = measure(records)
    found = tables(measured)
    title = f"Run {measured[0].label}" if len(measured) == 1 else f"{len(measured)} runs"
    width = shutil.get_terminal_size(fallback=(120, 24)).columns
    try:
        setup, texts = setup_table(measured), setup_texts(measured)
        write_page(output, f"{title} - DataFlex report", found, charts(measured), setup, texts)
    finally:  # printed even if Plotly is missing, and after the page, since printing fails into a closed pipe
        print("\n".join(to_text(table, width) for table in found))
    return output


def write_page(
    output: Path,
    title: str,
    tables: Sequence[Table],
    charts: Sequence[Chart],
    setup: Table | None = None,
    texts: Sequence[tuple[str, str]] = (),
) -> None:
    """Write a self-contained HTML page of tables and charts, under a temporary name first.

    Args:
        output: the file to write. An earlier page of DataFlex is replaced.
        title: heading of the page, plain text.
        tables: the first is shown above the charts, the others below.
        charts: shown by section, in this order. Charts of one section must follow each other.
        setup: table shown below the first table.
        texts: title and text of the sections that can be opened at the end of the page.

    Raises:
        ConfigError: if the file may not be replaced or cannot be written, or Plotly is not installed.
    """
    check_output(output)
    content = page(title, tables, charts, _plotly_js(), setup, texts)
    try:
        write_atomically(output, content.encode())
    except OSError as error:
        raise ConfigError(f"{output} cannot be written ({error}).") from error


def _plotly_js() -> str:
    """Return the source of plotly.js, which the Python package contains."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ConfigError('the page needs Plotly, which is not installed: pip install "dataflex[report]".') from error
    return str(get_plotlyjs())


def check_output(path: Path) -> None:
    """Check that the file can be written and, if it exists, is a page of DataFlex.

    Raises:
        ConfigError: if ``path`` is something else, or its folder does not exist.
    """
    if not path.parent.is_dir():
        raise ConfigError(f"{path.parent} is not a folder; expected one to write {path.name} into.")
    if not path.exists():
        return
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; expected the name of the file to write.")
    with path.open("rb") as stream:
        if GENERATOR.encode() not in stream.read(_MARK_WITHIN):
            raise ConfigError(f"{path} exists and is not a DataFlex report; choose another --output.")
