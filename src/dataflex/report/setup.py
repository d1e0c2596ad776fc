"""The setup of the runs of a report: model, data sets, settings, versions and dates, and the whole configuration."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

import yaml

from dataflex.config.loading import SECTION
from dataflex.files import json_text
from dataflex.record.reader import RunRecord
from dataflex.record.schema import Start, to_json
from dataflex.report.measure import MeasuredRun
from dataflex.report.tables import NOTHING, Table

_SHOWN_VERSIONS = ("dataflex", "llamafactory", "torch", "transformers", "python")
_DATASETS = 8
"""Most data sets that are listed with their number of samples."""
_MISSING = 20
"""Most missing rounds that are listed."""


def setup_table(runs: Sequence[MeasuredRun]) -> Table:
    """Return a table with a column for each run, and a row for each fact that is on record for at least one run."""
    facts: dict[str, Callable[[RunRecord], str]] = {
        "model": _model,
        "training": _training,
        "data sets": _datasets,
        "evaluated on": lambda record: _names(record.config.get("eval_dataset")),
        "samples of a step": _batch,
        "seeds": _seeds,
        "began": lambda record: _date(record.starts[0].started if record.starts else None),
        "ended": lambda record: _date(_last(record).finished),
        "started": _starts,
        "changed at a resume": _changes,
        "rounds not on record": lambda record: (
            ", ".join(map(str, record.rounds_missing[:_MISSING]))
            + (", ..." if len(record.rounds_missing) > _MISSING else "")
        ),
        "processes": _processes,
        "versions": _versions,
    }
    rows = [[fact, *(found(run.record) or NOTHING for run in runs)] for fact, found in facts.items()]
    kept = [row for row in rows if any(cell != NOTHING for cell in row[1:])]
    return Table("What was run", ["", *(run.label for run in runs)], kept, len(runs) + 1)


def setup_texts(runs: Sequence[MeasuredRun]) -> list[tuple[str, str]]:
    """Return the titles and texts of the sections that can be opened: each run's configuration and environment."""
    texts = []
    for run in runs:
        whole = yaml.safe_dump(dict(run.record.config), sort_keys=False, allow_unicode=True)
        texts.append((f"Configuration: {run.label}", whole))
        if run.record.starts:
            last = json_text(to_json(run.record.starts[-1]), indent=2, ensure_ascii=False)
            texts.append((f"Environment: {run.label}", last))
    return texts


def _model(record: RunRecord) -> str:
    parts = [str(record.config.get("model_name_or_path") or "")]
    adapter = record.config.get("adapter_name_or_path")
    commit = _last(record).model.get("commit")
    parts += [f"commit {str(commit)[:12]}"] if commit else []
    parts += [f"with the adapter {adapter}"] if adapter else []
    return ", ".join(part for part in parts if part)


def _training(record: RunRecord) -> str:
    config = record.config
    parts = [str(config[key]) for key in ("stage", "finetuning_type") if config.get(key)]
    parts += [f"template {config['template']}"] if config.get("template") else []
    parts += [f"learning rate {config['learning_rate']}"] if config.get("learning_rate") is not None else []
    return ", ".join(parts)


def _datasets(record: RunRecord) -> str:
    names = _names(record.config.get("dataset"))
    pool = record.pool
    if not pool:
        return names
    sizes = [f"{name} ({size:,})" for name, size in list(pool.items())[:_DATASETS]]
    more = [f"and {len(pool) - _DATASETS} more"] if len(pool) > _DATASETS else []
    domains = ", ".join([*sizes, *more])
    column = record.config[SECTION].get("domain_column")
    return f"{names} by {column}: {domains}" if column else domains


def _names(value: Any) -> str:
    names = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else []
    return ", ".join(str(name).strip() for name in names)


def _batch(record: RunRecord) -> str:
    device = record.config.get("per_device_train_batch_size")
    if device is None:
        return ""
    accumulation = record.config.get("gradient_accumulation_steps") or 1
    processes = _last(record).processes
    return f"{device} per device x {accumulation} accumulated" + (f" x {processes} processes" if processes else "")


def _seeds(record: RunRecord) -> str:
    training, ours = record.config.get("seed"), record.config[SECTION].get("seed")
    found = [f"training {training}"] if training is not None else []
    return ", ".join([*found, *([f"decisions {ours}"] if ours is not None else [])])


def _date(value: str | None) -> str:
    try:
        return f"{datetime.fromisoformat(value):%Y-%m-%d %H:%M} UTC" if value else ""
    except ValueError:
        return str(value)


def _starts(record: RunRecord) -> str:
    resumed = [str(start.step) for start in record.starts[1:]]
    return f"{len(resumed) + 1} times, again from step {', '.join(resumed)}" if resumed else ""


def _changes(record: RunRecord) -> str:
    """Return the settings that a resume changed, each with the step from which the change holds."""
    return "; ".join(
        f"from step {change.step + 1} {change.key} {json.dumps(change.now, ensure_ascii=False)}"
        for change in record.changes
        if change.holds
    )


def _processes(record: RunRecord) -> str:
    last = _last(record)
    if not last.processes:
        return ""
    return f"{last.processes} ({', '.join(dict.fromkeys(last.devices or ['CPU']))}), {last.platform}"


def _versions(record: RunRecord) -> str:
    found = _last(record).versions
    return ", ".join(f"{name} {found[name]}" for name in _SHOWN_VERSIONS if name in found)


def _last(record: RunRecord) -> Start:
    return record.starts[-1] if record.starts else Start(0)
