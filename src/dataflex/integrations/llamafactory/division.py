"""Division of one data set by a raw column, so that each value is treated like a separate data set.

While such a data set is loaded, four names of ``llamafactory.data.loader`` are replaced.
- ``align_dataset``: the last function that sees the raw columns. The value of each row is stored there.
- ``split_dataset``: splits the rows of each value separately.
- ``_get_preprocessed_dataset``: gets batches of one value each.
- ``_get_dataset_processor``: returns the processor for these batches.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataflex.data.columns import column_of, values_of
from dataflex.data.pool import DomainSamples
from dataflex.errors import ConfigError
from dataflex.integrations.llamafactory.batches import DOMAIN, in_batches
from dataflex.integrations.llamafactory.parsing import replaced


class _Division:
    """A raw column while a data set is loaded. The methods wrap LLaMA-Factory's functions.

    Args:
        column: name of the raw column.
        key: setting that names the column, for messages.
        name: name of the data set, for messages.
    """

    def __init__(self, column: str, key: str, name: str) -> None:
        self.column, self.key, self.name = column, key, name
        self.values: list[str] = []
        """The distinct values, sorted."""
        self.codes: NDArray[np.int64] = np.zeros(0, np.int64)
        """The index in :attr:`values` of each row's value."""

    def align(self, align: Callable[..., Any], dataset: Any, *args: Any) -> Any:
        """Convert raw rows to LLaMA-Factory's format, and store their values."""
        if len(dataset):  # LLaMA-Factory reports an empty data set itself
            self.values, self.codes = values_of(dataset, self.column, self.key, self.name)
        return align(dataset, *args)

    def split(self, split: Callable[..., Any], aligned: Any, evaluation: Any, data_args: Any, seed: int) -> Any:
        """Split validation rows off the rows of each value.

        Returns:
            The training and the validation part. Each is a tuple of all aligned rows, the positions of the part's rows
            sorted by value, and the number of rows of each value.
        """
        from datasets import Dataset

        order = np.argsort(self.codes, kind="stable")
        bounds = np.concatenate([[0], np.cumsum(np.bincount(self.codes, minlength=len(self.values)))])
        if not data_args.val_size:
            return {"train": (aligned, order, np.diff(bounds))}, {}
        kept: dict[str, list[NDArray[np.int64]]] = {"train": [], "validation": []}
        # Keyed by the number of rows: for one seed the split depends on nothing else.
        positions: dict[int, dict[str, NDArray[np.int64]]] = {}
        for value, (low, high) in zip(self.values, pairwise(bounds.tolist()), strict=True):
            if high - low not in positions:
                numbers = Dataset.from_dict({"row": np.arange(high - low)})
                try:
                    training, held_out = split(numbers, evaluation, data_args, seed)
                except ValueError as error:
                    what = f"the {high - low} rows of {self.name!r} with {self.column!r} {value!r}"
                    raise ConfigError(f"val_size: {what} cannot be split: {error}") from error
                found = {**training, **held_out}
                positions[high - low] = {which: column_of(part, "row").to_numpy() for which, part in found.items()}
            for which, rows in kept.items():
                rows.append(order[low:high][positions[high - low][which]])
        divided = {
            which: (aligned, np.concatenate(rows), np.array([part.size for part in rows]))
            for which, rows in kept.items()
        }
        return {"train": divided.pop("train")}, divided

    def preprocess(
        self,
        preprocess: Callable[..., Any],
        divided: tuple[Any, NDArray[np.int64], NDArray[np.int64]],
        *args: Any,
        **named: Any,
    ) -> Any:
        """Preprocess rows in batches of one value each."""
        aligned, rows, sizes = divided
        return in_batches(preprocess, aligned.select(rows), sizes.tolist(), *args, **named)


def load_divided(
    load: Callable[..., dict[str, Any]], data_args: Any, key: str, column: str, column_key: str, prefix: str
) -> dict[str, DomainSamples]:
    """Load a data set with each value of a raw column treated like a separate data set, and return its divided parts.

    The rows of each value are split (``val_size``), packed and cut into batches separately, in one pass over the data.

    Args:
        load: loads data with LLaMA-Factory.
        data_args: LLaMA-Factory's data arguments, which name the one data set.
        key: setting that names the data set, for messages.
        column: name of the raw column.
        column_key: setting that names the column, for messages.
        prefix: prefix of the domain names, before the value.
    """
    from llamafactory.data import loader

    division = _Division(column, column_key, data_args.dataset[0])
    with (
        replaced(loader, "align_dataset", partial(division.align, loader.align_dataset)),
        replaced(loader, "split_dataset", partial(division.split, loader.split_dataset)),
        replaced(loader, "_get_preprocessed_dataset", partial(division.preprocess, loader._get_preprocessed_dataset)),
    ):
        module = load(data_args, key)
    names = [prefix + value for value in division.values]
    return {which: _divided(dataset, names) for which, dataset in module.items()}


def _divided(dataset: Any, names: list[str]) -> DomainSamples:
    """Return a preprocessed data set without the numbers of the values, and the number of samples of each value."""
    if DOMAIN not in dataset.column_names:  # no batch produced a sample
        return DomainSamples(dataset, dict.fromkeys(names, 0))
    sizes = np.bincount(column_of(dataset, DOMAIN).to_numpy(), minlength=len(names))
    return DomainSamples(dataset.remove_columns(DOMAIN), dict(zip(names, sizes.tolist(), strict=True)))
