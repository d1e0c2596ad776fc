"""Hooks of mkdocs: they choose the pages of the site and complete the navigation.

The site has the repository's own paths (``README.md``, ``docs/configuration.md``, ``benchmarks/README.md``). So a
relative link between two files leads to the same file on the repository's page and on the site, and no file is copied.
"""

from __future__ import annotations

import fnmatch
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PUBLISHED = (
    "*.md",
    "LICENSE",
    "docs/**/*.md",
    "docs/**/*.png",
    "docs/results.html",
    "benchmarks/README.md",
    "benchmarks/results/**/*.json",
    "examples/**/*.*",
)
"""The files of the repository that are on the site. Files that are no pages are there because pages link to them."""

PARAMETERS = "docs/parameters.md"
"""The page that is made from the models of the parameters when the site is built."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Replace the patterns in ``nav`` by the pages they stand for."""
    pages = [*(path for path in published() if path.endswith(".md")), PARAMETERS]
    assert config.nav is not None
    config.nav = expanded(config.nav, pages)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Return the files of the theme and those of the repository, under the repository's paths."""
    theme = [file for file in files if file.src_dir != config.docs_dir]
    ours = [File(path, str(ROOT), config.site_dir, config.use_directory_urls) for path in published()]
    made = File.generated(config, PARAMETERS, content=_parameters_page().page())
    return Files([*theme, *ours, made])


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Return a page whose links lead to files of the site."""
    return with_links_on_the_site(markdown, Path(page.file.src_uri).parent, set(files.src_uris))


def with_links_on_the_site(markdown: str, folder: Path, paths: set[str]) -> str:
    """Return a page whose links to files and folders of the repository work on the site, too.

    A link to a folder becomes a link to the README.md of the folder. A link to a file that is not on the site, for
    example to source code, becomes plain text. Every other link is left to the checks of mkdocs.

    Args:
        markdown: the text of the page.
        folder: the folder of the page, from the root of the repository.
        paths: the paths of all files on the site.
    """

    def replaced(match: re.Match[str]) -> str:
        text, target = match.groups()
        found = (ROOT / folder / target).resolve()
        path = found.relative_to(ROOT).as_posix() if found.is_relative_to(ROOT) else ""
        if not found.exists() or path in paths:
            return match[0]
        return f"[{text}]({target.rstrip('/')}/README.md)" if f"{path}/README.md" in paths else text

    return re.sub(r"\[([^\[\]]+)\]\(([^()#:\s]+)\)", replaced, markdown)


def published() -> list[str]:
    """Return the paths of the published files, from the root of the repository."""
    found = {path.relative_to(ROOT).as_posix() for pattern in PUBLISHED for path in ROOT.glob(pattern)}
    files = (path for path in found if (ROOT / path).is_file())
    return sorted(files, key=lambda path: (not path.endswith("README.md"), path))  # the index of a folder first


def expanded(nav: list[Any], pages: list[str]) -> list[Any]:
    """Return a navigation with pages instead of patterns; a section without a page is left out.

    Args:
        nav: the navigation of mkdocs.yml.
        pages: the paths of all pages.
    """
    named = set(_names(nav))
    free = [page for page in pages if page not in named]
    return _expanded(nav, free)


def _expanded(nav: list[Any], free: list[str]) -> list[Any]:
    found: list[Any] = []
    for entry in nav:
        if isinstance(entry, dict):
            for title, inside in entry.items():
                section = _expanded(inside if isinstance(inside, list) else [inside], free)
                found += [{title: section}] if section else []
        elif "*" in entry:
            found += [page for page in free if _matches(page, entry)]
        else:
            found.append(entry)
    return found


def _matches(page: str, pattern: str) -> bool:
    """Return whether a page is in the folder of a pattern and has a name that fits."""
    folder, _, name = pattern.rpartition("/")
    return page.rpartition("/")[0] == folder and fnmatch.fnmatch(page.rpartition("/")[2], name)


def _names(nav: Any) -> Iterator[str]:
    """Yield every text in a navigation that is a path or a pattern."""
    if isinstance(nav, str):
        yield nav
    for inside in nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else ():
        yield from _names(inside)


def _parameters_page() -> ModuleType:
    """Return the module beside this one that writes the page of the parameters."""
    spec = importlib.util.spec_from_file_location("parameters_page", Path(__file__).with_name("parameters_page.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
