"""Writer of selected samples as a LLaMA-Factory data set: raw rows if they are known, otherwise tokenized samples."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dataflex import assets
from dataflex.data.pool import Pool, some
from dataflex.data.sampling import IndexArray
from dataflex.files import json_text, write_atomically

INFO = "dataset_info.json"
_PLACES = ("file_name", "script_url")
"""Keys of an entry that name a file or folder beside ``dataset_info.json``."""
_SOURCES = ("hf_hub_url", "ms_hub_url", "om_hub_url", "cloud_file_name", *_PLACES)
_SHAPES = ("subset", "split", "folder", "num_samples")
_MEDIA = ("images", "videos", "audios")


@dataclass(frozen=True)
class Selected:
    """The written data sets, and instructions for training on them.

    Attributes:
        counts: domain -> number of selected samples, and number of all its samples.
        overrides: ``key=value`` arguments for a training command.
        tokenized: reason why tokenized samples were written; None if raw rows were.
        notes: notes for the user.
    """

    counts: dict[str, tuple[int, int]]
    overrides: tuple[str, ...]
    tokenized: str | None = None
    notes: tuple[str, ...] = ()

    def lines(self) -> Iterator[str]:
        """Yield the lines for the user. The last line is the command that trains on the samples."""
        for name, (count, size) in self.counts.items():
            yield f"selected {count} of {size} samples of {name}"
        if self.tokenized is not None:
            yield self.tokenized
        yield from (f"note: {note}" for note in self.notes)
        overrides = " ".join(map(shlex.quote, self.overrides))
        section = ", in a YAML without select, mix and order" if self.tokenized is not None else ""
        yield f"to train on them: dataflex-cli train YAML {overrides}{section}"


def write_selected(pool: Pool, chosen: IndexArray, folder: Path, given: dict[str, Any]) -> Selected:
    """Write selected samples of a pool to a folder.

    The ``dataset_info.json`` beside the rows holds the entries of the original one. A data set with selected samples
    points to the written file. Any other data set, such as one for evaluation or validation, points to the old file.

    Args:
        pool: the pool, with the raw rows of its samples if they are known.
        chosen: pool indices of the samples, ascending, each once.
        folder: target folder, which is created.
        given: LLaMA-Factory's keys of the run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    counted = zip(pool.domains, pool.domain_counts(chosen).tolist(), pool.domain_sizes.tolist(), strict=True)
    counts = {name: (count, size) for name, count, size in counted}
    source = Path(assets.resolve(str(given.get("dataset_dir", "data")))).absolute()
    unknown = [name for name in pool.domains if name not in pool.rows_of]
    if unknown or not (source / INFO).is_file():
        from datasets import DatasetDict

        path = folder / "tokenized"
        DatasetDict({"train": pool.dataset.select(chosen)}).save_to_disk(str(path))
        why = f"it is not known which rows the samples of {some(unknown)} were made from"
        if not unknown:
            why = f"{source} has no {INFO}"
        return Selected(counts, (f"tokenized_path={path}",), f"{why}, so the samples are written tokenized")
    info = json.loads((source / INFO).read_text(encoding="utf-8"))
    entries = {name: _moved(entry, source) for name, entry in info.items()}
    kept = []
    for name in dict.fromkeys(rows.dataset for rows in pool.rows_of.values()):
        del entries[name]
        positions = _positions(pool, chosen, name)
        if not positions.size:
            continue
        raw = next(rows.raw for rows in pool.rows_of.values() if rows.dataset == name)
        lines = (json_text(row, ensure_ascii=False, default=str) + "\n" for row in raw.select(positions))
        write_atomically(folder / f"{name}.jsonl", "".join(lines).encode())
        kept.append(name)
    written = {
        name: {"file_name": f"{name}.jsonl"}
        | {key: value for key, value in info[name].items() if key not in (*_SOURCES, *_SHAPES)}
        for name in kept
    }
    write_atomically(folder / INFO, (json_text({**written, **entries}, indent=2) + "\n").encode())
    overrides = [f"dataset_dir={folder}", f"dataset={','.join(kept)}"]
    if any(key in (entry.get("columns") or {}) for entry in written.values() for key in _MEDIA):
        # Without `media_dir` LLaMA-Factory uses `dataset_dir`, and the media files are in the old one.
        overrides.append(f"media_dir={given.get('media_dir') or source}")
    return Selected(counts, tuple(overrides), notes=tuple(_notes(given, kept)))


def row_column(pool: Pool, indices: IndexArray) -> pa.Array:
    """Return the row of each sample in its data set; null if it is not known."""
    rows = pool.row_numbers(indices)
    if rows is None:
        return pa.nulls(indices.size, pa.int64())
    return pa.array(rows, mask=rows < 0)


def _positions(pool: Pool, chosen: IndexArray, dataset: str) -> IndexArray:
    """Return the raw rows of a data set that the selected samples come from, ascending."""
    found = [np.zeros(0, dtype=np.int64)]
    for number, name in enumerate(pool.domains):
        if pool.rows_of[name].dataset == dataset:
            low, high = pool.offsets[number], pool.offsets[number + 1]
            found.append(pool.rows_of[name].positions_of(chosen[(chosen >= low) & (chosen < high)] - low))
    return np.sort(np.concatenate(found))


def _moved(entry: dict[str, Any], source: Path) -> dict[str, Any]:
    """Return the entry of a data set that is not moved, for a ``dataset_info.json`` in another folder."""
    return {key: str(source / value) if key in _PLACES else value for key, value in entry.items()}


def _notes(given: dict[str, Any], kept: list[str]) -> Iterator[str]:
    """Yield a note for each evaluation data set whose samples were selected from."""
    evaluated = given.get("eval_dataset") or []
    names = [name.strip() for name in evaluated.split(",")] if isinstance(evaluated, str) else evaluated
    for name in names:
        if name in kept:
            yield (
                f"samples of eval_dataset {name!r} were selected, so with this dataset_dir an evaluation uses only the "
                "selected rows; to evaluate on all rows, enter the whole data set under another name."
            )
