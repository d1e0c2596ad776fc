"""The pool: the run's preprocessed training samples, domain after domain, with their lengths and a fingerprint."""

from __future__ import annotations

import hashlib
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dataflex.data.sampling import IndexArray
from dataflex.errors import ConfigError

if TYPE_CHECKING:
    from datasets import Dataset

_FINGERPRINT_ROWS = 512
_SCAN_ROWS = 10_000
_COUNTED = 1 << 16


class Pool:
    """``N`` map-style samples in ``K`` domains; the samples of a domain are a contiguous range.

    Args:
        dataset: the concatenated samples, with an ``input_ids`` column.
        domains: names of the domains, in order.
        domain_sizes: samples in each, >= 1; they add up to ``len(dataset)``.
    """

    def __init__(self, dataset: Dataset, domains: tuple[str, ...], domain_sizes: NDArray[np.int64]) -> None:
        self.dataset = dataset
        self.domains = domains
        self.domain_sizes = np.asarray(domain_sizes, dtype=np.int64)
        self.offsets = np.concatenate([[0], np.cumsum(self.domain_sizes)]).astype(np.int64)
        """First index of each domain, and ``N`` last, shape (K + 1,)."""

    @classmethod
    def concatenate(cls, parts: dict[str, Dataset], key: str = "dataset") -> Pool:
        """Return the pool of one preprocessed data set per domain; ``key`` is the setting named in errors.

        Raises:
            ConfigError: if a domain has no sample.
        """
        from datasets import concatenate_datasets

        empty = [name for name, part in parts.items() if len(part) == 0]
        if empty:
            raise ConfigError(f"{key}: {', '.join(map(repr, empty))} has no sample left after preprocessing.")
        sizes = np.array([len(part) for part in parts.values()], dtype=np.int64)
        merged = next(iter(parts.values())) if len(parts) == 1 else concatenate_datasets(list(parts.values()))
        return cls(merged, tuple(parts), sizes)

    @property
    def size(self) -> int:
        """Number of samples, N."""
        return int(self.offsets[-1])

    def domain_ids(self, indices: IndexArray) -> NDArray[np.int64]:
        """Return the domain number of each sample, same shape as ``indices``."""
        return np.searchsorted(self.offsets, indices, side="right") - 1

    def domain_counts(self, indices: IndexArray) -> NDArray[np.int64]:
        """Return how many of ``indices`` lie in each domain, shape (K,)."""
        counts = np.zeros(len(self.domains), dtype=np.int64)
        for begin in range(0, indices.size, _COUNTED):
            ids = self.domain_ids(indices[begin : begin + _COUNTED])
            counts += np.bincount(ids, minlength=len(self.domains))
        return counts

    @cached_property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens of every sample, shape (N,)."""
        import pyarrow.compute as pc

        parts = [
            pc.list_value_length(table.column("input_ids")).to_numpy()
            for table in self.dataset.with_format("arrow").iter(batch_size=_SCAN_ROWS)
        ]
        return np.concatenate(parts).astype(np.int32)

    @cached_property
    def domain_tokens(self) -> NDArray[np.int64]:
        """Tokens of each domain, shape (K,)."""
        return np.add.reduceat(self.lengths.astype(np.int64), self.offsets[:-1])

    @cached_property
    def fingerprint(self) -> str:
        """A digest of the domains, every sample's length and the tokens of evenly spaced samples.

        Two pools of equal fingerprint are taken for the same data when a run is resumed.
        """
        digest = hashlib.sha256(repr((self.domains, self.domain_sizes.tolist())).encode())
        digest.update(np.ascontiguousarray(self.lengths).data)
        rows = np.unique(np.linspace(0, self.size - 1, min(self.size, _FINGERPRINT_ROWS)).astype(np.int64))
        for row in rows:
            digest.update(np.asarray(self.dataset[int(row)]["input_ids"], dtype=np.int64).data)
        return digest.hexdigest()

    @cached_property
    def content_digest(self) -> str:
        """A digest of every token and label of every sample, and of the domains."""
        digest = hashlib.sha256(repr((self.domains, self.domain_sizes.tolist())).encode())
        columns = [name for name in ("input_ids", "labels") if name in self.dataset.column_names]
        for table in self.dataset.with_format("arrow").iter(batch_size=_SCAN_ROWS):
            for name in columns:
                column = table.column(name).combine_chunks()
                digest.update(np.diff(column.offsets.to_numpy()).astype(np.int64).data)
                digest.update(column.flatten().to_numpy(zero_copy_only=False).astype(np.int64).data)
        return digest.hexdigest()

    def rows(self, indices: IndexArray) -> list[dict[str, Any]]:
        """Return samples as the collator takes them."""
        return self.dataset.__getitems__([int(index) for index in indices])
