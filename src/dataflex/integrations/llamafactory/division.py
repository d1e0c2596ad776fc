"""One data set divided by a column of its raw data: each value is what a data set of its own would be.

While such a data set is loaded, four names of ``llamafactory.data.loader`` are replaced: the raw columns are still
there when ``align_dataset`` is called, ``split_dataset`` is then done for each value, ``_get_preprocessed_dataset``
gets batches of one value each, and ``_get_dataset_processor`` what processes them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataflex.data.columns import column_of
from dataflex.data.pool import DomainSamples
from dataflex.errors import ConfigError, unknown
from dataflex.integrations.llamafactory.batches import DOMAIN, in_batches
from dataflex.integrations.llamafactory.parsing import replaced


class _Division:
    """A raw column while a data set is loaded; its methods stand around LLaMA-Factory's functions of those names.

    Args:
        column: of the raw data.
        key: the setting that names it, for messages.
        name: of the data set, for messages.
    """

    def __init__(self, column: str, key: str, name: str) -> None:
        self.column, self.key, self.name = column, key, name
        self.values: list[str] = []
        """The distinct values in their order."""
        self.codes: NDArray[np.int64] = np.zeros(0, np.int64)
        """Which of them each row has."""

    def align(self, align: Callable[..., Any], dataset: Any, *args: Any) -> Any:
        """Bring raw rows into LLaMA-Factory's form, noting their values."""
        if len(dataset):  # else it says so itself
            self.values, self.codes = values_of(dataset, self.column, self.key, self.name)
        return align(dataset, *args)

    def split(self, split: Callable[..., Any], aligned: Any, evaluation: Any, data_args: Any, seed: int) -> Any:
        """Split validation rows off the rows of each value: the rows, where they are, and how many have each value."""
        from datasets import Dataset

        order = np.argsort(self.codes, kind="stable")
        bounds = np.concatenate([[0], np.cumsum(np.bincount(self.codes, minlength=len(self.values)))])
        if not data_args.val_size:
            return {"train": (aligned, order, np.diff(bounds))}, {}
        kept: dict[str, list[NDArray[np.int64]]] = {"train": [], "validation": []}
        positions: dict[int, dict[str, NDArray[np.int64]]] = {}  # depend on nothing but the number of rows
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
        """Make samples of rows, in batches of one value each."""
        aligned, rows, sizes = divided
        return in_batches(preprocess, aligned.select(rows), sizes.tolist(), *args, **named)


def load_divided(
    load: Callable[..., dict[str, Any]], data_args: Any, key: str, column: str, column_key: str, prefix: str
) -> dict[str, DomainSamples]:
    """Load a data set, each value of a raw column treated as a data set of its own; return its module, divided.

    Values are split (``val_size``), packed and cut into batches each for itself, in one pass over the data.

    Args:
        load: LLaMA-Factory's loading.
        data_args: its arguments, which name the one data set.
        key: the setting that names it, for messages.
        column: of the raw data.
        column_key: the setting that names it, for messages.
        prefix: what the names of the domains begin with, before the value.
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


def values_of(dataset: Any, column: str, key: str, name: str) -> tuple[list[str], NDArray[np.int64]]:
    """Return the distinct values of a raw column in their order, as text, and which of them each row has.

    Numbers are in the order of numbers, text in that of its characters' codes.

    Args:
        dataset: the raw rows.
        column: its column.
        key: the setting that names it, for messages.
        name: of the data set, for messages.

    Raises:
        ConfigError: if there is no such column, a row has no value in it, or values are neither text nor numbers.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if column not in dataset.column_names:
        raise ConfigError(f"{key}: {unknown('column', column, dataset.column_names)} (of {name!r})")
    found = column_of(dataset, column)
    kind = found.type
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    if not (text or pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        raise ConfigError(f"{key}: {column!r} of {name!r} holds {kind}; needed are text, numbers or true and false.")
    missing = pc.is_null(found, nan_is_null=True)
    if text:
        missing = pc.or_kleene(missing, pc.equal(pc.utf8_trim_whitespace(found), "").fill_null(True))
    rows = np.flatnonzero(missing.to_numpy(zero_copy_only=False))
    if rows.size:
        some = ", ".join(map(str, rows[:10])) + (", ..." if rows.size > 10 else "")
        raise ConfigError(
            f"{key}: {rows.size} of {len(found)} rows of {name!r} have no value in {column!r} (rows {some}, counted "
            "from 0). Give each one, or leave them out."
        )
    coded = pc.dictionary_encode(found)
    distinct = coded.dictionary.to_pylist()
    order = sorted(range(len(distinct)), key=distinct.__getitem__)
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    return [str(distinct[number]) for number in order], rank[coded.indices.to_numpy(zero_copy_only=False)]


def _divided(dataset: Any, names: list[str]) -> DomainSamples:
    """Return a preprocessed data set without the numbers of the values, and how many samples each has."""
    if DOMAIN not in dataset.column_names:  # no batch gave a sample
        return DomainSamples(dataset, dict.fromkeys(names, 0))
    sizes = np.bincount(column_of(dataset, DOMAIN).to_numpy(), minlength=len(names))
    return DomainSamples(dataset.remove_columns(DOMAIN), dict(zip(names, sizes.tolist(), strict=True)))
