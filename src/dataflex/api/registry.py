"""The registry of components: built-in, from entry points of installed packages, and from plug-in files."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import pkgutil
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from traceback import walk_tb
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

from dataflex.api.component import Component
from dataflex.api.measurement import available_measurements, forget_measurements
from dataflex.api.mixer import DomainParams, Mixer
from dataflex.api.order import Order
from dataflex.api.params import ComponentParams
from dataflex.api.selector import Selector
from dataflex.api.source import file_of, place_of
from dataflex.api.weighter import Weighter
from dataflex.errors import ConfigError, DataFlexError, Problem, did_you_mean, unknown

FAMILIES: dict[str, type[Component]] = {
    "selector": Selector,
    "mixer": Mixer,
    "order": Order,
    "weighter": Weighter,
}
"""Family name -> base class."""

CONFIG_KEYS: dict[str, str] = {"select": "selector", "mix": "mixer", "order": "order", "weight": "weighter"}
"""Key in the ``dataflex:`` section -> family name."""

ENTRY_POINT_GROUP = "dataflex.components"
_BUILTIN_PACKAGES = ("selectors", "mixers", "orders", "weighters")
_registered: dict[tuple[str, str], type[Component]] = {}

ComponentType = TypeVar("ComponentType", bound=type[Component])


def register(family: str, name: str) -> Callable[[ComponentType], ComponentType]:
    """Return a class decorator that registers a component as ``method: name`` of its family.

    Args:
        family: ``selector``, ``mixer``, ``order`` or ``weighter``.
        name: the method name in YAML, docs and reports.

    Raises:
        ConfigError: if the family is unknown, the class does not fit it or cannot decide, a parameter has an invalid
            default, or another class has the name.

    Example:
        >>> from dataflex import Selector, SelectorParams, register
        >>> @register("selector", "longest")
        ... class Longest(Selector[SelectorParams]):
        ...     def score(self, ctx, candidates):
        ...         return ctx.pool.lengths[candidates]
        >>> Longest.family, Longest.name
        ('selector', 'longest')
    """
    if family not in FAMILIES:
        raise ConfigError(unknown("family", family, FAMILIES))
    if not isinstance(name, str) or not name:
        raise ConfigError(f"the name of a component must be text, got {name!r}.")

    def add(cls: ComponentType) -> ComponentType:
        problem = _unfit(cls, family)
        if problem is not None:
            raise ConfigError(problem)
        holder = _registered.get((family, name))
        if holder is not None and (holder.__module__, holder.__qualname__) != (
            cls.__module__,
            cls.__qualname__,
        ):
            where = place_of(holder)
            where = f"{holder.__module__}.{holder.__qualname__}" if where is None else f"{holder.__name__} ({where})"
            raise ConfigError(f"{family} {name!r} is already registered by {where}; choose another name.")
        cls.family, cls.name = family, name
        _registered[family, name] = cls
        return cls

    return add


DECIDING: dict[str, tuple[str, ...]] = {
    "selector": ("score", "choose", "select"),
    "mixer": ("mix",),
    "order": ("arrange", "draw"),
    "weighter": ("weigh",),
}
"""Family -> the deciding methods. A component defines at least one of them."""


def _unfit(cls: type, family: str) -> str | None:
    """Return why a class cannot be a component of a family, or None."""
    base = FAMILIES[family]
    if not isinstance(cls, type) or not issubclass(cls, base):
        return f"{cls.__name__} is registered as {family} but does not extend {base.__name__}."
    if not (isinstance(cls.Params, type) and issubclass(cls.Params, ComponentParams)):
        return f"{cls.__name__}.Params must extend dataflex.ComponentParams."
    ways = DECIDING[family]
    missing = list(ways[:2]) if all(_is_inherited(cls, base, name) for name in ways) else []
    if not missing and issubclass(cls, Mixer) and cls.weighs_loss:
        missing = [name for name in ("loss_weights", "update_weights") if _is_inherited(cls, base, name)]
    missing += [name for name in dir(cls) if getattr(getattr(cls, name), "__isabstractmethod__", False)]
    if missing:
        own = [name for name, value in vars(cls).items() if inspect.isfunction(value)]
        near = [found for name in missing for found in difflib.get_close_matches(name, own, n=1, cutoff=0.6)]
        hint = f"; it has {near[0]}()." if near else "."
        how = " or ".join(f"{name}()" for name in missing)
        return f"{cls.__name__} does not define {how}, which a component of this family needs in order to decide{hint}"
    return (
        _replaced(cls)
        or _half_drawing(cls)
        or _unknown_in_state(cls)
        or _wrong_word(cls, base)
        or _misfit(cls, base)
        or _lacking(cls, base)
        or _bad_default(cls)
    )


_REPLACED = {
    "needs_validation": "return Needs(validation=self.params) from needs(); the parameters extend ValidationParams",
    "probes": "name the measurements in needs(), as Needs(measurements=(Losses(),))",
    "measures_samples": "name the measurements in needs(), as Needs(measurements=(Losses(),))",
    "weighs_loss_by": 'set weighs_loss = True, and return Needs(step_losses="domains") (or reference, or measurements) '
    "from needs()",
    "learns_from_losses": 'return Needs(step_losses="domains") from needs()',
    "expected_forwards": "name the measurements in needs(), and define measured_samples() if the default is not right",
}
"""Attributes of components in earlier releases -> the current replacement."""


def _replaced(cls: type) -> str | None:
    """Return an error for an attribute of an earlier release that a class still has, or None."""
    for name, instead in _REPLACED.items():
        if hasattr(cls, name):
            return f"{cls.__name__}.{name} belongs to an earlier release and is not read; {instead}."
    return None


def _half_drawing(cls: type) -> str | None:
    """Return that an order sets ``draws`` but lacks :meth:`Order.draw`, or the reverse; otherwise None."""
    if not issubclass(cls, Order) or cls.draws != _is_inherited(cls, Order, "draw"):
        return None
    return f"{cls.__name__}.draws must be True in an order that defines draw(), and in no other."


def _unknown_in_state(cls: type[Component]) -> str | None:
    """Return an error if ``state_depends_on`` names an unknown parameter, or None."""
    for name in cls.state_depends_on:
        if name not in cls.Params.model_fields:
            return f"{cls.__name__}.state_depends_on: {unknown('parameter', name, cls.Params.model_fields)}"
    return None


def _lacking(cls: type[Component], base: type[Component]) -> str | None:
    """Return an error if the component's model lacks parameters that the base class reads, or None."""

    def own(*methods: str) -> list[bool]:
        return [not _is_inherited(cls, base, method) for method in methods]

    names: tuple[str, ...] = ()
    how = ""
    if base is Selector and not any(own("choose", "select", "pick")):
        names, how = ("rule", "temperature"), "extend dataflex.SelectorParams, or define pick() or choose()."
    elif base is Mixer and not issubclass(cls.Params, DomainParams):
        names, how = ("max_epochs_per_domain",), "extend dataflex.MixerParams."
    elif base is Mixer and not all(own("initial", "check_domains")):
        names, how = ("initial_proportions",), "extend dataflex.MixerParams, or define initial() and check_domains()."
    elif base is Weighter:
        names, how = ("normalization",), "extend dataflex.WeighterParams."
    missing = [name for name in names if name not in cls.Params.model_fields]
    if not missing:
        return None
    return f"{cls.Params.__name__} has no {' and '.join(missing)}, which {cls.__name__} needs: {how}"


def _is_inherited(cls: type, base: type, name: str) -> bool:
    """Return whether the class inherits the method of the family's base class unchanged."""
    return next(each for each in cls.__mro__ if name in vars(each)) is base


def _wrong_word(cls: type, base: type) -> str | None:
    """Return an error if a class attribute has a value that the framework does not know, or None."""
    for name, kind in {**get_type_hints(Component), **get_type_hints(base)}.items():
        (declared,) = get_args(kind) if get_origin(kind) is ClassVar else (None,)
        known = (True, False) if declared is bool else get_args(declared) if get_origin(declared) is Literal else ()
        value = next((vars(each)[name] for each in cls.__mro__ if name in vars(each)), None)
        if known and value not in known and not isinstance(value, property):
            return f"{cls.__name__}.{name} must be one of {', '.join(map(repr, known))}, got {value!r}."
    return None


_MADE_OTHERWISE: dict[str, str] = {
    "weigh": "Write def weigh(self, batch), a StepBatch with batch.losses, batch.step and more.",
}
"""Method -> how to rewrite a method that follows an earlier release."""


def _misfit(cls: type, base: type) -> str | None:
    """Return an error if a method has a signature that the framework cannot call, or None."""
    for name, original in {**vars(Component), **vars(base)}.items():
        holder = next(each for each in cls.__mro__ if name in vars(each))
        own = vars(holder)[name]
        if holder in (base, Component) or not (inspect.isfunction(original) and inspect.isfunction(own)):
            continue
        expected = inspect.signature(original)
        positional = [each for each in expected.parameters.values() if each.default is each.empty]
        try:
            inspect.signature(own).bind(*positional)
        except TypeError:
            names = ", ".join(each.name for each in positional)
            hint = f" {_MADE_OTHERWISE[name]}" if name in _MADE_OTHERWISE else ""
            return f"{cls.__name__}.{name}{_signature(own)} must take ({names}).{hint}"
    return None


def _signature(function: Any) -> str:
    return f"({', '.join(map(str, inspect.signature(function).parameters.values()))})"


def _bad_default(cls: type[Component]) -> str | None:
    """Return an error if a parameter has a default that its own validation refuses, or None."""
    for name, field in cls.Params.model_fields.items():
        if field.is_required():
            continue
        default = field.get_default(call_default_factory=True)
        constrained = Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
        try:
            TypeAdapter(constrained).validate_python(default)
        except ValidationError as error:
            return f"{cls.Params.__name__}.{name}: its default {default!r} is not valid: {error.errors()[0]['msg']}."
        except PydanticUserError:  # The type needs settings of the whole model.
            continue
    return None


def instantiate(cls: type[Component], params: ComponentParams) -> Component:
    """Return a component with the given parameters.

    Raises:
        ConfigError: if ``__init__`` fails. The message names the class, its file and the line.
    """
    file = file_of(cls)
    try:
        component = cls(params)
    except DataFlexError:
        raise
    except Exception as error:
        if file is None:  # A failing built-in class is a bug of the package, so the traceback is needed.
            raise
        said = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{cls.__name__} ({_line_in(error, file)}) cannot be constructed: {said}") from error
    if vars(component).get("params") is not params:
        raise ConfigError(f"{cls.__name__} ({place_of(cls)}): its __init__ must call super().__init__(params).")
    return component


def _line_in(error: BaseException, file: str) -> str:
    """Return ``FILE, line N`` of the last frame of an error in a file, or the file alone if no frame is in it."""
    lines = [line for frame, line in walk_tb(error.__traceback__) if frame.f_code.co_filename == file]
    return f"{file}, line {lines[-1]}" if lines else file


def failure_of_component(error: BaseException) -> str | None:
    """Return the message of an error that was raised under the code of a component that is not built in, or None.

    None means that the error comes from the framework, so that the traceback is needed.
    """
    files = {file for cls in _registered.values() if (file := file_of(cls)) is not None}
    cause: BaseException | None = error
    while cause is not None:
        frames = list(walk_tb(cause.__traceback__))
        own = [(frame, line) for frame, line in frames if frame.f_code.co_filename in files]
        if own:
            break
        cause = cause.__cause__  # For example, a StopIteration leaves a generator as the cause of another error.
    else:
        return None
    frame, line = own[-1]
    holders = [each.f_locals.get("self") for each, _ in own]
    component = next((each for each in holders if isinstance(each, Component)), None)
    who = "a plug-in" if component is None else f"{component.family} {component.name!r}"
    if isinstance(cause, DataFlexError):
        return f"{who}, in {frame.f_code.co_name} ({frame.f_code.co_filename}, line {line}): {cause}"
    text = " ".join(f"{type(cause).__name__}: {cause}".split()).rstrip(":. ")
    last, last_line = frames[-1]
    below = "" if last is frame else f" (raised in {last.f_code.co_filename}, line {last_line})"
    return f"{who} failed in {frame.f_code.co_name}, {frame.f_code.co_filename}, line {line}: {text}{below}"


def load_components(plugins: list[str], base: Path | None = None) -> None:
    """Import the built-in methods, the methods of installed packages, and the files in ``plugins``.

    Args:
        plugins: paths of Python files, relative to the working directory or to ``base``.
        base: second folder to look for a relative path in (the folder of the YAML file).

    Raises:
        ConfigError: if plug-ins do not exist, cannot be imported or register nothing. The error lists all of them.
    """
    for package in _BUILTIN_PACKAGES:
        module = importlib.import_module(f"dataflex.{package}")
        for info in pkgutil.iter_modules(module.__path__):
            importlib.import_module(f"dataflex.{package}.{info.name}")
    problems: list[Problem] = []
    for point in entry_points(group=ENTRY_POINT_GROUP):
        try:
            point.load()
        except Exception as error:  # noqa: BLE001 - whatever the code of somebody's package raises
            package = "a package" if point.dist is None else f"the package {point.dist.name}"
            said = str(error) if isinstance(error, ConfigError) else f"{type(error).__name__}: {error}"
            message = f"{package} names components by the entry point {point.name} = {point.value}, which cannot be "
            problems.append(Problem("", f"{message}loaded: {said} Repair or uninstall it."))
    for plugin in plugins:
        try:
            _load_plugin(find_plugin(plugin, base))
        except ConfigError as error:
            problems.append(Problem("plugins", str(error)))
    if problems:
        raise ConfigError(problems=problems)


def find_plugin(plugin: str, base: Path | None) -> Path:
    """Return the absolute path of a plug-in file, looked up in the working directory and in ``base``.

    Raises:
        ConfigError: if the file does not exist.
    """
    folders = list(dict.fromkeys(folder for folder in (Path.cwd(), base) if folder is not None))
    for folder in folders:
        if (folder / plugin).is_file():
            return (folder / plugin).resolve()
    others = [path.name for folder in folders if folder.is_dir() for path in folder.glob("*.py")]
    hint = did_you_mean(plugin, others) or "."
    raise ConfigError(f"no file {plugin!r} in {' or '.join(map(str, folders))}{hint}")


def _load_plugin(path: Path) -> None:
    """Import a plug-in file, and check that it registers a component or a measurement.

    Raises:
        ConfigError: if the file cannot be imported or registers nothing. Its registrations are then removed.
    """
    # The module name is a digest of the file, so that a copy in a run's record counts as the same plug-in.
    name = f"dataflex_plugin_{hashlib.sha256(path.read_bytes()).hexdigest()[:12]}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} is no Python file; its name must end in .py.")
    before, measurements = set(_registered), set(available_measurements())
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    problem = (
        "it registers no component and no measurement; put @dataflex.register(family, name) or "
        "@dataflex.register_measurement(name) before a class."
    )
    try:
        spec.loader.exec_module(module)
        if _registered.keys() - before or available_measurements().keys() - measurements:
            return
        cause: BaseException | None = None
    except ConfigError as error:
        problem, cause = str(error), error
    except SyntaxError as error:
        problem, cause = f"SyntaxError: {error.msg}.", error
    except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever the code of somebody's file raises
        problem, cause = f"importing it failed with {type(error).__name__}: {error}.", error
        if isinstance(error, ModuleNotFoundError) and error.name and (path.parent / f"{error.name}.py").is_file():
            problem += " Modules beside a plug-in are found only if PYTHONPATH names their folder."
    # A failed plug-in must leave nothing behind, neither its module nor a part of its components.
    del sys.modules[name]
    for key in _registered.keys() - before:
        del _registered[key]
    forget_measurements(available_measurements().keys() - measurements)
    place = str(path)
    if isinstance(cause, SyntaxError):
        place = f"{cause.filename}, line {cause.lineno}"
    elif cause is not None:
        place = _line_in(cause, place)
    raise ConfigError(f"{place}: {problem}") from cause


def available(family: str) -> dict[str, type[Component]]:
    """Return the registered components of a family by name, sorted."""
    return {name: cls for (kind, name), cls in sorted(_registered.items()) if kind == family}


def get(family: str, name: str) -> type[Component]:
    """Return a registered component.

    Raises:
        ConfigError: if the name is not registered. The message lists the most similar name and all known names.
    """
    if (family, name) not in _registered:
        raise ConfigError(unknown(family, name, available(family)))
    return _registered[family, name]
