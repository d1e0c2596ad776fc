"""The numbers of a report as tables of text, for the terminal and for the page."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dataflex.record.schema import TokenWeights
from dataflex.record.trainer_log import Curve
from dataflex.report.measure import LEVELS, MeasuredRun

NOTHING = "-"
"""Text of an empty cell."""

DOMAIN_ROWS = 40
"""Most rows of the tables of domains. The runs share them, with at least three for each."""

NAMED = 10
"""Most domains listed in a note."""


@dataclass(frozen=True)
class Table:
    """A table whose cells are ready to print. The first ``text_columns`` columns are texts, the others numbers."""

    title: str
    header: list[str]
    rows: list[list[str]]
    text_columns: int
    notes: tuple[str, ...] = ()


def tables(runs: Sequence[MeasuredRun]) -> list[Table]:
    """Return the tables that have rows, out of runs, evaluation, tasks, domains and scores."""
    found = (run_table(runs), evaluation_table(runs), task_table(runs), domain_table(runs), score_table(runs))
    return [table for table in found if table.rows]


def run_table(runs: Sequence[MeasuredRun]) -> Table:
    """Return one row per run. Columns without a value in any run are omitted."""
    eval_names = list(
        dict.fromkeys(name for run in runs if not run.record.evaluations for name in run.record.eval_loss)
    )
    header = ["run", "components", "rounds", "steps", "samples", "distinct", "overlap", "tokens", "train loss"]
    header += ["token-weighted loss", "mean loss", "bits/byte", "accuracy"]
    for name in eval_names:
        header += ["eval loss", "eval best"] if name == "eval" else [f"{name} loss", f"{name} best"]
    header += ["train s", "decide s", "evaluate s", "overhead"]
    header, rows = _without_empty(header, [_run_row(run, eval_names) for run in runs])
    told = tuple(note for run in runs for note in _told(run))
    return Table("Runs", header, rows, 2, told)


def _without_empty(header: Sequence[str], rows: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """Return a table without the columns, after the first two, that have no value in any row."""
    kept = [i for i in range(len(header)) if i < 2 or any(row[i] != NOTHING for row in rows)]
    return [header[i] for i in kept], [[row[i] for i in kept] for row in rows]


def _told(run: MeasuredRun) -> list[str]:
    """Return the notes about a run below the table."""
    summary = run.record.summary
    if summary is None:
        return [_unfinished(run)]
    limit = [] if summary.overhead_limit is None else [f"decisions are {summary.overhead_limit.text}."]
    return [f"{run.label}: {note}" for note in [*summary.notes, *limit]]


def _unfinished(run: MeasuredRun) -> str:
    trained = run.record.trained
    partly = f"; the seconds of training are known up to step {trained[0]:,}" if trained else ""
    return f"{run.label}: not finished (no summary.json), so its numbers cover the run so far{partly}."


def _run_row(run: MeasuredRun, eval_names: Sequence[str]) -> list[str]:
    record, coverage, summary = run.record, run.coverage, run.record.summary
    last = record.evaluations[-1] if record.evaluations else None
    row = [
        run.label,
        record.acting or NOTHING,
        _count(len(record.rounds)) if record.rounds or record.components else NOTHING,
        _count(record.steps),
        _count(sum(each.size for each in record.rounds)) if record.rounds else NOTHING,
        _count(coverage.distinct) if coverage else NOTHING,
        _share(coverage.mean_overlap) if coverage else NOTHING,
        _count(record.tokens),
        _last(record.train_loss),
        _loss(last.token_weighted.loss) if last else NOTHING,
        _loss(last.unweighted.loss) if last else NOTHING,
        _loss(last.token_weighted.bits_per_byte) if last else NOTHING,
        _loss(last.token_weighted.accuracy) if last else NOTHING,
    ]
    for name in eval_names:
        curve = [] if record.evaluations else record.eval_loss.get(name, [])
        row += [_last(curve), _lowest(curve)]
    return [
        *row,
        _seconds(record.train_seconds),
        _seconds(record.decision_seconds) if summary or record.rounds else NOTHING,
        _seconds(record.evaluate_seconds),
        f"{100 * summary.overhead_fraction:.1f} %" if summary else NOTHING,
    ]


def evaluation_table(runs: Sequence[MeasuredRun]) -> Table:
    """Return one row per run and evaluation set: the first, last and lowest loss, and the last measures.

    Columns without a value in any run are omitted.
    """
    header = ["run", "set", "samples", "tokens", "first loss", "last loss", "lowest", "perplexity", "bits/byte"]
    header += ["accuracy", "margin"]
    rows: list[list[str]] = []
    limit = max(3, DOMAIN_ROWS // len(runs))
    cut = False
    for run in runs:
        if not run.record.evaluations:
            continue
        last = run.record.evaluations[-1]
        cut = cut or len(last.domains) > limit
        for name, measures in list(last.domains.items())[:limit]:
            curve = [(each.step, each.domains[name].loss) for each in run.record.evaluations if name in each.domains]
            row = [run.label, name, _count(measures.samples), _count(measures.tokens), _loss(curve[0][1])]
            row += [_last(curve), _lowest(curve), _loss(measures.perplexity), _loss(measures.bits_per_byte)]
            rows.append([*row, _loss(measures.accuracy), _loss(measures.margin)])
    notes = (f"Only the first {limit} evaluation sets of each run are listed.",) if cut else ()
    header, rows = _without_empty(header, rows)
    return Table("Evaluation", header, rows, 2, notes)


def task_table(runs: Sequence[MeasuredRun]) -> Table:
    """Return one row per run, downstream task and metric, with the notes of the evaluations below."""
    header = ["run", "task", "metric", "form", "samples", "shots", "value", "std. error", "chance"]
    rows: list[list[str]] = []
    notes: list[str] = []
    for run in runs:
        for task in run.record.tasks:
            for name, metric in task.metrics.items():
                row = [run.label, task.task, name, task.form.replace("_", " ")]
                row += [_count(task.samples), _count(task.num_fewshot), _loss(metric.value), _loss(metric.stderr)]
                rows.append([*row, _loss(task.chance)])
            notes += [f"{run.label}, {task.task}: {note}" for note in task.notes]
    return Table("Downstream tasks", header, rows, 4, tuple(notes))


def domain_table(runs: Sequence[MeasuredRun]) -> Table:
    """Return one row per run and domain: samples and shares, passes, weights, first and last training loss.

    Columns without a value in any run are omitted.
    """
    header = ["run", "domain", "samples", "share", "first round", "last round", "last proportion"]
    counted = " or ".join(sorted({run.record.counted for run in runs}))
    header += ["last wanted", "rounds capped", "passes", "loss weight", f"{counted} that count", "effective"]
    header += ["first loss", "last loss"]
    rows: list[list[str]] = []
    notes: list[str] = []
    limit = max(3, DOMAIN_ROWS // len(runs))
    if any(len(run.domains) > limit for run in runs):
        notes.append(f"Only the {limit} domains with the most samples of each run are listed.")
    for run in runs:
        counts = run.domain_samples
        capped = Counter(name for each in run.record.rounds for name in each.clipped_shares)
        shown = set(sorted(counts, key=lambda name: -counts[name])[:limit])
        rows += [_domain_row(run, name, counts, capped) for name in counts if name in shown]
        notes += _domain_notes(run, [name for name in capped if name not in shown])
    header, rows = _without_empty(header, rows)
    return Table("Domains", header, rows, 2, tuple(notes))


def _domain_row(run: MeasuredRun, name: str, counts: Mapping[str, int], capped: Mapping[str, int]) -> list[str]:
    record = run.record
    total = sum(counts.values())
    first, last = (record.rounds[0], record.rounds[-1]) if record.rounds else (None, None)
    loss = record.domain_loss.get(name, [])
    passes = record.passes.get(name)
    return [
        run.label,
        name,
        _count(counts[name]) if record.rounds else NOTHING,
        _share(counts[name] / total) if total else NOTHING,
        _share(first.shares.get(name, 0.0)) if first else NOTHING,
        _share(last.shares.get(name, 0.0)) if last else NOTHING,
        _share(last.proportions.get(name)) if last else NOTHING,
        _share(last.clipped_shares.get(name)) if last else NOTHING,
        _count(capped.get(name, 0)) if capped else NOTHING,
        _share(float(passes[-1])) if passes is not None else NOTHING,
        _loss(record.mean_loss_weights.get(name)),
        *map(_share, _token_shares(record.token_weights, name)),
        _loss(loss[0][1]) if loss else NOTHING,
        _last(loss),
    ]


def _token_shares(lines: Sequence[TokenWeights], domain: str) -> tuple[float | None, float | None]:
    """Return the tokens of a domain that count, and its effective tokens, as shares of its trained tokens."""
    tokens = sum(each.tokens.get(domain, 0) for each in lines)
    if not tokens:
        return None, None
    counting = sum(each.counting.get(domain, 0) for each in lines)
    return counting / tokens, sum(each.effective.get(domain, 0.0) for each in lines) / tokens


def _domain_notes(run: MeasuredRun, capped: Sequence[str]) -> list[str]:
    """Return the number of steps behind the mean weights, and the names of the cut domains that are not listed."""
    notes = []
    weighted, result = run.record.loss_weights, run.record.domain_weights
    steps = result.steps if result else weighted.total if weighted else None
    if steps is not None:
        notes.append(f"{run.label}: loss weight is the mean over {steps:,} steps with a loss weighted by domain.")
    if capped:
        named = ", ".join(capped[:NAMED])
        more = f" and {len(capped) - NAMED:,} more" if len(capped) > NAMED else ""
        notes.append(f"{run.label}: max_epochs_per_domain also cut {named}{more}.")
    return notes


def score_table(runs: Sequence[MeasuredRun]) -> Table:
    """Return two rows per run that scores samples: the distribution of the scores in its first and last scored plan."""
    names = {0.0: "min", 0.5: "median", 1.0: "max"}
    header = ["run", "round", *(names.get(level, f"{level:.0%}") for level in LEVELS)]
    rows: list[list[str]] = []
    for run in runs:
        if run.scores:
            for i in sorted({0, len(run.scores.rounds) - 1}):
                numbers = [f"{value:.4g}" for value in run.scores.values[i]]
                rows.append([run.label, str(run.scores.rounds[i]), *numbers])
    return Table("Scores of the selected samples", header, rows, 1)


def to_text(table: Table, width: int) -> str:
    """Return the table in aligned columns. If ``width`` is too small, the columns are split into blocks."""
    header = [_printable(cell) for cell in table.header]
    rows = [[_printable(cell) for cell in row] for row in table.rows]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [table.title]
    for block in _blocks(widths, width):
        lines.append("")
        for row in [header, *rows]:
            cells = [_pad(row[i], widths[i], left=i < table.text_columns) for i in block]
            lines.append("  ".join(cells).rstrip())
    lines += ["", *(_printable(note) for note in table.notes)] if table.notes else []
    return "\n".join(lines) + "\n"


def _blocks(widths: Sequence[int], width: int) -> list[list[int]]:
    """Split the columns into groups that fit. Each group begins with the first column."""
    blocks = [[0]]
    used = widths[0]
    for i in range(1, len(widths)):
        if used + 2 + widths[i] > width and len(blocks[-1]) > 1:
            blocks.append([0])
            used = widths[0]
        blocks[-1].append(i)
        used += 2 + widths[i]
    return blocks


def _pad(text: str, width: int, *, left: bool) -> str:
    return text.ljust(width) if left else text.rjust(width)


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else "?" for char in text)


def _count(value: int | None) -> str:
    return NOTHING if value is None else f"{value:,}"


def _share(value: float | None) -> str:
    return NOTHING if value is None or math.isnan(value) else f"{value:.3f}"


def _loss(value: float | None) -> str:
    return NOTHING if value is None or math.isnan(value) else f"{value:.4f}"


def _seconds(value: float | None) -> str:
    return NOTHING if value is None else f"{value:,.1f}"


def _last(curve: Curve) -> str:
    return _loss(curve[-1][1]) if curve else NOTHING


def _lowest(curve: Curve) -> str:
    values = [value for _, value in curve if not math.isnan(value)]
    return _loss(min(values)) if values else NOTHING


def print_tables(tables: Sequence[Table]) -> None:
    """Print tables in the width of the terminal."""
    width = shutil.get_terminal_size(fallback=(120, 24)).columns
    print("\n".join(to_text(table, width) for table in tables))
