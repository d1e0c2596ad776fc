"""The embeddings that components read as ``ctx.embeddings``: one service per run, shared by all components."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np

from dataflex.api.context import EmbeddingArray, EmbeddingSource
from dataflex.api.params import EmbeddingParams
from dataflex.api.probe import Probe
from dataflex.data.pool import Pool
from dataflex.data.sampling import IndexArray
from dataflex.embedding.of_model import model_embeddings
from dataflex.embedding.stored import StoredEmbeddings
from dataflex.probe.embeddings import Embeddings

_Kept = tuple[IndexArray, EmbeddingArray]


class EmbeddingService:
    """Provides the embeddings that components need.

    Embeddings of the model in training are measured on first access, on all processes together, and cached until
    :meth:`forget`. Components that need the same embeddings share them.

    Args:
        wanted: the embedding parameters of the components, by configuration key.
        pool: the samples of the run.
        probe: measures embeddings on the model in training.
        stored: the embeddings of encoders, by configuration key.
    """

    def __init__(
        self,
        wanted: Mapping[str, EmbeddingParams],
        pool: Pool,
        probe: Probe,
        stored: Mapping[str, StoredEmbeddings] | None = None,
    ) -> None:
        self._wanted, self._pool, self._probe, self._stored = dict(wanted), pool, probe, dict(stored or {})
        self._kept: dict[tuple[Embeddings, str], list[_Kept]] = {}
        """Measured embeddings, by measurement and pool ("" is the run's pool), each with the indices of the samples."""

    def of_all(self, key: str) -> EmbeddingSource | None:
        """Return a function for the embeddings of all samples of a pool, or None if the component needs none."""
        if key in self._stored:
            return self._stored[key].of
        params = self._wanted.get(key)
        return None if params is None else partial(self._all, params)

    def of_some(self, key: str) -> Callable[[IndexArray, Pool | None], EmbeddingArray] | None:
        """Return a function for the embeddings of some samples of a pool, or None if the component needs none."""
        if key in self._stored:
            return partial(self._rows, self._stored[key])
        params = self._wanted.get(key)
        return None if params is None else partial(self._some, params)

    def forget(self) -> None:
        """Clear the cache, because the model changes or no component reads the embeddings again."""
        self._kept.clear()

    @staticmethod
    def _rows(stored: StoredEmbeddings, indices: IndexArray, samples: Pool | None = None) -> EmbeddingArray:
        return stored.of(samples)[indices]

    def _all(self, params: EmbeddingParams, samples: Pool | None = None) -> EmbeddingArray:
        return self._some(params, np.arange((self._pool if samples is None else samples).size), samples)

    def _some(self, params: EmbeddingParams, indices: IndexArray, samples: Pool | None = None) -> EmbeddingArray:
        """Return the embeddings of some samples, measured at the first request since the last :meth:`forget`."""
        measurement = model_embeddings(params)
        of = "" if samples is None or samples is self._pool else samples.content_digest
        kept = self._kept.setdefault((measurement, of), [])
        for known, values in kept:
            if np.array_equal(known, indices):
                return values
        values = self._probe.measure(measurement, indices, samples)
        values.flags.writeable = False
        kept.append((indices, values))
        return values
