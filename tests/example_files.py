"""Copies of the examples with a tiny model and tiny data instead of the assets, so that tests check and train them."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import tiny
from dataflex.api import measurement, registry

EXAMPLES = Path(__file__).parents[1] / "examples"
DATA_SETS = ("docs_to_code", "code_to_docs", "docs_to_code_val", "code_to_docs_val")
FILES = sorted(path for path in EXAMPLES.rglob("*") if path.is_file() and "__pycache__" not in path.parts)


def of_ours(suffix: str) -> list[str]:
    """Return the examples with this suffix, relative to their folder, without those of the paper."""
    return [path.relative_to(EXAMPLES).as_posix() for path in FILES if path.suffix == suffix and not of_paper(path)]


def of_paper(path: Path) -> bool:
    """Return whether a file belongs to ``examples/paper``, which has tests of its own."""
    return path.is_relative_to(EXAMPLES / "paper")


def copy(folder: Path, saves: Path) -> Path:
    """Copy the examples to a folder and return their new folder.

    Args:
        folder: The copies and their inputs are written here.
        saves: Folder that the runs of the copies write to, instead of ``saves/examples``.
    """
    model = tiny.make_model(folder / "model")
    data = tiny.make_data(folder / "data", dict.fromkeys(DATA_SETS, 32))
    copied = folder / "examples"
    for path in FILES:
        if of_paper(path):
            continue
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".yaml":
            text = re.sub(r"\basset:(smollm2-135m-instruct|all-minilm-l6-v2)", str(model), text)
            text = text.replace("asset:python-docs", str(data)).replace("template: smollm2", "template: default")
            text = re.sub(r"(?<= )examples/", f"{copied}/", text)
            text = re.sub(r"(?<= )saves/examples/", f"{saves}/", text)
        target = copied / path.relative_to(EXAMPLES)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    tiny.make_experts(saves / "mix" / "experts")
    vision_inputs().main(saves / "vision")
    return copied


def vision_inputs() -> ModuleType:
    """Return the module of the example that makes a vision-language model and its images."""
    spec = importlib.util.spec_from_file_location("vision_inputs", EXAMPLES / "vision" / "make_inputs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def plugins_forgotten() -> Iterator[None]:
    """Unregister the plug-ins loaded inside the block, because two files cannot register one name in one process."""
    registry.load_components([])
    before = [(where, dict(where)) for where in (registry._registered, measurement._registered)]
    for where, entries in before:  # other tests in this process may have loaded plug-ins
        where.clear()
        where.update({key: cls for key, cls in entries.items() if cls.__module__.startswith("dataflex.")})
    modules = _taken_plugins()
    try:
        yield
    finally:
        for where, entries in before:
            where.clear()
            where.update(entries)
        _taken_plugins()
        sys.modules.update(modules)


def _taken_plugins() -> dict[str, ModuleType]:
    """Remove the modules of plug-ins from the imported modules, and return them."""
    return {name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith("dataflex_plugin_")}
