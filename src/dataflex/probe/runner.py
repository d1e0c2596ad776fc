"""The batch runner of all measurements.

Batches are sorted by length and cut under a token budget, independently of the number of processes. Each process runs
its share of the batches. All processes run the same number of batches (the values of a repeated batch are discarded),
because under ZeRO-3 and FSDP a forward is collective. A batch that does not fit into memory is halved (see
``memory.py``), except if a forward is collective, because the other processes wait inside their forward.

An error of one process is raised by all processes before the values are gathered. Under ZeRO-3 and FSDP a process that
has found unusable values first runs its remaining batches. A process that fails inside a forward cannot do so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from dataflex import distributed
from dataflex.api.measurement import UNREGISTERED, MeasuredBatch, Measurement, is_registered, quantity_of
from dataflex.api.source import place_of
from dataflex.data.rules import ScoreArray
from dataflex.data.samples import RowList, Samples
from dataflex.data.sampling import IndexArray
from dataflex.data.token_loss import IGNORE_INDEX
from dataflex.errors import ComponentError, DataFlexError, DivergenceError
from dataflex.probe.batches import Batches, inputs_of, length_batches, on_device
from dataflex.probe.head import Statistic, chunked_forward, chunked_values, full_forward, full_values
from dataflex.probe.hidden_states import hidden_states
from dataflex.probe.particulars import look_at_head
from dataflex.probe.routing import real_tokens

if TYPE_CHECKING:
    from dataflex.probe.gradients import GradientPass
    from dataflex.probe.model import ModelProbe
    from dataflex.probe.stage_loss import StageLosses

_SUMMED_ROWS = 65536
"""Number of rows of values that are summed over the processes at a time."""
_DEVICE_VALUES = 1 << 24
"""Most values of all samples that stay on the device until the end; more values are stored in the CPU's memory."""


Part = tuple[Samples, IndexArray]
"""Some samples of a batch: a pool or list of rows, and indices in it."""


class UnfitValues(ComponentError):
    """Raised if a measurement returns values of the wrong kind or shape, after the batch's forward passes."""


class Batch:
    """One batch on the device; see :class:`~dataflex.api.measurement.MeasuredBatch`.

    Tokens and the batch of the stage's loss are collated when they are read, because a measurement reads one of them.
    """

    def __init__(self, runner: Runner, indices: IndexArray) -> None:
        self._runner, self.indices = runner, indices

    @cached_property
    def _tokens(self) -> tuple[dict[str, Any], Tensor]:
        probe = self._runner.probe
        return inputs_of(probe.token_batch(self._runner.samples, self.indices), probe.device)

    @property
    def inputs(self) -> dict[str, Any]:
        """The arguments of the model's forward pass, without labels."""
        return self._tokens[0]

    @property
    def labels(self) -> Tensor:
        """The token to predict at each position, (B, T)."""
        return self._tokens[1]

    @property
    def model(self) -> torch.nn.Module:
        """The model."""
        return self._runner.model

    @cached_property
    def mask(self) -> Tensor:
        """Mask of the positions that are tokens and not padding, (B, T), bool."""
        return real_tokens(self.inputs, self.labels)

    def stage_losses(self) -> StageLosses | None:
        """Return the losses and margins of the samples; None if their tokens have losses."""
        runner = self._runner
        if runner.probe.stage_loss is None:
            return None
        return runner.stage_losses(self._collated(), [(runner.samples, self.indices)])

    def reference_values(self) -> Tensor:
        """Return the values of the frozen reference of the stage's loss, (B, k)."""
        stage_loss = self._runner.probe.stage_loss
        assert stage_loss is not None
        return stage_loss.reference(self.model, self._collated())

    def losses_of(self, gradient_pass: GradientPass) -> Tensor:
        """Return the losses of the samples, (B,), from a pass that gives their gradients to a reducer."""
        runner = self._runner
        if runner.probe.stage_loss is None:
            return gradient_pass.run(self.inputs, self.labels)
        return runner.differentiated(gradient_pass, self._collated(), [(runner.samples, self.indices)])

    def _collated(self) -> dict[str, Any]:
        """Return the training collator's batch on the device, with labels."""
        runner = self._runner
        return runner.on_device(runner.probe.collated(runner.samples, self.indices))

    def token_means(self, value: Statistic) -> Tensor:
        """Return each sample's mean of a function of its trained tokens, (B,); NaN without a trained token."""
        forward = chunked_forward if self._runner.chunked_head else full_forward
        return forward(self.model, self.inputs, self.labels, value)

    def token_values(self, value: Statistic) -> Tensor:
        """Return a function of each trained token, (B, T); 0 elsewhere."""
        forward = chunked_values if self._runner.chunked_head else full_values
        rows, columns, values = forward(self.model, self.inputs, self.labels, value)
        found = torch.zeros(self.labels.shape, dtype=torch.float32, device=values.device)
        found[rows, columns] = values.float()
        return found

    def hidden_states(self, layer: int = -1) -> Tensor:
        """Return the hidden states of one layer, (B, T, H)."""
        return hidden_states(self.model, self.inputs, layer)


class Runner:
    """Runs one measurement over a list of samples.

    Args:
        probe: the probe, with the model.
        measurement: the measurement.
        indices: indices of the samples, (n,).
        samples: the samples that ``indices`` refers to; None means the pool.
    """

    def __init__(
        self,
        probe: ModelProbe,
        measurement: Measurement[Any],
        indices: IndexArray,
        samples: Samples | Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        if not is_registered(measurement):
            raise ComponentError(f"the probe was given {type(measurement).__name__}, {UNREGISTERED}.")
        self.probe, self.measurement = probe, measurement
        self.samples: Samples
        if samples is None:
            self.samples = probe.pool
        else:
            self.samples = RowList(samples, probe.pool.fields) if isinstance(samples, Sequence) else samples
        self.indices = _checked_indices(indices, self.samples.size, measurement.name)
        self.model = probe.model()

    @cached_property
    def chunked_head(self) -> bool:
        """Whether the head may be applied in chunks; the check is collective, in the first batch of all processes."""
        look_at_head(self.probe, self.samples, self.indices)
        return bool(self.probe.chunked_head)

    def on_device(self, collated: Mapping[str, Any]) -> dict[str, Any]:
        """Return a batch of the training collator on the device."""
        return {key: on_device(value, self.probe.device) for key, value in collated.items()}

    def stage_losses(self, batch: dict[str, Any], parts: Sequence[Part]) -> StageLosses:
        """Return the losses of the samples of a batch, in a stage in which a sample has one loss.

        Args:
            batch: batch of the training collator on the device, with labels.
            parts: the samples of the batch.
        """
        stage_loss, kept = self.probe.stage_loss, self.probe.references.of_batch(parts)
        assert stage_loss is not None
        return stage_loss(self.model, batch, None if kept is None else on_device(kept, self.probe.device))

    def differentiated(self, gradient_pass: GradientPass, batch: dict[str, Any], parts: Sequence[Part]) -> Tensor:
        """Return the losses of :meth:`stage_losses`, (B,), from a pass that gives their gradients to a reducer."""
        assert self.probe.stage_loss is not None
        count = sum(indices.size for _, indices in parts)
        rows = self.probe.stage_loss.rows
        return gradient_pass.run_losses(count, rows, lambda: self.stage_losses(batch, parts).losses)

    def each(self, measure: Callable[[MeasuredBatch], Tensor], batches: Batches | None = None) -> ScoreArray:
        """Apply a function to every batch; return the values in the order of the samples, (n, ...), on every process.

        Args:
            measure: returns the values of a batch, (B, ...).
            batches: positions in :attr:`indices`; None cuts batches under the token budget of a forward pass.

        Raises:
            DivergenceError: on every process, if a value is not finite; the message names the first such sample.
            ComponentError: if memory is too small for one sample, ``measure`` returns another shape, or a plug-in's
                measurement gives a value that is not finite.
        """
        if not self.indices.size:
            return self._nothing(measure)
        if batches is None:
            batches = length_batches(self.samples.lengths[self.indices], self.probe.batch_tokens)
        mine, useful = batches.share(distributed.rank(), distributed.world_size())
        values = _Values(self.indices.size, self.probe.device)
        with distributed.together(), self.unfit_noted() as noted:
            for number, batch in enumerate(self.bar(mine)):
                with noted():
                    found = self.attempt(measure, self.indices[batch])
                    values.like(found, self.measurement.name)
                    if number < useful:
                        values.put(batch, found)
        whole = values.gathered()
        self._check_finite(whole)
        self.probe.count(self.samples, self.indices)
        return whole

    def _nothing(self, measure: Callable[[MeasuredBatch], Tensor]) -> ScoreArray:
        """Return the values of no samples; one sample is measured to find their shape."""
        if not self.samples.size:
            return np.zeros(0, dtype=np.float32)
        values = _Values(0, self.probe.device)
        with distributed.together():
            values.like(self.attempt(measure, np.zeros(1, dtype=np.int64)), self.measurement.name)
        return values.gathered()

    @contextmanager
    def unfit_noted(self) -> Iterator[Callable[[], AbstractContextManager[None]]]:
        """Give a context in which to run each batch, so that an error of a batch does not stop collective forwards.

        If a forward is collective, an error found after a forward is noted and raised after the last batch. Otherwise
        it is raised at once.

        Raises:
            DataFlexError: the first error noted, at the end.
        """
        first: list[DataFlexError] = []

        @contextmanager
        def noted() -> Iterator[None]:
            try:
                yield
            except (DivergenceError, UnfitValues) as error:
                if not self.probe.sharded:
                    raise
                first.append(error)

        yield noted
        if first:
            raise first[0]

    def bar(self, batches: Batches) -> tqdm[IndexArray]:
        """Return the batches with a progress bar."""
        return tqdm(batches, desc="Scoring", unit="batch", disable=not self.probe.progress, leave=False)

    def attempt(self, measure: Callable[[MeasuredBatch], Tensor], rows: IndexArray) -> Tensor:
        """Return the checked values of samples, (B, ...); halve the batch if memory runs out.

        The value of a sample without a trained token is the measurement's ``untrained``, if it is set. Every other NaN
        becomes infinity, so that NaN always means a sample without a trained token.
        """
        what = f"measure {quantity_of(self.measurement)}"
        limit = self.probe.limit(self.measurement.name, what, "Shorten cutoff_len.")
        parts = limit.parts(lambda part: self._values(measure, part), rows, self.samples.lengths)
        return parts[0][1] if len(parts) == 1 else torch.cat([values for _, values in parts])

    def _values(self, measure: Callable[[MeasuredBatch], Tensor], rows: IndexArray) -> Tensor:
        """Return the checked values of one batch."""
        batch = Batch(self, rows)
        return self._checked(measure(batch), batch)

    def _checked(self, values: Tensor, batch: Batch) -> Tensor:
        """Return values as float32 or int64, after a check of their shape, with ``untrained`` filled in."""
        name, count = self.measurement.name, batch.indices.size
        if not isinstance(values, Tensor) or not values.dim() or values.shape[0] != count:
            got = f"a tensor of shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
            place = place_of(type(self.measurement))
            raise UnfitValues(
                f"measurement {name!r}{f' ({place})' if place else ''} returned {got} for a batch of {count} samples; "
                f"it must return a torch tensor whose first dimension is {count}."
            )
        if not values.is_floating_point():
            return values.long()
        values = values.float().masked_fill(values.isnan(), math.inf)
        other = self.measurement.untrained
        if other is None or (self.measurement.of_sample_loss and self.probe.stage_loss is not None):
            return values  # in a stage in which a sample has one loss, every sample has one
        untrained = (batch.labels == IGNORE_INDEX).all(1)
        return values.masked_fill(untrained.view(-1, *[1] * (values.dim() - 1)), other)

    def _check_finite(self, values: NDArray[Any]) -> None:
        """Raise an error that names the first sample with an infinite value."""
        broken = np.isinf(values).reshape(len(values), -1).any(axis=1)
        if broken.any():
            more = f" (and {int(broken.sum()) - 1} more of {broken.size})" if broken.sum() > 1 else ""
            found = f"{self.called(self.indices[broken][0])}{more}"
            place = place_of(type(self.measurement))
            if place is not None:
                raise ComponentError(
                    f"measurement {self.measurement.name!r} ({type(self.measurement).__name__}, {place}) gives NaN or "
                    f"infinity for {found}. Return finite values; `untrained` is the value of a sample without a "
                    "trained token. If the code is right, the model's values are not finite: training has diverged."
                )
            raise DivergenceError(f"the {quantity_of(self.measurement)} of {found} is not finite")

    def called(self, index: int) -> str:
        """Return the name of a sample in messages."""
        of = "pool index" if self.samples is self.probe.pool else "validation sample"
        return f"{of} {index}"


class _Values:
    """Values of samples, on this process's device if they are few, otherwise in the CPU's memory."""

    def __init__(self, count: int, device: torch.device) -> None:
        self._count, self._device = count, device
        self._values: Tensor | None = None
        """Values of all samples, (count, ...); 0 for samples of other processes. None before the first batch."""

    def like(self, found: Tensor, name: str) -> None:
        """Allocate the values at the first batch; all other batches must have values of the same shape and type."""
        if self._values is None:
            shape = (self._count, *found.shape[1:])
            device = self._device if math.prod(shape) <= _DEVICE_VALUES else torch.device("cpu")
            self._values = torch.zeros(shape, dtype=found.dtype, device=device)
        elif found.shape[1:] != self._values.shape[1:] or found.dtype != self._values.dtype:
            before, now = (f"{tuple(each.shape[1:])} of {each.dtype}" for each in (self._values, found))
            raise UnfitValues(
                f"measurement {name!r} returned values of shape {now} after {before}, depending on its batch."
            )

    def put(self, batch: IndexArray, found: Tensor) -> None:
        """Store the values of a batch, given the positions of its samples."""
        assert self._values is not None
        places = on_device(torch.from_numpy(batch), self._values.device)
        self._values[places] = found.to(self._values.device)

    def gathered(self) -> NDArray[Any]:
        """Return the values of all processes."""
        assert self._values is not None
        # Each process has filled in its own samples and left zeros elsewhere, so a sum joins the values.
        for part in self._values.split(_SUMMED_ROWS):
            part.copy_(distributed.all_reduce_sum(part.to(self._device)))
        return self._values.cpu().numpy()


def _checked_indices(indices: Any, size: int, name: str) -> IndexArray:
    """Return indices as int64, after a check of their type and range."""
    numbers = np.asarray(indices)
    if numbers.ndim != 1 or not (np.issubdtype(numbers.dtype, np.integer) or not numbers.size):
        raise ComponentError(
            f"measurement {name!r} takes the indices of samples as a one-dimensional array of whole numbers, got "
            f"{numbers.dtype} of shape {numbers.shape}."
        )
    outside = numbers[(numbers < 0) | (numbers >= size)]
    if outside.size:
        raise ComponentError(f"measurement {name!r} was asked for sample {outside[0]} of {size} (0 to {size - 1}).")
    return numbers.astype(np.int64, copy=False)
