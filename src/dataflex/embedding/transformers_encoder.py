"""Encoders that Transformers runs: pooled hidden states of a layer, in batches by length under a token budget."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from dataflex.data.sampling import IndexArray
from dataflex.embedding.names import MODULES_FILE, read_json
from dataflex.errors import ConfigError
from dataflex.probe.batches import length_batches
from dataflex.probe.embeddings import Pooling, pooled
from dataflex.probe.memory import BatchLimit, release_memory

BATCH_TOKENS = 16384
"""Number of tokens in a forward pass, including padding."""
_MOST_TOKENS = 8192
"""Maximum number of tokens of a text, if the encoder's files name no limit."""
_POOLINGS: dict[str, Pooling] = {
    "cls_token": "first",
    "cls": "first",
    "mean_tokens": "mean",
    "mean": "mean",
    "lasttoken": "last",
    "weightedmean_tokens": "weighted_mean",
    "weightedmean": "weighted_mean",
}
"""Name of a pooling in sentence-transformers -> name of the pooling here."""


class TransformersEncoder:
    """An encoder, or a language model used as an encoder.

    Args:
        folder: the folder of the model.
        device: the device of the model. On a CPU the model runs in float32, otherwise in the dtype of its files.
        layer: 0 selects the embeddings, -1 the last layer after the final normalisation.
        pooling: the pooling of token states. ``auto`` means the pooling that the folder's files name, or the mean.
        batch_tokens: number of tokens in a forward pass, including padding.

    Raises:
        ConfigError: if the folder has no model, the model has no such layer, or the files name layers after the
            pooling.
    """

    def __init__(
        self,
        folder: Path,
        device: torch.device | str,
        layer: int = -1,
        pooling: str = "auto",
        batch_tokens: int = BATCH_TOKENS,
    ) -> None:
        from transformers import AutoModel, AutoTokenizer

        self._device, self._batch_tokens = torch.device(device), batch_tokens
        self._limit = BatchLimit("make embeddings", "Use a smaller encoder.", "texts")
        self.pooling: Pooling = pooling_of(folder) if pooling == "auto" else cast(Pooling, pooling)
        dtype: Any = torch.float32 if self._device.type == "cpu" else "auto"
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder)
            model = AutoModel.from_pretrained(folder, dtype=dtype)
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"encoder: {folder} cannot be loaded: {error}") from error
        model = model.get_encoder() if model.config.is_encoder_decoder else model
        self._model = model.eval().to(self._device)
        config = model.config.get_text_config()
        self.dim = int(config.hidden_size)
        self._layer = _checked_layer(layer, int(config.num_hidden_layers))
        self.most_tokens = longest_text(folder, self._tokenizer, config)
        self._lower = bool((read_json(folder / "sentence_bert_config.json") or {}).get("do_lower_case"))
        self._prefix = _prefix(folder)
        # Padding is on the right whatever the files say, because padding on the left would shift absolute positions.
        self._tokenizer.padding_side = "right"
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self.says = f"{folder.name} by transformers, {self.pooling} of at most {self.most_tokens} tokens of a text"

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return a vector for each text, (n, H)."""
        texts = [self._prefix + (text.lower() if self._lower else text) for text in texts]
        rows = self._tokenizer(texts, truncation=True, max_length=self.most_tokens, padding=False)
        lengths = np.array([len(ids) for ids in rows["input_ids"]], dtype=np.int64)
        found = np.zeros((len(texts), self.dim), dtype=np.float32)

        def vectors(batch: IndexArray) -> NDArray[np.float32]:
            return self._forward({name: [values[row] for row in batch] for name, values in rows.items()})

        for batch in length_batches(lengths, self._batch_tokens):
            for part, values in self._limit.parts(vectors, batch, lengths):
                found[part] = values
        return found

    def close(self) -> None:
        """Release the memory of the model."""
        del self._model
        release_memory()

    @torch.no_grad()
    def _forward(self, rows: dict[str, list[list[int]]]) -> NDArray[np.float32]:
        """Return the pooled embeddings of tokenized texts, (B, H)."""
        inputs = self._tokenizer.pad(rows, return_tensors="pt").to(self._device)
        if self._layer is None:
            states = self._model(**inputs).last_hidden_state
        else:
            states = self._model(**inputs, output_hidden_states=True).hidden_states[self._layer]
        vectors: NDArray[np.float32] = (
            pooled(states.float(), inputs["attention_mask"].bool(), self.pooling).cpu().numpy()
        )
        return vectors


def _checked_layer(layer: int, count: int) -> int | None:
    """Return the index of a layer's hidden states, or None for the last layer."""
    number = layer if layer >= 0 else count + 1 + layer
    if not 0 <= number <= count:
        raise ConfigError(
            f"layer: the encoder has {count} layers, so its hidden states are numbered 0 (the embeddings) to {count}, "
            f"or {-count - 1} to -1; got {layer}."
        )
    return None if number == count else number


def longest_text(folder: Path, tokenizer: Any, config: Any) -> int:
    """Return the maximum number of tokens of a text: the files' limit for sentences, otherwise the model's limit."""
    said = (read_json(folder / "sentence_bert_config.json") or {}).get("max_seq_length")
    if said:
        return int(said)
    limits = (tokenizer.model_max_length, getattr(config, "max_position_embeddings", None), _MOST_TOKENS)
    return int(min(limit for limit in limits if limit))


def _prefix(folder: Path) -> str:
    """Return the prefix that sentence-transformers puts before a text by default."""
    config = read_json(folder / "config_sentence_transformers.json") or {}
    name = config.get("default_prompt_name")
    return "" if name is None else str(config["prompts"][name])


def pooling_of(folder: Path) -> Pooling:
    """Return the pooling that an encoder's files name, or the mean if they name none.

    Raises:
        ConfigError: if the files name an unsupported pooling or further layers.
    """
    modules = read_json(folder / MODULES_FILE)
    if modules is None:
        return "mean"
    found: list[Pooling] = []
    for module in modules:
        kind = str(module["type"]).rpartition(".")[2]
        if kind == "Pooling":
            found.append(_pooling_named(folder / module["path"] / "config.json"))
        elif kind not in ("Transformer", "Normalize"):
            raise ConfigError(
                f"encoder: {folder} has a {kind} layer, which sentence-transformers alone runs: pip install "
                "'dataflex[embeddings]', or set pooling to have the transformer alone pooled."
            )
    return found[0] if found else "mean"


def _pooling_named(file: Path) -> Pooling:
    """Return the pooling that a configuration file of sentence-transformers names."""
    config = read_json(file) or {}
    named = config.get("pooling_mode")
    modes = named if isinstance(named, list) else [named] if named else []
    modes += [key.removeprefix("pooling_mode_") for key, on in config.items() if key.startswith("pooling_mode_") and on]
    if len(modes) != 1 or modes[0] not in _POOLINGS:
        raise ConfigError(
            f"encoder: {file} names the pooling {' and '.join(map(str, modes)) or 'of nothing'}, which "
            "sentence-transformers alone knows: pip install 'dataflex[embeddings]', or set pooling."
        )
    return _POOLINGS[modes[0]]
