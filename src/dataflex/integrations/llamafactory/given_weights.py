"""Token weights that the data gives: read from the raw rows, and placed on the samples that LLaMA-Factory made of them.

The rows of the samples are encoded a second time (:mod:`~dataflex.integrations.llamafactory.turn_weights`). The tokens
and labels of every sample are compared with the second encoding, so a weight never belongs to another token.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataflex.api.given_weights import GivenWeightParams
from dataflex.data.columns import column_of, nowhere
from dataflex.data.given_weights import GivenWeights, joined
from dataflex.data.pool import IGNORE_INDEX, Pool
from dataflex.data.sampling import IndexArray
from dataflex.errors import ConfigError
from dataflex.files import write_atomically
from dataflex.integrations.llamafactory.origins import Origin, RawPart
from dataflex.integrations.llamafactory.row_weights import SPAN_KEYS, RowReader
from dataflex.integrations.llamafactory.turn_weights import RowError, encode

_KEPT = "dataflex_token_weights.parquet"
"""Name of the file beside tokenized data that holds the weights, with one list per training sample."""
_SAMPLES = b"dataflex_samples"
"""Key in the file's metadata for the fingerprint of the samples that the weights belong to."""
_FORMAT = 1
"""Part of the name of cached results. Raised if the meaning of a weight changes, so that none is taken from before."""
_BLOCK = 1000
"""Number of samples whose tokens are compared at a time."""

Weights = NDArray[np.float32]


@dataclass(frozen=True)
class PartWeights:
    """The weights of the samples of one load.

    Attributes:
        values: weights of the trained tokens, sample after sample, (m,).
        counts: number of trained tokens of each sample, (n,).
        unused: parameters for which the rows of this load hold nothing, and the problem of each.
    """

    values: Weights
    counts: IndexArray
    unused: Mapping[str, str]


@dataclass(frozen=True)
class _RowEncoder:
    """Function for the datasets library: the tokens, labels and weights of rows, or the problem of each."""

    processor: Any
    reader: RowReader
    raw: Any
    format: int = _FORMAT

    def __call__(self, rows: dict[str, list[Any]], numbers: list[int]) -> dict[str, list[Any]]:
        """Encode rows of LLaMA-Factory's format, given the numbers of their raw rows."""
        raw: dict[str, list[Any]] = {} if self.raw is None else self.raw[numbers[0] : numbers[-1] + 1]
        marks = self.reader.params.marks
        found: dict[str, list[Any]] = {name: [] for name in ("input_ids", "labels", "weights", "marks", "problem")}
        for place in range(len(numbers)):
            row = {name: values[place] for name, values in rows.items()}
            messages, problem = row["_prompt"] + row["_response"], None
            try:
                given, system = self.reader.read({name: values[place] for name, values in raw.items()}, messages)
                made = vars(encode(self.processor, row, given, system, marks))
            except RowError as error:
                made, problem = {key: [] for key in ("input_ids", "labels", "weights", "marks")}, str(error)
            for name, values in {**made, "problem": problem}.items():
                found[name].append(values)
        return found


@dataclass(frozen=True)
class WeightRun:
    """Computation of the weights of one component for the samples of one load.

    Attributes:
        params: the parameters of the weights.
        key: setting of the component, for messages.
        processor: LLaMA-Factory's supervised processor.
        data_args: LLaMA-Factory's data arguments.
        uses_cache: whether an earlier result in the cache of the datasets library is used.
    """

    params: GivenWeightParams
    key: str
    processor: Any
    data_args: Any
    uses_cache: bool

    def of(self, origin: Origin, samples: Any) -> PartWeights:
        """Return the weights of samples, given the rows that they were made of.

        Raises:
            ConfigError: if the rows are not known, or if a row gives weights that cannot be used.
        """
        from datasets import concatenate_datasets

        found = origin.rows_of_samples(self.key)
        used, members = np.unique(found.rows, return_inverse=True)
        encoded, unused, start = [], list[dict[str, str]](), 0
        for part in origin.parts:
            chosen = used[(used >= start) & (used < start + len(part.raw))]
            unused.append(dict(self._columns(part)))
            if chosen.size:
                made = self._encoded(part, chosen - start)
                problems = column_of(made, "problem")
                if problems.null_count < len(problems):
                    first = int(np.flatnonzero(problems.is_valid().to_numpy(zero_copy_only=False))[0])
                    raise ConfigError(f"{self.key}: {origin.place_of(int(chosen[first]))}: {problems[first]}.")
                encoded.append(made)
                unused[-1] |= self._marks(made)
            start += len(part.raw)
        without = {name: text for name, text in unused[0].items() if all(name in each for each in unused)}
        all_rows = encoded[0] if len(encoded) == 1 else concatenate_datasets(encoded)
        return PartWeights(*weights_of_samples(samples, all_rows, members, found.sizes), without)

    def _encoded(self, part: RawPart, used: IndexArray) -> Any:
        """Return the encoded rows of a data set, given the rows that samples are made of, ascending."""
        from datasets import Features, List, Value

        reader = RowReader(self.params, part.attributes, bool(self.data_args.train_on_prompt))
        columns = [name for name in reader.columns if name in part.raw.column_names]
        raw = part.raw.select_columns(columns).select(used) if columns else None
        aligned = part.aligned.select(used)
        lists = {name: List(Value("int64")) for name in ("input_ids", "labels", "marks")}
        features = Features({**lists, "weights": List(Value("float32")), "problem": Value("string")})
        return aligned.map(
            _RowEncoder(self.processor, reader, raw),
            with_indices=True,
            batched=True,
            batch_size=self.data_args.preprocessing_batch_size,
            remove_columns=aligned.column_names,
            features=features,
            num_proc=self.data_args.preprocessing_num_workers,
            load_from_cache_file=self.uses_cache,
            desc="Token weights of the data",
        )

    def _marks(self, encoded: Any) -> dict[str, str]:
        """Return the marks that no row holds, and the problem of each."""
        counts = column_of(encoded, "marks").flatten().to_numpy().reshape(len(encoded), -1).sum(0)
        return {
            f"marks {mark.begin}": f"{self.key}.marks: no response of the training data holds {mark.begin!r}."
            for mark, count in zip(self.params.marks, counts, strict=True)
            if not count
        }

    def _columns(self, part: RawPart) -> Iterator[tuple[str, str]]:
        """Yield the parameters whose key or column a data set does not have, and the problem of each.

        Raises:
            ConfigError: if the column of spans holds no lists.
        """
        params, attributes, known = self.params, part.attributes, part.raw.column_names
        spans, key = params.spans_column, params.message_key
        if spans is not None and spans not in known:
            yield "spans_column", f"{self.key}.spans_column: {nowhere('column', spans, known)}"
        elif spans is not None:
            kind = part.raw.data.schema.field(spans).type
            if not (_is_list(kind) or str(kind) == "null"):
                raise ConfigError(
                    f"{self.key}.spans_column: {spans!r} holds {kind}; a list of mappings with {', '.join(SPAN_KEYS)} "
                    "is needed."
                )
        if key is None:
            return
        of_rows = attributes.formatting == "alpaca"
        if not of_rows:
            known = [field.name for field in part.raw.data.schema.field(attributes.messages).type.value_type]
        if key not in known:
            what = "column" if of_rows else "key of messages"
            yield "message_key", f"{self.key}.message_key: {nowhere(what, key, known)}"


def _is_list(kind: Any) -> bool:
    """Return whether an arrow type is a list."""
    import pyarrow as pa

    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def weights_of_samples(
    samples: Any, encoded: Any, members: IndexArray, sizes: IndexArray | None
) -> tuple[Weights, IndexArray]:
    """Return the weights of the trained tokens of samples, and the number of trained tokens of each.

    Args:
        samples: the samples, as LLaMA-Factory made them.
        encoded: encoded rows, one after another.
        members: the encoded rows of the samples, sample after sample, (r,).
        sizes: number of rows of each sample; None if each sample has one row.

    Raises:
        ConfigError: if the tokens or labels of a sample differ from those of its rows.
    """
    of_samples = np.arange(len(samples) + 1) if sizes is None else np.concatenate([[0], np.cumsum(sizes)])
    values, counts = list[Weights](), np.zeros(len(samples), np.int64)
    both = ("input_ids", "labels")
    for begin in range(0, len(samples), _BLOCK):
        end = min(begin + _BLOCK, len(samples))
        own = {name: _lists(samples.select(range(begin, end)), name) for name in both}
        chosen = encoded.select(members[of_samples[begin] : of_samples[end]])
        theirs = {name: _lists(chosen, name) for name in (*both, "weights")}
        for place in range(end - begin):
            low, high = (int(of_samples[begin + place + step] - of_samples[begin]) for step in (0, 1))
            made = {name: np.concatenate(lists[low:high]) for name, lists in theirs.items()}
            labels = own["labels"][place]
            rest = labels[made["labels"].size :]  # the padding of a packed sample
            same = all(np.array_equal(own[name][place][: made[name].size], made[name]) for name in both)
            if not same or (rest != IGNORE_INDEX).any() or (sizes is None and rest.size):
                raise ConfigError(
                    f"sample {begin + place} (counted from 0) has other tokens than a second encoding of its row, so "
                    "weights of its tokens are not known. Use a supported release of LLaMA-Factory."
                )
            weights = made["weights"]
            if labels.size and labels[0] != IGNORE_INDEX:
                weights = weights[1:]  # no position predicts the first token of a sample
            values.append(weights.astype(np.float32))
            counts[begin + place] = weights.size
    return np.concatenate(values) if values else np.zeros(0, np.float32), counts


def _lists(dataset: Any, name: str) -> list[NDArray[Any]]:
    """Return a column of lists as arrays."""
    column = column_of(dataset, name)
    bounds = column.offsets.to_numpy()
    flat = column.values.to_numpy()
    return [flat[begin:end] for begin, end in pairwise(bounds)]


def finished(parts: Sequence[PartWeights], params: GivenWeightParams, key: str) -> GivenWeights:
    """Return the weights of all samples of a run, from those of each load.

    Raises:
        ConfigError: if a parameter has no effect on any row, or if every weight is 0.
    """
    for name, problem in parts[0].unused.items():
        if all(name in part.unused for part in parts):
            raise ConfigError(problem)
    values, counts = joined([(part.values, part.counts) for part in parts])
    if not values.any():
        raise ConfigError(f"{key}: the weight of every trained token is 0, so nothing would be trained on.")
    return GivenWeights.of(values, counts, params.normalized, params.settings)


def keep_weights(
    folder: Path, samples: Any, weights: Mapping[str, PartWeights], wanted: Mapping[str, GivenWeightParams]
) -> None:
    """Write weights beside the tokenized samples that they belong to.

    Args:
        folder: folder of the tokenized data.
        samples: its training samples.
        weights: the weights, by setting of the component.
        wanted: the parameters of the weights, by setting of the component.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {}
    for key, part in weights.items():
        bounds = pa.array(np.concatenate([[0], np.cumsum(part.counts)]), pa.int64())
        columns[wanted[key].settings] = pa.LargeListArray.from_arrays(bounds, pa.array(part.values))
    fingerprint = Pool.concatenate({"samples": samples}).fingerprint
    stream = io.BytesIO()
    pq.write_table(pa.table(columns).replace_schema_metadata({_SAMPLES: fingerprint.encode()}), stream)
    write_atomically(folder / _KEPT, stream.getvalue())


def kept_weights(folder: Path, samples: Any, wanted: Mapping[str, GivenWeightParams]) -> dict[str, PartWeights]:
    """Return the weights that are stored beside tokenized samples, by setting of the component.

    Raises:
        ConfigError: if weights of these parameters are not stored, or were stored for other samples.
    """
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    file, key = folder / _KEPT, next(iter(wanted))
    again = "Remove the folder, or name an empty one, so that the data is tokenized again from its raw rows."
    if not file.is_file():
        raise ConfigError(f"{key}: {folder} (tokenized_path) holds tokenized samples without token weights. {again}")
    table = pq.read_table(file)
    if (table.schema.metadata or {}).get(_SAMPLES) != Pool.concatenate({"samples": samples}).fingerprint.encode():
        raise ConfigError(f"{key}: {file} was written for other samples than the folder holds now. {again}")
    found = {}
    for key, params in wanted.items():
        if params.settings not in table.column_names:
            raise ConfigError(
                f"{key}: {file} holds token weights of other parameters: {'; '.join(table.column_names)}. {again}"
            )
        column = table.column(params.settings).combine_chunks()
        counts = pc.list_value_length(column).to_numpy().astype(np.int64)
        found[key] = PartWeights(column.flatten().to_numpy().astype(np.float32), counts, {})
    return found
