"""Clusters of the pool's samples by their tokens, without a model.

TF-IDF of hashed token ids is reduced by a truncated SVD (latent semantic analysis, Deerwester et al. 1990), scaled to
length 1 and clustered by mini-batch k-means (Sculley 2010). All steps are fitted on a seeded draw of at most 20 000
samples. The pool is then read once, a few thousand samples at a time, so memory does not grow with its tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dataflex import distributed
from dataflex.data.rng import derive_rng, key_of

if TYPE_CHECKING:
    import pyarrow as pa
    from scipy.sparse import csr_matrix

    from dataflex.data.pool import Pool

_FITTED = 20_000
"""Maximum number of samples for fitting."""
_ROWS = 2_000
"""Number of samples per read."""
_BITS = 16
"""Token ids are hashed to 2**16 columns."""
_DIM = 64
"""Number of dimensions after the SVD."""
_MAX_SHARE = 0.5
"""Tokens in a larger share of the samples (special tokens, the template, punctuation) are ignored."""
_MIN_SAMPLES = 2
"""Tokens in fewer of the fitted samples are ignored, because they make no two samples similar."""


def token_clusters(pool: Pool, num_clusters: int, seed: int) -> NDArray[np.int32]:
    """Return the cluster of every sample, shape (N,), int32, numbered from 0 without gaps.

    The result has fewer clusters than ``num_clusters`` if samples repeat or share no informative token. If ``N`` is at
    most ``num_clusters``, every sample is a separate cluster. The same pool, seed and number of threads give the same
    clusters. Collective: the main process fits, every process predicts the clusters of a share of the samples, and
    every process receives all clusters.

    Args:
        pool: the samples, read by their ``input_ids``.
        num_clusters: number of clusters, >= 1.
        seed: seed of the draw, the SVD and k-means.

    Raises:
        ValueError: if ``num_clusters`` is below 1.
    """
    if num_clusters < 1:
        raise ValueError(f"num_clusters must be at least 1, got {num_clusters}")
    if pool.size <= num_clusters:
        return np.arange(pool.size, dtype=np.int32)
    fitted = distributed.on_main(partial(_fitted, pool, num_clusters, seed))
    if fitted is None:
        return np.zeros(pool.size, dtype=np.int32)
    labels = np.concatenate(distributed.on_each(partial(_predicted, pool, *fitted)))
    return np.unique(labels, return_inverse=True)[1].astype(np.int32)


def _fitted(pool: Pool, num_clusters: int, seed: int) -> tuple[NDArray[np.int64], Any] | None:
    """Return the informative columns of the token counts and the fitted pipeline, or None if fewer than two remain."""
    counts = _fitted_counts(pool, max(_FITTED, 10 * num_clusters), seed)
    found_in = counts.getnnz(axis=0)
    columns = np.flatnonzero((found_in >= _MIN_SAMPLES) & (found_in <= _MAX_SHARE * counts.shape[0]))
    return None if columns.size < 2 else (columns, _fitted_model(counts[:, columns], num_clusters, seed))


def _predicted(pool: Pool, columns: NDArray[np.int64], model: Any) -> NDArray[np.int32]:
    """Return the clusters of this process's share of the samples.

    The samples are read in the same tables for any number of processes.
    """
    tables = -(-pool.size // _ROWS)
    first, last = (tables * rank // distributed.world_size() for rank in (distributed.rank(), distributed.rank() + 1))
    share = pool.dataset.select(range(first * _ROWS, min(last * _ROWS, pool.size))).with_format("arrow")
    found = [
        model.predict(_token_counts(table, pool.fields.tokens[0])[:, columns]) for table in share.iter(batch_size=_ROWS)
    ]
    return np.concatenate([np.empty(0, dtype=np.int32), *found])


def _fitted_counts(pool: Pool, count: int, seed: int) -> csr_matrix:
    """Return the token counts of a draw of at most ``count`` samples."""
    from scipy.sparse import vstack

    rows = np.arange(pool.size)
    if pool.size > count:
        rows = np.sort(derive_rng(seed, "clusters").choice(pool.size, count, replace=False))
    return vstack([_token_counts(table, pool.fields.tokens[0]) for table in _read(pool, rows)], format="csr")


def _read(pool: Pool, rows: NDArray[np.int64]) -> Iterator[pa.Table]:
    dataset = pool.dataset.with_format("arrow")
    for begin in range(0, rows.size, _ROWS):
        yield dataset[rows[begin : begin + _ROWS].tolist()]


def _token_counts(table: pa.Table, field: str) -> csr_matrix:
    """Return how often each hashed token of a field occurs in each sample, shape (n, 2**16), float32."""
    import pyarrow.compute as pc
    from scipy.sparse import csr_matrix

    column = table.column(field)
    ends = np.cumsum(pc.list_value_length(column).to_numpy().astype(np.int64))
    tokens = pc.list_flatten(column).to_numpy().astype(np.uint64)
    hashed = (tokens * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(64 - _BITS)
    ones = np.ones(hashed.size, dtype=np.float32)
    counts = csr_matrix((ones, hashed.astype(np.int32), np.append(0, ends)), shape=(ends.size, 2**_BITS))
    counts.sum_duplicates()
    return counts


def _fitted_model(counts: csr_matrix, num_clusters: int, seed: int) -> Any:
    """Return the fitted pipeline from token counts to clusters."""
    from sklearn.cluster import MiniBatchKMeans
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfTransformer
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import Normalizer

    state = key_of(seed, "clusters") % 2**32
    return make_pipeline(
        TfidfTransformer(sublinear_tf=True),
        TruncatedSVD(min(_DIM, *counts.shape), random_state=state),
        Normalizer(),
        MiniBatchKMeans(num_clusters, batch_size=4096, n_init=3, random_state=state),
    ).fit(counts)
