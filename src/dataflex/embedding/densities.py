"""Kernel densities of vectors: how many other vectors lie near each vector.

A few vectors are compared with all vectors. If this takes too long, the vectors are divided into cells around cluster
centres, and each vector is compared with the vectors of the nearest cells. These cells nearly always contain all
vectors within the width of the kernel. To verify this, some vectors are also compared with all vectors. If a neighbour
of any of them is missed, every vector is compared with all.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dataflex import distributed
from dataflex.data.rng import derive_rng
from dataflex.embedding import neighbours
from dataflex.embedding.clusters import spherical_kmeans
from dataflex.embedding.neighbours import Queries, Vectors, engine_of, search

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

_EXACT = 1 << 40
"""Number of multiplications up to which every vector is compared with all vectors."""
_PROBES = 10
"""Number of cells that a vector is compared with."""
_TRAINED = 64
"""Number of vectors for each cell to compute the centres from."""
_ITERATIONS = 5
_SAMPLE = 500
"""Number of vectors that are compared with all vectors to verify the cells."""


def kernel_densities(
    vectors: Vectors,
    rows: NDArray[np.int64],
    bandwidth: float,
    k: int,
    *,
    device: str | torch.device | None = None,
    share: bool = False,
) -> NDArray[np.float64]:
    """Return the sum of max(0, 1 - D^2 / bandwidth^2) over the ``k`` nearest vectors, for some of the vectors.

    D is the Euclidean distance. Each vector counts as its nearest neighbour itself, which adds exactly 1.

    Args:
        vectors: shape (N, H).
        rows: indices of the vectors whose density is returned, shape (n,).
        bandwidth: > 0.
        k: maximum number of vectors in the sum, including the vector itself, >= 1.
        device: as in :func:`~dataflex.embedding.neighbours.nearest`.
        share: whether the processes divide the rows. All processes then make this call with the same arguments.

    Returns:
        Densities of shape (n,), the same on every process.

    Example:
        >>> import numpy as np
        >>> from dataflex import kernel_densities
        >>> vectors = np.array([[0.0, 0.0], [0.5, 0.0], [9.0, 0.0]])
        >>> kernel_densities(vectors, np.array([0, 2]), bandwidth=1.0, k=3)
        array([1.75, 1.  ])
    """
    kernels = _Kernels(vectors, bandwidth, k - 1, device, share)
    if k == 1 or not rows.size:
        return np.ones(rows.size)
    if rows.size * vectors.size <= _EXACT:
        return 1 + kernels.of_all(rows)
    sample = np.unique(np.linspace(0, rows.size - 1, min(_SAMPLE, rows.size)).astype(np.int64))
    found, exact = kernels.of_cells(rows), kernels.of_all(rows[sample])
    missed = int(np.count_nonzero(np.abs(found[sample] - exact) > 1e-5 * (1 + exact)))
    if not missed:
        return 1 + found
    logger.info("densities: the cells miss neighbours of %d of %d vectors; comparing all vectors.", missed, sample.size)
    return 1 + kernels.of_all(rows)


class _Kernels:
    """Kernel sums of some vectors with all other vectors."""

    def __init__(
        self, vectors: Vectors, bandwidth: float, k: int, device: str | torch.device | None, share: bool
    ) -> None:
        self.vectors, self.bandwidth, self.k, self.device = vectors, bandwidth, k, device
        self.world, self.rank = (distributed.world_size(), distributed.rank()) if share else (1, 0)

    def of_all(self, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the kernel sum over the ``k`` nearest of all vectors, (n,)."""
        found = np.zeros(rows.size)
        for number, begin in enumerate(range(0, rows.size, neighbours.QUERIES)):
            # Blocks have one size, so that the products are the same on any number of processes.
            if number % self.world != self.rank:
                continue
            part = slice(begin, begin + neighbours.QUERIES)
            queries = engine_of(self.vectors[rows[part]], self.vectors, "l2", self.device, rows[part])
            sums, counts = self._sums(queries)
            many = np.flatnonzero(counts > self.k)
            if many.size:
                few = rows[part][many]
                _, distances = search(engine_of(self.vectors[few], self.vectors, "l2", self.device, few), self.k)
                sums[many] = np.maximum(0, 1 - distances**2 / self.bandwidth**2).sum(axis=1)
            found[part] = sums
        return self._joined(found)

    def of_cells(self, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the kernel sum over the vectors of the nearest cells, (n,)."""
        cell_of, probed = self._cells(rows)
        width = probed.shape[1]
        members = np.argsort(cell_of, kind="stable")
        ends = np.cumsum(np.bincount(cell_of, minlength=int(probed.max()) + 1))
        asking = np.argsort(probed.ravel(), kind="stable")  # positions in the table of rows and cells, sorted by cell
        asking_ends = np.cumsum(np.bincount(probed.ravel(), minlength=ends.size))
        sums, counts = np.zeros(probed.size), np.zeros(probed.size)
        for cell in range(self.rank, ends.size, self.world):
            inside = members[ends[cell - 1] if cell else 0 : ends[cell]]
            places = asking[asking_ends[cell - 1] if cell else 0 : asking_ends[cell]]
            if not inside.size:
                continue
            base = self.vectors[inside]
            for begin in range(0, places.size, neighbours.QUERIES):
                part = places[begin : begin + neighbours.QUERIES]
                asked = rows[part // width]
                own = np.searchsorted(inside, asked)
                own[inside[np.minimum(own, inside.size - 1)] != asked] = -1
                sums[part], counts[part] = self._sums(engine_of(self.vectors[asked], base, "l2", self.device, own))
        found = self._joined(sums).reshape(probed.shape).sum(axis=1)
        many = np.flatnonzero(self._joined(counts).reshape(probed.shape).sum(axis=1) > self.k)
        if many.size:
            found[many] = self.of_all(rows[many])
        return found

    def _cells(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the cell of every vector, (N,), and the cells that the given rows are compared with, (n, cells)."""
        size = len(self.vectors)
        number = max(1, int(np.sqrt(size)))
        drawn = np.unique(np.linspace(0, size - 1, min(size, _TRAINED * number)).astype(np.int64))
        rng = derive_rng(0, "densities")
        _, centres = distributed.on_main(lambda: spherical_kmeans(self.vectors[drawn], number, _ITERATIONS, rng))
        return _nearest_cells(self.vectors, centres, 1)[:, 0], _nearest_cells(self.vectors[rows], centres, _PROBES)

    def _sums(self, queries: Queries) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Return the kernel sum over the base rows of each query, and how many rows it covers, (m,)."""
        squares = np.einsum("ij,ij->i", queries.matrix, queries.matrix)
        cut = ((squares - self.bandwidth**2) / 2).astype(queries.dtype)
        sums, counts = np.zeros(len(queries)), np.zeros(len(queries), dtype=np.int64)
        for _, _, scores in queries.blocks():
            rows, _, values = scores.above(cut)
            kernels = np.minimum(1.0, (values.astype(np.float64) - cut[rows]) * 2 / self.bandwidth**2)
            sums += np.bincount(rows, kernels, minlength=len(queries))
            counts += np.bincount(rows, minlength=len(queries))
        return sums, counts

    def _joined(self, found: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the results of all processes. Each process has computed a part and has 0 elsewhere."""
        return found if self.world == 1 else np.maximum.reduce(distributed.gather_objects(found))


def _nearest_cells(vectors: Vectors, centres: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """Return the cells whose centres have the largest cosines with each vector, in any order, (n, count)."""
    count = min(count, len(centres))
    found = np.empty((len(vectors), count), dtype=np.int64)
    for begin in range(0, len(vectors), neighbours.QUERIES):
        cosines = np.asarray(vectors[begin : begin + neighbours.QUERIES], dtype=np.float32) @ centres.T
        place = len(centres) - count
        found[begin : begin + len(cosines)] = np.argpartition(cosines, place, axis=1)[:, place:]
    return found
