"""DSIR: samples whose words and word pairs resemble those of the validation samples rather than those of the pool.

Words and pairs of neighbouring words of the lower-case text are hashed into ``buckets``. With p the share of each
bucket in the text of the validation samples and q its share in the text of the pool,

    log w(x) = sum over the words and pairs of x of  log(p_b + 1e-8) - log(q_b + 1e-8),

with b the bucket of the word or pair. Samples are drawn without replacement in proportion to w: those with the largest
log w(x) + Gumbel noise are chosen.

Source: Xie et al., Data Selection for Language Models via Importance Resampling (NeurIPS 2023, arXiv 2302.03169) and
its package ``data-selection``, which has the same defaults.
Differs from it: the hash has a seed, the noise follows from the seed of the run, and separate targets choose in turns
instead of one after the other.
Cost: none of the model. The text of pool and validation samples is read once in a run, on the main process.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import ClassVar, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from dataflex import (
    ConfigError,
    IndexArray,
    Needs,
    Pool,
    RoundContext,
    RunView,
    ScoreArray,
    Selector,
    SelectorParams,
    ValidationParams,
    on_main,
    register,
)

_WORD = re.compile(r"\w+|[^\w\s]+")
_FLOOR = 1e-8
"""Added to every share before its logarithm."""
_BLOCK = 4096
"""Texts that are read and hashed at a time."""
_KNOWN_WORDS = 1 << 20
"""Largest number of words whose hash is cached."""

logger = logging.getLogger(__name__)


class DsirParams(SelectorParams, ValidationParams):
    """Parameters of DSIR."""

    buckets: int = Field(
        10_000, ge=2, le=1 << 24, description="Number of buckets that words and word pairs are hashed into."
    )
    hash_seed: int = Field(0, ge=0, lt=1 << 64, description="Seed of the hash.")
    min_words: int = Field(100, ge=1, description="Samples of fewer words have no score and are not chosen.")
    smoothing: float = Field(0.0, ge=0, description="Added to the count of every bucket in the validation samples.")
    resample: bool = Field(True, description="Draw in proportion to the weights w; if false, take the largest weights.")
    separate_targets: bool = Field(
        False,
        description="Compare with each sub-task of the validation samples separately; the sub-tasks choose in turns. "
        "If false, compare with all of them together.",
    )
    target_shares: list[float] | None = Field(
        None,
        description="With separate_targets: share of the chosen samples for each sub-task. If null, all shares are "
        "equal.",
    )

    @model_validator(mode="after")
    def _shares_of_targets(self) -> Self:
        shares = self.target_shares
        if shares is None:
            return self
        if not self.separate_targets:
            raise ValueError("target_shares are for separate_targets: true; set it or remove target_shares")
        if not shares or min(shares) <= 0:
            raise ValueError(f"target_shares must be positive numbers, got {shares}")
        return self


@register("selector", "dsir")
class DsirSelector(Selector[DsirParams]):
    """Prefers samples with the words of the validation samples."""

    partial_scores: ClassVar[str | None] = (
        "the scores follow from the text alone, are computed once in a run and need no forward pass; remove it"
    )

    without_score: ClassVar[str | None] = "the others have fewer than min_words words; lower min_words"

    def __init__(self, params: DsirParams) -> None:
        super().__init__(params)
        self._weights: NDArray[np.float64] | None = None
        """log w of every sample of the pool for each target, shape (N, T); NaN if the text is too short."""

    def needs(self, run: RunView) -> Needs:
        """Return the validation samples."""
        return Needs(validation=self.params)

    def problems(self, run: RunView) -> Iterator[tuple[str, str]]:
        """Yield a problem if the data sets are the sub-tasks and ``target_shares`` has another length."""
        shares, names = self.params.target_shares, self.params.validation
        if (
            shares is not None
            and names is not None
            and self.params.subtask_column is None
            and len(shares) != len(names)
        ):
            yield (
                "target_shares",
                f"has {len(shares)} numbers for {len(names)} sub-tasks ({', '.join(names)}). Give one number each.",
            )

    def pool_problems(self, pool: Pool) -> Iterator[tuple[str, str]]:
        """Yield a problem if every sample of the pool is too short.

        The longest samples are read first, so that few texts are read if one is long enough.
        """
        wanted, longest = self.params.min_words, 0
        order = np.argsort(-pool.lengths, kind="stable")
        for index in order[pool.lengths[order] >= wanted]:  # a word has at least one token
            longest = max(longest, len(_WORD.findall(pool.text(int(index)).lower())))
            if longest >= wanted:
                return
        said = f"{longest} words" if longest else f"{int(pool.lengths.max())} tokens"
        yield "min_words", f"no sample has {wanted} words: the longest has {said}. Lower min_words."

    def begin(self, ctx: RoundContext) -> None:
        """Compute log w of all samples of the pool, once in a run."""
        if self._weights is not None:
            return
        targets = len(ctx.validation.domains) if self.params.separate_targets else 1
        shares = self.params.target_shares
        if shares is not None and len(shares) != targets:
            raise ConfigError(
                f"dsir.target_shares has {len(shares)} numbers, and there are {targets} sub-tasks of validation "
                f"samples ({', '.join(ctx.validation.domains)}). Give one number each."
            )
        self._weights = on_main(partial(log_weights, ctx.pool, ctx.validation, self.params))

    def score(self, ctx: RoundContext, candidates: IndexArray) -> ScoreArray:
        """Return log w of every candidate, plus the noise with ``resample``; NaN if the text is too short.

        With several targets the score is in (0, 1] and falls with the position of a candidate in the order of
        :func:`in_turn`.
        """
        assert self._weights is not None
        weights = self._weights[candidates]
        scores = np.full(candidates.size, np.nan, dtype=np.float32)
        long = np.flatnonzero(~np.isnan(weights[:, 0]))
        keys = weights[long]
        if self.params.resample:
            keys = keys + ctx.rng.gumbel(size=keys.shape)
        if keys.shape[1] == 1:
            scores[long] = keys[:, 0]
        else:
            shares = self.params.target_shares or [1.0] * keys.shape[1]
            scores[long[in_turn(keys, shares)]] = np.arange(long.size, 0, -1) / long.size
        return scores


class Grams(NamedTuple):
    """Buckets of the words and word pairs of some texts, text after text."""

    words: NDArray[np.unsignedinteger]
    pairs: NDArray[np.unsignedinteger]
    lengths: IndexArray
    """Number of words of each text. A text with words has one pair less."""

    def counts(self, buckets: int) -> NDArray[np.int64]:
        """Return how often each bucket occurs, shape (buckets,)."""
        return np.bincount(self.words, minlength=buckets) + np.bincount(self.pairs, minlength=buckets)

    def sums(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return for each text the sum of ``values`` over the buckets of its words and pairs.

        Args:
            values: one value per bucket, shape (buckets,).
        """
        return _sums(values[self.words], self.lengths) + _sums(values[self.pairs], np.maximum(self.lengths - 1, 0))


def _sums(values: NDArray[np.float64], lengths: IndexArray) -> NDArray[np.float64]:
    owners = np.repeat(np.arange(lengths.size), lengths)
    return np.bincount(owners, weights=values, minlength=lengths.size).astype(np.float64, copy=False)


class _Words(dict[str, int]):
    """Cache that maps a word to 64 bits of its seeded hash."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._key = seed.to_bytes(8, "little")

    def __missing__(self, word: str) -> int:
        encoded = word.encode("utf-8", errors="surrogatepass")
        found = int.from_bytes(hashlib.blake2b(encoded, digest_size=8, key=self._key).digest(), "little")
        if len(self) < _KNOWN_WORDS:
            self[word] = found
        return found


@dataclass
class Hasher:
    """Hashes the words and word pairs of texts: words with BLAKE2, pairs by mixing the hashes of both words.

    Attributes:
        buckets: number of buckets.
        seed: seed of the hash.
    """

    buckets: int
    seed: int = 0

    def __post_init__(self) -> None:
        self._words = _Words(self.seed)
        self._dtype = np.uint16 if self.buckets <= 1 << 16 else np.uint32

    def grams(self, texts: list[str]) -> Grams:
        """Return the buckets of every word, and of every pair of neighbouring words, of some texts."""
        split = [_WORD.findall(text.lower()) for text in texts]
        lengths = np.array([len(words) for words in split], dtype=np.int64)
        total = int(lengths.sum())
        hashes = np.fromiter(map(self._words.__getitem__, chain.from_iterable(split)), np.uint64, total)
        inside = np.ones(total, dtype=bool)  # whether a word has a predecessor in its text
        inside[(np.cumsum(lengths) - lengths)[lengths > 0]] = False
        second = np.flatnonzero(inside)
        # The factor (an odd number) makes the hash of a pair depend on the order of its words.
        pairs = _mixed(hashes[second - 1] * np.uint64(0x9E3779B97F4A7C15) + hashes[second])
        return Grams(self._in_buckets(hashes), self._in_buckets(pairs), lengths)

    def _in_buckets(self, hashes: NDArray[np.uint64]) -> NDArray[np.unsignedinteger]:
        return (hashes % np.uint64(self.buckets)).astype(self._dtype)


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return hashes whose bits each depend on all bits of the input (finalizer of SplitMix64, Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def grams_of(pool: Pool, hasher: Hasher, indices: IndexArray) -> Iterator[Grams]:
    """Yield the grams of some samples, block by block."""
    for begin in range(0, indices.size, _BLOCK):
        yield hasher.grams(pool.texts(indices[begin : begin + _BLOCK]))


def log_weights(pool: Pool, validation: Pool, params: DsirParams) -> NDArray[np.float64]:
    """Return log w of every sample for each target, shape (N, T); NaN if a text has fewer than ``min_words`` words.

    Args:
        pool: the training samples, N of them.
        validation: the validation samples; with ``separate_targets`` each of its domains is a target.
        params: parameters of DSIR.

    Raises:
        ConfigError: if no text of the pool is long enough, or the text of a target has no word.
    """
    hasher = Hasher(params.buckets, params.hash_seed)
    targets = dict(zip(validation.domains, np.split(np.arange(validation.size), validation.offsets[1:-1]), strict=True))
    if not params.separate_targets:
        targets = {", ".join(targets): np.arange(validation.size)}
    raw = list(grams_of(pool, hasher, np.arange(pool.size)))
    seen = sum((part.counts(params.buckets) for part in raw), np.zeros(params.buckets, dtype=np.int64))
    lengths = np.concatenate([part.lengths for part in raw])
    short = lengths < params.min_words
    if short.all():
        raise ConfigError(
            f"dsir.min_words: none of the pool's {pool.size} samples has {params.min_words} words (the longest has "
            f"{int(lengths.max(initial=0))}). Lower min_words."
        )
    if short.any():
        logger.warning(
            "select dsir: %d of %d samples have fewer than min_words (%d) words and are not chosen.",
            np.count_nonzero(short),
            pool.size,
            params.min_words,
        )
    weights = np.empty((pool.size, len(targets)))
    for number, (name, indices) in enumerate(targets.items()):
        wanted = np.full(params.buckets, params.smoothing)
        for part in grams_of(validation, hasher, indices):
            wanted += part.counts(params.buckets)
        if not wanted.any():
            raise ConfigError(f"dsir.validation: the text of {name} has no word to compare with.")
        values = log_ratios(wanted, seen)
        weights[:, number] = np.concatenate([part.sums(values) for part in raw])
    weights[short] = np.nan
    return weights


def log_ratios(wanted: NDArray[np.floating], seen: NDArray[np.integer]) -> NDArray[np.float64]:
    """Return log(p + 1e-8) - log(q + 1e-8) of every bucket, shape (buckets,).

    Args:
        wanted: count of every bucket in the target.
        seen: count of every bucket in the pool.
    """
    p, q = wanted / wanted.sum(), seen / seen.sum()
    return np.log(p + _FLOOR) - np.log(q + _FLOOR)


def in_turn(keys: NDArray[np.float64], shares: list[float]) -> IndexArray:
    """Return all rows in the order in which targets take them in turns.

    At its turn, a target takes the row with the largest of its keys among the rows not yet taken. Target t takes its
    j-th row at time (j - 1/2) / (share of t). Of the first k rows each target therefore took its share of k, rounded up
    or down, for every k.

    Args:
        keys: key of each row for each target, shape (n, T).
        shares: shares of the targets, positive, on any scale.
    """
    size, targets = keys.shape
    whole = np.asarray(shares, dtype=np.float64) / np.sum(shares)
    due = np.concatenate([(np.arange(size) + 0.5) / share for share in whole])
    turns = np.tile(np.arange(targets), (size, 1)).T.ravel()[np.argsort(due, kind="stable")[:size]]
    falling = [iter(np.argsort(-keys[:, target], kind="stable").tolist()) for target in range(targets)]
    taken = bytearray(size)
    order = np.empty(size, dtype=np.int64)
    for place, target in enumerate(turns.tolist()):
        row = next(row for row in falling[target] if not taken[row])
        taken[row] = 1
        order[place] = row
    return order
