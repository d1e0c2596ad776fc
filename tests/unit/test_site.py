"""The documentation site: it is built without a warning, and every page has a place in its navigation."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from dataflex.api import registry

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs" / "site_hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_patterns_stand_for_the_pages_of_a_folder_that_are_not_named(hooks: ModuleType) -> None:
    pages = ["a.md", "docs/b.md", "docs/c.md", "docs/t/d.md", "docs/t/e.md"]
    nav = [{"Start": ["a.md"]}, {"Tutorials": ["docs/t/*.md"]}, {"Guides": ["docs/c.md", "docs/*.md"]}]
    tutorials = {"Tutorials": ["docs/t/d.md", "docs/t/e.md"]}
    assert hooks.expanded(nav, pages) == [{"Start": ["a.md"]}, tutorials, {"Guides": ["docs/c.md", "docs/b.md"]}]
    assert hooks.expanded(nav, pages[:3]) == [{"Start": ["a.md"]}, {"Guides": ["docs/c.md", "docs/b.md"]}]


@pytest.mark.parametrize(
    ("link", "expected"),
    [
        ("[a](api.md)", "[a](api.md)"),
        ("[a](methods)", "[a](methods/README.md)"),
        ("[a](methods/)", "[a](methods/README.md)"),
        ("[a](../src/dataflex/cli.py)", "a"),
        ("[a](../src)", "a"),
        ("[a](absent)", "[a](absent)"),
        ("[a](api.md#b)", "[a](api.md#b)"),
        ("[a](https://example.org)", "[a](https://example.org)"),
    ],
)
def test_links_lead_to_files_of_the_site(hooks: ModuleType, link: str, expected: str) -> None:
    paths = {"docs/api.md", "docs/methods/README.md"}
    assert hooks.with_links_on_the_site(f"See {link}.", Path("docs"), paths) == f"See {expected}."


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr  # warnings are errors under --strict, but not under --quiet
    assert "DataFlex" in (tmp_path / "index.html").read_text()
    assert (tmp_path / "benchmarks" / "index.html").is_file()
    assert not list((tmp_path / "docs").rglob("*.py"))
    headings = re.findall(r'<h3 id="[^"]*"><code>(.*?)</code>', (tmp_path / "docs/parameters/index.html").read_text())
    registry.load_components([])
    built_in = {
        f"{key}: {name}"
        for key, family in registry.CONFIG_KEYS.items()
        for name, cls in registry.available(family).items()
        if cls.__module__.startswith("dataflex.")
    }
    assert set(headings) == built_in
