"""Exact nearest neighbours of many queries.

The base is read once, in blocks, and scored by matrix products.

Products in single precision only exclude rows that cannot be among the nearest. The distances of the remaining pairs
are computed again in double precision. A distance then depends only on its two rows, and not on the blocks, threads,
processes or the device. Equal distances go to the lower index.

Time: one product of all queries with the base, and one pass over the scores. Memory: a block of the base, and about
``1.2 k`` candidates for each query.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from dataflex import distributed

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
Metric = Literal["cosine", "l2"]
Vectors = NDArray[np.floating[Any]]

QUERIES = 2048
"""Number of queries that are scored in one pass over the base."""
_CELLS = 1 << 23
"""Number of values in a block of the base and in its scores. Both fit into the processor's cache."""
_DEVICE_CELLS = 1 << 27
"""Number of values in a block of the base and in its scores on an accelerator."""
_MUCH = 1 << 32
"""Number of multiplications above which an accelerator is worth the transfer."""
_PAIR_CELLS = 1 << 17
"""Number of values in a block of pairs for double precision. The block fits into the cache of one core."""
_CROWDED = 64
"""Number of queries per batch if more candidates than can be stored have nearly the same distance."""


def nearest(
    queries: Vectors,
    base: Vectors,
    k: int,
    *,
    metric: Metric = "cosine",
    device: str | torch.device | None = None,
    exclude_self: bool = False,
    share: bool = False,
    measured: int | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return the ``k`` nearest base rows of every query, nearest first.

    Args:
        queries: shape (M, H), finite.
        base: shape (N, H), finite. A memory map is read block by block.
        k: number of neighbours. At most N exist, or N - 1 with ``exclude_self``.
        metric: ``cosine`` (1 - cosine; 1 for a row of zeros) or ``l2`` (the Euclidean distance).
        device: the device of the products. None means the accelerator of this process if it exists and the search is
            large, otherwise the CPU.
        exclude_self: whether query i is base row i, which then is no neighbour of query i.
        share: whether the processes divide the queries. All processes then make this call with the same arguments.
        measured: number of neighbours of each query whose distance is computed in double precision. A smaller number
            saves time. The other neighbours have the order and distances of the products. None means all.

    Returns:
        Indices, int64, and distances, float32, both of shape (M, min(k, N)). They are the same on every process.

    Raises:
        ValueError: if the shapes do not match, or ``k`` is below 1.

    Example:
        >>> import numpy as np
        >>> from dataflex import nearest
        >>> base = np.array([[0.0, 0.0], [3.0, 4.0], [1.0, 0.0]], dtype=np.float32)
        >>> indices, distances = nearest(base[:1], base, k=2, metric="l2", exclude_self=True)
        >>> indices, distances
        (array([[2, 1]]), array([[1., 5.]], dtype=float32))
    """
    if queries.ndim != 2 or base.ndim != 2 or queries.shape[1] != base.shape[1]:
        raise ValueError(f"queries {queries.shape} and base {base.shape} must be matrices of the same width")
    if exclude_self and queries.shape[0] > base.shape[0]:
        raise ValueError(f"{queries.shape[0]} queries cannot each be one of {base.shape[0]} base rows")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    count = min(k, base.shape[0] - int(exclude_self))
    world = distributed.world_size() if share else 1
    bounds = np.linspace(0, queries.shape[0], world + 1).astype(int)
    first, last = (int(bounds[distributed.rank()]), int(bounds[distributed.rank() + 1])) if share else (0, len(queries))
    indices = np.empty((last - first, count), dtype=np.int64)
    distances = np.empty((last - first, count), dtype=np.float32)
    for begin in range(first, last if count else first, QUERIES):
        end = min(begin + QUERIES, last)
        own = np.arange(begin, end) if exclude_self else None
        engine = engine_of(queries[begin:end], base, metric, device, own)
        indices[begin - first : end - first], distances[begin - first : end - first] = search(engine, count, measured)
    if world == 1:
        return indices, distances
    parts = distributed.gather_objects((indices, distances))
    return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])


def pair_distances(
    queries: Vectors, base: Vectors, rows: NDArray[np.int64], ids: NDArray[np.int64], metric: Metric
) -> NDArray[np.float64]:
    """Return the distances of pairs of a query and a base row with the precision of :func:`nearest`, shape (n,)."""
    return _HostQueries(queries, base, metric, None).measured(rows, ids)


class _Scores(Protocol):
    """The scores of a block. A larger score means a smaller distance."""

    def above(self, cut: Vectors) -> tuple[NDArray[np.int64], NDArray[np.int64], Vectors]:
        """Return rows, columns (by row, then column) and values of the scores above each row's ``cut``."""
        ...

    def best(self, count: int) -> tuple[NDArray[np.int64], Vectors]:
        """Return columns and values of each row's ``count`` largest scores, in any order; all if fewer exist."""
        ...


class Queries:
    """Some queries, the base, and the comparison between them.

    The score is q.b for unit rows with the metric ``cosine``. With ``l2`` the score is q.b - |b|^2 / 2, which orders
    the base rows by distance.

    Args:
        queries: shape (m, H).
        base: shape (N, H).
        metric: as in :func:`nearest`.
        own: the base row that each query is and must not find. None means that a query may find any row.
    """

    device_cells = _CELLS
    device: str | torch.device = "cpu"

    def __init__(self, queries: Vectors, base: Vectors, metric: Metric, own: NDArray[np.int64] | None) -> None:
        self.base, self.metric = base, metric
        self.own = np.full(len(queries), -1, dtype=np.int64) if own is None else own
        kind = np.result_type(queries.dtype, base.dtype)
        self.dtype: np.dtype[Any] = np.dtype(np.float64 if kind == np.float64 else np.float32)
        self.rounding = float(np.finfo(np.float64 if kind == np.float64 else np.float32).eps)
        self._given = queries
        scaled = self.exact / np.where(self.lengths, self.lengths, 1)[:, None] if metric == "cosine" else queries
        self.matrix = np.ascontiguousarray(scaled, dtype=self.dtype)
        self.longest = 0.0
        """Length of the longest base row so far."""

    def __len__(self) -> int:
        return len(self.matrix)

    @cached_property
    def exact(self) -> NDArray[np.float64]:
        """The queries in double precision, (m, H)."""
        return np.asarray(self._given, dtype=np.float64)

    @cached_property
    def lengths(self) -> NDArray[np.float64]:
        """The lengths of the queries, (m,)."""
        return np.sqrt(np.einsum("ij,ij->i", self.exact, self.exact))

    @property
    def error(self) -> Vectors:
        """A bound on the rounding error of a score, shape (m,)."""
        unit = (self.matrix.shape[1] + 32) * self.rounding
        if self.metric == "cosine":
            return np.full(len(self), unit)
        return unit * (self.lengths * self.longest + self.longest**2)

    def blocks(self) -> Iterator[tuple[int, int, _Scores]]:
        """Yield blocks of scores that cover all base rows, each with its first row and its number of rows."""
        width = max(len(self), self.base.shape[1])
        rows = max(256, min(self.device_cells // width, self.base.shape[0]))
        for begin in range(0, self.base.shape[0], rows):
            block = np.asarray(self.base[begin : begin + rows])
            yield begin, len(block), self.scores(begin, block)

    def scores(self, begin: int, block: Vectors) -> _Scores:
        """Return the scores of the block of base rows that begins at ``begin``, (m, n)."""
        raise NotImplementedError

    def own_places(self, begin: int, size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return rows and columns of the pairs in a block that are a query and itself."""
        rows = np.flatnonzero((self.own >= begin) & (self.own < begin + size))
        return rows, self.own[rows] - begin

    def distances(self, rows: NDArray[np.int64], scores: Vectors) -> NDArray[np.float64]:
        """Return the distances of some queries that match the scores up to rounding, in the shape of the scores."""
        if self.metric == "cosine":
            return 1 - scores.astype(np.float64)
        squares: NDArray[np.float64] = self.lengths[rows, None] ** 2 - 2 * scores.astype(np.float64)
        return np.sqrt(np.maximum(squares, 0))

    def measured(self, rows: NDArray[np.int64], ids: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the distances of pairs of a query and a base row, in double precision, shape (n,)."""
        exact, known = self.exact, self.lengths  # computed before the threads start
        together = max(1, _PAIR_CELLS // max(1, self.base.shape[1]))
        found = np.empty(rows.size)

        def measure(pairs: slice) -> None:
            for begin in range(pairs.start, pairs.stop, together):
                part = slice(begin, min(begin + together, pairs.stop))
                vectors, asked = self.base[ids[part]].astype(np.float64), exact[rows[part]]
                if self.metric == "l2":
                    vectors -= asked
                    found[part] = np.sqrt(np.einsum("ij,ij->i", vectors, vectors))
                    continue
                lengths = np.sqrt(np.einsum("ij,ij->i", vectors, vectors)) * known[rows[part]]
                cosines = np.einsum("ij,ij->i", vectors, asked) / np.where(lengths, lengths, 1)
                found[part] = np.maximum(1 - cosines, 0)

        _by_threads(rows.size, measure)
        return found


def _by_threads(size: int, work: Callable[[slice], T]) -> list[T]:
    """Return the results of ``work`` for equal parts of ``range(size)``, in order, with one thread for each part.

    NumPy uses one thread except for matrix products, and releases the interpreter lock for other threads.
    """
    import torch

    bounds = np.linspace(0, size, torch.get_num_threads() + 1).astype(int)
    parts = [slice(int(begin), int(end)) for begin, end in pairwise(bounds)]
    if len(parts) == 1:
        return [work(parts[0])]
    with ThreadPoolExecutor(len(parts)) as threads:
        return list(threads.map(work, parts))


class _HostScores:
    def __init__(self, values: Vectors) -> None:
        self.values = values

    def above(self, cut: Vectors) -> tuple[NDArray[np.int64], NDArray[np.int64], Vectors]:
        width = self.values.shape[1]

        def find(rows: slice) -> tuple[NDArray[np.int64], Vectors]:
            values = self.values[rows]
            places = np.flatnonzero(values > cut[rows, None])
            return places + rows.start * width, values.reshape(-1)[places]

        found = _by_threads(len(self.values), find)
        rows, columns = np.divmod(np.concatenate([places for places, _ in found]), width)
        return rows, columns, np.concatenate([values for _, values in found])

    def best(self, count: int) -> tuple[NDArray[np.int64], Vectors]:
        size = self.values.shape[1]
        if size <= count:
            return np.broadcast_to(np.arange(size), self.values.shape), self.values.copy()
        columns = np.argpartition(self.values, size - count, axis=1)[:, size - count :]
        return columns, np.take_along_axis(self.values, columns, axis=1)


class _HostQueries(Queries):
    """Products on the CPU."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._room: Vectors = np.empty(0, dtype=self.dtype)
        """Buffer for the products of a block, reused by later blocks."""

    def scores(self, begin: int, block: Vectors) -> _HostScores:
        block = _widened(block) if block.dtype == np.float16 else block.astype(self.dtype, copy=False)
        squares = np.einsum("ij,ij->i", block, block)
        if self.metric == "cosine" and np.abs(squares - 1).max() > 16 * self.rounding:
            block = block / np.sqrt(np.where(squares, squares, 1))[:, None]
        if self._room.size < len(self) * len(block):
            self._room = np.empty(len(self) * len(block), dtype=self.dtype)
        values = self._room[: len(self) * len(block)].reshape(len(self), len(block))
        _multiply(self.matrix, block, values)
        if self.metric == "l2":
            self.longest = max(self.longest, float(np.sqrt(squares.max())))
            half = squares / 2
            _by_threads(len(self), lambda rows: np.subtract(values[rows], half, out=values[rows]))
        values[self.own_places(begin, len(block))] = -np.inf
        return _HostScores(values)


def _multiply(left: Vectors, right: Vectors, out: Vectors) -> None:
    """Write the products of the rows of two matrices, ``left @ right.T``, to ``out``."""
    import torch

    if not _is_intel():
        np.matmul(left, right.T, out=out)
        return
    with _full_precision():
        torch.mm(
            torch.from_numpy(left),
            torch.from_numpy(np.require(right, requirements=["C", "W"])).T,
            out=torch.from_numpy(out),
        )


@cache
def _is_intel() -> bool:
    """Return whether the CPU is from Intel.

    On Intel CPUs torch's library (MKL) takes four fifths of the time of NumPy's (OpenBLAS) for blocks of this size. On
    an AMD CPU it takes 1.1 to 1.4 times as long.
    """
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:  # not Linux
        return False


def _widened(block: Vectors) -> Vectors:
    import torch

    return torch.from_numpy(np.array(block)).float().numpy()


class _DeviceScores:
    def __init__(self, values: torch.Tensor) -> None:
        self.values = values

    def above(self, cut: Vectors) -> tuple[NDArray[np.int64], NDArray[np.int64], Vectors]:
        import torch

        limit = torch.from_numpy(cut).to(self.values.device, self.values.dtype)
        places = (self.values > limit[:, None]).view(-1).nonzero().squeeze(1)
        rows, columns = np.divmod(places.cpu().numpy(), self.values.shape[1])
        return rows, columns, self.values.view(-1)[places].cpu().numpy()

    def best(self, count: int) -> tuple[NDArray[np.int64], Vectors]:
        values, columns = self.values.topk(min(count, self.values.shape[1]), dim=1, sorted=False)
        return columns.cpu().numpy(), values.cpu().numpy()


class _DeviceQueries(Queries):
    """Products on an accelerator, in full single precision."""

    device_cells = _DEVICE_CELLS

    def __init__(
        self, queries: Vectors, base: Vectors, metric: Metric, own: NDArray[np.int64] | None, device: Any
    ) -> None:
        import torch

        super().__init__(queries, base, metric, own)
        self.device = torch.device(device)
        self.on_device = torch.from_numpy(self.matrix).to(self.device)

    def scores(self, begin: int, block: Vectors) -> _DeviceScores:
        import torch

        rows = torch.from_numpy(np.array(block)).to(self.device).to(self.on_device.dtype)
        squares = (rows * rows).sum(1)
        if self.metric == "cosine":
            rows /= torch.where(squares > 0, squares, torch.ones_like(squares)).sqrt()[:, None]
        with _full_precision():
            values = self.on_device @ rows.T
        if self.metric == "l2":
            self.longest = max(self.longest, float(squares.max().sqrt()))
            values -= squares / 2
        own_rows, own_columns = (torch.from_numpy(each).to(self.device) for each in self.own_places(begin, len(block)))
        values[own_rows, own_columns] = -torch.inf
        return _DeviceScores(values)


@contextmanager
def _full_precision() -> Iterator[None]:
    """Disable reduced precision in products: TF32 on NVIDIA devices and bfloat16 on some CPUs."""
    import torch

    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    allowed = [each.fp32_precision for each in backends]
    try:
        for each in backends:
            each.fp32_precision = "ieee"
        yield
    finally:
        for each, precision in zip(backends, allowed, strict=True):
            each.fp32_precision = precision


def engine_of(
    queries: Vectors,
    base: Vectors,
    metric: Metric,
    device: str | torch.device | None,
    own: NDArray[np.int64] | None,
) -> Queries:
    """Return the comparison of queries with a base on a device. The arguments are the same as for :class:`Queries`."""
    is_double = np.result_type(queries.dtype, base.dtype) == np.float64
    if device is None and not is_double and queries.shape[0] * base.size > _MUCH:
        device = _accelerator()
    if device is None or str(device) == "cpu" or (is_double and not _has_float64(device)):
        return _HostQueries(queries, base, metric, own)
    return _DeviceQueries(queries, base, metric, own, device)


def _has_float64(device: str | torch.device) -> bool:
    import torch

    from dataflex.data.sums import sum_dtype

    return sum_dtype(torch.device(device)) == torch.float64


def _accelerator() -> torch.device | None:
    import torch

    return torch.accelerator.current_accelerator(check_available=True)


class _Best:
    """The ``width`` best candidates of every query so far, by score."""

    def __init__(self, queries: int, count: int, dtype: np.dtype[Any]) -> None:
        self.count, self.width = count, count + max(32, count // 8)
        self.values = np.full((queries, self.width), -np.inf, dtype=dtype)
        self.ids = np.full((queries, self.width), -1, dtype=np.int64)
        self.last = np.full(queries, -np.inf, dtype=dtype)
        """The ``count``-th best score of each query."""
        self.dropped = np.full(queries, -np.inf, dtype=dtype)
        """Upper bound of the scores of each query that were dropped for lack of space."""
        self._waiting: list[tuple[NDArray[np.int64], NDArray[np.int64], Vectors]] = []
        """Added candidates that are not reduced yet: (query, base row, score) of each addition."""
        self._counts = np.zeros(queries, dtype=np.int64)
        """Number of waiting candidates of each query."""

    def begin(self, scores: _Scores, size: int) -> None:
        """Store the best candidates of the first block, of ``size`` base rows from 0 on."""
        columns, values = scores.best(self.width)
        place = columns.shape[1]
        self.ids[:, :place], self.values[:, :place] = columns, values
        self.ids[np.isneginf(self.values)] = -1  # the query itself
        if size > self.width:
            self.dropped = self.values.min(axis=1)
        self._rank()

    def _rank(self) -> None:
        place = self.width - self.count
        self.last = np.partition(self.values, place, axis=1)[:, place]

    def add(self, rows: NDArray[np.int64], ids: NDArray[np.int64], values: Vectors) -> None:
        """Add candidates, in the order of ``rows``."""
        self._waiting.append((rows, ids, values))
        self._counts += np.bincount(rows, minlength=self._counts.size)
        if self._counts.sum() > self.values.size or self._counts.max() > 4 * self.width:
            self.settle()

    def settle(self) -> None:
        """Reduce the added candidates to the best ones."""
        rows = np.concatenate([part[0] for part in self._waiting])
        # Row numbers are below QUERIES, and numpy sorts 16-bit integers by radix, which is faster.
        order = np.argsort(rows.astype(np.uint16), kind="stable")
        rows = rows[order]
        places = np.arange(rows.size) - np.repeat(np.cumsum(self._counts) - self._counts, self._counts)
        shape = (self._counts.size, self.width + int(self._counts.max()))
        values = np.full(shape, -np.inf, dtype=self.values.dtype)
        ids = np.full(shape, -1, dtype=np.int64)
        values[:, : self.width], ids[:, : self.width] = self.values, self.ids
        values[rows, self.width + places] = np.concatenate([part[2] for part in self._waiting])[order]
        ids[rows, self.width + places] = np.concatenate([part[1] for part in self._waiting])[order]
        kept = np.argpartition(values, shape[1] - self.width, axis=1)[:, shape[1] - self.width :]
        is_cut = np.count_nonzero(self.ids >= 0, axis=1) + self._counts > self.width
        self.values, self.ids = np.take_along_axis(values, kept, axis=1), np.take_along_axis(ids, kept, axis=1)
        self.dropped = np.where(is_cut, np.maximum(self.dropped, self.values.min(axis=1)), self.dropped)
        self._rank()
        self._waiting, self._counts = [], np.zeros_like(self._counts)

    def finish(self) -> None:
        """Reduce all candidates to the best ones, including those that are still waiting."""
        if self._waiting:
            self.settle()


def search(queries: Queries, count: int, measured: int | None = None) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the nearest base rows of some queries, and their distances, both (m, count)."""
    best = _Best(len(queries), count, queries.dtype)
    for begin, size, scores in queries.blocks():
        if begin == 0:
            best.begin(scores, size)
            continue
        rows, columns, values = scores.above(_cut(best.last, queries))
        best.add(rows, columns + begin, values)
    best.finish()
    found = np.empty((len(queries), count), dtype=np.int64)
    distances = np.empty((len(queries), count))
    cut = _cut(best.last, queries)
    is_crowded = best.dropped > cut
    clear = np.flatnonzero(~is_crowded)
    found[clear], distances[clear] = _sorted(queries, best, clear, measured)
    crowded = np.flatnonzero(is_crowded)
    for begin in range(0, crowded.size, _CROWDED):
        chosen = crowded[begin : begin + _CROWDED]
        found[chosen], distances[chosen] = _crowded(queries, chosen, cut, count)
    return found, distances


def _sorted(
    queries: Queries, best: _Best, chosen: NDArray[np.int64], measured: int | None
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the nearest base rows of some queries by distance and index, and their distances.

    Args:
        queries: all queries.
        best: the candidates of the queries.
        chosen: indices of the queries to sort, shape (m,).
        measured: number of candidates of each query to measure in double precision; scores order the others. None means
            all.
    """
    # By index first: the stable sort by distance below then gives ties to the lower index.
    order = np.argsort(best.ids[chosen], axis=1)
    ids = np.take_along_axis(best.ids[chosen], order, axis=1)
    scores = np.take_along_axis(best.values[chosen], order, axis=1)
    is_asked = ids >= 0
    distances = np.where(is_asked, queries.distances(chosen, scores), np.inf)
    width = best.width if measured is None else measured + max(32, measured // 8)
    if width < best.width:
        place = best.width - width
        is_asked &= scores >= np.partition(scores, place, axis=1)[:, place, None]
    distances[is_asked] = queries.measured(np.repeat(chosen, np.count_nonzero(is_asked, axis=1)), ids[is_asked])
    order = np.argsort(distances, axis=1, kind="stable")[:, : best.count]
    return np.take_along_axis(ids, order, axis=1), np.take_along_axis(distances, order, axis=1)


def _cut(last: Vectors, queries: Queries) -> Vectors:
    """Return the scores below which no row can be nearer than the candidates whose scores are ``last``."""
    # Twice the error, because both compared scores are rounded.
    return (last - 2 * queries.error).astype(queries.dtype)


def _crowded(
    queries: Queries, chosen: NDArray[np.int64], cut: Vectors, count: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the nearest base rows of queries with too many candidates at nearly the same distance."""
    limits = np.full(len(queries), np.inf, dtype=queries.dtype)
    limits[chosen] = cut[chosen]
    kept_rows, kept_ids = [], []
    for begin, _, scores in queries.blocks():
        rows, columns, _ = scores.above(limits)
        kept_rows.append(rows)
        kept_ids.append(columns + begin)
    rows, ids = np.concatenate(kept_rows), np.concatenate(kept_ids)
    order = np.argsort(rows, kind="stable")
    return _ordered(queries, rows[order], ids[order], count)


def _ordered(
    queries: Queries, rows: NDArray[np.int64], ids: NDArray[np.int64], count: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the first ``count`` of each query's candidates by distance and index. ``rows`` are ascending."""
    distances = queries.measured(rows, ids)
    order = np.lexsort((ids, distances, rows))
    starts = np.flatnonzero(np.diff(rows, prepend=-1))
    places = order[starts[:, None] + np.arange(count)]
    return ids[places], distances[places]
