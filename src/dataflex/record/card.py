"""The model card of a trained model: the section of ``README.md`` that a run's record is the source of.

LLaMA-Factory has the Trainer write ``README.md`` into the ``output_dir`` at the end of a run, with the base model, the
hyperparameters and the results. The card here is one section of that file: the data, the methods, the cost and the
versions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from dataflex.config.loading import SECTION
from dataflex.files import write_atomically
from dataflex.record.configuration import FILE as CONFIGURATION
from dataflex.record.identity import FOLDER
from dataflex.record.reader import RunRecord, read_run
from dataflex.record.schema import SUMMARY, Round

NAME = "README.md"

BEGIN = "<!-- dataflex: begin. DataFlex replaces this section. Delete this line and the line of its end to keep it. -->"
END = "<!-- dataflex: end -->"

_BY_THE_TRAINER = "This model card has been generated automatically according to the information the Trainer had access"
"""Part of the comment in a card that the Trainer wrote. The comment asks people who edit the card to remove it."""


def write_card(output_dir: Path) -> bool:
    """Write the section of a finished run into the model card in its ``output_dir``.

    A card that neither the Trainer nor DataFlex wrote is left as it is. So is the card of a run that has not finished.

    Returns:
        Whether the section was written.

    Raises:
        ConfigError: if the record of the run cannot be read.
    """
    if not (output_dir / FOLDER / SUMMARY).is_file():
        return False
    path = output_dir / NAME
    # Bytes that are not UTF-8 are written back as they were read.
    text = path.read_text(encoding="utf-8", errors="surrogateescape") if path.exists() else ""
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if begin and not end:
        return False  # somebody deleted the second line
    if not begin and text.strip() and _BY_THE_TRAINER not in " ".join(text.split()):
        return False
    if not begin:
        head, tail = f"{head.rstrip()}\n\n" if head.strip() else "", "\n"
    content = f"{head}{BEGIN}\n\n{section_of(read_run(output_dir))}\n{END}{tail}"
    write_atomically(path, content.encode("utf-8", errors="surrogateescape"))
    return True


def section_of(record: RunRecord) -> str:
    """Return the section of the model card that describes a finished run, as Markdown."""
    blocks = [*_methods(record), *_data(record), *_run(record)]
    return "\n\n".join(["## Training data and how it was chosen", *blocks]) + "\n"


def _methods(record: RunRecord) -> Iterator[str]:
    """Yield the paragraphs on the methods and their parameters."""
    version = record.starts[-1].versions.get("dataflex") if record.starts else None
    by = f"DataFlex {version}" if version else "DataFlex"
    if record.components:
        chosen = ", ".join(f"`{family}: {name}`" for family, name in record.components.items())
        yield f"{by} decided which data this model was trained on while it trained, with these methods: {chosen}."
    else:
        yield f"{by} recorded this training. No method selected, mixed, ordered or weighted the data."
    section = yaml.safe_dump({SECTION: record.config[SECTION]}, sort_keys=False, allow_unicode=True)
    yield f"All parameters, with their defaults:\n\n```yaml\n{section}```"


def _data(record: RunRecord) -> Iterator[str]:
    """Yield the table of the domains: pool, samples trained on, proportion and epochs."""
    if not record.rounds:
        yield f"### Data\n\nData sets: {_cell(record.config.get('dataset'))}. No rounds were planned."
        return
    trained, weights = trained_by_domain(record), record.mean_loss_weights
    total, pool = sum(trained.values()), record.pool
    head = ["domain", "samples in the pool", "samples trained on", "proportion", "epochs"]
    rows = []
    for domain, count in trained.items():
        size = pool.get(domain)
        share = f"{count / total:.1%}" if total else "-"
        row = [_cell(domain), f"{size:,}" if size else "-", f"{count:,}", share, f"{count / size:.2f}" if size else "-"]
        rows.append([*row, *([f"{weights.get(domain, 0):.4f}"] if weights else [])])
    table = _table([*head, *(["mean weight in the loss"] if weights else [])], rows)
    yield (
        f"### Data\n\nData sets: {_cell(record.config.get('dataset'))}. A sample that was trained on twice counts "
        f"twice. Epochs are the samples trained on divided by the samples in the pool.\n\n{table}"
    )
    if record.rounds_missing:
        yield f"{len(record.rounds_missing)} rounds of an earlier run are not on record. The table leaves them out."


def trained_by_domain(record: RunRecord) -> dict[str, int]:
    """Return the number of samples of each domain that training reached, repeats counted."""
    found = dict.fromkeys(record.pool, 0)
    for each in record.rounds:
        for domain, count in _reached(record, each).items():
            found[domain] = found.get(domain, 0) + count
    return found


def _reached(record: RunRecord, each: Round) -> dict[str, int]:
    """Return the samples of each domain in a round, up to the step at which training ended."""
    rows = record.trained_rows(each)
    if rows == each.size:
        return each.domains
    ids, names = record.plans.labels(each)
    counts = np.bincount(ids[:rows], minlength=len(names))
    return dict(zip(names, counts.tolist(), strict=True))


def _run(record: RunRecord) -> Iterator[str]:
    """Yield the table of the run, the settings changed at a resume, the notes, and the command that repeats the run."""
    summary, start = record.summary, record.starts[-1] if record.starts else None
    rows: list[list[str]] = [["base model", _cell(record.config.get("model_name_or_path"))]]
    if start is not None and start.model.get("commit"):
        rows.append(["commit of the base model", _cell(start.model["commit"])])
    rows.append(["stage, finetuning type", _cell(", ".join(_of(record, "stage", "finetuning_type")))])
    rows.append(["optimizer steps", f"{record.steps:,}"])
    if summary is not None:
        rows.append(["tokens trained on", f"{summary.tokens:,}"])
        rows.append(["seconds of training", f"{summary.train_seconds:,.1f}"])
        rows.append(["seconds of decisions", f"{summary.decision_seconds:,.1f}"])
    if start is not None:
        devices = ", ".join(dict.fromkeys(start.devices or ["CPU"]))
        rows.append(["processes, devices", _cell(f"{start.processes or 1}, {devices}")])
        rows.append(["finished", _cell(start.finished or "-")])
        rows.append(["versions", _cell(", ".join(f"{name} {value}" for name, value in start.versions.items()))])
    rows.append([f"SHA-256 of `{FOLDER}/{CONFIGURATION}`", f"`{_digest(record)}`"])
    yield f"### Run\n\n{_table(['', ''], rows)}"
    changed = [
        f"- `{each.key}` was changed from `{each.before}` to `{each.now}` at step {each.step}."
        for each in record.changes
        if each.holds
    ]
    if changed:
        yield "Settings were changed when the run was resumed:\n\n" + "\n".join(changed)
    if summary is not None and summary.notes:
        yield "Notes of the run:\n\n" + "\n".join(f"- {' '.join(note.split())}" for note in summary.notes)
    yield (
        f"The folder `{FOLDER}` beside this file records every decision. To repeat the run:\n\n"
        f"    dataflex-cli train {FOLDER}/{CONFIGURATION} output_dir=ANOTHER_FOLDER"
    )


def _of(record: RunRecord, *keys: str) -> list[str]:
    return [str(record.config[key]) for key in keys if record.config.get(key)]


def _digest(record: RunRecord) -> str:
    return hashlib.sha256((record.path / FOLDER / CONFIGURATION).read_bytes()).hexdigest()


def _cell(value: Any) -> str:
    """Return a value as text for a table: one line, without the character that ends a cell."""
    return " ".join(str(value if value is not None else "-").split()).replace("|", "\\|")


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
