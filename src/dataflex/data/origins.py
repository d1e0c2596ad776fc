"""Which raw row each sample was made from, noted while LLaMA-Factory loads a data set.

What becomes of a row between the file and the pool: ``num_samples`` draws some, ``max_samples`` keeps the first,
``val_size`` splits some off and shuffles the rest, a division by a column sorts them, and rows without a prompt or a
response are dropped. Each of these is noted, or made again from what it depends on; nothing is read or tokenized twice.
Packed samples are made of many rows, and those of a stored ``tokenized_path`` have none any more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from dataflex.data.pool import Rows
from dataflex.data.sampling import IndexArray

SPLIT_OFF = 1e-6
"""Above it LLaMA-Factory splits ``val_size`` off."""


class Origin:
    """The rows of one training data set; :meth:`align` and :meth:`split` stand around LLaMA-Factory's functions."""

    def __init__(self) -> None:
        self._raw: Any = None
        """The rows as they were read."""
        self._aligned: Any = None
        """The same rows in LLaMA-Factory's form."""
        self._is_drawn = False
        """Whether ``num_samples`` drew them."""
        self._numbers: IndexArray | None = None
        """The number of each raw row in the data set, where they were drawn."""
        self._positions: IndexArray | None = None
        """Raw row of each sample; None: the same."""

    def align(self, align: Callable[..., Any], dataset: Any, attributes: Any, *args: Any) -> Any:
        """Bring raw rows into LLaMA-Factory's form."""
        self._raw, self._is_drawn = dataset, attributes.num_samples is not None
        self._aligned = align(dataset, attributes, *args)
        return self._aligned

    def split(self, split: Callable[..., Any], aligned: Any, evaluation: Any, args: Any, seed: int) -> Any:
        """Split validation rows off, if any are to be."""
        result = split(aligned, evaluation, args, seed)
        training = result[0].get("train")
        if isinstance(training, tuple):  # divided by a column: the rows of each value together
            self._positions = training[1]
        elif training is not None and args.val_size > SPLIT_OFF:
            self._positions = _split_again(split, len(aligned), args, seed)
        return result

    def settle(self, samples: int) -> bool:
        """Leave out rows that gave no sample, and return whether it is known which row each of the samples was."""
        if self._aligned is None:  # stored tokenized
            return False
        if self._is_drawn:
            if self._raw._indices is None:  # the draw happens to be a stretch of the file; nobody says which
                return False
            self._numbers = self._raw._indices.column(0).to_numpy().astype(np.int64)
        handed = len(self._aligned) if self._positions is None else self._positions.size
        if handed != samples:
            made = _gives_a_sample(self._aligned)
            self._positions = (
                np.flatnonzero(made) if self._positions is None else self._positions[made[self._positions]]
            )
        return samples == (handed if self._positions is None else self._positions.size)

    def rows(self, dataset: str, sizes: Mapping[str, int]) -> dict[str, Rows]:
        """Return the rows of each domain that the samples are divided into.

        Args:
            dataset: name of the data set.
            sizes: samples of each domain, in their order.
        """
        bounds = np.cumsum([0, *sizes.values()]).tolist()
        return {
            domain: Rows(
                dataset, self._raw, None if self._positions is None else self._positions[low:high], self._numbers
            )
            for domain, (low, high) in zip(sizes, pairwise(bounds), strict=True)
        }


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
