"""Nearest neighbours by faiss, for pools that an exact search takes too long for; how many are found is measured."""

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
"""Base rows from which on ``auto`` takes faiss, where it is installed."""
_PROBES = 32
"""Lists of the index that are looked through for a query."""
_TRAINED = 64
"""Vectors for each list that the index is trained on."""
_ROWS = 65_536
"""Vectors added together."""
_SAMPLE = 100
"""Queries whose neighbours are compared with the exact ones."""


class Neighbours(NamedTuple):
    """The nearest base rows of every query.

    Attributes:
        indices: nearest first, shape (M, k).
        distances: float32, shape (M, k).
        recall: share of the exact neighbours that was found, of some queries; None: the search was exact.
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
    """Return the ``k`` nearest base rows of every query, nearest first; all processes make this call together.

    Args:
        queries: shape (M, H).
        base: shape (N, H).
        k: neighbours wanted.
        metric: as in :func:`~dataflex.embedding.neighbours.nearest`.
        search: ``exact``; ``faiss``, an approximate index; ``auto``: exact up to two million base rows, or if faiss is
            not installed.
        measured: as in :func:`~dataflex.embedding.neighbours.nearest`, of an exact search.

    Raises:
        DataFlexError: if faiss is asked for and not installed.
    """
    is_there = find_spec("faiss") is not None
    if search == "faiss" and not is_there:
        raise DataFlexError("search: faiss is not installed; pip install 'dataflex[embeddings]', or set search: exact.")
    if search == "exact" or (search == "auto" and not (is_there and base.shape[0] > _LARGE)):
        return Neighbours(*nearest(queries, base, k, metric=metric, share=True, measured=measured))
    return distributed.on_main(lambda: _by_faiss(queries, base, min(k, base.shape[0]), metric))


def _by_faiss(queries: Vectors, base: Vectors, k: int, metric: Metric) -> Neighbours:
    index = _index(base, metric)
    found = index.search(_prepared(queries, metric), k)[1].astype(np.int64)
    short = np.flatnonzero((found < 0).any(axis=1))  # fewer than k in the lists looked through
    if short.size:
        found[short] = nearest(queries[short], base, k, metric=metric)[0]
    rows = np.repeat(np.arange(len(queries)), k)
    found = np.sort(found, axis=1)
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
    """Return an index of the base rows, as half precision numbers in lists around the centres of clusters."""
    import faiss

    size, width = base.shape
    lists = max(1, min(int(4 * np.sqrt(size)), size // 39))  # faiss wants 39 vectors to train a list on
    kind = faiss.ScalarQuantizer.QT_fp16
    index = faiss.IndexIVFScalarQuantizer(faiss.IndexFlatL2(width), width, lists, kind, faiss.METRIC_L2)
    drawn = np.unique(np.linspace(0, size - 1, min(size, _TRAINED * lists)).astype(np.int64))
    index.train(_prepared(base[drawn], metric))
    for begin in range(0, size, _ROWS):
        index.add(_prepared(base[begin : begin + _ROWS], metric))
    index.nprobe = min(lists, _PROBES)
    return index


def _prepared(vectors: Vectors, metric: Metric) -> NDArray[np.float32]:
    """Return vectors as the index takes them: the cosine orders as the distance of vectors of length 1 does."""
    rows = np.array(vectors, dtype=np.float32, order="C")
    if metric == "cosine":
        lengths = np.linalg.norm(rows, axis=1, keepdims=True)
        rows /= np.where(lengths, lengths, 1)
    return rows
