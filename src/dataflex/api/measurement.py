"""Measurements of samples on the model in training: the base class of all measurements, and their registry.

A measurement is a frozen dataclass of settings with a registered name. Its method ``measure`` computes the values of
one batch. The probe cuts batches of similar length under a token budget and distributes the batches over the processes.
It halves a batch that does not fit into memory, and returns the values in the order of the samples. A component
measures with ``ctx.probe.measure(Losses(), candidates)``.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, cast

from typing_extensions import TypeVar

from dataflex.api.source import place_of
from dataflex.data.rules import ScoreArray
from dataflex.data.sampling import IndexArray
from dataflex.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from dataflex.api.needs import RunView
    from dataflex.probe.stage_loss import StageLosses

ResultT = TypeVar("ResultT", default=ScoreArray)
"""The return type of a measurement for a list of samples."""


class MeasuredBatch(Protocol):
    """One batch of B samples on the device. T is the padded length of the longest sample.

    Example:
        A measurement of the mean probability of the trained tokens of each sample:

        >>> import dataclasses
        >>> import torch
        >>> from dataflex import MeasuredBatch, Measurement, register_measurement
        >>> @register_measurement("mean_probability")
        ... @dataclasses.dataclass(frozen=True)
        ... class MeanProbability(Measurement):
        ...     def measure(self, batch: MeasuredBatch):
        ...         return batch.token_means(lambda logits, labels: logits.softmax(1).gather(1, labels[:, None])[:, 0])
    """

    @property
    def model(self) -> torch.nn.Module:
        """The model in evaluation mode, without gradients, under the precision of training."""
        ...

    @property
    def inputs(self) -> dict[str, Any]:
        """The arguments of the model's forward pass, without labels."""
        ...

    @property
    def labels(self) -> Tensor:
        """The token to predict at each position, (B, T), already shifted; -100 at positions that are not trained on."""
        ...

    @property
    def mask(self) -> Tensor:
        """Whether each position is a token and not padding, (B, T), bool."""
        ...

    @property
    def indices(self) -> IndexArray:
        """Indices of the samples, (B,)."""
        ...

    def stage_losses(self) -> StageLosses | None:
        """Return the losses and reward margins of the samples, in stages dpo, rm and kto.

        The result is None in stages pt and sft, in which each token has a loss. In stages dpo and rm, all other
        attributes are those of the prompts with the chosen responses.
        """
        ...

    def token_means(self, value: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Return the mean of a function over the trained tokens of each sample, (B,).

        The mean is NaN for a sample without trained tokens. The head of the model is applied to a thousand positions at
        a time, so that the logits of the whole batch never exist at once.

        Args:
            value: maps logits (n, V), float32, and labels (n,) to one value for each position, (n,).
        """
        ...

    def token_values(self, value: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Return a function of each trained token, (B, T), float32; 0 at positions that are not trained on.

        The head of the model is applied as in :meth:`token_means`.

        Args:
            value: maps logits (n, V), float32, and labels (n,) to one value for each position, (n,).
        """
        ...

    def hidden_states(self, layer: int = -1) -> Tensor:
        """Return the hidden states of one layer, (B, T, H). Hidden states of other layers are not stored.

        Args:
            layer: 0 selects the embeddings, 1 the output of the first layer and so on; -1 selects the last layer after
                the final normalisation. The values are the same as those of Transformers' ``output_hidden_states``.

        Raises:
            ComponentError: if the model has no such layer.
        """
        ...


class MeasurementRun(Protocol):
    """One measurement of a list of samples, passed to :meth:`Measurement.run`.

    Example:
        A measurement that standardises its values over all samples of the call:

        >>> import dataclasses
        >>> from dataflex import Measurement, MeasurementRun, register_measurement
        >>> @register_measurement("standard_lengths")
        ... @dataclasses.dataclass(frozen=True)
        ... class StandardLengths(Measurement):
        ...     def run(self, run: MeasurementRun):
        ...         lengths = run.each(lambda batch: batch.mask.sum(1))
        ...         return (lengths - lengths.mean()) / lengths.std()
    """

    @property
    def model(self) -> torch.nn.Module:
        """The model."""
        ...

    @property
    def indices(self) -> IndexArray:
        """Indices of the samples to measure, (n,)."""
        ...

    def each(self, measure: Callable[[MeasuredBatch], Tensor]) -> ScoreArray:
        """Return the results of ``measure`` for all batches, (n, ...), in the order of :attr:`indices`.

        Every process receives all results.
        """
        ...


class Measurement(ABC, Generic[ResultT]):
    """Base of all measurements: a registered frozen dataclass of settings that defines ``measure``.

    All processes measure together. The value of a sample must not depend on the batch that the sample is in. A
    measurement must not change the model. It may draw random values only from generators that are keyed by its own
    settings.

    Example:
        >>> import dataclasses
        >>> from dataflex import Measurement, register_measurement
        >>> @register_measurement("prompt_share")
        ... @dataclasses.dataclass(frozen=True)
        ... class PromptShare(Measurement):
        ...     def measure(self, batch):
        ...         return 1 - (batch.labels >= 0).sum(1) / batch.mask.sum(1)
        >>> PromptShare.name
        'prompt_share'
    """

    name: ClassVar[str]
    """The registered name. :func:`register_measurement` sets it."""
    quantity: ClassVar[str] = ""
    """The measured quantity for messages ("the loss of sample 3 is not finite"). If empty, messages use the name."""
    forwards: ClassVar[float] = 1.0
    """Cost of one sample in forward passes. A forward and backward pass together cost 3."""
    untrained: ClassVar[float | None] = None
    """Value of a sample without a trained token (NaN or 0). If None, such a sample is measured like any other."""
    of_sample_loss: ClassVar[bool] = False
    """Whether the value is made from the loss of the sample itself, which is the loss of a pair in stages dpo and rm.
    In stages in which a sample has one loss, every sample has such a value, and ``untrained`` has no effect."""

    def measure(self, batch: MeasuredBatch) -> Tensor:
        """Return the values of a batch, shape (B, ...), with the same trailing shape for every batch.

        Floating-point values are returned as float32, integers as int64. A value that is not finite ends the run.
        """
        raise NotImplementedError

    def run(self, run: MeasurementRun) -> ResultT:
        """Return the values of all samples. The default runs :meth:`measure` on every batch."""
        return cast(ResultT, run.each(self.measure))

    def problems(self, run: RunView) -> Iterator[tuple[str, str]]:
        """Yield pairs of a parameter and why the measurement cannot run. Called before anything is loaded."""
        yield from ()


MeasurementType = TypeVar("MeasurementType", bound=type[Measurement[Any]])
_registered: dict[str, type[Measurement[Any]]] = {}


def register_measurement(name: str) -> Callable[[MeasurementType], MeasurementType]:
    """Return a class decorator that registers a measurement under a name.

    Raises:
        ConfigError: if the class does not extend :class:`Measurement` or defines neither ``measure`` nor ``run``, or if
            the name is taken.

    Example:
        >>> import dataclasses
        >>> from dataflex import Measurement, register_measurement
        >>> @register_measurement("length")
        ... @dataclasses.dataclass(frozen=True)
        ... class Length(Measurement):
        ...     def measure(self, batch):
        ...         return batch.mask.sum(1)
        >>> Length().name
        'length'
    """
    if not isinstance(name, str) or not name:
        raise ConfigError(f"the name of a measurement must be text, got {name!r}.")

    def add(cls: MeasurementType) -> MeasurementType:
        if not isinstance(cls, type) or not issubclass(cls, Measurement):
            raise ConfigError(f"{cls!r} is registered as measurement {name!r} but does not extend Measurement.")
        # The class may come from a plug-in that is not type-checked, so its methods are checked here.
        if cls.measure is Measurement.measure and cls.run is Measurement.run:
            raise ConfigError(f"{cls.__name__} does not define measure(), which computes the values of a batch.")
        holder = _registered.get(name)
        if holder is not None and (holder.__module__, holder.__qualname__) != (cls.__module__, cls.__qualname__):
            where = place_of(holder) or holder.__module__
            raise ConfigError(
                f"measurement {name!r} is already registered by {holder.__name__} ({where}); choose another name."
            )
        cls.name = name
        _registered[name] = cls
        return cls

    return add


UNREGISTERED = "which is no measurement with a name; put @dataflex.register_measurement(NAME) before the class"
"""The end of a message about an unregistered measurement. It follows the name of the class."""


def is_registered(measurement: Measurement[Any]) -> bool:
    """Return whether the class of a measurement is registered itself. An inherited name does not count."""
    return "name" in vars(type(measurement))


def available_measurements() -> dict[str, type[Measurement[Any]]]:
    """Return the registered measurements by name, sorted."""
    return dict(sorted(_registered.items()))


def forget_measurements(names: Iterable[str]) -> None:
    """Undo the registration of measurements that a failed plug-in made."""
    for name in names:
        del _registered[name]


def quantity_of(measurement: Measurement[Any]) -> str:
    """Return the measured quantity for messages."""
    return measurement.quantity or measurement.name.replace("_", " ")
