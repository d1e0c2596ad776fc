"""Encoders that the package sentence-transformers runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dataflex.data.sampling import IndexArray
from dataflex.errors import ConfigError
from dataflex.probe.memory import BatchLimit, release_memory

if TYPE_CHECKING:
    import torch

_BATCH = 64
"""Number of texts of similar length in a forward pass."""


class SentenceEncoder:
    """A model as sentence-transformers loads it, with all of its layers and its default prompt.

    Args:
        folder: the folder of the model.
        device: the device of the model.

    Raises:
        ConfigError: if the package is not installed, or cannot load the folder.
    """

    def __init__(self, folder: str, device: torch.device | str) -> None:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise ConfigError(
                f"encoder_backend: sentence_transformers cannot be imported ({error}); pip install "
                "'dataflex[embeddings]', or use transformers."
            ) from error
        try:
            self._model = SentenceTransformer(folder, device=str(device), local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"encoder: {folder} cannot be loaded: {error}") from error
        self._limit = BatchLimit("make embeddings", "Use a smaller encoder.", "texts", "characters")
        self.dim = int(self._model.encode(["a"], convert_to_numpy=True, show_progress_bar=False).shape[1])
        limit = self._model.max_seq_length
        most = "" if limit is None else f", at most {limit} tokens of a text"
        self.says = f"{Path(folder).name} by sentence-transformers{most}"

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return a vector for each text, (n, H)."""

        def vectors(batch: IndexArray) -> NDArray[np.float32]:
            given = [texts[row] for row in batch]
            values = self._model.encode(given, batch_size=_BATCH, convert_to_numpy=True, show_progress_bar=False)
            return np.asarray(values, dtype=np.float32)

        lengths = np.array([len(text) for text in texts], dtype=np.int64)
        order = np.argsort(-lengths, kind="stable")
        found = np.zeros((len(texts), self.dim), dtype=np.float32)
        for begin in range(0, len(texts), _BATCH):
            for part, values in self._limit.parts(vectors, order[begin : begin + _BATCH], lengths):
                found[part] = values
        return found

    def close(self) -> None:
        """Release the memory of the model."""
        del self._model
        release_memory()
