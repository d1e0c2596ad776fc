"""Embeddings of the model in training as it is, kept on disk: for ``dataflex-cli embed``; a run measures its own."""

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
    """Embeds samples by the model in training, on all processes together.

    Attributes:
        probe: of the model.
        measurement: what is measured.
        root: folder of the stores; each list of samples and each state of the model has one of its own in it.
        chunk_rows: samples of a chunk.
    """

    probe: ModelProbe
    measurement: Embeddings
    root: Path
    chunk_rows: int = CHUNK_ROWS

    def embed(self, samples: Pool) -> EmbeddingStore:
        """Return the finished store of the samples' embeddings, after measuring the chunks that are missing.

        Raises:
            DataFlexError: if the disk fails; finished chunks stay.
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
