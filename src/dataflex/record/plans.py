"""Plans of a run's rounds in a few files, to which each round is appended.

``plans/from-round-NNNNN.arrows`` is an Arrow IPC stream: a head with the columns and the names of the domains, then
one compressed batch of rows for each round. When a file has reached :data:`FULL` bytes, the next round begins another
file. The line of a round in ``rounds.jsonl`` holds the byte range of its plan. It is written after the plan, so it
never names a plan that does not exist. Bytes that a killed run wrote beyond the last such line are overwritten. Any
reader of Arrow streams can read a whole file::

    pyarrow.ipc.open_stream("plans/from-round-00000.arrows").read_pandas()

Records of version 1 have a Parquet file for each round, with the same columns.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import ConfigError
from dataflex.record.files import one_line, parquet_table
from dataflex.record.schema import ROUNDS, Place, Round

if TYPE_CHECKING:  # the import takes a third of a second, so readers of JSON do not import it
    import pyarrow

FULL = 64 * 2**20
"""Size in bytes at which a file gets no further round."""
_SUFFIX = ".arrows"
_ROUND, _POSITION, _INDEX, _DOMAIN, _ROW, _SCORE, _RANK = COLUMNS = (
    "round", "position", "index", "domain", "row", "score", "rank",
)  # fmt: skip


@dataclass(frozen=True)
class Rows:
    """The samples of a round in training order. Every array has the shape (size,)."""

    indices: NDArray[np.int64]
    domains: NDArray[np.int64]
    """Index of each sample's domain."""
    rows: NDArray[np.int64] | None = None
    """Row of each sample in its data set; negative if it is not known."""
    scores: NDArray[np.float32] | None = None
    """Score of each sample; NaN for a sample without a score."""
    ranks: NDArray[np.int64] | None = None
    """Rank of each sample from 1, the best; 0 for a sample without a rank."""


class PlanWriter:
    """Appends plans behind the last one that a resumed run keeps.

    Args:
        folder: folder ``plans`` of the record.
        domains: names of the pool's domains.
        kept: byte ranges of the plans to keep. Bytes behind them are cut off, and files without any of them are
            deleted.
    """

    def __init__(self, folder: Path, domains: Sequence[str], kept: Iterable[Place] = ()) -> None:
        import pyarrow as pa

        self._folder, self._names = folder, pa.array(list(domains), pa.string())
        self._schema = pa.schema(
            {
                _ROUND: pa.int32(),
                _POSITION: pa.int64(),
                _INDEX: pa.int64(),
                _DOMAIN: pa.dictionary(pa.int32(), pa.string()),
                _ROW: pa.int64(),
                _SCORE: pa.float32(),
                _RANK: pa.int64(),
            }
        )
        self._sink = io.BytesIO()
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        self._stream = pa.ipc.new_stream(self._sink, self._schema, options=options)
        nothing = np.zeros(0, np.int64)
        # An empty batch makes the stream write its head, with the columns and the names, before the first real batch.
        self._head = self._bytes_of(0, Rows(nothing, nothing))
        self._file, self._end = "", 0
        self._cut(list(kept))

    def _cut(self, kept: list[Place]) -> None:
        """Cut the files behind the plans to keep, and continue the last file if it fits."""
        ends: dict[str, int] = {}
        for place in kept:
            ends[place.file] = max(ends.get(place.file, 0), place.end)
        for path in sorted(self._folder.glob(f"*{_SUFFIX}")):
            if path.name not in ends:
                path.unlink()
            elif path.stat().st_size > ends[path.name]:
                with path.open("r+b") as stream:
                    stream.truncate(ends[path.name])
        if kept and self._takes_on(self._folder / kept[-1].file):
            self._file, self._end = kept[-1].file, ends[kept[-1].file]

    def _takes_on(self, path: Path) -> bool:
        """Return whether a file has the head that this writer would write, so that it can be continued."""
        if not path.is_file():
            return False
        with path.open("rb") as stream:
            return stream.read(len(self._head)) == self._head

    def write(self, number: int, rows: Rows) -> Place:
        """Append the plan of a round, and return its byte range."""
        content = self._bytes_of(number, rows)
        if not self._file or self._end >= FULL:
            self._file, self._end = f"from-round-{number:05d}{_SUFFIX}", len(self._head)
            (self._folder / self._file).write_bytes(self._head)
        begin, self._end = self._end, self._end + len(content)
        with (self._folder / self._file).open("r+b") as stream:
            stream.seek(begin)
            stream.write(content)
            stream.truncate()
        return Place(self._file, begin, self._end)

    def _bytes_of(self, number: int, rows: Rows) -> bytes:
        """Return the bytes that the stream writes for the plan of a round."""
        import pyarrow as pa

        size = rows.indices.size

        def known(values: NDArray[Any] | None, unknown: Any, kind: pyarrow.DataType) -> pyarrow.Array:
            return pa.nulls(size, kind) if values is None else pa.array(values, kind, mask=unknown(values))

        batch = pa.record_batch(
            [
                pa.array(np.full(size, number, np.int32)),
                pa.array(np.arange(size, dtype=np.int64)),
                pa.array(rows.indices.astype(np.int64, copy=False)),
                pa.DictionaryArray.from_arrays(rows.domains.astype(np.int32), self._names),
                known(rows.rows, lambda values: values < 0, pa.int64()),
                known(rows.scores, np.isnan, pa.float32()),
                known(rows.ranks, lambda values: values == 0, pa.int64()),
            ],
            schema=self._schema,
        )
        self._stream.write_batch(batch)
        content = self._sink.getvalue()
        self._sink.seek(0)
        self._sink.truncate()
        return content


class PlanReader:
    """Reads the plans of a record, one round at a time.

    Args:
        folder: folder ``plans`` of the record.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._heads: dict[str, bytes] = {}
        """Bytes of each plan file before its first round, by name of the file. They are read once."""

    def __bool__(self) -> bool:
        return any(self.folder.glob(f"*{_SUFFIX}")) or any(self.folder.glob("round-*.parquet"))

    def where(self, each: Round) -> str:
        """Return the file of a round's plan, for messages."""
        if each.plan is None:
            return str(self.folder / f"round-{each.round:05d}.parquet")
        return f"{self.folder / each.plan.file}, round {each.round}"

    def table(self, each: Round, names: Sequence[str] = COLUMNS) -> pyarrow.Table:
        """Return columns of the plan of a round. Columns that a file of version 1 lacks are left out.

        Raises:
            ConfigError: if the plan does not exist, or its file is malformed.
        """
        if each.plan is None:
            return self._table_of_version_1(each, names)
        import pyarrow as pa

        path, where = self.folder / each.plan.file, self.where(each)
        if not path.is_file():
            raise ConfigError(f"{path} is missing; expected the plan of round {each.round} of {ROUNDS}.")
        numbers = [COLUMNS.index(name) for name in dict.fromkeys([_ROUND, *names])]
        try:
            head = self._head(path)
            with path.open("rb") as stream:
                stream.seek(each.plan.begin)
                content = stream.read(each.plan.end - each.plan.begin)
            if len(content) < each.plan.end - each.plan.begin:
                raise ConfigError(f"{where} is not all there; was the file cut off?")
            options = pa.ipc.IpcReadOptions(included_fields=numbers, use_threads=False)
            table = pa.ipc.open_stream(pa.BufferReader(head + content), options=options).read_all()
        except (pa.ArrowInvalid, OSError) as error:
            raise ConfigError(f"{where} is not readable Arrow ({one_line(error)}); was the file changed?") from error
        if table.num_rows != each.size or not (table.column(_ROUND).to_numpy() == each.round).all():
            raise ConfigError(
                f"{where} has {table.num_rows} samples, {ROUNDS} says {each.size}; was the file changed, or the run "
                "resumed while it was read?"
            )
        return table.select(list(names))

    def _head(self, path: Path) -> bytes:
        """Return the bytes of a file before its first round."""
        import pyarrow as pa

        if path.name not in self._heads:
            with pa.OSFile(str(path)) as file:
                pa.ipc.open_stream(file).read_next_batch()
                size = file.tell()
            with path.open("rb") as stream:
                self._heads[path.name] = stream.read(size)
        return self._heads[path.name]

    def _table_of_version_1(self, each: Round, names: Sequence[str]) -> pyarrow.Table:
        """Return columns of the Parquet file of a round."""
        path = Path(self.where(each))
        if not path.is_file():
            raise ConfigError(f"{path} is missing; expected the plan of round {each.round} of {ROUNDS}.")
        return parquet_table(path, names)

    def indices(self, each: Round) -> NDArray[np.int64]:
        """Return the pool indices of a round in training order, shape (size,)."""
        import pyarrow as pa

        column = self._needed(each, _INDEX)
        kind = column.type
        if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind)):
            raise ConfigError(f"{self.where(each)}: column 'index' must hold numbers, holds {kind}.")
        if column.null_count or not pa.types.is_integer(kind):
            raise ConfigError(
                f"{self.where(each)}: column 'index' has fractions or nulls; expected pool indices from 0."
            )
        indices = column.to_numpy()
        if indices.size and indices.min() < 0:
            raise ConfigError(f"{self.where(each)}: column 'index' has {indices.min()}; expected pool indices from 0.")
        return indices.astype(np.int64, copy=False)

    def labels(self, each: Round) -> tuple[NDArray[np.int64], list[str]]:
        """Return the domain of each sample of a round as an index, and the domain names that the indices refer to."""
        import pyarrow as pa

        column = self._needed(each, _DOMAIN)
        if not pa.types.is_dictionary(column.type):
            column = column.dictionary_encode()
        values = column.combine_chunks()  # an array, its dictionaries made one
        if not pa.types.is_string(values.type.value_type) or values.null_count:
            raise ConfigError(f"{self.where(each)}: column 'domain' must hold a word in each row, holds {column.type}.")
        return values.indices.to_numpy().astype(np.int64), values.dictionary.to_pylist()

    def numbers(self, each: Round, name: str) -> NDArray[Any] | None:
        """Return the rows, scores or ranks of a round, with NaN for missing values; None if all are missing."""
        table = self.table(each, [name])
        if name not in table.column_names or table.column(name).null_count == table.num_rows:
            return None
        values = table.column(name).to_numpy()
        if values.dtype.kind not in "iuf":
            raise ConfigError(f"{self.where(each)}: column {name!r} must hold numbers, holds {values.dtype}.")
        return values

    def _needed(self, each: Round, name: str) -> pyarrow.ChunkedArray:
        """Return a column of the plan of a round that every file must have."""
        table = self.table(each, [name])
        if name not in table.column_names:
            raise ConfigError(f"{self.where(each)} has no column {name!r}; expected a plan written by a DataFlex run.")
        return table.column(name)
