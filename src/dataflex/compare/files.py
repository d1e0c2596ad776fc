"""The result of a comparison as tables, and as the files in its folder."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from typing import Any

from dataflex.compare.outcome import Outcome, Row
from dataflex.compare.result import COSTS
from dataflex.compare.statistics import BOOTSTRAP_SEEDS, as_json, number, signed, title
from dataflex.errors import ConfigError
from dataflex.files import json_text, write_atomically
from dataflex.report.tables import NOTHING, Table

MARKDOWN, CSV, JSON, HTML = "comparison.md", "comparison.csv", "comparison.json", "comparison.html"


def tables(outcome: Outcome) -> list[Table]:
    """Return the differences, the costs and the runs."""
    return [difference_table(outcome), cost_table(outcome), run_table(outcome)]


def difference_table(outcome: Outcome) -> Table:
    """Return one row per variant and claim, the baseline's means first."""
    settings = outcome.experiment.settings
    header = ["variant", "metric", "finding", "seeds", "mean", "difference", "95 % t interval", "95 % bootstrap"]
    rows: list[list[str]] = []
    for metric in outcome.claims:
        higher = outcome.higher_is_better(metric)
        side = "direction not known" if higher is None else f"{'higher' if higher else 'lower'} is better"
        named = f"{title(metric)} ({side})"
        baseline = list(outcome.values(settings.baseline, metric).values())
        rows.append([settings.baseline, named, "baseline", str(len(baseline)), _mean(baseline), *[NOTHING] * 3])
        for each in outcome.differences:
            if each.metric == metric:
                own = outcome.values(each.variant, metric)
                rows.append(
                    [
                        each.variant,
                        named,
                        each.finding,
                        str(len(each.seeds)),
                        _mean([own[seed] for seed in each.seeds]),
                        NOTHING if each.mean is None else signed(each.mean),
                        _interval(each.interval),
                        _interval(each.bootstrap),
                    ]
                )
    about = f"Differences from {settings.baseline} at {settings.equal}, by seed"
    return Table(about, header, rows, 3, (*outcome.sentences, *outcome.notes))


def cost_table(outcome: Outcome) -> Table:
    """Return one row per variant with means over its complete runs."""
    header = ["variant", "runs", "train s", "decide s", "evaluate s", "tasks s", "tokens", "steps"]
    rows = []
    for variant in outcome.experiment.settings.variants:
        costs = outcome.costs(variant)
        complete = sum(row.result is not None for row in outcome.rows if row.run.variant == variant)
        numbers = [f"{costs[name]:,.{1 if name.endswith('seconds') else 0}f}" if costs else NOTHING for name in COSTS]
        rows.append([variant, str(complete), *numbers])
    if not outcome.experiment.tasks:
        at = header.index("tasks s")
        header.pop(at)
        rows = [[*row[:at], *row[at + 1 :]] for row in rows]
    return Table("Cost, mean of the complete runs", header, rows, 1)


def run_table(outcome: Outcome) -> Table:
    """Return one row per run with its status, and the reason if it is not compared."""
    rows = []
    for row in outcome.rows:
        folder = row.run.folder.relative_to(outcome.experiment.output)
        rows.append([row.run.variant, str(row.run.seed), row.status, str(folder), row.problem or NOTHING])
    return Table("Runs", ["variant", "seed", "status", "folder", "why not compared"], rows, 5)


def markdown(outcome: Outcome) -> str:
    """Return the tables and the sentences in Markdown."""
    first, *others = tables(outcome)
    said = "\n".join(f"- {_cell(line)}" for line in outcome.sentences)
    notes = "\n".join(f"{_cell(line)}\n" for line in outcome.notes)
    parts = [f"# Comparison with {outcome.experiment.settings.baseline}", said, notes.strip()]
    parts += [f"## {table.title}\n\n{_markdown_table(table)}" for table in (first, *others)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _markdown_table(table: Table) -> str:
    rule = ["---" if i < table.text_columns else "---:" for i in range(len(table.header))]
    rows = [table.header, rule, *([_cell(cell) for cell in row] for row in table.rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def csv_text(outcome: Outcome) -> str:
    """Return a CSV with one line per run and all its costs and metrics."""
    names = sorted({name for row in outcome.rows if row.result is not None for name in row.result.metrics})
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["variant", "seed", "status", "problem", "key", "folder", *COSTS, *names])
    for row in outcome.rows:
        costs = row.result.costs if row.result else {}
        metrics = row.result.metrics if row.result else {}
        writer.writerow(
            [row.run.variant, row.run.seed, row.status, row.problem or "", row.run.key, str(row.run.folder)]
            + [costs.get(name, "") for name in COSTS]
            + [metrics.get(name, "") for name in names]
        )
    return stream.getvalue()


def as_object(outcome: Outcome) -> dict[str, Any]:
    """Return everything as JSON values."""
    settings = outcome.experiment.settings
    return {
        "baseline": settings.baseline,
        "equal": {settings.equal.name: settings.equal.amount},
        "seeds": settings.seeds,
        "claims": list(outcome.claims),
        "differences": [as_json(each) for each in outcome.differences],
        "sentences": outcome.sentences,
        "notes": list(outcome.notes),
        "variants": {
            variant: {
                "means": {metric: _plain_mean(outcome.values(variant, metric).values()) for metric in outcome.claims},
                "costs": outcome.costs(variant),
            }
            for variant in settings.variants
        },
        "runs": [_run_object(row) for row in outcome.rows],
        "bootstrap": f"percentile; too narrow below {BOOTSTRAP_SEEDS} seeds",
    }


def _run_object(row: Row) -> dict[str, Any]:
    return {
        "variant": row.run.variant,
        "seed": row.run.seed,
        "status": row.status,
        "problem": row.problem,
        "key": row.run.key,
        "folder": str(row.run.folder),
        "fingerprint": row.result.fingerprint if row.result else None,
        "costs": row.result.costs if row.result else {},
        "runs_at_once": row.result.runs_at_once if row.result else None,
        "taken_over_from": row.result.taken_over_from if row.result else None,
        "metrics": row.result.metrics if row.result else {},
    }


def write(outcome: Outcome) -> None:
    """Write the result as Markdown, CSV and JSON into the folder of the comparison.

    Raises:
        ConfigError: if a file cannot be written.
    """
    output = outcome.experiment.output
    contents = {
        MARKDOWN: markdown(outcome),
        CSV: csv_text(outcome),
        JSON: json_text(as_object(outcome), indent=2) + "\n",
    }
    for name, content in contents.items():
        try:
            write_atomically(output / name, content.encode())
        except OSError as error:
            raise ConfigError(f"{output / name} cannot be written ({error.strerror or error}).") from error


def _plain_mean(values: Any) -> float | None:
    found = list(values)
    return math.fsum(found) / len(found) if found else None


def _mean(values: Sequence[float]) -> str:
    mean = _plain_mean(values)
    return NOTHING if mean is None else number(mean)


def _interval(ends: tuple[float, float] | None) -> str:
    return NOTHING if ends is None else f"[{signed(ends[0])}, {signed(ends[1])}]"
