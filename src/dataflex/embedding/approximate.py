"""Nearest neighbours with faiss, for pools that are too large for an exact search. The recall is measured."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dataflex import distributed
from dataflex.embedding.neighbours import Metric, Vectors, nearest, pair_distances
from dataflex.errors import DataFlexError

Search = Literal["auto", "exact", "faiss"]

_LARGE = 2_000_000
"""Number of base rows above which ``auto`` uses faiss, if it is installed."""
_PROBES = 32
"""Number of index lists that are searched for a query."""
_TRAINED = 64
"""Number of training vectors for each list of the index."""
_ROWS = 65_536
"""Number of vectors that are added at once."""
_SAMPLE = 100
"""Number of queries whose neighbours are compared with the exact neighbours."""


class Neighbours(NamedTuple):
    """The nearest base rows of every query.

    Attributes:
        indices: nearest first, shape (M, k).
        distances: float32, shape (M, k).
        recall: share of the exact neighbours that was found, measured on some queries. None for an exact search.
    """

    indices: NDArray[np.int64]
    distances: NDArray[np.float32]
    recall: float | None = None


def find_neighbours(
    queries: Vectors,
    base: Vectors,
    k: int,
    *,
    metric: Metric = "cosine",
    search: Search = "auto",
    measured: int | None = None,
) -> Neighbours:
    """Return the ``k`` nearest base rows of every query, nearest first. All processes make this call together.

    Args:
        queries: shape (M, H).
        base: shape (N, H).
        k: number of neighbours.
        metric: as in :func:`~dataflex.embedding.neighbours.nearest`.
        search: ``exact``; ``faiss``, an approximate index; or ``auto``, which is exact for up to two million base rows
            or if faiss is not installed.
        measured: as in :func:`~dataflex.embedding.neighbours.nearest`, for an exact search.

    Raises:
        DataFlexError: if ``search`` is ``faiss`` and faiss is not installed.

    Example:
        >>> import numpy as np
        >>> from dataflex import find_neighbours
        >>> base = np.eye(4, dtype=np.float32)
        >>> found = find_neighbours(np.array([[0.9, 0.1, 0.0, 0.0]], dtype=np.float32), base, k=2, search="exact")
        >>> found.indices, found.recall
        (array([[0, 1]]), None)
    """
    is_there = find_spec("faiss") is not None
    if search == "faiss" and not is_there:
        raise DataFlexError("search: faiss is not installed; pip install 'dataflex[embeddings]', or set search: exact.")
    if search == "exact" or (search == "auto" and not (is_there and base.shape[0] > _LARGE)):
        return Neighbours(*nearest(queries, base, k, metric=metric, share=True, measured=measured))
    return distributed.on_main(lambda: _by_faiss(queries, base, min(k, base.shape[0]), metric))


def _by_faiss(queries: Vectors, base: Vectors, k: int, metric: Metric) -> Neighbours:
    """Return neighbours found by faiss, with exact distances, and their recall on a sample of the queries."""
    index = _index(base, metric)
    found = index.search(_prepared(queries, metric), k)[1].astype(np.int64)
    short = np.flatnonzero((found < 0).any(axis=1))  # the searched lists hold fewer than k vectors
    if short.size:
        found[short] = nearest(queries[short], base, k, metric=metric)[0]
    rows = np.repeat(np.arange(len(queries)), k)
    found = np.sort(found, axis=1)  # with the stable sort by distance below, ties go to the lower index
    distances = pair_distances(queries, base, rows, found.ravel(), metric).reshape(found.shape)
    order = np.argsort(distances, axis=1, kind="stable")
    indices = np.take_along_axis(found, order, axis=1)
    sample = np.unique(np.linspace(0, len(queries) - 1, min(_SAMPLE, len(queries))).astype(np.int64))
    exact, _ = nearest(queries[sample], base, k, metric=metric)
    hits = [np.intersect1d(*pair, assume_unique=True).size for pair in zip(indices[sample], exact, strict=True)]
    return Neighbours(
        indices, np.take_along_axis(distances, order, axis=1).astype(np.float32), float(np.mean(hits)) / k
    )


def _index(base: Vectors, metric: Metric) -> Any:
    """Return an index of the base rows as half-precision values, in lists around cluster centres."""
    import faiss

    size, width = base.shape
    lists = max(1, min(int(4 * np.sqrt(size)), size // 39))  # faiss needs 39 vectors to train a list
    kind = faiss.ScalarQuantizer.QT_fp16
    index = faiss.IndexIVFScalarQuantizer(faiss.IndexFlatL2(width), width, lists, kind, faiss.METRIC_L2)
    drawn = np.unique(np.linspace(0, size - 1, min(size, _TRAINED * lists)).astype(np.int64))
    index.train(_prepared(base[drawn], metric))
    for begin in range(0, size, _ROWS):
        index.add(_prepared(base[begin : begin + _ROWS], metric))
    index.nprobe = min(lists, _PROBES)
    return index


def _prepared(vectors: Vectors, metric: Metric) -> NDArray[np.float32]:
    """Return vectors in the format of the index. Vectors of length 1 have the same order by cosine and by distance."""
    rows = np.array(vectors, dtype=np.float32, order="C")
    if metric == "cosine":
        lengths = np.linalg.norm(rows, axis=1, keepdims=True)
        rows /= np.where(lengths, lengths, 1)
    return rows
