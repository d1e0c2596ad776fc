"""Export of the samples that a run chose as a data set: raw rows, and a table with counts, rounds and scores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from dataflex.data.pool import Pool
from dataflex.errors import ConfigError
from dataflex.explain.explain import Record, round_number
from dataflex.explain.samples import load_texts
from dataflex.record.schema import Round
from dataflex.record.selected import row_column, write_selected

TABLE = "selected.parquet"


def export(path: Path, output: Path, number: int | None = None, everything: bool = False) -> None:
    """Write the samples that a run planned as a data set, each once, and print how to train on them.

    Args:
        path: ``output_dir`` of the run.
        output: folder to write to. It must be empty or not exist.
        number: number of the round whose samples are written. None means all rounds except the warm-up.
        everything: whether to include the rounds of the warm-up if ``number`` is None.

    Raises:
        ConfigError: if the record cannot be read, if the data has changed since the run, or if ``output`` is not empty.
    """
    record = Record(path)
    rounds = _rounds(record, number, everything)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"--output: {output} exists and is not an empty folder; name another folder.")
    loaded = load_texts(record.run, full=False)
    if isinstance(loaded, str):
        raise ConfigError(f"{path}: {loaded}")
    table = _table(record, rounds, loaded.pool)
    chosen = table.column("index").to_numpy()
    written = write_selected(loaded.pool, chosen, output, dict(record.run.config))
    pq.write_table(table, output / TABLE)
    times = int(table.column("times").to_numpy().sum())
    print(f"dataflex: {chosen.size} samples, planned {times} times: {output / TABLE}")
    print("\n".join(f"dataflex: {line}" for line in written.lines()))


def _rounds(record: Record, number: int | None, everything: bool) -> list[Round]:
    """Return the rounds whose samples are exported."""
    if number is not None:
        return [record.rounds[round_number(record, number)]]
    found = [each for each in record.run.rounds if everything or not each.warmup]
    if not found:
        raise ConfigError(
            f"{record.run.path}: all rounds are warm-up, in which no samples are chosen; add --all to export them."
        )
    return found


def _table(record: Record, rounds: list[Round], pool: Pool) -> pa.Table:
    """Return a table with a row for each planned sample: origin, counts, rounds, last score and best rank."""
    times, trained = np.zeros((2, pool.size), dtype=np.int64)
    first, last = np.full((2, pool.size), -1, dtype=np.int64)
    scores: NDArray[np.float64] = np.full(pool.size, np.nan)
    ranks: NDArray[np.float64] = np.full(pool.size, np.nan)
    for each in rounds:
        plans = record.run.plans
        indices = plans.indices(each)
        np.add.at(times, indices, 1)
        np.add.at(trained, indices[: record.run.trained_rows(each)], 1)
        first[indices] = np.where(first[indices] < 0, each.round, first[indices])
        last[indices] = each.round
        score, rank = plans.numbers(each, "score"), plans.numbers(each, "rank")
        if score is not None:
            known = np.isfinite(score)
            scores[indices[known]] = score[known]
        if rank is not None:
            np.fmin.at(ranks, indices, rank)  # fmin ignores NaN, which stands for samples without a rank
    chosen = np.flatnonzero(times)
    ids = pool.domain_ids(chosen).astype(np.int32)
    return pa.table(
        {
            "index": pa.array(chosen),
            "domain": pa.DictionaryArray.from_arrays(ids, list(pool.domains)),
            "row": row_column(pool, chosen),
            "times": pa.array(times[chosen]),
            "trained": pa.array(trained[chosen]),
            "first_round": pa.array(first[chosen]),
            "last_round": pa.array(last[chosen]),
            "score": pa.array(scores[chosen], from_pandas=True),
            "rank": pa.array(ranks[chosen], from_pandas=True).cast(pa.int64()),
        }
    )
