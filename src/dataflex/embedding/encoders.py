"""Text encoders: the interface of all backends, and how the parameters select an encoder."""

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
from dataflex.files import is_path
from dataflex.probe.embeddings import layer_problem

if TYPE_CHECKING:
    import torch

Backend = Literal["transformers", "sentence_transformers", "vllm", "openai"]

_PACKAGES = {"sentence_transformers": "'dataflex[embeddings]'", "vllm": "vllm"}
"""Backend -> the package to install."""
_SKIPPED_ON_HUB = ["onnx/*", "openvino/*", "coreml/*", "*.h5", "*.msgpack", "*.ot", "*.gguf", "*.onnx"]


class Encoder(Protocol):
    """Computes vectors of texts."""

    @property
    def dim(self) -> int:
        """Length of a vector, H."""
        ...

    @property
    def says(self) -> str:
        """Description of the encoder for messages."""
        ...

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return a vector of any length for each text, (n, H). No text is empty."""
        ...

    def close(self) -> None:
        """Release the memory of the encoder."""
        ...


@dataclass(frozen=True)
class EncoderChoice:
    """An encoder that has been found but not loaded.

    Attributes:
        backend: the library or service that runs the encoder.
        place: the folder of the encoder, or the URL of the service.
        layer: the layer whose hidden states are pooled.
        pooling: the pooling of the hidden states. ``auto`` means the pooling that the encoder's files name.
    """

    backend: Backend
    place: str
    layer: int = -1
    pooling: str = "auto"

    def key(self) -> dict[str, Any]:
        """Return everything that the vectors depend on as JSON values: the settings and a digest of the files."""
        found: dict[str, Any] = {"backend": self.backend}
        if self.backend == "openai":
            return {**found, "service": self.place}
        if self.backend == "transformers":
            found |= {"layer": self.layer, "pooling": self.pooling}
        return {**found, "files": files_digest(Path(self.place))}

    def load(self, device: torch.device | str) -> Encoder:
        """Return the loaded encoder.

        Raises:
            DataFlexError: if the encoder cannot be loaded or its service does not answer.
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
    """Yield pairs of a parameter and its problem that can be found before anything is downloaded or loaded."""
    name, backend = params.encoder, params.encoder_backend
    if name is None:
        if backend != "auto":
            yield (
                "encoder_backend",
                f"{backend!r} runs an encoder, and encoder is not set; set it, or use auto.",
            )
        if params.embedding_folder is not None:
            yield (
                "embedding_folder",
                "embeddings of the model in training change during training and are not stored; set encoder, or "
                "remove this parameter.",
            )
        return
    if params.embedding_text == "image_and_text":
        yield "embedding_text", "an encoder reads text alone; image_and_text is of the model in training. Use all."
    if is_url(name) and backend not in ("auto", "openai"):
        yield "encoder_backend", f"{name} is the address of a service; use openai or auto, not {backend}."
    elif backend in _PACKAGES and find_spec(backend) is None:
        yield "encoder_backend", f"{backend} is not installed here: pip install {_PACKAGES[backend]}."
    if backend in ("sentence_transformers", "vllm", "openai") or is_url(name):
        who = "openai" if is_url(name) else backend
        if params.layer != -1:
            yield "layer", f"{who} returns pooled vectors; only transformers supports layer."
        if params.pooling != "auto":
            yield "pooling", f"{who} uses the encoder's own pooling; only transformers supports pooling. Use auto."
    if name.startswith(assets.PREFIX):
        short = name.removeprefix(assets.PREFIX)
        encoders = [asset.name for asset in assets.ASSETS.values() if asset.kind != "data"]
        if short not in encoders:
            yield "encoder", unknown("encoder asset", short, encoders)
    elif not is_url(name) and backend != "openai" and is_path(name):
        folder = Path(name).expanduser()
        if not any((folder / file).is_file() for file in ("config.json", MODULES_FILE)):
            yield "encoder", f"no encoder in {name!r} (it has no config.json)."
        problem = layer_problem(folder, params.layer)
        if problem is not None:
            yield "layer", problem


def choose(params: EmbeddingParams) -> EncoderChoice:
    """Return the encoder that the parameters name. It is downloaded if it is not on this machine.

    Raises:
        ConfigError: if the encoder does not exist.
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


def _folder_of(name: str) -> Path:
    """Return the folder of an encoder: an asset, a local folder, or the local copy of a hub repository.

    Raises:
        ConfigError: if the folder does not exist and the encoder cannot be downloaded.
    """
    if name.startswith(assets.PREFIX):
        return assets.fetch(name.removeprefix(assets.PREFIX))
    if is_path(name):
        return Path(name).expanduser()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, ignore_patterns=_SKIPPED_ON_HUB))
    except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise ConfigError(f"encoder: {name!r} is no folder here, and the hub does not provide it: {error}") from error
