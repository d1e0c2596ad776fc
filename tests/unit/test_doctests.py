"""The examples in the docstrings run, and everything that a plug-in may import has one."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import tempfile
from pathlib import Path

import pytest

import dataflex
from dataflex.api import measurement, registry

SOURCE = Path(dataflex.__file__).parent


def modules_with_examples() -> list[str]:
    """Return the names of all modules of the package whose files hold an example."""
    files = [file for file in sorted(SOURCE.rglob("*.py")) if ">>> " in file.read_text(encoding="utf-8")]
    names = [file.relative_to(SOURCE.parent).with_suffix("").parts for file in files]
    return [".".join(parts[:-1] if parts[-1] == "__init__" else parts) for parts in names]


def exported_definitions() -> list[str]:
    """Return the exported names that are classes or functions; the others are type aliases and constants."""
    names = []
    for name, module in dataflex.EXPORTS.items():
        file = SOURCE.parent.joinpath(*module.split(".")).with_suffix(".py")
        body = ast.parse(file.read_text(encoding="utf-8")).body
        if any(isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name for node in body):
            names.append(name)
    return names


@pytest.fixture
def _registries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the examples register components and measurements that other tests do not see."""
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    monkeypatch.setattr(measurement, "_registered", dict(measurement._registered))


@pytest.mark.usefixtures("_registries")
@pytest.mark.parametrize("name", modules_with_examples())
def test_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("here", "temporary"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    result = doctest.testmod(
        importlib.import_module(name), globs={"__name__": "__main__"}
    )  # imports are in the example
    assert result.attempted
    assert not result.failed
    assert not list((tmp_path / "here").iterdir())  # an example must not write into the working directory


@pytest.mark.parametrize("name", exported_definitions())
def test_every_export_has_an_example(name: str) -> None:
    text = inspect.getdoc(getattr(dataflex, name)) or ""
    examples = doctest.DocTestParser().get_examples(text)
    assert examples
    lines = [line for line in text.splitlines() if line.strip().startswith((">>> ", "... "))]
    assert 1 <= len(lines) <= 12
    assert "tests." not in "".join(example.source for example in examples)
