"""Counts of the rows in a run's data files, without a tokenizer, if counting is quick."""

from __future__ import annotations

import csv
import json
import math
from functools import cache
from pathlib import Path
from typing import Any

from dataflex import assets
from dataflex.config.checks.values import dataset_names, is_packed, number, truthy
from dataflex.config.loading import RunConfig
from dataflex.data.stages import STAGES

_LARGEST_ARRAY = 1 << 28
"""Bytes of the largest JSON array that is parsed for counting. Parsing it takes one or two seconds."""
_BLOCK = 1 << 22
_REMOTE = ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")


def training_samples(config: RunConfig) -> tuple[dict[str, int], str]:
    """Return an upper bound of the samples in each training data set, or the reason why the number is not known.

    Rows that preprocessing drops are counted, so the real number may be smaller, but never larger.

    Returns:
        The samples by data set and an empty text. If they are not known, an empty mapping and the reason.
    """
    stage = config.llamafactory.get("stage", "sft")
    if truthy(config, "streaming"):
        return {}, "streamed data has no length"
    if config.llamafactory.get("tokenized_path"):
        return {}, "the rows of tokenized data are not counted"
    if is_packed(config):
        return {}, "packing changes the number of samples"
    if stage not in STAGES:
        return {}, f"stage {stage} makes another number of samples from the rows"
    if str(config.llamafactory.get("mix_strategy", "concat")) != "concat":
        return {}, "data sets are interleaved"
    found: dict[str, int] = {}
    for name in dataset_names(config):
        rows = rows_of(config, name)
        if rows is None:
            return {}, f"the rows of {name!r} are not counted"
        held_out = number(config, "val_size", 0.0)
        found[name] = max(0, rows - int(held_out)) if held_out >= 1 else rows - math.ceil(held_out * rows)
    if not all(found.values()):
        return {}, "a data set has no rows"
    return found, ""


def rows_of(config: RunConfig, name: str) -> int | None:
    """Return the rows of a data set after ``num_samples`` and ``max_samples``; None if they cannot be counted."""
    folder = str(config.llamafactory.get("dataset_dir", "data"))
    if folder.startswith(assets.PREFIX):
        asset = folder.removeprefix(assets.PREFIX)
        if not (asset in assets.ASSETS and assets.is_cached(asset)):
            return None
        folder = assets.resolve(folder)
    entry = _entry(Path(folder) / "dataset_info.json", name)
    file_name = entry.get("file_name")
    if any(source in entry for source in _REMOTE) or not isinstance(file_name, str):
        return None
    path = Path(folder) / file_name
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    counts = [_count(file, file.stat().st_mtime_ns) if file.is_file() else None for file in files]
    if not counts or None in counts:
        return None
    rows = sum(count for count in counts if count is not None)
    if isinstance(entry.get("num_samples"), int):
        rows = int(entry["num_samples"])
    most = number(config, "max_samples", math.inf)
    return int(min(rows, most))


def _entry(path: Path, name: str) -> dict[str, Any]:
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))[name]
    except (OSError, ValueError, LookupError, TypeError):
        return {}  # the check of data sets reports a wrong entry
    return entry if isinstance(entry, dict) else {}


@cache
def _count(path: Path, changed: int) -> int | None:
    """Return the number of rows of a file; None if it cannot be counted.

    Args:
        path: the file.
        changed: time of the last change, in nanoseconds. As a part of the cache key it makes a changed file be counted
            again.
    """
    try:
        kind = path.suffix.lower()
        if kind == ".parquet":
            import pyarrow.parquet as pq

            return int(pq.ParquetFile(path).metadata.num_rows)
        if kind == ".csv":
            with path.open(encoding="utf-8", newline="") as stream:
                return max(0, sum(1 for row in csv.reader(stream) if row) - 1)
        if kind == ".json" and _is_array(path):
            rows = json.loads(path.read_bytes()) if path.stat().st_size <= _LARGEST_ARRAY else None
            return len(rows) if isinstance(rows, list) else None
        if kind in (".json", ".jsonl", ".txt"):
            return _lines(path)
        if kind == ".arrow":
            return _arrow_rows(path)
    except (OSError, ValueError, csv.Error):
        pass  # the check of data sets and the loading report the cause
    return None


def _is_array(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(1024).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


def _lines(path: Path) -> int:
    lines, last = 0, b"\n"
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            lines, last = lines + block.count(b"\n"), block[-1:]
    return lines + (last != b"\n")


def _arrow_rows(path: Path) -> int:
    import pyarrow as pa

    with pa.memory_map(str(path)) as source:
        try:
            return sum(batch.num_rows for batch in pa.ipc.open_stream(source))
        except pa.ArrowInvalid:
            reader = pa.ipc.open_file(source)
            return sum(reader.get_batch(number).num_rows for number in range(reader.num_record_batches))
