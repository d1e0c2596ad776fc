"""The pool: the preprocessed training samples of the run, domain after domain, with their lengths and a fingerprint."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dataflex.data.columns import ColumnArray, column_digest
from dataflex.data.given_weights import GivenWeights
from dataflex.data.sample_media import media_paths
from dataflex.data.sampling import IndexArray
from dataflex.data.stages import SampleFields
from dataflex.errors import ConfigError, unknown

if TYPE_CHECKING:
    from datasets import Dataset

IGNORE_INDEX = -100
"""The label of a token that is not trained on."""

_NAMED = 10
"""Maximum number of names in a message."""
_FINGERPRINT_ROWS = 512
"""Number of samples whose content is part of a fingerprint."""
_SCAN_ROWS = 10_000
"""Number of samples per read in a scan of the pool."""
_COUNTED = 1 << 16
"""Number of indices per block for counting, so that memory does not grow with the number of indices."""


class DomainSamples(NamedTuple):
    """The preprocessed samples of one or more domains.

    Attributes:
        dataset: the samples, one domain after another.
        sizes: number of samples in each domain, in the order of the domains.
    """

    dataset: Dataset
    sizes: dict[str, int]


def of_one(domain: str, dataset: Dataset) -> DomainSamples:
    """Return the samples of one domain."""
    return DomainSamples(dataset, {domain: len(dataset)})


@dataclass(frozen=True)
class Rows:
    """The rows of a data set that the samples of a domain were made from.

    Attributes:
        dataset: the name of the data set.
        raw: the raw rows that the samples were made from.
        positions: position in ``raw`` of the row of each sample. None means that sample i is row i.
        numbers: number of each row of ``raw`` in the original data set. None means that row i has number i. The numbers
            differ if LLaMA-Factory's ``num_samples`` has drawn a part of the rows.
    """

    dataset: str
    raw: Dataset
    positions: IndexArray | None = None
    numbers: IndexArray | None = None

    def positions_of(self, samples: IndexArray) -> IndexArray:
        """Return the positions in ``raw`` of the rows of samples, which are counted within the domain."""
        return samples if self.positions is None else self.positions[samples]

    def numbers_of(self, samples: IndexArray) -> IndexArray:
        """Return the row numbers of samples in the data set."""
        positions = self.positions_of(samples)
        return positions if self.numbers is None else self.numbers[positions]


class Pool:
    """``N`` map-style samples in ``K`` domains. The samples of a domain are a contiguous range.

    Args:
        dataset: the concatenated samples.
        domains: names of the domains, in order.
        domain_sizes: number of samples in each domain, >= 1, with sum ``len(dataset)``.
        fields: the fields of a sample in the training stage.

    Attributes:
        domains: names of the domains, in order.
        domain_sizes: number of samples in each domain, shape (K,).
        offsets: index of the first sample of each domain, followed by N, shape (K + 1,).

    Example:
        >>> import numpy as np
        >>> from datasets import Dataset
        >>> from dataflex import Pool
        >>> code = Dataset.from_dict({"input_ids": [[1, 5, 2], [1, 6]], "labels": [[-100, 5, 2], [-100, 6]]})
        >>> math = Dataset.from_dict({"input_ids": [[1, 7, 8, 2]], "labels": [[-100, -100, 8, 2]]})
        >>> pool = Pool.concatenate({"code": code, "math": math})
        >>> pool.size, pool.lengths.tolist(), pool.trained_tokens.tolist()
        (3, [3, 2, 4], [2, 1, 2])
        >>> pool.domain_ids(np.array([0, 2]))
        array([0, 1])
    """

    def __init__(
        self,
        dataset: Dataset,
        domains: tuple[str, ...],
        domain_sizes: NDArray[np.int64],
        fields: SampleFields = SampleFields(),  # noqa: B008 - it cannot be changed
    ) -> None:
        self.dataset, self.fields = dataset, fields
        self.domains = domains
        self.domain_sizes = np.asarray(domain_sizes, dtype=np.int64)
        self.offsets = np.concatenate([[0], np.cumsum(self.domain_sizes)]).astype(np.int64)
        """First index of each domain, followed by ``N``, shape (K + 1,)."""
        self.rows_of: dict[str, Rows] = {}
        """Domain -> the rows of its samples, if known. They are unknown for packed samples."""
        self._columns: dict[str, ColumnArray] = {}
        """Values of the stored raw columns, one per sample, by name of the column."""
        self.given_weights: dict[str, GivenWeights] = {}
        """Weights of the trained tokens that the data gives, by configuration key of the component that reads them."""
        self.decode: Callable[[list[int]], str] | None = None
        """Function that returns the text of tokens; None without a tokenizer."""

    @classmethod
    def concatenate(
        cls,
        parts: dict[str, Dataset],
        key: str = "dataset",
        fields: SampleFields = SampleFields(),  # noqa: B008
    ) -> Pool:
        """Return the pool of one preprocessed data set per domain. Errors name the setting ``key``.

        Raises:
            ConfigError: if a domain has no sample.
        """
        return cls.of_domains([of_one(name, part) for name, part in parts.items()], key, fields)

    @classmethod
    def of_domains(
        cls,
        parts: list[DomainSamples],
        key: str = "dataset",
        fields: SampleFields = SampleFields(),  # noqa: B008
    ) -> Pool:
        """Return the pool of several parts of one or more domains each. Errors name the setting ``key``.

        Raises:
            ConfigError: if a domain has no sample, or if two domains have the same name.
        """
        from datasets import concatenate_datasets

        named = [(name, size) for _, sizes in parts for name, size in sizes.items()]
        names, sizes = tuple(name for name, _ in named), np.array([size for _, size in named], dtype=np.int64)
        empty = [name for name, size in named if size == 0]
        if empty:
            raise ConfigError(f"{key}: {some(list(map(repr, empty)))} has no sample left after preprocessing.")
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise ConfigError(f"{key}: there are two domains named {some(list(map(repr, twice)))}.")
        datasets = [dataset for dataset, _ in parts]
        return cls(datasets[0] if len(datasets) == 1 else concatenate_datasets(datasets), names, sizes, fields)

    @property
    def size(self) -> int:
        """Number of samples, N."""
        return int(self.offsets[-1])

    def domain_ids(self, indices: IndexArray) -> NDArray[np.int64]:
        """Return the domain number of each sample, in the shape of ``indices``."""
        return np.searchsorted(self.offsets, indices, side="right") - 1

    def domain_counts(self, indices: IndexArray) -> NDArray[np.int64]:
        """Return how many of ``indices`` lie in each domain, shape (K,)."""
        counts = np.zeros(len(self.domains), dtype=np.int64)
        for begin in range(0, indices.size, _COUNTED):
            ids = self.domain_ids(indices[begin : begin + _COUNTED])
            counts += np.bincount(ids, minlength=len(self.domains))
        return counts

    @cached_property
    def lengths(self) -> NDArray[np.int32]:
        """Number of tokens of every sample, shape (N,)."""
        import pyarrow.compute as pc

        parts = [
            sum(pc.list_value_length(table.column(name)).to_numpy() for name in self.fields.tokens)
            for table in self.dataset.with_format("arrow").iter(batch_size=_SCAN_ROWS)
        ]
        return np.concatenate(parts).astype(np.int32)

    @cached_property
    def domain_tokens(self) -> NDArray[np.int64]:
        """Number of tokens of each domain, shape (K,)."""
        return np.add.reduceat(self.lengths.astype(np.int64), self.offsets[:-1])

    @property
    def outline(self) -> str:
        """A digest of the domains and of the length of every sample."""
        digest = hashlib.sha256(repr((self.domains, self.domain_sizes.tolist())).encode())
        digest.update(np.ascontiguousarray(self.lengths).data)
        return digest.hexdigest()

    @cached_property
    def fingerprint(self) -> str:
        """A digest of the domains, of the lengths and trained tokens, and of the content of evenly spaced samples.

        If a run resumes, two pools with the same fingerprint count as the same data. Media are hashed by their path.
        """
        digest = hashlib.sha256(repr((self.domains, self.domain_sizes.tolist())).encode())
        digest.update(np.ascontiguousarray(self.lengths).data)
        digest.update(np.ascontiguousarray(self.trained_tokens, dtype=np.int32).data)
        rows = np.unique(np.linspace(0, self.size - 1, min(self.size, _FINGERPRINT_ROWS)).astype(np.int64))
        for row in rows:
            sample = self.dataset[int(row)]
            for name in (*self.fields.tokens, *self.fields.labels, *self.fields.others):
                if name in sample:
                    digest.update(np.asarray(sample[name], dtype=np.int64).data)
            digest.update("".join(f"{path}\n" for path in media_paths(sample)).encode())
        return digest.hexdigest()

    @cached_property
    def content_digest(self) -> str:
        """A digest of the domains and of all columns of every sample. Media are hashed by their path."""
        digest = hashlib.sha256(repr((self.domains, self.domain_sizes.tolist())).encode())
        for table in self.dataset.with_format("arrow").iter(batch_size=_SCAN_ROWS):
            for name in sorted(table.column_names):
                digest.update(name.encode())
                _add(digest, table.column(name).combine_chunks())
        return digest.hexdigest()

    @cached_property
    def trained(self) -> NDArray[np.bool_]:
        """Whether each sample has a trained token, shape (N,)."""
        return self.trained_tokens > 0

    @cached_property
    def trained_tokens(self) -> NDArray[np.int32]:
        """Number of trained tokens of every sample, shape (N,): labels that count, after the first position."""
        labels = [name for name in self.fields.labels if name in self.dataset.column_names]
        if not labels:  # text without labels trains on every token
            return np.maximum(self.lengths - 1, 0)
        parts = [
            sum(_trained(table.column(name).combine_chunks()) for name in labels)
            for table in self.dataset.with_format("arrow").iter(batch_size=_SCAN_ROWS)
        ]
        return np.concatenate(parts).astype(np.int32)

    def row_numbers(self, indices: IndexArray) -> IndexArray | None:
        """Return the row number of each sample in its data set, from 0, or -1 if unknown.

        Returns None if no row number is known.
        """
        if not self.rows_of:
            return None
        found = np.full(indices.size, -1, dtype=np.int64)
        ids = self.domain_ids(indices)
        for number, name in enumerate(self.domains):
            rows = self.rows_of.get(name)
            if rows is not None:
                here = ids == number
                found[here] = rows.numbers_of(indices[here] - self.offsets[number])
        return found

    def keep_column(self, name: str, values: ColumnArray) -> None:
        """Store a raw column, one value for each sample, as a read-only array."""
        assert values.shape == (self.size,)
        values.flags.writeable = False
        self._columns[name] = values

    def column(self, name: str) -> ColumnArray:
        """Return the values of a raw column, one for each sample, shape (N,).

        Numbers are float64, null is NaN, booleans are 0 and 1. Text is unchanged, with None for null. A packed sample
        is made of several rows. Its value is the mean over the tokens of its rows with a value, or NaN if no row has a
        value.

        Raises:
            ConfigError: if the column is not stored with the pool.
        """
        if name not in self._columns:
            raise ConfigError(
                f"{unknown('column', name, self._columns)} Columns of the raw data are stored with the samples if "
                f"dataflex.columns names them (columns: [{name}]), or needs() of a component does "
                f"(Needs(columns=({name!r},)))."
            )
        return self._columns[name]

    def numbers(self, name: str) -> NDArray[np.float64]:
        """Return the values of a raw column of numbers, one for each sample, shape (N,).

        Raises:
            ConfigError: if the column is not stored with the pool or holds text.
        """
        values = self.column(name)
        if values.dtype == object:
            raise ConfigError(f"the column {name!r} of the raw data holds text; numbers are needed.")
        return values.astype(np.float64, copy=False)

    @cached_property
    def column_fingerprints(self) -> dict[str, str]:
        """A digest of the values of each stored raw column, and of the token weights that the data gives."""
        return {
            **{name: column_digest(values) for name, values in self._columns.items()},
            **{f"token weights {weights.source}": weights.digest for weights in self.given_weights.values()},
        }

    def text(self, index: int) -> str:
        """Return the text of a sample: its decoded tokens without special tokens.

        The text of a pair of responses is the prompt with the chosen response.

        Raises:
            ValueError: if the pool has no tokenizer.
        """
        return self.texts(np.array([index]))[0]

    def texts(self, indices: IndexArray) -> list[str]:
        """Return the texts of samples, as :meth:`text`.

        Raises:
            ValueError: if the pool has no tokenizer.
        """
        decode = self.decode
        if decode is None:
            raise ValueError("this pool has no tokenizer to decode with; set pool.decode")
        return [decode(row[self.fields.tokens[0]]) for row in self.rows(indices)]

    def rows(self, indices: IndexArray) -> list[dict[str, Any]]:
        """Return samples in the format of the collator."""
        return self.dataset.__getitems__([int(index) for index in indices])


def some(names: Sequence[str]) -> str:
    """Return names for a message, only the first ones if the list is long."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _trained(labels: Any) -> NDArray[np.int64]:
    """Return the number of labels that count in each list of an arrow array, without its first position."""
    import pyarrow.compute as pc

    lengths = pc.list_value_length(labels).to_numpy()
    ends = np.cumsum(lengths)
    before = np.concatenate([[0], np.cumsum(labels.flatten().to_numpy() != IGNORE_INDEX)])
    return before[ends] - before[np.minimum(ends - lengths + 1, ends)]


def _add(digest: Any, values: Any) -> None:
    """Add an arrow array to a digest: its null mask and its values, independent of the width of numbers."""
    import pyarrow as pa
    import pyarrow.compute as pc

    values = values.storage if isinstance(values, pa.ExtensionArray) else values
    digest.update(f" {len(values)} {values.null_count} ".encode())
    if values.null_count:
        digest.update(values.is_valid().to_numpy(zero_copy_only=False).data)
        values = values.drop_null()
    kind = values.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        _add(digest, pc.list_value_length(values))
        _add(digest, values.flatten())
    elif pa.types.is_struct(kind):
        for field, part in zip(kind, values.flatten(), strict=True):
            digest.update(field.name.encode())
            _add(digest, part)
    elif pa.types.is_integer(kind) or pa.types.is_floating(kind):
        wide = np.int64 if pa.types.is_integer(kind) else np.float64
        digest.update(values.to_numpy(zero_copy_only=False).astype(wide).data)
    elif pa.types.is_binary(kind) or pa.types.is_string(kind):
        _add(digest, pc.binary_length(values))
        for value in values:
            digest.update(value.as_buffer())
    else:
        digest.update(repr(values.to_pylist()).encode())
