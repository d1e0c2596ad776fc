"""The base class of all components.

A component is a small class with a parameter model, one method that decides and, if it has state, ``state_dict``
and ``load_state_dict``. The framework keeps the promises around it: decisions between optimizer steps, the same on
any number of processes, exact resume, and a record of every one.
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
"""A component's state: numbers, text and numpy arrays, nested in dicts, lists and tuples."""


class Component(Generic[ParamsT]):
    """Base of all components. ``register`` sets :attr:`family` and :attr:`name`.

    A component names its parameter model as the type argument of its base class, as in
    ``class Focus(Selector[FocusParams])``; :attr:`params` is then of that type, and :attr:`Params` is set to it.
    """

    family: ClassVar[str]
    name: ClassVar[str]
    Params: ClassVar[type[ComponentParams]] = ComponentParams

    state_depends_on: ClassVar[frozenset[str]] = frozenset()
    """Parameters that the state is made with. If a run is resumed with other values of them, the state is made anew."""
    reference_passes: ClassVar[int] = 1
    """Forwards of the reference a sample takes, if it asks for one; with a table one less."""

    def __init__(self, params: ParamsT) -> None:
        self.params = params

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "Params" not in vars(cls):
            cls.Params = _params_named_by(cls) or cls.Params

    def needs(self, run: RunView) -> Needs:
        """Return what it asks of the run. Called before anything is loaded, and more than once."""
        return Needs()

    def problems(self, run: RunView) -> Iterator[tuple[str, str]]:
        """Yield a parameter and what is wrong with it in this run. Called before anything is loaded."""
        yield from ()

    def column_problem(self, column: str, values: ColumnArray) -> Wrong | None:
        """Return what is wrong with a raw column that :meth:`needs` names, before the model is loaded; None: nothing.

        Args:
            column: its name.
            values: those of all rows that are trained on, also if a sample is packed of several: numbers, NaN where
                there is none, or text, None where there is none.

        Returns:
            The first row that cannot be used, as a position in ``values``, or None if it is the whole column; and what
            is wrong, a sentence without its full stop that begins with the name of the column.
        """
        return None

    def pool_problems(self, pool: Pool) -> Iterator[tuple[str, str]]:
        """Yield a parameter and what is wrong with it for these samples, before the model is loaded."""
        yield from ()

    def wanted_rounds(self, domains: int) -> int:
        """Return into how many rounds a pass and the run are divided at least where ``update_steps`` is not given.

        1: a round is one pass over the pool.
        """
        return 1

    def cannot_act(self, run: RunOutline) -> str | None:
        """Return why the component cannot do in this run what it is for, and what to set; None where it can.

        Asked before the model is loaded; the text goes on from "select less: " and the like, without a full stop.
        """
        return None

    def unfit(self, run: RunOutline) -> tuple[str, str] | None:
        """Return a parameter and why it does not fit the run, which is then an error; None: all do.

        Asked before the model is loaded.
        """
        return None

    def measured_samples(self, measurement: Measurement[Any], run: RunOutline) -> float:
        """Return how many samples it measures in the whole run, each as often as it does so.

        Asked for each measurement that :meth:`needs` names, for the estimate of what the run costs. The default is the
        validation samples at every decision.
        """
        return float(run.validation * run.decisions)

    @property
    def decides_within_step(self) -> bool:
        """Whether it decides coefficients of a step's loss from the losses of that step itself.

        With several micro-batches in a step that takes a forward of all of them before the first backward.
        """
        return False

    def on_step(self, statistics: StepStatistics) -> None:
        """Hear what the optimizer step just made showed; called after every step on every rank."""

    def state_dict(self) -> State:
        """Return what the component needs to go on exactly.

        None, True and False, numbers, text, numpy arrays and scalars, in dicts, lists and tuples; all come back of the
        same types, and anything else is refused before training begins.
        """
        return {}

    def load_state_dict(self, state: State) -> None:
        """Take back what :meth:`state_dict` returned."""


def _params_named_by(cls: type[Component[ComponentParams]]) -> Any:
    """Return the type argument of a component among a class's bases, whatever it is: ``register`` checks it.

    Of a type variable it is the bound, if that is no wider than the model the class has inherited.
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
    """Return the values of the parameters that a component's state depends on, as plain data."""
    return component.params.model_dump(mode="json", include=set(component.state_depends_on))


def take_back(component: Component, state: State, then: State) -> list[str]:
    """Give a component its state back, unless it was made with other parameters, and return which ones those are.

    Args:
        component: one that has just been made.
        state: what :func:`state_of` returned.
        then: what :func:`made_with` returned at that time.
    """
    now = made_with(component)
    changed = [name for name in sorted(now) if name not in then or then[name] != now[name]]
    if not changed:
        component.load_state_dict(state)
    return changed


def state_of(component: Component) -> State:
    """Return a component's state.

    Raises:
        ComponentError: if it holds something that a checkpoint cannot, naming where.
    """
    state = component.state_dict()
    label = label_of(component, ("state_dict",))
    if not isinstance(state, dict):
        raise ComponentError(f"{label} returned a {type(state).__name__} as its state; needed is a dict.")
    for path, value in _parts(state):
        if isinstance(value, np.ndarray) and not value.dtype.hasobject:
            continue
        if value is not None and not isinstance(value, str | bool | int | float | np.generic):
            kind = f"an array of {value.dtype}" if isinstance(value, np.ndarray) else f"a {type(value).__name__}"
            raise ComponentError(
                f"{label} returned {kind} as {path!r} of its state; use JSON values and numeric numpy arrays."
            )
    return state


def _parts(state: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value in nested dicts and lists with its path; a key that is no text as a value."""
    if isinstance(state, dict):
        for key, value in state.items():
            if isinstance(key, str):
                yield from _parts(value, f"{path}.{key}".lstrip("."))
            else:
                yield f"{path}.{key}".lstrip("."), (key,)
    elif isinstance(state, list | tuple):
        for number, value in enumerate(state):
            yield from _parts(value, f"{path}[{number}]")
    else:
        yield path, state
