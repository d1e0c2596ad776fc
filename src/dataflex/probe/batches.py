"""Batches of samples for a probe: the same ones on any number of processes."""

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
    """Batches of positions, cut when they are asked for: there may be as many as samples.

    Args:
        order: the positions, batch after batch, (n,).
        begins: where in ``order`` each stretch of batches of one size begins, ascending.
        sizes: of the batches of each stretch; the last batch of all may have fewer positions.
        ends: how many batches there are up to the end of each stretch.
        numbers: the batches meant; one from the last of ``ends`` on is the first batch again.
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
        """Return the batches of one process and how many of them count; all processes get the same number.

        Batches of neighbouring lengths are dealt out in turn, which balances tokens. Behind those that count, the first
        batch is repeated. Taken of all batches, not of a part of them.
        """
        count = len(self)
        most = -(-count // world_size)
        numbers = range(rank, most * world_size, world_size)
        mine = Batches(self.order, self._begins, self._sizes, self._ends, numbers)
        return mine, len(range(rank, count, world_size))


def length_batches(lengths: np.ndarray, batch_tokens: int) -> Batches:
    """Return positions in batches of similar length, longest first, each at most ``batch_tokens`` with padding.

    A sample longer than the budget is a batch of its own. The batches depend on nothing but the arguments.
    """
    keys = lengths.max(initial=0) - lengths
    if keys.max(initial=0) < 1 << 16:
        keys = keys.astype(np.uint16)  # which numpy sorts in time linear in their number
    order = np.argsort(keys, kind="stable")
    descending = lengths[order]
    ends = np.append(np.flatnonzero(descending[1:] != descending[:-1]) + 1, order.size)  # of the samples of one length
    begins, sizes, counts, begin = [], [], [], 0
    for end in ends.tolist():
        if begin < end:  # else the last batch of a greater length has all of this one
            size = max(1, batch_tokens // max(1, int(descending[begin])))
            count = -(-(end - begin) // size)
            begins.append(begin)
            sizes.append(size)
            counts.append(count)
            begin += count * size
    begin_of, size_of, end_of = (np.array(values, dtype=np.int64) for values in (begins, sizes, np.cumsum(counts)))
    return Batches(order, begin_of, size_of, end_of, range(sum(counts)))


def inputs_of(batch: Mapping[str, Any], device: torch.device) -> tuple[dict[str, Any], Tensor]:
    """Return the model inputs of a collated batch on the device, and its shifted labels (B, T).

    Without labels all of them are ignored.
    """
    inputs = {key: on_device(value, device) for key, value in batch.items()}
    labels = inputs.pop("labels", None)
    if labels is None:
        return inputs, torch.full_like(inputs["input_ids"], IGNORE_INDEX)
    return inputs, shifted(labels)


def on_device(value: Any, device: torch.device) -> Any:
    """Return a value on the device if it is a tensor.

    A copy to a GPU is made from pinned memory, behind what the GPU has to do: from any other memory the process would
    wait until the GPU is idle.
    """
    if not isinstance(value, Tensor):
        return value
    if device.type == "cuda" and value.device.type == "cpu":
        return value.pin_memory().to(device, non_blocking=True)
    return value.to(device)
