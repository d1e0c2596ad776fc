"""The probe: what a decision may measure on the model in training, on all processes together, without a trace.

The raw module is run in evaluation mode under the training precision; modes and random streams are put back. What a
measurement computes is its own matter, and how batches are cut, shared and gathered the runner's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dataflex.api.measurement import Measurement, ResultT
from dataflex.data.pool import Pool
from dataflex.data.samples import Samples
from dataflex.data.sampling import IndexArray
from dataflex.errors import ComponentError
from dataflex.probe.checkpoints import learning_rates, weights_of
from dataflex.probe.collation import Collate, Collation
from dataflex.probe.cost import Cost
from dataflex.probe.gradients import canonical, parameter_names
from dataflex.probe.memory import BatchLimit
from dataflex.probe.mode import probe_mode
from dataflex.probe.moments import Moments
from dataflex.probe.runner import Runner
from dataflex.probe.signs import SignTables


@dataclass(frozen=True)
class Tokens:
    """What generation needs of the tokenizer."""

    pad: int
    eos: tuple[int, ...]
    decode: Callable[[list[int]], str]


@dataclass
class ModelProbe:
    """Measurements on the model in training.

    Attributes:
        pool: the samples.
        model: returns the module to run (the raw one; the wrapper's own forward belongs to training).
        collate: the training collator, on rows of the pool.
        plain_collators: classes of it that do nothing but pad; see :class:`~dataflex.probe.collation.Collation`.
        autocast: the training precision.
        device: where the model lives.
        batch_tokens: tokens, padding counted, of one forward.
        gradient_batch_tokens: the same, of one forward and backward; none: ``batch_tokens``.
        moments: returns the optimizer's moments by parameter name.
        tokens: the tokenizer's part in generation.
        sharded: whether a forward is collective (ZeRO-3, FSDP).
        after_backward: called after every backward; under ZeRO-3 it releases what DeepSpeed still holds.
        saved_moments: returns the moments a checkpoint folder holds.
        progress: whether to show a progress bar.
    """

    pool: Pool
    model: Callable[[], torch.nn.Module]
    collate: Collate
    autocast: Callable[[], AbstractContextManager[Any]]
    device: torch.device
    batch_tokens: int
    gradient_batch_tokens: int | None = None
    moments: Callable[[], dict[str, Moments]] | None = None
    tokens: Tokens | None = None
    sharded: bool = False
    after_backward: Callable[[], None] = lambda: None
    saved_moments: Callable[[Path], dict[str, Moments]] | None = None
    progress: bool = False
    plain_collators: tuple[type, ...] = ()
    cost: Cost = field(default_factory=Cost)
    chunked_head: bool | None = None
    """Whether the head may be applied chunk by chunk; None: not known yet."""
    samples_apart: bool | None = None
    """Whether the samples of a batch keep apart in the model's layers; None: not known yet."""
    signs: SignTables = field(default_factory=SignTables)
    """Random signs, kept from one measurement to the next on a CPU."""
    limits: dict[str, BatchLimit] = field(default_factory=dict)
    """What the device was found to have the memory for, by the names of measurements."""
    _collation: Collation | None = field(default=None, init=False, repr=False)

    def measure(
        self,
        measurement: Measurement[ResultT],
        indices: IndexArray,
        samples: Samples | Sequence[Mapping[str, Any]] | None = None,
    ) -> ResultT:
        """Return what a measurement gives for samples, in their order; see :class:`~dataflex.api.probe.Probe`."""
        runner = Runner(self, measurement, indices, samples)
        with probe_mode(runner.model), self.autocast():
            return measurement.run(runner)

    def limit(self, name: str, what: str, single: str) -> BatchLimit:
        """Return the limit of the batches of a measurement.

        Args:
            name: of the measurement.
            what: is done to a batch, for messages.
            single: what to set where a sample alone does not fit.
        """
        return self.limits.setdefault(name, BatchLimit(what, single, collective=self.sharded))

    def collated(self, samples: Samples, indices: IndexArray) -> Mapping[str, Any]:
        """Return what the training collator makes of samples."""
        if self._collation is None or self._collation.collate is not self.collate:
            self._collation = Collation(self.collate, self.plain_collators)
        return self._collation.of(samples, indices)

    def decode(self, tokens: list[int]) -> str:
        """Return the text of token ids, special tokens left out."""
        assert self.tokens is not None
        return self.tokens.decode(tokens)

    @contextmanager
    def checkpoint(self, folder: str) -> Iterator[None]:
        """Measure with the weights (and moments) of a stored checkpoint for a while.

        Raises:
            ComponentError: if the parameters are spread over processes, or the checkpoint is of another model.
        """
        if self.sharded:
            raise ComponentError(
                "checkpoints: stored weights cannot be looked at while ZeRO-3 or FSDP spreads the model out. "
                "Use ZeRO-2 or DDP, or score the pool before with dataflex-cli score."
            )
        moments = self.moments
        with weights_of(self.model(), Path(folder)):
            if self.saved_moments is not None:
                self.moments = partial(self.saved_moments, Path(folder))
            try:
                yield
            finally:
                self.moments = moments

    def learning_rates(self, folders: list[str]) -> list[float]:
        """Return the mean learning rate of each stored checkpoint's stretch of its run, scaled to sum 1."""
        return learning_rates([Path(folder) for folder in folders])

    def parameter_sizes(self) -> dict[str, int]:
        """Return the number of elements of every trainable parameter, by name, sharded or not."""
        model = self.model()
        names = parameter_names(model)
        return {
            names[id(value)]: int(getattr(value, "ds_numel", value.numel()))
            for value in model.parameters()
            if id(value) in names
        }

    def optimizer_moments(self) -> dict[str, Moments]:
        """Return the optimizer's moments of every trainable parameter, under the names features know it by."""
        assert self.moments is not None
        return {canonical(name): value for name, value in self.moments().items()}

    def count(self, samples: Samples, indices: IndexArray) -> None:
        """Add samples to what was run through the model."""
        self.cost.samples += indices.size
        self.cost.tokens += int(samples.lengths[indices].sum())
