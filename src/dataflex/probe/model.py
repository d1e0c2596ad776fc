"""The probe measures the model in training for a decision, on all processes together, and leaves no trace.

The probe runs the raw module in evaluation mode under the training precision, and restores modes and random streams. A
measurement defines the computation. The runner cuts batches, divides them among processes and gathers the values.
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
from dataflex.probe.stage_loss import StageLoss
from dataflex.probe.stage_references import StageReferences


@dataclass(frozen=True)
class Tokens:
    """The parts of a tokenizer that generation needs."""

    pad: int
    eos: tuple[int, ...]
    decode: Callable[[list[int]], str]


@dataclass
class ModelProbe:
    """Measurements on the model in training.

    Attributes:
        pool: the training samples.
        model: returns the module to run. This is the raw module, because the wrapper's own forward belongs to training.
        collate: the training collator, for rows of the pool.
        plain_collators: classes of collators that only pad; see :class:`~dataflex.probe.collation.Collation`.
        autocast: context of the training precision.
        device: device of the model.
        batch_tokens: most tokens of one forward pass, padding counted.
        gradient_batch_tokens: the same for a forward and backward pass; None means ``batch_tokens``.
        moments: returns the optimizer's moments by parameter name.
        tokens: the parts of the tokenizer that generation needs.
        sharded: whether a forward is collective (ZeRO-3, FSDP).
        after_backward: called after every backward pass; under ZeRO-3 it frees the parameters that DeepSpeed still
            holds.
        saved_moments: returns the moments of a checkpoint folder.
        progress: whether to show a progress bar.
        stage_loss: the loss of a sample, in a stage in which a sample has one loss; None if its tokens have losses.
        stage_settings: settings of the run that shape the loss of the stage, for the key of stored features.
        references: values of the stage's reference model, if the loss needs some.
        cost: cost of the measurements so far.
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
    stage_loss: StageLoss | None = None
    stage_settings: Mapping[str, Any] = field(default_factory=dict)
    references: StageReferences = field(default_factory=StageReferences)
    cost: Cost = field(default_factory=Cost)
    chunked_head: bool | None = None
    """Whether the head may be applied in chunks; None means unknown so far."""
    samples_apart: bool | None = None
    """Whether samples in one batch have the same gradients as alone; None means unknown so far."""
    signs: SignTables = field(default_factory=SignTables)
    """Random signs, cached on a CPU from one measurement to the next."""
    limits: dict[str, BatchLimit] = field(default_factory=dict)
    """Limits of batches by the name of the measurement, found when the device ran out of memory."""
    _collation: Collation | None = field(default=None, init=False, repr=False)

    def measure(
        self,
        measurement: Measurement[ResultT],
        indices: IndexArray,
        samples: Samples | Sequence[Mapping[str, Any]] | None = None,
    ) -> ResultT:
        """Return the values of a measurement for samples, in their order; see :class:`~dataflex.api.probe.Probe`."""
        runner = Runner(self, measurement, indices, samples)
        with probe_mode(runner.model), self.autocast():
            if measurement.of_sample_loss:
                self.references.make(self, runner.samples)
            return measurement.run(runner)

    def keep_references(self) -> None:
        """Read or compute the values of the stage's reference for the whole pool. Collective."""
        with probe_mode(self.model()), self.autocast():
            self.references.make(self, self.pool)

    def limit(self, name: str, what: str, single: str) -> BatchLimit:
        """Return the batch limit of a measurement.

        Args:
            name: name of the measurement.
            what: the operation on a batch, for messages.
            single: advice for messages, if a single sample does not fit.
        """
        return self.limits.setdefault(name, BatchLimit(what, single, collective=self.sharded))

    def collated(self, samples: Samples, indices: IndexArray) -> Mapping[str, Any]:
        """Return a batch of samples from the training collator."""
        if self.stage_loss is not None:  # such a collator does more than padding
            return self.collate(samples.rows(indices))
        if self._collation is None or self._collation.collate is not self.collate:
            self._collation = Collation(self.collate, self.plain_collators)
        return self._collation.of(samples, indices)

    def token_batch(self, samples: Samples, indices: IndexArray) -> Mapping[str, Any]:
        """Return a batch with one row of tokens for each sample; of a pair, the prompt with the chosen response."""
        if self.stage_loss is None:
            return self.collated(samples, indices)
        return self.stage_loss.token_batch(samples.rows(indices))

    def decode(self, tokens: list[int]) -> str:
        """Return the text of token ids, without special tokens."""
        assert self.tokens is not None
        return self.tokens.decode(tokens)

    @contextmanager
    def checkpoint(self, folder: str) -> Iterator[None]:
        """Measure with the weights (and moments) of a stored checkpoint while the context is open.

        Raises:
            ComponentError: if the parameters are sharded over processes, or the checkpoint belongs to another model.
        """
        if self.sharded:
            raise ComponentError(
                "checkpoints: stored weights cannot be loaded while ZeRO-3 or FSDP shards the model. "
                "Use ZeRO-2 or DDP, or score the pool before the training with dataflex-cli score."
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
        """Return the mean learning rate of the steps between each checkpoint and the one before, scaled to sum 1."""
        return learning_rates([Path(folder) for folder in folders])

    def parameter_sizes(self) -> dict[str, int]:
        """Return the number of elements of every trainable parameter, by name; a sharded parameter counts whole."""
        model = self.model()
        names = parameter_names(model)
        return {
            names[id(value)]: int(getattr(value, "ds_numel", value.numel()))
            for value in model.parameters()
            if id(value) in names
        }

    def optimizer_moments(self) -> dict[str, Moments]:
        """Return the optimizer's moments of every trainable parameter, by the parameter names that features use."""
        assert self.moments is not None
        return {canonical(name): value for name, value in self.moments().items()}

    def count(self, samples: Samples, indices: IndexArray) -> None:
        """Add samples to the cost as run through the model."""
        self.cost.samples += indices.size
        self.cost.tokens += int(samples.lengths[indices].sum())
