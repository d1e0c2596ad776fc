"""Texts of a run's samples: the pool is loaded again with the recorded configuration, and tokens are decoded."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from dataflex.config.loading import SECTION, TRAINER_CLASS, RunConfig
from dataflex.config.masking import masks
from dataflex.errors import ConfigError
from dataflex.record.files import one_line
from dataflex.record.reader import RunRecord

if TYPE_CHECKING:
    from dataflex.data.pool import Pool

_HEAD, _TAIL = 220, 75
_SEARCHED = 1000
"""Number of samples that a search decodes at once."""
_LOADING_ERRORS = (
    ConfigError, OSError, ValueError, RuntimeError, ImportError, LookupError, TypeError, AttributeError,
)  # fmt: skip
"""Errors of DataFlex, LLaMA-Factory and its libraries if recorded data or a tokenizer cannot be loaded any more.

LLaMA-Factory and the libraries have no common error class, so the list is long.
"""


Kind = Literal["prompt", "trained", "chosen", "rejected", "desired", "undesired"]
"""The kind of a span of tokens: a prompt, which has no loss; trained tokens; or the response of a preference stage."""


@dataclass(frozen=True)
class Part:
    """A span of a sample's tokens, as text."""

    kind: Kind
    text: str


class Texts:
    """The text of every sample of a pool.

    Args:
        pool: the samples.
        tokenizer: the tokenizer that produced the samples.
        full: whether to return texts completely and with special tokens. Otherwise they are shortened and without.
    """

    def __init__(self, pool: Pool, tokenizer: Any, full: bool) -> None:
        self.pool, self.tokenizer, self.full = pool, tokenizer, full

    def parts(self, index: int) -> list[Part]:
        """Return the spans of a sample in order. In stage pt every token is trained on.

        A pair has its prompt once, then both responses. A response without text is shown too.
        """
        row, fields = self.pool.dataset[index], self.pool.fields
        if len(fields.tokens) == 1:
            kinds: tuple[Kind, ...] = ("trained",)
            if "kto_tags" in row:
                kinds = ("desired",) if row["kto_tags"] else ("undesired",)
        else:
            kinds = ("chosen", "rejected")
        parts: list[Part] = []
        for kind, tokens, labels in zip(kinds, fields.tokens, fields.labels, strict=True):
            found = self._spans(row[tokens], row.get(labels), kind)
            parts += found if not parts else [part for part in found if part.kind != "prompt"]
        return parts

    def _spans(self, tokens: list[int], labels: list[int] | None, kind: Kind) -> list[Part]:
        """Return the spans of tokens in order: of the kind ``kind`` if they have labels, otherwise of a prompt."""
        from dataflex.data.token_loss import IGNORE_INDEX

        trained = np.asarray(tokens if labels is None else labels) != IGNORE_INDEX
        bounds = [0, *(np.flatnonzero(np.diff(trained)) + 1).tolist(), len(tokens)]
        parts = []
        for start, stop in pairwise(bounds):
            text = self.tokenizer.decode(tokens[start:stop], skip_special_tokens=not self.full)
            is_response = bool(trained[start]) and kind != "trained"
            if self.full or text.strip() or is_response:
                parts.append(Part(kind if trained[start] else "prompt", text if self.full else shortened(text)))
        return parts

    def trained_tokens(self, index: int) -> list[int]:
        """Return the tokens of a sample that have a loss: those with a label, without the first token of the sample.

        Of a pair, these are the tokens of the chosen response.
        """
        from dataflex.data.token_loss import IGNORE_INDEX

        row, fields = self.pool.dataset[index], self.pool.fields
        tokens, labels = row[fields.tokens[0]], row.get(fields.labels[0])
        if labels is None:  # the collator of stage pt gives padding no label, and often the padding token ends a text
            return [token for token in tokens[1:] if token != self.tokenizer.pad_token_id]
        return [token for token, label in zip(tokens[1:], labels[1:], strict=True) if label != IGNORE_INDEX]

    def decode(self, tokens: list[int]) -> str:
        """Return the text of tokens, with special tokens."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def containing(self, phrase: str) -> list[int]:
        """Return the indices of the samples whose text contains a phrase.

        Special tokens are left out. The comparison ignores case, and any white space equals a single space.
        """
        wanted = _comparable(phrase)
        found = []
        for start in range(0, self.pool.size, _SEARCHED):
            rows = self.pool.dataset[start : start + _SEARCHED]
            there: set[int] = set()
            for field in self.pool.fields.tokens:
                texts = self.tokenizer.batch_decode(rows[field], skip_special_tokens=True)
                there |= {start + number for number, text in enumerate(texts) if wanted in _comparable(text)}
            found += sorted(there)
        return found


def shortened(text: str) -> str:
    """Return a text on one line. The middle of a long text is replaced by dots."""
    line = " ".join(text.split())
    return line if len(line) <= _HEAD + _TAIL + 5 else f"{line[:_HEAD]} ... {line[-_TAIL:]}"


def _comparable(text: str) -> str:
    return " ".join(text.casefold().split())


def load_texts(record: RunRecord, full: bool) -> Texts | str:
    """Return the texts of a run's samples, or the reason why they cannot be shown.

    The loaded data counts as the run's data if each data set has as many samples as on record and if the fingerprint of
    the whole pool is the same. Older records have only the names of the data sets.
    """
    from dataflex.integrations.llamafactory.pool_only import pool_of

    if TRAINER_CLASS in record.config:
        return f"a Python script gave the samples to {record.config[TRAINER_CLASS]}, and they are not on record"

    # Secrets, such as a hub's token, are not on record. Loading is tried without them, because local data needs none.
    given = {key: value for key, value in record.config.items() if key != SECTION and not masks(value)}
    column = record.config[SECTION].get("domain_column")
    try:
        config = RunConfig(given, None, source=str(record.path)).with_assets()
        pool, tokenizer = pool_of(config, column, whole=not record.rounds)
    except _LOADING_ERRORS as error:
        directory = str(given.get("dataset_dir", "data"))
        hint = "" if Path(directory).is_absolute() else f" (dataset_dir {directory!r} is relative to {Path.cwd()})"
        return f"the recorded data cannot be loaded: {one_line(error)}{hint}"
    now = {name: int(size) for name, size in zip(pool.domains, pool.domain_sizes, strict=True)}
    then = record.pool or dict.fromkeys(record.rounds[0].domains if record.rounds else now)
    if list(now) != list(then):
        return f"the data has changed since the run: the data sets are {', '.join(now)}, on record {', '.join(then)}."
    other = [
        f"{name} has {now[name]} samples, {size} on record" for name, size in record.pool.items() if now[name] != size
    ]
    if other:
        return f"the data has changed since the run: {', '.join(other)}."
    known = [start.fingerprints["dataset"] for start in record.starts if "dataset" in start.fingerprints]
    if known and known[-1] != pool.fingerprint:
        return "the data has changed since the run: the number of samples is the same, but their content is not."
    return Texts(pool, tokenizer, full)
