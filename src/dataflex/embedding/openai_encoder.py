"""Encoders behind an OpenAI-compatible ``/embeddings`` endpoint."""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataflex.embedding.names import is_url
from dataflex.errors import DataFlexError

KEY = "OPENAI_API_KEY"
BASE = "OPENAI_BASE_URL"
_DEFAULT_BASE = "https://api.openai.com/v1"
_BATCH = 64
"""Number of texts in a request."""
_AT_ONCE = 4
"""Number of concurrent requests."""
_TRIES = 5
_TIMEOUT = 120.0
_SHOWN = 300
"""Maximum number of characters of a response in an error message."""


class OpenAIEncoder:
    """A model of an embedding service.

    Args:
        place: the base URL, such as ``http://host:8000/v1``. If the service has several models, the model follows a
            ``#``. Alternatively the name of a model alone, for the service in the environment variable
            ``OPENAI_BASE_URL``.
        pause: time in seconds before the first retry of a failed request. Each further retry waits twice as long.

    Raises:
        DataFlexError: if the service does not answer, or if the model is not unique.
    """

    def __init__(self, place: str, pause: float = 1.0) -> None:
        base, _, model = place.partition("#")
        if not is_url(place):
            base, model = os.environ.get(BASE) or _DEFAULT_BASE, place
        if not is_url(base):
            raise DataFlexError(f"encoder: the environment variable {BASE} is {base!r}, which is no http(s) URL.")
        self._base, self._pause = base.rstrip("/").removesuffix("/embeddings"), pause
        self._model = self._known_model(model)
        self.dim = int(self._request(["a"]).shape[1])
        self.says = f"{self._model} at {self._base}"

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return a vector for each text, (n, H)."""
        batches = [list(texts[begin : begin + _BATCH]) for begin in range(0, len(texts), _BATCH)]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            found = list(pool.map(self._request, batches))
        return np.concatenate(found)

    def close(self) -> None:
        """Do nothing, because the encoder holds no memory."""

    def _known_model(self, named: str) -> str:
        """Return the model to use: the named one, or the only one of the service."""
        if named:
            return named
        answer = self._ask("models", None)
        try:
            names = [str(each["id"]) for each in answer["data"]]
        except (KeyError, TypeError) as error:
            raise DataFlexError(f"encoder: {self._base}/models lists no models: {_cut(answer)}") from error
        if len(names) != 1:
            raise DataFlexError(
                f"encoder: {self._base} has {len(names)} models ({', '.join(names[:8])}); name one behind the URL, as "
                f"{self._base}#{names[0] if names else 'MODEL'}."
            )
        return names[0]

    def _request(self, texts: list[str]) -> NDArray[np.float32]:
        """Return the vectors of some texts from one request."""
        answer = self._ask("embeddings", {"model": self._model, "input": texts, "encoding_format": "float"})
        try:
            rows = sorted(answer["data"], key=lambda each: int(each["index"]))
            found = np.asarray([each["embedding"] for each in rows], dtype=np.float32)
        except (KeyError, TypeError, ValueError) as error:
            raise DataFlexError(f"encoder: {self._base}/embeddings gave no embeddings: {_cut(answer)}") from error
        if found.ndim != 2 or len(found) != len(texts):
            raise DataFlexError(
                f"encoder: {self._base}/embeddings returned vectors of shape {found.shape} for {len(texts)} texts."
            )
        return found

    def _ask(self, what: str, content: dict[str, Any] | None) -> Any:
        """Return the JSON response of the service. Temporary failures are retried.

        Raises:
            DataFlexError: if the service refuses, or does not answer after several retries.
        """
        url, pause, said = f"{self._base}/{what}", self._pause, ""
        for attempt in range(_TRIES):
            if attempt:
                time.sleep(pause)
                pause *= 2
            try:
                return self._answer(url, content)
            except urllib.error.HTTPError as error:
                said = f"{error.code} {error.reason}: {_cut(error.read().decode(errors='replace'))}"
                if error.code != 429 and error.code < 500:
                    raise DataFlexError(f"encoder: {url} refuses ({said}). {self._hint(error.code)}") from error
                pause = max(pause, _seconds(error.headers.get("Retry-After")))
            except json.JSONDecodeError as error:
                raise DataFlexError(f"encoder: {url} answers with no JSON ({error}); is the URL right?") from error
            except (OSError, http.client.HTTPException) as error:
                said = str(getattr(error, "reason", error))
        raise DataFlexError(
            f"encoder: {url} does not answer after {_TRIES} tries ({said}). Start the service or check the "
            "URL; finished embeddings stay on disk."
        )

    def _answer(self, url: str, content: dict[str, Any] | None) -> Any:
        data = None if content is None else json.dumps(content).encode()
        headers = {"Content-Type": "application/json"}
        if os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {os.environ[KEY]}"
        asked = urllib.request.Request(url, data, headers)
        with urllib.request.urlopen(asked, timeout=_TIMEOUT) as answer:
            return json.loads(answer.read())

    def _hint(self, code: int) -> str:
        if code in (401, 403):
            return f"The key is read from the environment variable {KEY}."
        if code == 404:
            return f"The requested model is {self._model!r}." if "_model" in vars(self) else "Is the URL right?"
        return "If a text is too long for it, embed the prompt alone (embedding_text) or shorten cutoff_len."


def _seconds(text: str | None) -> float:
    """Return the number of seconds to wait that a header names, at most a minute; 0 for a date or an empty header."""
    return min(float(text), 60.0) if text is not None and text.isdecimal() else 0.0


def _cut(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
