"""Which raw rows each sample was made from, noted while LLaMA-Factory loads training data.

What becomes of a row between the file and the pool: ``num_samples`` draws some, ``max_samples`` keeps the first,
``val_size`` splits some off and shuffles the rest, a division by a column sorts them, rows without a prompt or a
response are dropped, and packing puts several into one sample. Each of these is noted, or made again from what it
depends on; nothing is read or tokenized twice. Those of a stored ``tokenized_path`` have no rows any more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
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
from dataflex.errors import ConfigError
from dataflex.integrations.llamafactory.batches import DOMAIN, in_batches, shards, take_packs

SPLIT_OFF = 1e-6
"""Above it LLaMA-Factory splits ``val_size`` off."""


class Origin:
    """The rows of one load of training data; three methods stand around LLaMA-Factory's functions of their names.

    Args:
        names: the data sets, in the order they are loaded.
        columns: the raw columns that are wanted, by name.
        place: says where a row of a data set is, by its name and number.
    """

    def __init__(
        self, names: Sequence[str], columns: Mapping[str, WantedColumn], place: Callable[[str, int], str]
    ) -> None:
        self.names, self.columns, self._place = names, columns, place
        self._raws: list[Any] = []
        """The rows of each data set as they were read."""
        self._aligned: Any = None
        """The same rows in LLaMA-Factory's form, one data set after another."""
        self._drawn: list[bool] = []
        """Whether ``num_samples`` drew those of each data set."""
        self._positions: IndexArray | None = None
        """Raw row of each sample, or of each row that is packed; None: the same."""
        self._packs: Packs | None = None
        """Which of these rows each packed sample is made of."""
        self._is_known = False

    @property
    def is_stored(self) -> bool:
        """Whether the data was there tokenized, without rows."""
        return self._aligned is None

    def align(self, align: Callable[..., Any], dataset: Any, attributes: Any, *args: Any) -> Any:
        """Bring raw rows into LLaMA-Factory's form.

        Raises:
            ConfigError: if a column that is wanted is not there.
        """
        name = self.names[len(self._raws)]
        for column, wanted in self.columns.items() if len(dataset) else ():  # if it is empty, it says so itself
            check_column(dataset, column, wanted.key, name)
        self._raws.append(dataset)
        self._drawn.append(attributes.num_samples is not None)
        return align(dataset, attributes, *args)

    def split(self, split: Callable[..., Any], aligned: Any, evaluation: Any, args: Any, seed: int) -> Any:
        """Split validation rows off, if any are to be."""
        self._aligned = aligned
        result = split(aligned, evaluation, args, seed)
        training = result[0].get("train")
        if isinstance(training, tuple):  # divided by a column: the rows of each value together
            self._positions = training[1]
        elif training is not None and args.val_size > SPLIT_OFF:
            self._positions = _split_again(split, len(aligned), args, seed)
        return result

    def preprocess(
        self, preprocess: Callable[..., Any], rows: Any, data_args: Any, *args: Any, is_eval: bool = False
    ) -> Any:
        """Make samples of rows, and keep which rows each is packed of: if columns are wanted, or in a division."""
        if is_eval or rows is None or not data_args.packing:
            return preprocess(rows, data_args, *args, is_eval=is_eval)
        if isinstance(rows, tuple) or not self.columns:
            samples = preprocess(rows, data_args, *args, is_eval=is_eval)
        else:
            sizes = shards(len(rows), data_args.preprocessing_num_workers)
            samples = without_groups(in_batches(preprocess, rows, sizes, data_args, *args, is_eval=is_eval))
        samples, self._packs = take_packs(samples)
        return samples

    def settle(self, samples: int, is_packed: bool) -> None:
        """Leave out rows that gave no sample; afterwards it is known which rows each of the samples was, or not."""
        if self.is_stored:
            return
        if is_packed:
            self._is_known = self._packs is not None and self._packs.sizes.size == samples
            return
        handed = len(self._aligned) if self._positions is None else self._positions.size
        if handed != samples:
            made = _gives_a_sample(self._aligned)
            self._positions = (
                np.flatnonzero(made) if self._positions is None else self._positions[made[self._positions]]
            )
        self._is_known = samples == (handed if self._positions is None else self._positions.size)

    def rows(self, sizes: Mapping[str, int]) -> dict[str, Rows]:
        """Return the row of each sample by domain; of one data set, if it is known, and one row is one sample.

        Args:
            sizes: samples of each domain that the samples are divided into, in their order.
        """
        if not self._is_known or self._packs is not None:
            return {}
        (name,), (raw,), numbers = self.names, self._raws, None
        if self._drawn[0]:
            if raw._indices is None:  # the draw happens to be a stretch of the file; nobody says which
                return {}
            numbers = raw._indices.column(0).to_numpy().astype(np.int64)
        bounds = np.cumsum([0, *sizes.values()]).tolist()
        return {
            domain: Rows(name, raw, None if self._positions is None else self._positions[low:high], numbers)
            for domain, (low, high) in zip(sizes, pairwise(bounds), strict=True)
        }

    def column(self, column: str) -> ColumnArray:
        """Return the values of a raw column, one for each sample: of a packed one the mean over its tokens.

        Raises:
            ConfigError: if rows cannot be followed to samples, text is packed, or a component cannot use a value.
        """
        wanted = self.columns[column]
        key = wanted.key
        if not self._is_known:
            raise ConfigError(
                f"{key}: {column!r} cannot be kept, because it is not known which rows LLaMA-Factory made the samples "
                f"of {', '.join(map(repr, self.names))} from."
            )
        parts = [(name, read_column(raw, column)) for name, raw in zip(self.names, self._raws, strict=True)]
        values = join_columns(parts, column, key)
        positions = np.arange(values.size) if self._positions is None else self._positions
        used = positions if self._packs is None else positions[np.unique(self._packs.rows)]
        refuse_values(wanted, column, values[used], lambda row: self._place_of(int(used[row])))
        values = values[positions]
        if self._packs is None:
            return values
        if values.dtype == object:
            raise ConfigError(f"{key}: {text_is_packed(column)}")
        return self._packs.mean(values.astype(np.float64))

    def _place_of(self, position: int) -> str:
        """Return where a raw row is, by its position among those of all data sets."""
        for name, raw, is_drawn in zip(self.names, self._raws, self._drawn, strict=True):
            if position < len(raw):
                indices = raw._indices
                if indices is None and is_drawn:  # nobody says which rows were drawn
                    return f"a row of {name!r}"
                return self._place(name, position if indices is None else int(indices.column(0)[position].as_py()))
            position -= len(raw)
        raise IndexError(position)


def without_groups(samples: Any) -> Any:
    """Return samples without the number of their group."""
    return samples.remove_columns(DOMAIN) if DOMAIN in samples.column_names else samples


def _split_again(split: Callable[..., Any], size: int, args: Any, seed: int) -> IndexArray:
    """Return the rows that a split keeps for training; it depends on nothing but their number and the seed."""
    from datasets import Dataset

    training = split(Dataset.from_dict({"row": np.arange(size)}), None, args, seed)[0]["train"]
    return training.with_format("arrow")[:].column("row").to_numpy()


def _gives_a_sample(aligned: Any) -> Any:
    """Return which rows LLaMA-Factory's supervised processor does not drop as invalid, (n,)."""
    import pyarrow.compute as pc

    table = aligned.select_columns(["_prompt", "_response"]).with_format("arrow")[:]
    turns, answers = (pc.list_value_length(table.column(name)).to_numpy() for name in ("_prompt", "_response"))
    return (turns % 2 == 1) & (answers == 1)
