"""Raw rows of each sample, recorded while LLaMA-Factory loads training data.

Between the file and the pool several things happen to a row.
- ``num_samples`` draws some rows, and ``max_samples`` keeps the first ones.
- ``val_size`` splits some rows off and shuffles the rest.
- A division by a column sorts the rows.
- Rows without a prompt or a response are dropped.
- Packing puts several rows into one sample.

Each of these steps is recorded, or repeated from its inputs. Nothing is read or tokenized twice. The samples of a
stored ``tokenized_path`` have lost their rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from dataflex.data.columns import (
    ColumnArray,
    Packs,
    WantedColumn,
    check_column,
    join_columns,
    read_column,
    refuse_values,
    text_is_packed,
)
from dataflex.data.pool import Rows
from dataflex.data.sampling import IndexArray
from dataflex.data.stages import Stage
from dataflex.errors import ConfigError
from dataflex.integrations.llamafactory.batches import DOMAIN, in_batches, shards, take_packs

_SCAN_ROWS = 10_000
"""Number of rows per read."""
SPLIT_OFF = 1e-6
"""LLaMA-Factory splits validation data off if ``val_size`` is above this value."""


@dataclass(frozen=True)
class RawPart:
    """Rows of one data set.

    Attributes:
        raw: the raw rows.
        aligned: the same rows in LLaMA-Factory's format.
        attributes: LLaMA-Factory's description of the data set.
    """

    raw: Any
    aligned: Any
    attributes: Any


@dataclass(frozen=True)
class RowsOfAll:
    """The rows of all samples of a load.

    Attributes:
        rows: the rows of the samples, sample after sample, counted over all data sets, (r,).
        sizes: number of rows of each sample, with sum r; None without packing, if each sample has one row.
    """

    rows: IndexArray
    sizes: IndexArray | None


class Origin:
    """The raw rows of one load of training data. Three methods wrap LLaMA-Factory's functions.

    Args:
        names: names of the data sets, in the order of loading.
        columns: the wanted raw columns, by name.
        place: returns the file and line of a row, from the name of its data set and its number.
        notes_packs: whether the rows of packed samples are recorded, even if no column is wanted.
    """

    def __init__(
        self,
        names: Sequence[str],
        columns: Mapping[str, WantedColumn],
        place: Callable[[str, int], str],
        notes_packs: bool = False,
    ) -> None:
        self.names, self.columns, self._place = names, columns, place
        self._notes_packs = notes_packs or bool(columns)
        self._attributes: list[Any] = []
        """LLaMA-Factory's description of each data set."""
        self._raws: list[Any] = []
        """The raw rows of each data set."""
        self._aligned: Any = None
        """The same rows in LLaMA-Factory's format, one data set after another."""
        self._drawn: list[bool] = []
        """Whether ``num_samples`` drew the rows, for each data set."""
        self._positions: IndexArray | None = None
        """Raw row of each sample, or of each row that is packed. None means that the two are in the same order."""
        self._packs: Packs | None = None
        """The rows of each packed sample, as indices of :attr:`_positions`."""
        self._is_known = False
        self._left_out: IndexArray = np.zeros(0, dtype=np.int64)
        """Positions of the raw rows that gave no sample."""

    @property
    def is_stored(self) -> bool:
        """Whether the data was stored tokenized, so that its rows are not known."""
        return self._aligned is None

    def align(self, align: Callable[..., Any], dataset: Any, attributes: Any, *args: Any) -> Any:
        """Convert raw rows to LLaMA-Factory's format, and store the raw rows.

        Raises:
            ConfigError: if a wanted column does not exist.
        """
        name = self.names[len(self._raws)]
        # LLaMA-Factory reports an empty data set itself.
        for column, wanted in self.columns.items() if len(dataset) else ():
            check_column(dataset, column, wanted.key, name)
        self._raws.append(dataset)
        self._attributes.append(attributes)
        self._drawn.append(attributes.num_samples is not None)
        return align(dataset, attributes, *args)

    def split(self, split: Callable[..., Any], aligned: Any, evaluation: Any, args: Any, seed: int) -> Any:
        """Split validation rows off, and record the positions of the training rows."""
        self._aligned = aligned
        result = split(aligned, evaluation, args, seed)
        training = result[0].get("train")
        if isinstance(training, tuple):  # divided by a column; the rows are sorted by value
            self._positions = training[1]
        elif training is not None and args.val_size > SPLIT_OFF:
            self._positions = _split_again(split, len(aligned), args, seed)
        return result

    def preprocess(
        self, preprocess: Callable[..., Any], rows: Any, data_args: Any, *args: Any, is_eval: bool = False
    ) -> Any:
        """Preprocess rows.

        With packing, record the rows of each sample if they are wanted or the data set is divided.
        """
        if is_eval or rows is None or not data_args.packing:
            return preprocess(rows, data_args, *args, is_eval=is_eval)
        if isinstance(rows, tuple) or not self._notes_packs:
            samples = preprocess(rows, data_args, *args, is_eval=is_eval)
        else:
            sizes = shards(len(rows), data_args.preprocessing_num_workers)
            samples = without_groups(in_batches(preprocess, rows, sizes, data_args, *args, is_eval=is_eval))
        samples, self._packs = take_packs(samples)
        return samples

    def settle(self, samples: int, is_packed: bool, stage: Stage) -> None:
        """Remove the positions of rows that gave no sample, and decide whether the rows of the samples are known.

        Args:
            samples: number of samples.
            is_packed: whether rows are packed into samples.
            stage: the training stage.
        """
        if self.is_stored:
            return
        if is_packed:
            self._is_known = self._packs is not None and self._packs.sizes.size == samples
            return
        handed = len(self._aligned) if self._positions is None else self._positions.size
        if handed != samples:
            made = _gives_a_sample(self._aligned, stage)
            positions = self._all
            self._positions, self._left_out = positions[made[positions]], positions[~made[positions]]
        self._is_known = samples == (handed if self._positions is None else self._positions.size)

    def notes(self, stage: Stage, why: Callable[[str, int], str | None]) -> Iterator[str]:
        """Yield notes for the user about rows that gave no sample, and about responses without text.

        Args:
            stage: the training stage.
            why: returns why a row gives no sample, from the name of its data set and its number; None if unknown.
        """
        if self.is_stored or not self._is_known:
            return
        named = ", ".join(map(repr, self.names))
        if self._left_out.size:
            first, count = int(self._left_out.min()), self._left_out.size
            reason, one = self._of_row(first, why), count == 1
            yield (
                f"{count:,} of {self._all.size + count:,} rows of {named} {'gives' if one else 'give'} no sample"
                f"{'' if one else '; the first'}, {self.place_of(first)}{'.' if reason is None else f': {reason}'}"
            )
        empty = (
            np.intersect1d(_without_text(self._aligned, stage), self._all) if stage.loss_per_sample else self._all[:0]
        )
        if empty.size:
            one = empty.size == 1
            yield (
                f"{empty.size:,} of {self._all.size:,} rows of {named} {'has' if one else 'have'} a response without "
                f"text{'' if one else '; the first'}, {self.place_of(int(empty[0]))}."
                + ("" if stage.takes_pairs else " LLaMA-Factory takes such a response for an undesired one.")
            )

    @property
    def _all(self) -> IndexArray:
        """Positions of the raw rows of all samples, or of all rows that are packed."""
        return np.arange(len(self._aligned)) if self._positions is None else self._positions

    def rows(self, sizes: Mapping[str, int]) -> dict[str, Rows]:
        """Return the rows of the samples by domain.

        The result is empty if the rows are not known, or if samples are packed. It requires a single data set.

        Args:
            sizes: number of samples of each domain, in the order of the samples.
        """
        if not self._is_known or self._packs is not None:
            return {}
        (name,), (raw,), numbers = self.names, self._raws, None
        if self._drawn[0]:
            # The datasets library stores a selection of consecutive rows as a slice without its start.
            if raw._indices is None:
                return {}
            numbers = raw._indices.column(0).to_numpy().astype(np.int64)
        bounds = np.cumsum([0, *sizes.values()]).tolist()
        return {
            domain: Rows(name, raw, None if self._positions is None else self._positions[low:high], numbers)
            for domain, (low, high) in zip(sizes, pairwise(bounds), strict=True)
        }

    def column(self, column: str) -> ColumnArray:
        """Return the values of a raw column, one per sample. A packed sample has the mean over its tokens.

        Raises:
            ConfigError: if the rows of the samples are not known, text is packed, or a component cannot use a value.
        """
        wanted = self.columns[column]
        key = wanted.key
        self._refuse_unknown(key, f"the column {column!r} cannot be stored with the samples", "Leave the column out.")
        parts = [(name, read_column(raw, column)) for name, raw in zip(self.names, self._raws, strict=True)]
        values = join_columns(parts, column, key)
        positions = np.arange(values.size) if self._positions is None else self._positions
        used = positions if self._packs is None else positions[np.unique(self._packs.rows)]
        refuse_values(wanted, column, values[used], lambda row: self.place_of(int(used[row])))
        values = values[positions]
        if self._packs is None:
            return values
        if values.dtype == object:
            raise ConfigError(f"{key}: {text_is_packed(column)}")
        return self._packs.mean(values.astype(np.float64))

    @property
    def parts(self) -> list[RawPart]:
        """The rows of each data set, in the order of loading."""
        ends = list(accumulate(map(len, self._raws)))
        return [
            RawPart(raw, self._aligned.select(range(end - len(raw), end)), attributes)
            for raw, end, attributes in zip(self._raws, ends, self._attributes, strict=True)
        ]

    def rows_of_samples(self, key: str) -> RowsOfAll:
        """Return the rows of all samples.

        Raises:
            ConfigError: if they are not known. The message names the setting ``key``.
        """
        self._refuse_unknown(key, "weights of tokens cannot be read from the data", "Remove it.")
        if self._packs is None:
            return RowsOfAll(self._all, None)
        return RowsOfAll(self._all[self._packs.rows], self._packs.sizes)

    def _refuse_unknown(self, key: str, what: str, remedy: str) -> None:
        """Raise an error if the rows of the samples are not known."""
        if not self._is_known:
            raise ConfigError(
                f"{key}: {what}, because it is not known from which rows LLaMA-Factory made the samples of "
                f"{', '.join(map(repr, self.names))}. {remedy}"
            )

    def place_of(self, position: int) -> str:
        """Return the file and line of a raw row, from its position among the rows of all data sets."""
        found = self._of_row(position, self._place)
        return f"a row of {self._dataset_of(position)[0]!r}" if found is None else found

    def _dataset_of(self, position: int) -> tuple[str, Any, bool, int]:
        """Return the data set of a row: its name, its raw rows, whether they were drawn, and the row among them."""
        for name, raw, is_drawn in zip(self.names, self._raws, self._drawn, strict=True):
            if position < len(raw):
                return name, raw, is_drawn, position
            position -= len(raw)
        raise IndexError(position)

    def _of_row(self, position: int, read: Callable[[str, int], str | None]) -> str | None:
        """Return what a function says of a row, from the name of its data set and its number; None if unknown."""
        name, raw, is_drawn, row = self._dataset_of(position)
        indices = raw._indices
        if indices is None and is_drawn:  # the drawn rows are a slice without its start
            return None
        return read(name, row if indices is None else int(indices.column(0)[row].as_py()))


def without_groups(samples: Any) -> Any:
    """Return samples without the number of their group."""
    return samples.remove_columns(DOMAIN) if DOMAIN in samples.column_names else samples


def _split_again(split: Callable[..., Any], size: int, args: Any, seed: int) -> IndexArray:
    """Return the positions of the rows that a split keeps for training.

    They depend on the number of rows and the seed alone.
    """
    from datasets import Dataset

    training = split(Dataset.from_dict({"row": np.arange(size)}), None, args, seed)[0]["train"]
    return training.with_format("arrow")[:].column("row").to_numpy()


def _gives_a_sample(aligned: Any, stage: Stage) -> Any:
    """Return a mask of the rows that LLaMA-Factory's processor does not drop as invalid, (n,).

    The supervised processor needs one response, and those of pairs and of feedback need two. The second response of
    feedback is empty.
    """
    import pyarrow.compute as pc

    table = aligned.select_columns(["_prompt", "_response"]).with_format("arrow")[:]
    turns, answers = (pc.list_value_length(table.column(name)).to_numpy() for name in ("_prompt", "_response"))
    return (turns % 2 == 1) & ((answers >= 2) if stage.loss_per_sample else (answers == 1))


def _without_text(aligned: Any, stage: Stage) -> IndexArray:
    """Return the positions of the rows whose response, or one of whose two responses, has no text."""
    import pyarrow.compute as pc

    usual = 0 if stage.takes_pairs else 1  # the second response of feedback never has a text
    parts, begin = [np.zeros(0, dtype=np.int64)], 0
    for table in aligned.select_columns(["_response"]).with_format("arrow").iter(batch_size=_SCAN_ROWS):
        responses = table.column(0).combine_chunks()
        sizes = pc.list_value_length(responses).to_numpy()
        has_text = pc.greater(pc.utf8_length(responses.flatten().field("content")), 0).fill_null(False)
        empty = ~has_text.to_numpy(zero_copy_only=False)
        counts = np.bincount(np.repeat(np.arange(sizes.size), sizes), empty, sizes.size)
        parts.append(begin + np.flatnonzero((sizes >= 2) & (counts > usual)))
        begin += len(table)
    return np.concatenate(parts)
