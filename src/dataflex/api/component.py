"""The base class of all components.

A component is a small class with a parameter model and one method that decides, such as ``score`` or ``mix``. If it has
state, it also defines ``state_dict`` and ``load_state_dict``. The framework provides the rest: decisions between
optimizer steps, the same decisions on any number of processes, exact resume, and a record of every decision.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar, get_args, get_origin

import numpy as np

from dataflex.api.context import StepStatistics
from dataflex.api.measurement import Measurement
from dataflex.api.needs import Needs, RunView
from dataflex.api.params import ComponentParams
from dataflex.api.schedule import RunOutline
from dataflex.api.source import label_of
from dataflex.data.columns import ColumnArray, Wrong
from dataflex.errors import ComponentError

if TYPE_CHECKING:
    from dataflex.data.pool import Pool

ParamsT = TypeVar("ParamsT", bound=ComponentParams, covariant=True)
"""The parameter model of a component."""

State = dict[str, Any]
"""The state of a component: numbers, text and numpy arrays, nested in dicts, lists and tuples."""


class Component(Generic[ParamsT]):
    """Base of all components. :func:`register` sets :attr:`family` and :attr:`name`.

    A component names its parameter model as the type argument of its base class, as in ``class
    Focus(Selector[FocusParams])``. The framework then sets :attr:`Params` to this model, and :attr:`params` is an
    instance of the model.

    Example:
        A selector that keeps a count in its checkpoints:

        >>> from dataflex import Selector, SelectorParams
        >>> class Counting(Selector[SelectorParams]):
        ...     decisions = 0
        ...     def begin(self, ctx):
        ...         self.decisions += 1
        ...     def state_dict(self):
        ...         return {"decisions": self.decisions}
        ...     def load_state_dict(self, state):
        ...         self.decisions = state["decisions"]
        >>> Counting(SelectorParams()).state_dict()
        {'decisions': 0}
    """

    family: ClassVar[str]
    """``selector``, ``mixer``, ``order`` or ``weighter``."""
    name: ClassVar[str]
    """The registered name, as ``method:`` in YAML."""
    Params: ClassVar[type[ComponentParams]] = ComponentParams
    """The parameter model."""

    state_depends_on: ClassVar[frozenset[str]] = frozenset()
    """Names of the parameters that the state depends on. If a run resumes with other values, the state is rebuilt."""
    reference_passes: ClassVar[int] = 1
    """Forward passes of the reference per sample, if the component needs one. A table of its losses saves one pass."""

    def __init__(self, params: ParamsT) -> None:
        self.params = params

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "Params" not in vars(cls):
            cls.Params = _params_named_by(cls) or cls.Params

    def needs(self, run: RunView) -> Needs:
        """Return the needs of the component in this run: measurements, validation samples, a reference and so on.

        Called several times, before anything is loaded.
        """
        return Needs()

    def problems(self, run: RunView) -> Iterator[tuple[str, str]]:
        """Yield pairs of a parameter and its problem in this run. Called before anything is loaded."""
        yield from ()  # makes the method a generator

    def column_problem(self, column: str, values: ColumnArray) -> Wrong | None:
        """Return the problem of a raw column that :meth:`needs` names, or None. Called before the model is loaded.

        Args:
            column: the name of the column.
            values: the values of all training rows, even if a packed sample is made of several rows. They are numbers
                with NaN for a missing value, or text with None for a missing value.

        Returns:
            The first unusable row, as a position in ``values``, and the problem. The row is None if the whole column is
            unusable. The problem is a sentence without a full stop that begins with the name of the column.
        """
        return None

    def pool_problems(self, pool: Pool) -> Iterator[tuple[str, str]]:
        """Yield pairs of a parameter and its problem with the pool's samples. Called before the model is loaded."""
        yield from ()

    def wanted_rounds(self, domains: int) -> int:
        """Return the number of rounds that one pass over the pool, and the whole run, should have at least.

        The framework chooses the length of a round by this number if ``update_steps`` is not given. With 1, a round is
        one pass over the pool.
        """
        return 1

    def cannot_act(self, run: RunOutline) -> str | None:
        """Return why the component can have no effect in this run, and which setting to change. None if it can act.

        Called before the model is loaded. The text continues a prefix such as "select less: " and has no full stop.
        """
        return None

    def unfit(self, run: RunOutline) -> tuple[str, str] | None:
        """Return a parameter and why its value does not fit the size of the run, or None if all values fit.

        Called before the model is loaded, when the steps and the number of samples are known. :meth:`problems` is
        called earlier, with the configuration alone. The framework raises an error with this text.
        """
        return None

    def measured_samples(self, measurement: Measurement[Any], run: RunOutline) -> float:
        """Return the number of samples that the component measures in the whole run.

        A sample that is measured twice counts twice. The framework calls this for each measurement that :meth:`needs`
        names, to estimate the cost of the run. By default, the component measures the validation samples at every
        decision.
        """
        return float(run.validation * run.decisions)

    @property
    def decides_within_step(self) -> bool:
        """Whether the component decides the loss coefficients of a step from the losses of the same step.

        If a step has several micro-batches, this takes an extra forward pass over all of them before the first backward
        pass.
        """
        return False

    def on_step(self, statistics: StepStatistics) -> None:
        """Receive the losses and token counts of the last optimizer step. Called after every step on every rank."""

    def state_dict(self) -> State:
        """Return the state that the component needs to resume exactly.

        The state consists of None, booleans, numbers, text, numpy arrays and numpy scalars, in dicts, lists and tuples.
        All of them are restored with the same types. Any other type is refused before training begins.
        """
        return {}

    def load_state_dict(self, state: State) -> None:
        """Restore the state that :meth:`state_dict` returned."""


def _params_named_by(cls: type[Component[ComponentParams]]) -> Any:
    """Return the parameter model that a class names as the type argument of its base class, or None.

    For a type variable, return its bound if the bound is a subclass of the model that the class inherits. The result is
    not checked here, because :func:`register` checks it.
    """
    for base in vars(cls).get("__orig_bases__", ()):
        origin = get_origin(base)
        if not (isinstance(origin, type) and issubclass(origin, Component)):
            continue
        for argument in get_args(base):
            if not isinstance(argument, TypeVar):
                return argument
            bound = argument.__bound__
            if isinstance(bound, type) and issubclass(bound, cls.Params):
                return bound
    return None


def made_with(component: Component) -> State:
    """Return the values of the parameters that the component's state depends on, as JSON values."""
    return component.params.model_dump(mode="json", include=set(component.state_depends_on))


def take_back(component: Component, state: State, then: State) -> list[str]:
    """Restore a component's state, unless a parameter has changed that the state depends on.

    Args:
        component: a component that was just constructed.
        state: the return value of :func:`state_of` at the checkpoint.
        then: the return value of :func:`made_with` at the checkpoint.

    Returns:
        The names of the changed parameters. If empty, the state was restored.
    """
    now = made_with(component)
    changed = [name for name in sorted(now) if name not in then or then[name] != now[name]]
    if not changed:
        component.load_state_dict(state)
    return changed


def state_of(component: Component) -> State:
    """Return the state of a component.

    Raises:
        ComponentError: if a checkpoint cannot hold a value of the state. The message names the position of the value.
    """
    state = component.state_dict()
    label = label_of(component, ("state_dict",))
    if not isinstance(state, dict):
        raise ComponentError(f"{label} returned a {type(state).__name__} as its state; a dict is needed.")
    for path, value in _parts(state):
        if isinstance(value, np.ndarray) and not value.dtype.hasobject:
            continue
        if value is not None and not isinstance(value, str | bool | int | float | np.generic):
            kind = f"an array of {value.dtype}" if isinstance(value, np.ndarray) else f"a {type(value).__name__}"
            raise ComponentError(
                f"{label} returned {kind} as {path!r} of its state. Use JSON values and numeric numpy arrays."
            )
    return state


def _parts(state: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the path and the value of every leaf in nested dicts and lists."""
    if isinstance(state, dict):
        for key, value in state.items():
            if isinstance(key, str):
                yield from _parts(value, f"{path}.{key}".lstrip("."))
            else:
                yield f"{path}.{key}".lstrip("."), (key,)  # a key that is not text is refused: no leaf may be a tuple
    elif isinstance(state, list | tuple):
        for number, value in enumerate(state):
            yield from _parts(value, f"{path}[{number}]")
    else:
        yield path, state
