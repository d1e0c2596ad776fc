"""The samples of a run as text: its pool loaded once more with the configuration on record, and decoded."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from dataflex.config.loading import SECTION, RunConfig
from dataflex.config.masking import masks
from dataflex.errors import ConfigError
from dataflex.record.files import one_line
from dataflex.record.reader import RunRecord

if TYPE_CHECKING:
    from dataflex.data.pool import Pool

_HEAD, _TAIL = 220, 75
_SEARCHED = 1000
"""Samples decoded at a time in a search."""
_LOADING_ERRORS = (
    ConfigError, OSError, ValueError, RuntimeError, ImportError, LookupError, TypeError, AttributeError,
)  # fmt: skip
"""What we, LLaMA-Factory or its libraries raise where data or a tokenizer on record cannot be loaded any more."""


@dataclass(frozen=True)
class Part:
    """A stretch of a sample: ``trained`` on, or ``prompt``, which is only read."""

    kind: Literal["prompt", "trained"]
    text: str


class Texts:
    """The text of every sample of a pool.

    Args:
        pool: the samples.
        tokenizer: made them from text.
        full: give the text as the model sees it, with special tokens; otherwise shortened, without them.
    """

    def __init__(self, pool: Pool, tokenizer: Any, full: bool) -> None:
        self.pool, self.tokenizer, self.full = pool, tokenizer, full

    def parts(self, index: int) -> list[Part]:
        """Return the stretches of a sample in order; of plain text (stage pt) every token is trained on."""
        from dataflex.data.token_loss import IGNORE_INDEX

        row = self.pool.dataset[index]
        tokens = row["input_ids"]
        trained = np.asarray(row.get("labels", tokens)) != IGNORE_INDEX
        bounds = [0, *(np.flatnonzero(np.diff(trained)) + 1).tolist(), len(tokens)]
        parts = []
        for start, stop in pairwise(bounds):
            text = self.tokenizer.decode(tokens[start:stop], skip_special_tokens=not self.full)
            if self.full or text.strip():
                parts.append(Part("trained" if trained[start] else "prompt", text if self.full else shortened(text)))
        return parts

    def containing(self, phrase: str) -> list[int]:
        """Return the samples whose text, special tokens left out, contains a phrase.

        Upper and lower case are the same, and so is any white space.
        """
        wanted = _comparable(phrase)
        found = []
        for start in range(0, self.pool.size, _SEARCHED):
            rows = self.pool.dataset[start : start + _SEARCHED]["input_ids"]
            texts = self.tokenizer.batch_decode(rows, skip_special_tokens=True)
            found += [start + number for number, text in enumerate(texts) if wanted in _comparable(text)]
        return found


def shortened(text: str) -> str:
    """Return a text on one line, its middle left out where it is long."""
    line = " ".join(text.split())
    return line if len(line) <= _HEAD + _TAIL + 5 else f"{line[:_HEAD]} ... {line[-_TAIL:]}"


def _comparable(text: str) -> str:
    return " ".join(text.casefold().split())


def load_texts(record: RunRecord, full: bool) -> Texts | str:
    """Return the texts of a run's samples, or why there are none.

    The data sets are taken for those of the run if each gives as many samples as on record, and the fingerprint of all
    is the same (older records say only their names).
    """
    from dataflex.integrations.llamafactory.pool_only import pool_of

    # Without what is not on record, such as the token of a hub: what is there shows whether it is needed.
    given = {key: value for key, value in record.config.items() if key != SECTION and not masks(value)}
    column = record.config[SECTION].get("domain_column")
    try:
        config = RunConfig(given, None, source=str(record.path)).with_assets()
        pool, tokenizer = pool_of(config, column)
    except _LOADING_ERRORS as error:
        directory = str(given.get("dataset_dir", "data"))
        hint = "" if Path(directory).is_absolute() else f" (dataset_dir {directory!r} is looked for in {Path.cwd()})"
        return f"the data on record cannot be loaded: {one_line(error)}{hint}"
    now = {name: int(size) for name, size in zip(pool.domains, pool.domain_sizes, strict=True)}
    then = record.pool or dict.fromkeys(record.rounds[0].domains)
    if list(now) != list(then):
        return f"the data is not that of the run any more: it has the data sets {', '.join(now)}."
    other = [
        f"{name} has {now[name]} samples, {size} on record" for name, size in record.pool.items() if now[name] != size
    ]
    if other:
        return f"the data is not that of the run any more: {', '.join(other)}."
    known = [start.fingerprints["dataset"] for start in record.starts if "dataset" in start.fingerprints]
    if known and known[-1] != pool.fingerprint:
        return "the data is not that of the run any more: it has as many samples, but others."
    return Texts(pool, tokenizer, full)
