"""Encoders that vLLM's embedding mode runs in this process. Tests use a stand-in; this has not been run with vLLM."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataflex import distributed
from dataflex.embedding.transformers_encoder import longest_text
from dataflex.errors import ConfigError, DataFlexError


class VllmEncoder:
    """A model with vLLM's own pooling.

    Args:
        folder: the folder of the model.

    Raises:
        ConfigError: if vLLM is not installed, or if several processes would each start an engine.
        DataFlexError: if the engine does not start.
    """

    def __init__(self, folder: str) -> None:
        if distributed.world_size() > 1:
            raise ConfigError(
                "encoder_backend: vllm runs in one process; make the embeddings before with dataflex-cli embed in "
                "one, or start a server (vllm serve) and name its URL as encoder."
            )
        try:
            from vllm import LLM  # imported first, because nothing else is needed if the import fails
        except ImportError as error:
            raise ConfigError(
                f"encoder_backend: vllm cannot be imported ({error}); pip install vllm, or use transformers."
            ) from error
        from transformers import AutoConfig, AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder)
            config = AutoConfig.from_pretrained(folder).get_text_config()
            self._most = longest_text(Path(folder), self._tokenizer, config)
            self._engine: Any = LLM(model=folder, runner="pooling", max_model_len=self._most)
            self.dim = len(self._vectors(["a"])[0])
        except (RuntimeError, ValueError, OSError) as error:
            raise DataFlexError(f"encoder: vLLM cannot run {folder}: {error}") from error
        self.says = f"{Path(folder).name} by vLLM, at most {self._most} tokens of a text"

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return a vector for each text, (n, H)."""
        return np.asarray(self._vectors(texts), dtype=np.float32)

    def close(self) -> None:
        """Shut the engine down."""
        del self._engine
        gc.collect()

    def _vectors(self, texts: Sequence[str]) -> list[list[float]]:
        # Texts are cut here because vLLM's own option for this differs between releases.
        rows = self._tokenizer(list(texts), truncation=True, max_length=self._most)["input_ids"]
        found = self._engine.embed([{"prompt_token_ids": row} for row in rows], use_tqdm=False)
        return [each.outputs.embedding for each in found]
