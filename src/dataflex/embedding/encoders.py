"""Encoders of text: what all kinds have in common, and how the one that parameters name is found."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from dataflex import assets
from dataflex.api.params import EmbeddingParams
from dataflex.embedding.names import MODULES_FILE, files_digest, is_url
from dataflex.errors import ConfigError, unknown
from dataflex.probe.embeddings import layer_problem

if TYPE_CHECKING:
    import torch

Backend = Literal["transformers", "sentence_transformers", "vllm", "openai"]

_PACKAGES = {"sentence_transformers": "'dataflex[embeddings]'", "vllm": "vllm"}
"""Backend -> what is installed for it."""
_SKIPPED_ON_HUB = ["onnx/*", "openvino/*", "coreml/*", "*.h5", "*.msgpack", "*.ot", "*.gguf", "*.onnx"]


class Encoder(Protocol):
    """Makes vectors of texts."""

    @property
    def dim(self) -> int:
        """Length of a vector, H."""
        ...

    @property
    def says(self) -> str:
        """What it is, for messages."""
        ...

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return a vector for each text, none of which is empty, (n, H), of any length."""
        ...

    def close(self) -> None:
        """Give back the memory it takes."""
        ...


@dataclass(frozen=True)
class EncoderChoice:
    """An encoder that is found and not loaded yet.

    Attributes:
        backend: what runs it.
        place: its folder, or the URL of the service.
        layer: whose states are pooled.
        pooling: how; ``auto``: as its files say.
    """

    backend: Backend
    place: str
    layer: int = -1
    pooling: str = "auto"

    def key(self) -> dict[str, Any]:
        """Return what its vectors depend on, as JSON values: settings and a digest of its files."""
        found: dict[str, Any] = {"backend": self.backend}
        if self.backend == "openai":
            return {**found, "service": self.place}
        if self.backend == "transformers":
            found |= {"layer": self.layer, "pooling": self.pooling}
        return {**found, "files": files_digest(Path(self.place))}

    def load(self, device: torch.device | str) -> Encoder:
        """Return the encoder, ready to run.

        Raises:
            DataFlexError: if it cannot be loaded, or its service does not answer.
        """
        if self.backend == "openai":
            from dataflex.embedding.openai_encoder import OpenAIEncoder

            return OpenAIEncoder(self.place)
        if self.backend == "vllm":
            from dataflex.embedding.vllm_encoder import VllmEncoder

            return VllmEncoder(self.place)
        if self.backend == "sentence_transformers":
            from dataflex.embedding.sentence_encoder import SentenceEncoder

            return SentenceEncoder(self.place, device)
        from dataflex.embedding.transformers_encoder import TransformersEncoder

        return TransformersEncoder(Path(self.place), device, self.layer, self.pooling)


def problems_of_encoder(params: EmbeddingParams) -> Iterator[tuple[str, str]]:
    """Yield a parameter and what is wrong with it, as far as it shows before anything is fetched or loaded."""
    name, backend = params.encoder, params.encoder_backend
    if name is None:
        if backend != "auto":
            yield (
                "encoder_backend",
                f"{backend!r} runs an encoder, and none is named; name one as encoder, or use auto.",
            )
        if params.embedding_folder is not None:
            yield (
                "embedding_folder",
                "embeddings of the model in training change with it and are not kept on disk; name an encoder, or "
                "remove it.",
            )
        return
    if is_url(name) and backend not in ("auto", "openai"):
        yield "encoder_backend", f"{name} is the address of a service; use openai or auto, not {backend}."
    elif backend in _PACKAGES and find_spec(backend) is None:
        yield "encoder_backend", f"{backend} is not installed here: pip install {_PACKAGES[backend]}."
    if backend in ("sentence_transformers", "vllm", "openai") or is_url(name):
        who = "openai" if is_url(name) else backend
        if params.layer != -1:
            yield "layer", f"{who} gives finished vectors; only transformers takes a layer."
        if params.pooling != "auto":
            yield "pooling", f"{who} pools as the encoder does; only transformers takes a pooling. Use auto."
    if name.startswith(assets.PREFIX):
        short = name.removeprefix(assets.PREFIX)
        encoders = [asset.name for asset in assets.ASSETS.values() if asset.kind != "data"]
        if short not in encoders:
            yield "encoder", unknown("encoder asset", short, encoders)
    elif not is_url(name) and backend != "openai" and _is_path(name):
        folder = Path(name).expanduser()
        if not any((folder / file).is_file() for file in ("config.json", MODULES_FILE)):
            yield "encoder", f"no encoder in {name!r} (there is no config.json)."
        problem = layer_problem(folder, params.layer)
        if problem is not None:
            yield "layer", problem


def choose(params: EmbeddingParams) -> EncoderChoice:
    """Return the encoder that parameters name, fetched if it is not on this machine.

    Raises:
        ConfigError: if it is not there.
    """
    assert params.encoder is not None
    name, backend = params.encoder, params.encoder_backend
    if backend == "openai" or is_url(name):
        return EncoderChoice("openai", name)
    folder = _folder_of(name)
    has_modules = (folder / MODULES_FILE).is_file()
    given = params.layer != -1 or params.pooling != "auto"
    if backend == "auto":
        installed = find_spec("sentence_transformers") is not None
        backend = "sentence_transformers" if has_modules and installed and not given else "transformers"
    return EncoderChoice(backend, str(folder), params.layer, params.pooling)


def _is_path(name: str) -> bool:
    return name.startswith(("/", "./", "../", "~")) or name.count("/") > 1 or Path(name).exists()


def _folder_of(name: str) -> Path:
    """Return the folder of an encoder: an asset's, the one named, or the copy of one on a hub.

    Raises:
        ConfigError: if there is none, and it cannot be fetched.
    """
    if name.startswith(assets.PREFIX):
        return assets.fetch(name.removeprefix(assets.PREFIX))
    if _is_path(name):
        return Path(name).expanduser()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, ignore_patterns=_SKIPPED_ON_HUB))
    except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise ConfigError(f"encoder: {name!r} is no folder here, and the hub does not give it: {error}") from error
