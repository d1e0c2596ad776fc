"""What is measured of samples on the model in training: the base of all measurements, and their registry.

A measurement is a frozen dataclass of settings with a registered name. It says what to compute on one batch; the probe
cuts batches of similar length under a token budget, shares them over the processes, halves one that does not fit into
the memory, and returns the values in the order of the samples. A component asks for one by
``ctx.probe.measure(Losses(), candidates)``.
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

ResultT = TypeVar("ResultT", default=ScoreArray)
"""What a measurement returns of a list of samples."""


class MeasuredBatch(Protocol):
    """One batch of samples on the device. B is its number of samples, T the length of the longest with padding."""

    @property
    def model(self) -> torch.nn.Module:
        """The model, in evaluation mode, without gradients and under the precision of training."""
        ...

    @property
    def inputs(self) -> dict[str, Any]:
        """What the model's forward takes, without labels."""
        ...

    @property
    def labels(self) -> Tensor:
        """The token to be predicted at each position, (B, T): already shifted; -100 where none is trained on."""
        ...

    @property
    def mask(self) -> Tensor:
        """Which positions are tokens and not padding, (B, T), bool."""
        ...

    @property
    def indices(self) -> IndexArray:
        """Numbers of the samples, (B,)."""
        ...

    def token_means(self, value: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Return each sample's mean of a function of its trained tokens, (B,); NaN for a sample without one.

        The model's head is applied to a thousand positions at a time, so that all logits never exist at once.

        Args:
            value: from logits (n, V), float32, and labels (n,) to one number for each position, (n,).
        """
        ...

    def hidden_states(self, layer: int = -1) -> Tensor:
        """Return the hidden states of one layer, (B, T, H); no other layer's are kept.

        Args:
            layer: 0 are the embeddings, 1 the first layer's output and so on; -1 is the last layer behind the final
                normalisation. The numbers are those of Transformers' ``output_hidden_states``.

        Raises:
            ComponentError: if the model has no such layer.
        """
        ...


class MeasurementRun(Protocol):
    """One measurement of a list of samples, as :meth:`Measurement.run` sees it."""

    @property
    def model(self) -> torch.nn.Module:
        """The model."""
        ...

    @property
    def indices(self) -> IndexArray:
        """Numbers of the samples to measure, (n,)."""
        ...

    def each(self, measure: Callable[[MeasuredBatch], Tensor]) -> ScoreArray:
        """Return what a function makes of every batch, in the order of :attr:`indices`, (n, ...); on every process."""
        ...


class Measurement(ABC, Generic[ResultT]):
    """Base of all measurements. Extend it by a frozen dataclass of settings, register that, and define ``measure``.

    All processes measure together; a measurement must give the same value of a sample whatever batch it is in. It may
    neither change the model nor draw random numbers that are not keyed by its own settings.

    Example:
        >>> import dataclasses
        >>> @register_measurement("prompt_share")
        ... @dataclasses.dataclass(frozen=True)
        ... class PromptShare(Measurement):
        ...     def measure(self, batch):
        ...         return 1 - (batch.labels >= 0).sum(1) / batch.mask.sum(1)
        >>> PromptShare.name
        'prompt_share'
    """

    name: ClassVar[str]
    """Set by :func:`register_measurement`."""
    quantity: ClassVar[str] = ""
    """What is measured, for messages ("the loss of sample 3 is not finite"); empty: the name."""
    forwards: ClassVar[float] = 1.0
    """What one sample costs, in forward passes; a forward and backward is three."""
    untrained: ClassVar[float | None] = None
    """The value of a sample without a trained token (NaN, or 0); None: it is measured as any other."""

    def measure(self, batch: MeasuredBatch) -> Tensor:
        """Return the values of a batch, shape (B, ...), the same trailing shape for every batch.

        Floating-point values are returned as float32, whole numbers as int64. A value that is not finite ends the run.
        """
        raise NotImplementedError

    def run(self, run: MeasurementRun) -> ResultT:
        """Return the values of all samples. The default has :meth:`measure` run on every batch."""
        return cast(ResultT, run.each(self.measure))

    def problems(self, run: RunView) -> Iterator[tuple[str, str]]:
        """Yield why it cannot be taken in a run: a parameter, and the reason. Called before anything is loaded."""
        yield from ()


MeasurementType = TypeVar("MeasurementType", bound=type[Measurement[Any]])
_registered: dict[str, type[Measurement[Any]]] = {}


def register_measurement(name: str) -> Callable[[MeasurementType], MeasurementType]:
    """Class decorator: give a measurement its name.

    Raises:
        ConfigError: if the class is no measurement or does not say what it measures, or the name is taken.
    """
    if not isinstance(name, str) or not name:
        raise ConfigError(f"the name of a measurement must be text, got {name!r}.")

    def add(cls: MeasurementType) -> MeasurementType:
        if not isinstance(cls, type) or not issubclass(cls, Measurement):
            raise ConfigError(f"{cls!r} is registered as measurement {name!r} but does not extend Measurement.")
        # Code of a component may stand here: the class is checked and not trusted.
        if cls.measure is Measurement.measure and cls.run is Measurement.run:
            raise ConfigError(f"{cls.__name__} does not define measure(), by which a measurement is taken.")
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
"""What a message says of an unregistered measurement, behind the name of its class."""


def is_registered(measurement: Measurement[Any]) -> bool:
    """Return whether the class of a measurement has a name of its own."""
    return "name" in vars(type(measurement))


def available_measurements() -> dict[str, type[Measurement[Any]]]:
    """Return the registered measurements by name, sorted."""
    return dict(sorted(_registered.items()))


def forget_measurements(names: Iterable[str]) -> None:
    """Undo the registration of measurements, those of a plug-in that failed after it made them."""
    for name in names:
        del _registered[name]


def quantity_of(measurement: Measurement[Any]) -> str:
    """Return what a measurement measures, for messages."""
    return measurement.quantity or measurement.name.replace("_", " ")
