"""Embeddings of the model in training, stored on disk for ``dataflex-cli embed``. A run measures its own embeddings."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dataflex import distributed
from dataflex.data.pool import Pool
from dataflex.embedding.store import CHUNK_ROWS, EmbeddingStore
from dataflex.probe.checkpoints import adapter_settings
from dataflex.probe.embeddings import Embeddings
from dataflex.probe.extraction import model_digest, precision_of

if TYPE_CHECKING:
    from dataflex.probe.model import ModelProbe


@dataclass(frozen=True)
class ModelRun:
    """Computes embeddings with the model in training, on all processes together.

    Attributes:
        probe: the probe of the model.
        measurement: the embedding measurement.
        root: folder of the stores. Each pair of a sample list and a model state has a separate store.
        chunk_rows: number of samples in a chunk.
    """

    probe: ModelProbe
    measurement: Embeddings
    root: Path
    chunk_rows: int = CHUNK_ROWS

    def embed(self, samples: Pool) -> EmbeddingStore:
        """Return the finished store of the samples' embeddings. Missing chunks are measured first.

        Raises:
            DataFlexError: if the disk fails. Finished chunks stay on disk.
        """
        model = self.probe.model()
        key = {
            "model": model_digest(model, self.probe.sharded),
            "adapter": adapter_settings(model),
            "precision": precision_of(self.probe),
            "measurement": asdict(self.measurement),
            "samples": distributed.on_main(lambda: samples.content_digest),
        }
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        folder = self.root / f"embeddings-{digest[:16]}"
        if distributed.on_main(partial(EmbeddingStore.load, folder)) is None:
            dim = self.probe.measure(self.measurement, np.arange(1), samples).shape[1]
            about = {"encoder": "the model in training", "key": key}
            distributed.on_main(partial(EmbeddingStore.make, folder, samples.size, dim, about, self.chunk_rows))
        store = EmbeddingStore.load(folder)
        assert store is not None
        for chunk in distributed.on_main(store.missing):
            values = self.probe.measure(self.measurement, np.arange(*store.range_of(chunk)), samples)
            distributed.on_main(partial(store.write, chunk, values))
        return store
