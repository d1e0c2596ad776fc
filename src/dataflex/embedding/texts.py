"""The texts to embed: the texts or parts of samples, or a list of texts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from dataflex.data.pool import IGNORE_INDEX, Pool
from dataflex.probe.embeddings import TextPart

_COMPARED = 256
"""Number of samples whose text is part of a digest, in addition to the tokens of all samples."""


class Texts(Protocol):
    """Texts by number."""

    @property
    def size(self) -> int:
        """Number of texts."""
        ...

    @property
    def digest(self) -> str:
        """A digest of all texts."""
        ...

    def read(self, start: int, stop: int) -> list[str]:
        """Return the texts from ``start`` up to but excluding ``stop``."""
        ...


@dataclass(frozen=True)
class TextList:
    """A list of texts."""

    texts: Sequence[str]

    @property
    def size(self) -> int:
        """Number of texts."""
        return len(self.texts)

    @property
    def digest(self) -> str:
        """A digest of all texts."""
        return _digest_of(self.texts)

    def read(self, start: int, stop: int) -> list[str]:
        """Return the texts from ``start`` up to but excluding ``stop``."""
        return list(self.texts[start:stop])


@dataclass(frozen=True, eq=False)
class SampleTexts:
    """The texts of a pool's samples: their decoded tokens without special tokens.

    The text of a pair of responses is the prompt with the chosen response.

    Attributes:
        pool: the samples. The pool needs a tokenizer for decoding.
        part: ``all`` of a sample; its ``response``, which is the trained tokens; or its ``prompt``, the other tokens.
    """

    pool: Pool
    part: TextPart = "all"

    @property
    def size(self) -> int:
        """Number of texts."""
        return self.pool.size

    @property
    def digest(self) -> str:
        """A digest of every sample's tokens and labels, and of some texts, so that it differs between tokenizers."""
        some = np.unique(np.linspace(0, self.size - 1, min(self.size, _COMPARED)).astype(np.int64))
        texts = [text for index in some for text in self.read(int(index), int(index) + 1)]
        return hashlib.sha256(f"{self.pool.content_digest} {self.part} {_digest_of(texts)}".encode()).hexdigest()

    def read(self, start: int, stop: int) -> list[str]:
        """Return the texts from ``start`` up to but excluding ``stop``."""
        decode = self.pool.decode
        if decode is None:
            raise ValueError("this pool has no tokenizer to decode with")
        return [self._text(row, decode) for row in self.pool.rows(np.arange(start, stop))]

    def _text(self, row: dict[str, Any], decode: Callable[[list[int]], str]) -> str:
        """Return the wanted part of a sample as text: all tokens, the trained ones, or the others."""
        tokens, labels = self.pool.fields.tokens[0], self.pool.fields.labels[0]
        if self.part == "all":
            return decode(row[tokens])
        wanted = self.part == "response"
        pairs = zip(row[tokens], row[labels], strict=True)
        return decode([token for token, label in pairs if (label != IGNORE_INDEX) == wanted])


def _digest_of(texts: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        encoded = text.encode(errors="surrogatepass")
        digest.update(f"{len(encoded)} ".encode())
        digest.update(encoded)
    return digest.hexdigest()
