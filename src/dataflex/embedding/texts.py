"""The texts that are embedded: those of samples, or parts of them, or a list."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from dataflex.data.pool import IGNORE_INDEX, Pool
from dataflex.probe.embeddings import TextPart

_COMPARED = 256
"""Samples whose text is part of a digest, beside the tokens of all."""


class Texts(Protocol):
    """Texts by number."""

    @property
    def size(self) -> int:
        """How many there are."""
        ...

    @property
    def digest(self) -> str:
        """A digest of all of them."""
        ...

    def read(self, start: int, stop: int) -> list[str]:
        """Return the texts from ``start`` to before ``stop``."""
        ...


@dataclass(frozen=True)
class TextList:
    """Texts as they are given."""

    texts: Sequence[str]

    @property
    def size(self) -> int:
        """How many there are."""
        return len(self.texts)

    @property
    def digest(self) -> str:
        """A digest of all of them."""
        return _digest_of(self.texts)

    def read(self, start: int, stop: int) -> list[str]:
        """Return the texts from ``start`` to before ``stop``."""
        return list(self.texts[start:stop])


@dataclass(frozen=True, eq=False)
class SampleTexts:
    """The texts of a pool's samples: their tokens decoded, special tokens left out.

    Attributes:
        pool: the samples; it needs a tokenizer to decode with.
        part: all of a sample; its ``response``, the tokens that are trained on; or its ``prompt``, the others.
    """

    pool: Pool
    part: TextPart = "all"

    @property
    def size(self) -> int:
        """How many there are."""
        return self.pool.size

    @property
    def digest(self) -> str:
        """A digest of every sample's tokens and labels, and of some texts, which tells one tokenizer from another."""
        some = np.unique(np.linspace(0, self.size - 1, min(self.size, _COMPARED)).astype(np.int64))
        texts = [text for index in some for text in self.read(int(index), int(index) + 1)]
        return hashlib.sha256(f"{self.pool.content_digest} {self.part} {_digest_of(texts)}".encode()).hexdigest()

    def read(self, start: int, stop: int) -> list[str]:
        """Return the texts from ``start`` to before ``stop``."""
        decode = self.pool.decode
        if decode is None:
            raise ValueError("this pool has no tokenizer to decode with")
        return [self._text(row, decode) for row in self.pool.rows(np.arange(start, stop))]

    def _text(self, row: dict[str, Any], decode: Callable[[list[int]], str]) -> str:
        fields = self.pool.fields
        if self.part == "all":
            return "\n".join(decode(row[name]) for name in fields.tokens)
        wanted = self.part == "response"
        parts = []
        for tokens, labels in zip(fields.tokens, fields.labels, strict=True):
            pairs = zip(row[tokens], row[labels], strict=True)
            parts.append(decode([token for token, label in pairs if (label != IGNORE_INDEX) == wanted]))
        return "\n".join(parts)


def _digest_of(texts: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        encoded = text.encode(errors="surrogatepass")
        digest.update(f"{len(encoded)} ".encode())
        digest.update(encoded)
    return digest.hexdigest()
