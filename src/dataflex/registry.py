"""Names to components: built-in ones, entry points of installed packages, and files named in the configuration."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import TypeVar

from dataflex.components import Component, ComponentParams, Mixer, Order, Selector, Weighter
from dataflex.errors import ConfigError, unknown

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
    """Class decorator: make a component known as ``method: name`` of its family.

    Args:
        family: ``selector``, ``mixer``, ``order`` or ``weighter``.
        name: the word used in YAML, docs and reports.

    Raises:
        ConfigError: if the family is unknown, the class does not fit it, or the name is taken by another class.
    """
    if family not in FAMILIES:
        raise ConfigError(unknown("family", family, FAMILIES))

    def add(cls: ComponentType) -> ComponentType:
        if not issubclass(cls, FAMILIES[family]):
            raise ConfigError(
                f"{cls.__name__} is registered as {family} but does not extend {FAMILIES[family].__name__}."
            )
        if not (isinstance(cls.Params, type) and issubclass(cls.Params, ComponentParams)):
            raise ConfigError(f"{cls.__name__}.Params must extend dataflex.ComponentParams.")
        holder = _registered.get((family, name))
        if holder is not None and (holder.__module__, holder.__qualname__) != (
            cls.__module__,
            cls.__qualname__,
        ):
            raise ConfigError(f"{family} {name!r} is already registered by {holder.__module__}.{holder.__qualname__}.")
        cls.family, cls.name = family, name
        _registered[family, name] = cls
        return cls

    return add


def load_components(plugins: list[str], base: Path | None = None) -> None:
    """Import the built-in methods, those of installed packages, and the files in ``plugins``.

    Args:
        plugins: paths of Python files, relative to the working directory or to ``base`` (the YAML's folder).
        base: second place where a relative path is looked for.

    Raises:
        ConfigError: if a plugin file does not exist or cannot be imported.
    """
    for package in _BUILTIN_PACKAGES:
        module = importlib.import_module(f"dataflex.{package}")
        for info in pkgutil.iter_modules(module.__path__):
            importlib.import_module(f"dataflex.{package}.{info.name}")
    for point in entry_points(group=ENTRY_POINT_GROUP):
        try:
            point.load()
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(f"the entry point {point.name} = {point.value} cannot be loaded: {error}") from error
    for plugin in plugins:
        _load_plugin(find_plugin(plugin, base))


def find_plugin(plugin: str, base: Path | None) -> Path:
    """Return the absolute path of a plug-in file, from the working directory or from ``base``.

    Raises:
        ConfigError: if there is none.
    """
    folders = list(dict.fromkeys(folder for folder in (Path.cwd(), base) if folder is not None))
    for folder in folders:
        if (folder / plugin).is_file():
            return (folder / plugin).resolve()
    raise ConfigError(f"plugins: no file {plugin!r} in {' or '.join(map(str, folders))}.")


def _load_plugin(path: Path) -> None:
    # Named by its contents: the copy in a run's record is the same plug-in.
    name = f"dataflex_plugin_{hashlib.sha256(path.read_bytes()).hexdigest()[:12]}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"plugins: {path} is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except ConfigError:
        del sys.modules[name]
        raise
    except Exception as error:
        del sys.modules[name]
        raise ConfigError(f"plugins: importing {path} failed with {type(error).__name__}: {error}") from error


def available(family: str) -> dict[str, type[Component]]:
    """Return the registered components of a family by name, sorted."""
    return {name: cls for (kind, name), cls in sorted(_registered.items()) if kind == family}


def source_of(cls: type[Component]) -> str:
    """Return the file a component is defined in."""
    return str(getattr(sys.modules.get(cls.__module__), "__file__", cls.__module__))


def get(family: str, name: str) -> type[Component]:
    """Return a registered component.

    Raises:
        ConfigError: if there is none of that name; names the nearest and all known ones.
    """
    if (family, name) not in _registered:
        raise ConfigError(unknown(family, name, available(family)))
    return _registered[family, name]
