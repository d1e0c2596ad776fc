"""Spherical k-means: clusters of vectors by direction, read in blocks."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_ROWS = 8192
"""Number of vectors in a block."""


def spherical_kmeans(
    vectors: NDArray[np.floating[Any]], count: int, iterations: int, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return the cluster of every vector, and the cluster centres of length 1.

    A vector belongs to the cluster whose centre has the largest cosine with it (the first of several). A centre has the
    direction of the sum of its vectors. An empty cluster restarts at the vector that is farthest from its centre. The
    iterations end when no vector changes its cluster.

    Args:
        vectors: vectors of length 1 or 0, shape (N, H).
        count: number of clusters, at most N.
        iterations: maximum number of iterations.
        rng: generator that draws the vectors of the first centres.

    Returns:
        Clusters of shape (N,), and centres of shape (K, H) with K at most ``count``. Only clusters with vectors are
        returned, numbered from 0 without gaps.

    Example:
        >>> import numpy as np
        >>> from dataflex import spherical_kmeans
        >>> vectors = np.array([[1, 0], [0.8, 0.6], [0, -1], [-0.6, -0.8]])
        >>> clusters, centres = spherical_kmeans(vectors, 2, 10, np.random.default_rng(0))
        >>> bool(clusters[0] == clusters[1] != clusters[2] == clusters[3]), centres.shape
        (True, (2, 2))
    """
    rows = np.sort(rng.choice(vectors.shape[0], count, replace=False))
    centres = _unit(np.asarray(vectors[rows], dtype=np.float64))
    labels = np.full(vectors.shape[0], -1, dtype=np.int64)
    for _ in range(iterations):
        found, cosines, sums = _assigned(vectors, centres)
        if np.array_equal(found, labels):
            break
        labels = found
        empty = np.flatnonzero(np.bincount(labels, minlength=count) == 0)
        centres = _unit(sums)
        centres[empty] = _unit(np.asarray(vectors[np.argsort(cosines, kind="stable")[: empty.size]], dtype=np.float64))
    labels, _, sums = _assigned(vectors, centres)
    there, labels = np.unique(labels, return_inverse=True)
    return labels.astype(np.int64), _unit(sums[there]).astype(np.float32)


def _unit(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(lengths, lengths, 1)


def _assigned(
    vectors: NDArray[np.floating[Any]], centres: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float64]]:
    """Return the nearest centre of every vector, its cosine, and the sum of each centre's vectors."""
    from scipy.sparse import csr_matrix

    labels = np.empty(vectors.shape[0], dtype=np.int64)
    cosines = np.empty(vectors.shape[0], dtype=np.float32)
    sums, table = np.zeros_like(centres), centres.astype(np.float32).T
    for begin in range(0, vectors.shape[0], _ROWS):
        block = np.asarray(vectors[begin : begin + _ROWS], dtype=np.float32)
        values, size = block @ table, len(block)
        here = values.argmax(axis=1)
        labels[begin : begin + size] = here
        cosines[begin : begin + size] = values[np.arange(size), here]
        members = csr_matrix((np.ones(size), (here, np.arange(size))), shape=(len(centres), size))
        sums += members @ block.astype(np.float64)
    return labels, cosines, sums
