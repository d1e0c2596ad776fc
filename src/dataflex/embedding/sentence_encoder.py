"""Encoders run by the package sentence-transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import ConfigError

if TYPE_CHECKING:
    import torch

_BATCH = 64
"""Texts of one forward; the package sorts them by length."""


class SentenceEncoder:
    """A model as sentence-transformers loads it, with all of its layers and its default prompt.

    Args:
        folder: of the model.
        device: where it runs.

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
        self.dim = int(self._model.encode(["a"], convert_to_numpy=True, show_progress_bar=False).shape[1])
        limit = self._model.max_seq_length
        most = "" if limit is None else f", at most {limit} tokens of a text"
        self.says = f"{Path(folder).name} by sentence-transformers{most}"

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return a vector for each text, (n, H)."""
        found = self._model.encode(list(texts), batch_size=_BATCH, convert_to_numpy=True, show_progress_bar=False)
        return np.asarray(found, dtype=np.float32)

    def close(self) -> None:
        """Give back the memory of the model."""
        import torch

        is_cuda = self._model.device.type == "cuda"
        del self._model
        if is_cuda:
            torch.cuda.empty_cache()
