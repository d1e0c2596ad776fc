"""Batches of samples for a probe; the batches do not depend on the number of processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dataflex.data.sampling import IndexArray
from dataflex.data.token_loss import IGNORE_INDEX, shifted


class Batches(Sequence[IndexArray]):
    """Sequence of batches of sample positions, each cut when it is read.

    The number of batches may be as large as the number of samples, so only the stretches of equal batch size are
    stored.

    Args:
        order: positions of the samples, batch after batch, (n,).
        begins: index in ``order`` at which each stretch begins, ascending. A stretch is a run of batches of one size.
        sizes: samples per batch of each stretch. The last batch of all may have fewer.
        ends: number of batches up to the end of each stretch.
        numbers: numbers of the batches in this sequence. A number of ``ends[-1]`` or more stands for the first batch.
    """

    def __init__(
        self,
        order: IndexArray,
        begins: NDArray[np.int64],
        sizes: NDArray[np.int64],
        ends: NDArray[np.int64],
        numbers: range,
    ) -> None:
        self.order, self._begins, self._sizes, self._ends, self._numbers = order, begins, sizes, ends, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, place: int) -> IndexArray: ...

    @overload
    def __getitem__(self, place: slice) -> Batches: ...

    def __getitem__(self, place: int | slice) -> IndexArray | Batches:
        if isinstance(place, slice):
            return Batches(self.order, self._begins, self._sizes, self._ends, self._numbers[place])
        number = self._numbers[place]
        if number >= self._ends[-1]:
            number = 0
        stretch = int(np.searchsorted(self._ends, number, side="right"))
        before = int(self._ends[stretch - 1]) if stretch else 0
        size = int(self._sizes[stretch])
        begin = int(self._begins[stretch]) + (number - before) * size
        return self.order[begin : begin + size]

    def share(self, rank: int, world_size: int) -> tuple[Batches, int]:
        """Return the batches of one process and how many of them count; all processes get the same number of batches.

        Batches of neighbouring lengths are dealt out in turn, which balances the tokens of the processes. If the
        batches do not divide evenly, the first batch is repeated at the end. The repeated batches do not count. Call
        this method on the whole sequence, not on a slice of it.
        """
        count = len(self)
        most = -(-count // world_size)
        numbers = range(rank, most * world_size, world_size)
        mine = Batches(self.order, self._begins, self._sizes, self._ends, numbers)
        return mine, len(range(rank, count, world_size))


def length_batches(lengths: np.ndarray, batch_tokens: int) -> Batches:
    """Return positions in batches of samples of similar length, longest first.

    A batch has at most ``batch_tokens`` tokens, padding included. A sample that is longer forms a batch alone. The
    batches depend on nothing but the arguments.
    """
    keys = lengths.max(initial=0) - lengths
    if keys.max(initial=0) < 1 << 16:
        keys = keys.astype(np.uint16)  # numpy sorts 16-bit integers by radix sort, in linear time
    order = np.argsort(keys, kind="stable")
    descending = lengths[order]
    # For each length, the index after its last sample.
    ends = np.append(np.flatnonzero(descending[1:] != descending[:-1]) + 1, order.size)
    begins, sizes, counts, begin = [], [], [], 0
    for end in ends.tolist():
        if begin < end:  # otherwise the last batch of a greater length holds all samples of this length
            size = max(1, batch_tokens // max(1, int(descending[begin])))
            count = -(-(end - begin) // size)
            begins.append(begin)
            sizes.append(size)
            counts.append(count)
            begin += count * size
    begin_of, size_of, end_of = (np.array(values, dtype=np.int64) for values in (begins, sizes, np.cumsum(counts)))
    return Batches(order, begin_of, size_of, end_of, range(sum(counts)))


def inputs_of(batch: Mapping[str, Any], device: torch.device) -> tuple[dict[str, Any], Tensor]:
    """Return the model inputs of a collated batch on the device, and the shifted labels, (B, T).

    If the batch has no labels, all labels are the ignored index.
    """
    inputs = {key: on_device(value, device) for key, value in batch.items()}
    labels = inputs.pop("labels", None)
    if labels is None:
        return inputs, torch.full_like(inputs["input_ids"], IGNORE_INDEX)
    return inputs, shifted(labels)


def on_device(value: Any, device: torch.device) -> Any:
    """Return a tensor on the device, and any other value unchanged.

    A copy to a GPU starts from pinned memory and is queued behind the GPU's work. From pageable memory the process
    would wait until the GPU is idle.
    """
    if not isinstance(value, Tensor):
        return value
    if device.type == "cuda" and value.device.type == "cpu":
        return value.pin_memory().to(device, non_blocking=True)
    return value.to(device)
