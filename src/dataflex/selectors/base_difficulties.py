"""Tables of the difficulty of samples: Parquet files with a row for each sample, identified by its raw row."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dataflex import ConfigError, IndexArray, Pool, write_atomically

if TYPE_CHECKING:  # pyarrow is imported when a table is read or written: checks of a run load every selector.
    import pyarrow as pa

DIFFICULTY, SCORE = "difficulty", "score"
_PLACE = ("dataset", "row")


def write_difficulties(path: Path, pool: Pool, samples: IndexArray, difficulties: NDArray[np.floating]) -> None:
    """Write the difficulties of some samples, with the domain and the raw row of each.

    Args:
        path: the file.
        pool: the pool. The raw rows of its samples are known.
        samples: pool indices, shape (n,).
        difficulties: shape (n,).
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = np.array(pool.domains, dtype=object)[pool.domain_ids(samples)]
    columns = {
        "index": pa.array(samples),
        "dataset": pa.array(names, pa.string()),
        "row": pa.array(pool.row_numbers(samples)),
        DIFFICULTY: pa.array(difficulties, pa.float64()),
    }
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    write_atomically(path, buffer.getvalue())


def read_difficulties(path: Path) -> pa.Table:
    """Return a table of difficulties: ``dataset`` (text), ``row`` and ``difficulty``.

    A file of ``dataflex-cli score`` has scores instead. A score is the negative difficulty, and pairs without a score
    are left out.

    Raises:
        ConfigError: if the file cannot be read, lacks a column, or does not know the raw rows.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ConfigError(f"{str(path)!r} is not readable Parquet ({' '.join(str(error).split())}).") from error
    names = set(table.column_names)
    missing = [name for name in _PLACE if name not in names]
    if missing or not names & {DIFFICULTY, SCORE}:
        raise ConfigError(
            f"{str(path)!r} has the columns {', '.join(table.column_names) or 'none'}; a table of difficulties has "
            f"dataset, row and {DIFFICULTY} (or {SCORE}, as dataflex-cli score writes it)."
        )
    name = DIFFICULTY if DIFFICULTY in names else SCORE
    table = table.filter(table.column(name).is_valid())
    if table.column("row").null_count:
        raise ConfigError(f"{str(path)!r} does not know from which raw rows its samples are made (row is null).")
    values = table.column(name).to_numpy().astype(np.float64)
    if not np.isfinite(values).all():
        raise ConfigError(f"{str(path)!r}: {name} is {values[~np.isfinite(values)][0]} in a row; it must be finite.")
    places = {"dataset": table.column("dataset").cast(pa.string()), "row": table.column("row").cast(pa.int64())}
    return pa.table({**places, DIFFICULTY: values if name == DIFFICULTY else -values})


def difficulties_of(pool: Pool, tables: Iterable[pa.Table]) -> NDArray[np.float64]:
    """Return the mean difficulty of every sample over the tables that have it, shape (N,); NaN if none has it.

    Args:
        pool: the pool. The raw rows of its samples are known.
        tables: tables of :func:`read_difficulties`.
    """
    sums, counts = np.zeros(pool.size), np.zeros(pool.size)
    domains = pool.domain_ids(np.arange(pool.size))
    rows = pool.row_numbers(np.arange(pool.size))
    assert rows is not None
    for table in tables:
        names = np.asarray(table.column("dataset").to_pylist(), dtype=object)
        there, values = table.column("row").to_numpy(), table.column(DIFFICULTY).to_numpy()
        for number, name in enumerate(pool.domains):
            here, of_domain = names == name, np.flatnonzero(domains == number)
            size = int(max(there[here].max(initial=-1), rows[of_domain].max(initial=-1))) + 1
            sums[of_domain] += np.bincount(there[here], values[here], size)[rows[of_domain]]
            counts[of_domain] += np.bincount(there[here], minlength=size)[rows[of_domain]]
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def rows_unknown(pool: Pool) -> str | None:
    """Return why the samples of a pool cannot be found in a table; None if the raw row of each is known."""
    rows = pool.row_numbers(np.arange(pool.size))
    if rows is not None and (rows >= 0).all():
        return None
    return (
        "identifies samples by their raw rows, and it is not known from which rows the samples of this pool are made "
        "(they are packed, or stored tokenized). Load raw data without packing."
    )
