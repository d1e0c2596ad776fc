"""The results page, made from the result files of the leaderboard.

    python benchmarks/leaderboard/page.py

Reads ``benchmarks/results/leaderboard/*.json``, one file for each tier, and writes ``docs/results.md``. If a tier has
been run, it also writes ``docs/results.html``, which has the same content and charts. Equal files give equal pages.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import page_charts
import page_tables
from page_claims import Judged, judged
from page_form import TierResult, read

from dataflex.compare.files import _cell, _markdown_table
from dataflex.errors import ConfigError
from dataflex.files import write_atomically
from dataflex.report.charts.chart import Chart
from dataflex.report.report import write_page
from dataflex.report.tables import NOTHING, Table

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "leaderboard"
DOCS = ROOT / "docs"
COMMANDS = {
    "small": "make leaderboard",
    "large": "make leaderboard-gpu",
    "second_family": "make leaderboard-gpu TIER=second_family",
}
"""Tier -> the command that runs it."""

MARKDOWN, HTML = "results.md", "results.html"
TIERS = "Tiers"
_TITLE = "Results of the methods"
_INTRODUCTION = (
    "The leaderboard trains models with the methods of DataFlex at equal budgets, with several seeds, and compares "
    "them with a baseline. Every figure on this page is made from the result files of these runs. Null results are "
    "listed like all others."
)


@dataclass(frozen=True)
class Part:
    """A section of the page.

    Attributes:
        title: its heading.
        level: level of the heading in Markdown.
        lines: sentences below the heading.
        tables: its tables.
        charts: its charts, which only the HTML page has.
        links: whether the last column of its tables has paths of pages, which the Markdown page links to.
    """

    title: str
    level: int
    lines: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    links: bool = False


def write_pages(results: Sequence[Path], docs: Path) -> list[Path]:
    """Write the results page as Markdown and, if there is a result, as HTML.

    Args:
        results: the result files, at most one for each tier.
        docs: the folder to write into.

    Returns:
        The files that were written.

    Raises:
        ConfigError: if a result file does not have the form of ``page_form.py``, a page cannot be written, or Plotly is
            not installed.
    """
    found = read_tiers(results)
    written = docs / MARKDOWN
    write_atomically(written, markdown(found, results, docs).encode())
    if not found:
        return [written]
    write_html(found, docs / HTML)
    return [written, docs / HTML]


def read_tiers(results: Sequence[Path]) -> dict[str, TierResult]:
    """Return tier -> its result, in the order of the tiers.

    Raises:
        ConfigError: if a file does not have the right form, or two files are of one tier.
    """
    found: dict[str, TierResult] = {}
    for path in results:
        result = read(path)
        if result.tier in found:
            raise ConfigError(f"{path}: another file has the tier {result.tier!r}, too.")
        found[result.tier] = result
    return {tier: found[tier] for tier in COMMANDS if tier in found}


def markdown(found: Mapping[str, TierResult], results: Sequence[Path], docs: Path) -> str:
    """Return the page as Markdown, with links relative to its folder."""
    links = [f"[{path.name}]({Path(os.path.relpath(path, docs)).as_posix()})" for path in sorted(results)]
    intro = [_INTRODUCTION]
    if found:
        intro.append(f"[The same content with charts]({HTML}), made from {', '.join(links)}.")
    blocks = [f"# {_TITLE}", *intro]
    for part in parts(found):
        blocks.append(f"{'#' * part.level} {part.title}")
        blocks += ["\n".join(f"- {_cell(line)}" for line in part.lines)] if part.lines else []
        for table in part.tables:
            # A table with the name of its section needs no second heading.
            blocks += [] if table.title == part.title else [f"**{table.title}**"]
            linked = replace(table, rows=[[*row[:-1], _linked(row[-1], docs)] for row in table.rows])
            blocks += [_markdown_table(linked if part.links else table), *(_cell(note) for note in table.notes)]
    return "\n\n".join(blocks) + "\n"


def _linked(pages: str, docs: Path) -> str:
    """Return pages, paths from the folder of the docs, as links from the folder of the page."""
    if pages == NOTHING:
        return pages
    return " ".join(f"[{each}]({Path(os.path.relpath(DOCS / each, docs)).as_posix()})" for each in pages.split())


def write_html(found: Mapping[str, TierResult], output: Path) -> None:
    """Write the page as one HTML file that loads nothing."""
    every = parts(found)
    tables = [
        # A part begins with its sentences. The HTML page has no text between tables, so they are notes of the first.
        replace(
            table,
            title=table.title if table.title == part.title else f"{part.title}: {table.title}",
            notes=(*(part.lines if number == 0 else ()), *table.notes),
        )
        for part in every
        for number, table in enumerate(part.tables)
    ]
    tiers = next(table for table in tables if table.title == TIERS)
    first, *others = [table for table in tables if table is not tiers]
    first = replace(first, notes=(_INTRODUCTION, *first.notes))
    write_page(output, f"{_TITLE} - DataFlex", [first, *others], [c for part in every for c in part.charts], tiers)


def parts(found: Mapping[str, TierResult]) -> list[Part]:
    """Return the sections of the page: summary, claims, methods, tiers, then the tables of each tier."""
    claims = {tier: judged(result) for tier, result in found.items()}
    said = [_said(tier, each) for tier, every in claims.items() for each in every]
    missing = [
        f"The {_words(tier).lower()} tier has not been run. To run it: {command}"
        for tier, command in COMMANDS.items()
        if tier not in found
    ]
    every = []
    if found:
        summary = page_tables.summary_tables(found)
        every += [Part("Summary", 2, [], summary)] if summary else []
        every.append(Part("Claims", 2, said, [page_tables.claim_table(claims)]))
        pages = [file.relative_to(DOCS).as_posix() for file in sorted((DOCS / "methods").glob("*.md"))]
        every.append(Part("Methods", 2, [], [page_tables.method_table(found, pages)], links=True))
    missing += [
        f"The {_words(tier).lower()} tier is not complete. Missing: {', '.join(result.missing)}"
        for tier, result in found.items()
        if result.missing
    ]
    every.append(Part(TIERS, 2, missing, [page_tables.tier_table(found, COMMANDS)]))
    for tier, result in found.items():
        every += _tier_parts(f"{_words(tier)} tier", result)
    return every


def _words(tier: str) -> str:
    return tier.replace("_", " ").capitalize()


def _said(tier: str, found: Judged) -> str:
    source = f" ({found.claim.source})" if found.claim.source else ""
    return f"{found.verdict.capitalize()} ({_words(tier).lower()} tier): {found.claim.text}{source}. {found.sentence}"


def _tier_parts(name: str, result: TierResult) -> list[Part]:
    chance = [page_tables.chance_table(result)] if result.above_chance else []
    every = [Part(name, 2, [], chance)]
    for table in result.tables:
        comparison = table.comparison
        budget = ", ".join(f"{amount:,.0f} {what.replace('_', ' ')}" for what, amount in comparison.equal.items())
        lines = [
            *table.setting,
            f"Equal budget of every run: {budget}. Seeds: {', '.join(map(str, comparison.seeds))}.",
        ]
        made = len(page_tables.own_runs(table))
        if made:
            lines.append(f"Wall time of the {made} runs made for this table: {page_tables.duration(table.seconds)}.")
        title = f"{name}: {table.title}"
        charts = page_charts.forests(title, comparison)
        every.append(Part(title, 3, lines, page_tables.tables_of(table, result), charts))
    if result.costs is not None:
        title = f"{name}: cost beside other implementations"
        tables, charts = page_tables.cost_part_tables(result.costs.parts), page_charts.ratios(title, result.costs.parts)
        every.append(Part(title, 3, page_tables.cost_lines(result.costs), tables, charts))
    return every


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of the pages")
    options = parser.parse_args()
    try:
        written = write_pages(sorted(options.results.glob("*.json")), options.docs)
    except ConfigError as error:
        raise SystemExit(str(error)) from error
    print("\n".join(map(str, written)))


if __name__ == "__main__":
    main()
