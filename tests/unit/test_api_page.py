"""The exports of ``dataflex`` are all that a component needs, and each has a text on the page of the API."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import dataflex

ROOT = Path(__file__).parents[2]
FAMILIES = ("selectors", "mixers", "orders", "weighters")
FILES = sorted(path for family in FAMILIES for path in (ROOT / "src" / "dataflex" / family).glob("*.py"))


def imports_of(text: str, family: str) -> list[str]:
    """Return the modules of the package that a file imports from and that a plug-in could not."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [each.name for each in node.names if each.name.partition(".")[0] == "dataflex"]
        elif isinstance(node, ast.ImportFrom) and (node.level or str(node.module).partition(".")[0] == "dataflex"):
            if node.module == "dataflex":
                found += [each.name for each in node.names if each.name not in dataflex.__all__]
            elif not str(node.module).startswith(f"dataflex.{family}.base_"):
                found.append(f"{'.' * node.level}{node.module}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_built_in_method_imports_nothing_that_a_plug_in_could_not(path: Path) -> None:
    assert imports_of(path.read_text(encoding="utf-8"), path.parent.name) == []


def test_imports_that_a_plug_in_could_not_use_are_found() -> None:
    text = "from dataflex.mixers.base_x import a\nfrom dataflex import Mixer, cli\nimport dataflex.probe\n"
    assert imports_of(text, "mixers") == ["cli", "dataflex.probe"]
    assert imports_of("def f():\n    from dataflex.mixers.base_x import a\n", "selectors") == ["dataflex.mixers.base_x"]


def test_the_page_equals_the_docstrings() -> None:
    spec = importlib.util.spec_from_file_location("api_page", ROOT / "docs" / "api_page.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert text == module.page(), "docs/api.md is out of date: make docs"
    assert all(f"`{name}" in text for name in dataflex.EXPORTS)


def test_every_exported_name_is_there_and_torch_is_not_imported_for_them() -> None:
    assert set(dataflex.__all__) == {*dataflex.EXPORTS, "__version__"}
    code = "import dataflex, sys; assert not {'torch', 'transformers'} & set(sys.modules), 'imported'"
    subprocess.run([sys.executable, "-c", code], check=True)
    for name, module in dataflex.EXPORTS.items():
        assert getattr(dataflex, name) is getattr(importlib.import_module(module), name)
    with pytest.raises(AttributeError, match="no attribute 'Selectr'"):
        dataflex.Selectr  # noqa: B018
